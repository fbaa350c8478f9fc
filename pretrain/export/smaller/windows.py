"""Learned spans as windows: a model that keeps, of a text that it writes, no more than its heads still look at.

Exact on every text: beyond its span and the ramp a key has a weight of 0 (docs/attention.md).
"""

from pathlib import Path

from pydantic import ValidationError

from data_pipeline.errors import ConfigError
from model.architectures.token_model import TokenModel
from model.attention.weights import AdaptiveSpan
from model.config.transformer import TransformerConfig
from pretrain.export.smaller.comparison import Shrunk, check_new, comparing, export_smaller
from pretrain.inference.trained import find_checkpoint, read_model


def take_windows(path: Path, step: int | None, folder: Path) -> Shrunk:
    """Export a checkpoint's model into a new folder, with a window for each layer in the place of what it never sees.

    Raises:
        ConfigError: the model has no spans, or a window would change it.
        CheckpointError: the folder is there already.
        RunError, DataError: as `find_checkpoint` and `evaluate_run`.
    """
    checkpoint, config = find_checkpoint(path, step)
    shape = config.model
    if not isinstance(shape, TransformerConfig) or shape.weights.kind != "adaptive_span":
        raise ConfigError(f"{path} was trained without model.weights.kind=adaptive_span: there are no spans")
    _check(shape)
    check_new(folder)
    model = read_model(checkpoint, config)
    windows = _windows(shape, model)
    smaller = config.model_copy(update={"model": _narrowed(shape, windows)})
    with comparing(checkpoint, config) as text:
        before = text.loss(model)
        measured = export_smaller(checkpoint, smaller, model.state_dict(), folder, (model, before), text)
    return Shrunk([f"windows by layer: {', '.join(f'{window:,}' for window in windows)} tokens"], *measured)


def _check(shape: TransformerConfig) -> None:
    """Raises ConfigError where a window in the place of the spans would change what the model computes."""
    if shape.pattern.kind not in ("full", "window"):
        raise ConfigError(f"model.pattern.kind={shape.pattern.kind} has no windows that spans could narrow")
    if shape.dropout_sites and shape.learned_dropout.source in ("attention", "embed"):
        raise ConfigError(
            "the attention that masks come from has the pattern of its layer, but no spans: with windows it would see "
            "less, and the masks would be others; train with model.learned_dropout.enabled=false, or "
            "source=low_rank or elementwise"
        )
    _narrowed(shape, [1] * shape.layers)


def _narrowed(shape: TransformerConfig, windows: list[int]) -> TransformerConfig:
    """With a window for each layer. Raises ConfigError where the architecture has none."""
    seen = shape.pattern
    pattern = {"kind": "window", "windows": windows, "sinks": seen.sinks, "globals": seen.globals}
    try:
        return type(shape).model_validate(shape.model_dump() | {"pattern": pattern})
    except ValidationError as error:
        raise ConfigError(f"--spans: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _windows(shape: TransformerConfig, model: TokenModel) -> list[int]:
    """Of each layer of any stream: what its widest head sees, or its own window where that is narrower."""
    found = [1] * shape.layers
    for module in model.modules():
        if isinstance(module, AdaptiveSpan):
            layer = int(module.name.rpartition("/")[2])
            found[layer] = max(found[layer], module.reach())
    own = [shape.pattern.of_layer(layer, shape.context)[0] for layer in range(shape.layers)]
    return [min(reach, pattern.window or reach, shape.context) for reach, pattern in zip(found, own, strict=True)]
