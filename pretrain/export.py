"""A checkpoint in the layout of other programs. Duet does not read what it exports."""

from pathlib import Path

from pydantic import ValidationError

from data_pipeline.atomic import disk_errors, write_atomic
from data_pipeline.errors import CheckpointError
from model import registry
from pretrain.checkpoint import Checkpoint
from pretrain.config import Config
from pretrain.distributed import join
from pretrain.engine import Engine

NOTE = """An export of Duet's checkpoint {source}
in DeepSpeed's own layout, as of one rank at ZeRO stage {stage}. Duet does not read this folder.
The files are pickles: let nobody load one that does not trust whoever made it.
"""


def export_deepspeed(checkpoint: Checkpoint, folder: Path) -> None:
    """Load a checkpoint into an engine on this process alone, and let DeepSpeed save it into a new folder.

    Stage and precision are the run's; from stage 1 on, DeepSpeed's own tools apply to the folder (`zero_to_fp32`).
    Moments that the run keeps in 8 bits are exported in fp32.

    Raises:
        CheckpointError: the manifest does not hold the run's configuration, or the folder is there already.
    """
    try:
        config = Config.model_validate(checkpoint.manifest.state["config"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"{checkpoint.path}: the manifest does not hold the configuration: {error!r}") from None
    if config.optimizer.kind == "adamw8bit":
        optimizer = config.optimizer.model_copy(update={"kind": "adamw"})
        config = config.model_copy(update={"optimizer": optimizer})
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already; name a new folder")
    checkpoint.verify()
    with join(config.engine.timeout_minutes) as ranks, disk_errors(folder, CheckpointError):
        engine = Engine(registry.build(config.model), config, ranks)
        checkpoint.load(engine)
        folder.mkdir(parents=True)
        engine.export_deepspeed(folder)
        write_atomic(folder / "EXPORT.txt", NOTE.format(source=checkpoint.path, stage=engine.stage))
