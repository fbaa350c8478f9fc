"""A smaller file: weights in bf16, or linear maps in int8, beside the model in fp32 that was trained."""

from pathlib import Path
from typing import Literal

from data_pipeline.errors import ConfigError
from model.layers.int8 import in_int8, restored
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.config.schema import Config
from pretrain.export.layouts import Name
from pretrain.export.portable import DTYPES, write_export
from pretrain.export.smaller.comparison import Shrunk, check_new, comparing, size_of
from pretrain.export.standard import check_layout, write_standard
from pretrain.finetune.lora import linear_maps
from pretrain.inference.trained import read_model


def round_weights(
    checkpoint: Checkpoint, config: Config, folder: Path, dtype: Literal["bf16", "int8"], layout: Name | None = None
) -> Shrunk:
    """Export a checkpoint's model with weights of fewer bits into a new folder, ours or in a layout that others know.

    It is measured as transformers runs it: in bf16 all is computed in bf16; weights in int8 are read into fp32.

    Raises:
        ConfigError: no linear map could be in int8; the model does not fit the layout.
        CheckpointError: the folder is there already.
        RunError, DataError: as `evaluate_run`.
    """
    if layout:
        check_layout(config, layout)
    check_new(folder)
    model, other = (read_model(checkpoint, config) for _ in range(2))
    maps = [name for name, (_, of_mask) in linear_maps(model) if not of_mask]
    if dtype == "bf16":
        tensors, how = other.to(DTYPES[dtype]).state_dict(), "all is computed in bf16"
    elif maps:
        tensors, how = in_int8(model.state_dict(), maps), f"{len(maps)} linear maps, which are read into fp32"
        other.load_state_dict(restored(tensors))
    else:
        raise ConfigError(f"model.architecture={config.model.architecture} has no linear maps for int8")
    with comparing(checkpoint, config) as text:
        measured = text.compared(model, text.loss(model), other, size_of(tensors))
    loss = measured[1].loss
    if layout:
        write_standard(checkpoint, config, folder, layout, dtype, loss)
    else:
        write_export(checkpoint, config, folder, dtype, loss=loss)
    return Shrunk([f"{dtype}: {how}"], *measured)
