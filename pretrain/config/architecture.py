"""The source of an architecture that is not ours: kept with a run and with an export, and run from there."""

from pathlib import Path

from data_pipeline.files.atomic import write_atomic
from model.architectures import external
from model.architectures.external import FOLDER, Recorded
from model.config.model_config import ModelConfig
from pretrain.config.schema import Config


def opened(config: Config, folder: Path) -> Config:
    """The configuration of a run with the class of its model; the source that is run has the hash that is recorded.

    Args:
        folder: that of the run, where a copy of the source lies.

    Raises:
        ConfigError: the source is not there any more.
    """
    if not isinstance(config.model, Recorded):
        return config
    return Config.model_validate(config.model_dump() | {"model": external.open_recorded(config.model, [folder])})


def keep(model: ModelConfig, folder: Path) -> None:
    """Write the source that a model's class was loaded from into the folder of a run or an export, if it is not ours.

    Raises:
        OSError: it cannot be written.
    """
    if (found := external.source(model)) is None:
        return
    name, content = found
    file = folder / FOLDER / name
    if not (file.is_file() and file.read_bytes() == content):
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, content)
