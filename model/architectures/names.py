"""Names of a model's parameters, and what they were called before architectures had a part of their own."""

_OUTER = {
    "token_embed",
    "position_embed",
    "embed_dropout",
    "final_norm",
    "mask_source",
    "target_dropout",
    "draft_dropout",
    "head",
    "backbone",
}
"""What stands beside the backbone."""


def current_name(old: str) -> str:
    """The name today of a parameter or buffer: `encoder.0.ff.up.weight` is now the backbone's."""
    return old if old.partition(".")[0] in _OUTER else f"backbone.{old}"


def former_name(name: str) -> str:
    """What a parameter or buffer was called then."""
    return name.removeprefix("backbone.")
