"""A trained model validated with several values of a key that may change in use: what it gains by more of something."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError
from data_pipeline.files.atomic import disk_errors, write_atomic
from pretrain.export.use import validating
from pretrain.inference.in_use import used_with
from pretrain.inference.trained import find_checkpoint, read_model
from pretrain.report.sweep import loss_by_value


def sweep(run: Path, step: int | None, changes: Sequence[str], plot: Path | None = None) -> dict[str, dict[str, float]]:
    """Validation metrics of a checkpoint by `KEY=VALUE`, for each value of the last of the changes.

    Args:
        changes: `KEY=VALUE` each, the last one `KEY=A,B,…`; see `used_with`.
        plot: where the picture of the loss against the values goes, a PNG.

    Raises:
        UserError: as `evaluate_run` and `used_with`; or the picture cannot be written.
    """
    key, _, values = changes[-1].partition("=")
    if more := [change for change in changes[:-1] if "," in change]:
        raise ConfigError(f"--set {more[0]}: several values are for the last --set, whose loss is compared")
    if plot and (plot.suffix.lower() != ".png" or not plot.parent.is_dir()):  # said before the work, not behind it
        raise ConfigError(f"--plot {plot}: name a file that ends in .png, in a folder that is there")
    checkpoint, config = find_checkpoint(run, step)
    trained = read_model(checkpoint, config)
    each = [f"{key}={value}" for value in dict.fromkeys(values.split(","))]
    models = [used_with(trained, [*changes[:-1], change]) for change in each]  # all are possible before one is tried
    with validating(checkpoint, config) as validate:
        found = {change: validate(model) for change, model in zip(each, models, strict=True)}
    if plot:
        by_value = {change.partition("=")[2]: metrics for change, metrics in found.items()}
        value: Any = config.model
        for name in key.split(".")[1:]:
            value = getattr(value, name)
        with disk_errors(plot, ConfigError):
            write_atomic(plot, loss_by_value(key, by_value, str(value)))
    return found
