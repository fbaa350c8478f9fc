"""What a configuration asks of the hardware, and cannot know by itself."""

import ctypes
import os

import torch

from data_pipeline.errors import ConfigError
from pretrain.config.schema import Config

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_INT_MAX = 2**31 - 1


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


def keep_freed_memory(device: torch.device) -> None:
    """Have a process that trains on a CPU keep the memory that tensors leave, for the next ones.

    glibc gives large blocks back to the system and asks for them anew, which zeroes them page by page: up to a tenth of
    a step on a CPU (benchmarks/masks.md). Where another C library serves, or MALLOC_TRIM_THRESHOLD_ is set, nothing
    happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and device.type == "cpu" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _INT_MAX)
        mallopt(_M_TRIM_THRESHOLD, _INT_MAX)
