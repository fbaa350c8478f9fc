"""What a model's parameters are spent on, part by part."""

from collections import Counter

import torch

from model.architectures import registry
from model.config.model_config import ModelConfig

_TOP = {
    "token_embed": "token table",
    "position_embed": "position table",
    "embed_dropout": "masks",
    "target_dropout": "masks",
    "decoder_input_norm": "norms",
    "final_norm": "norms",
    "output_norm": "norms",
}
"""Parts outside the layers; others have the module's name."""
_LAYER = {"attention": "attention", "cross_attention": "cross attention", "ff": "feed forward"}


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of each part; nothing is allocated.

    The token table, which is also the head, counts once. Norms, and masks with their gates, are one part each wherever
    they stand.

    Raises:
        ConfigError: `vocab_size` is not known yet.
    """
    with torch.device("meta"):
        model = registry.build(config)
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        found[_part(name.split("."))] += parameter.numel()
    return dict(found)


def _part(path: list[str]) -> str:
    """Of a parameter's name: `encoder.3.ff.up.weight` is `encoder: feed forward`."""
    if not path[1].isdigit():
        return _TOP.get(path[0], path[0].replace("_", " "))
    module = path[2]
    if module.endswith("_norm"):
        return "norms"
    return "masks" if module.endswith("_dropout") else f"{path[0]}: {_LAYER[module]}"
