"""What is trained of a model where adapters are (LoRA): counted on the model itself, on torch's meta device."""

from functools import lru_cache
from typing import NamedTuple

from data_pipeline.errors import ConfigError
from pretrain.config.schema import Config


class Adapters(NamedTuple):
    """Of a model."""

    parameters: int
    """Of all adapters, (inputs + outputs) r for each; and of a head of labels, which is trained beside them."""
    maps: int
    """Linear maps that have one."""


def adapters_of(config: Config) -> Adapters | None:
    """None where all is trained.

    Raises:
        ConfigError: torch is not installed here; the vocabulary is not known; no map is called as a target.
    """
    if config.finetune.kind != "lora":
        return None
    return _count(_Key(config))


class _Key:
    """A configuration as a key: equal where its model and its adapters are."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._text = config.model.model_dump_json() + config.finetune.model_dump_json()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=64)
def _count(key: _Key) -> Adapters:
    try:
        import torch

        from model.architectures import registry
        from model.architectures.encoder_only.labels import HEAD
        from pretrain.finetune.lora import check_targets, is_adapted, linear_maps
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError("finetune.kind=lora is counted with torch, which is not here; ask where it is") from None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = registry.build(key.config.model)
    check_targets(model, key.config.finetune)
    maps = linear_maps(model)
    adapted = [base for name, (base, of_mask) in maps if is_adapted(name, of_mask, key.config.finetune)]
    sizes = sum(base.in_features + base.out_features for base in adapted)
    head = sum(values.numel() for name, values in model.named_parameters() if name.startswith(HEAD))
    return Adapters(sizes * key.config.finetune.rank + head, len(adapted))
