"""A trained model with another value of what may change in use: `duet eval --set`, `duet generate --set`."""

from collections.abc import Sequence

import torch

from data_pipeline.errors import ConfigError
from model.architectures import registry
from model.architectures.token_model import TokenModel
from pretrain.config.changes import in_use


def used_with(model: TokenModel, assignments: Sequence[str]) -> TokenModel:
    """The same weights in a model with other values, of `KEY=VALUE`s; the model itself where there are none.

    Raises:
        ConfigError: as `in_use`; or the trained weights are not those of such a model.
    """
    if not assignments:
        return model
    config = in_use(model.config, assignments)
    with torch.device("meta"):
        other = registry.build(config)
    held, wanted = model.state_dict(), other.state_dict()
    if {name: values.shape for name, values in held.items()} != {name: v.shape for name, v in wanted.items()}:
        raise ConfigError(f"--set {' '.join(assignments)}: a model with that has other weights than the trained one")
    other.load_state_dict(held, assign=True)
    return other.train(model.training)
