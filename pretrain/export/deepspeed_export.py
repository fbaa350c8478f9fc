"""A checkpoint in DeepSpeed's own layout. Duet does not read it."""

from pathlib import Path

from data_pipeline.errors import CheckpointError, ConfigError
from data_pipeline.files.atomic import write_atomic
from model.architectures import registry
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.engine.distributed import join
from pretrain.engine.engine import Engine
from pretrain.export.portable import new_folder
from pretrain.inference.trained import saved_config

NOTE = """An export of Duet's checkpoint {source}
in DeepSpeed's own layout, as of one rank at ZeRO stage {stage}. Duet does not read this folder.
The files are pickles: let nobody load one that does not trust whoever made it.
"""
_REFUSED = ("iostream error", "unexpected pos", "failed writing file", "file write failed")
"""How torch.save says that a file could not be written; what the system said is lost by then."""


def export_deepspeed(checkpoint: Checkpoint, folder: Path) -> None:
    """Load a checkpoint into an engine on this process alone, and let DeepSpeed save it into a new folder.

    Its hashes are not compared here.
    Stage and precision are the run's; from stage 1 on, DeepSpeed's own tools apply to the folder (`zero_to_fp32`).
    Moments that the run keeps in 8 bits are exported in fp32.

    Raises:
        CheckpointError: the manifest does not hold the run's configuration, the folder is there already, or the disk
            refuses; nothing of it is left then.
    """
    config = saved_config(checkpoint)
    if config.finetune.kind == "lora":
        raise ConfigError(f"{checkpoint.path} holds adapters, which DeepSpeed does not know; export with --to")
    if config.optimizer.kind == "adamw8bit":
        optimizer = config.optimizer.model_copy(update={"kind": "adamw"})
        config = config.model_copy(update={"optimizer": optimizer})
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already; name a new folder")
    with join(config.engine.timeout_minutes) as ranks:
        engine = Engine(registry.build(config.model), config, ranks)
        checkpoint.load(engine)
        with new_folder(folder) as new:
            try:
                engine.export_deepspeed(new)
            except RuntimeError as error:
                if not any(words in str(error) for words in _REFUSED):
                    raise
                raise CheckpointError(f"{folder}: the disk refuses what torch writes ({error}); make room") from error
            write_atomic(new / "EXPORT.txt", NOTE.format(source=checkpoint.path, stage=engine.stage))
