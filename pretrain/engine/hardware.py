"""What a configuration asks of the hardware, and cannot know by itself."""

import torch

from data_pipeline.errors import ConfigError
from pretrain.config.schema import Config


def check_hardware(config: Config, world_size: int, device: torch.device) -> None:
    """Whether ranks on devices of this kind can do it.

    Raises:
        ConfigError: names the key, the reason and the way on.
    """
    engine = config.engine
    if engine.precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"engine.precision=fp16 needs CUDA; on {device.type} use engine.precision=bf16 or fp32")
    if engine.hpz_partition_size > 1 and device.type != "cuda":
        raise ConfigError(
            f"engine.hpz_partition_size={engine.hpz_partition_size} needs CUDA; on {device.type} leave it out"
        )
    if world_size % engine.hpz_partition_size:
        raise ConfigError(
            f"engine.hpz_partition_size={engine.hpz_partition_size} does not divide the {world_size} ranks; "
            "use the number of ranks of a node"
        )
