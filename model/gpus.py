"""What GPUs hold and can do. Free of torch."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """A board, from its data sheet."""

    chip: str
    """Part of the name that CUDA gives it."""
    memory_gb: int
    """In 10^9 bytes; CUDA reports a few per cent more, which leave room for its context and for fragments."""
    peak_flops: float
    """Dense bf16 FLOP/s, without sparsity."""
    source: str


GPUS = {
    "a100-40gb": Gpu("A100", 40, 312e12, "NVIDIA A100 data sheet"),
    "a100": Gpu("A100", 80, 312e12, "NVIDIA A100 data sheet"),
    "h100": Gpu("H100", 80, 989e12, "NVIDIA H100 data sheet, SXM"),
    "h200": Gpu("H200", 141, 989e12, "NVIDIA H200 data sheet, SXM"),
}
"""By the name that `duet plan --gpu` takes."""
_OTHER_BOARDS = ("H100 PCIe", "H100 NVL", "H200 NVL", "MIG")


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name CUDA gives it; None for one that is not known here."""
    if any(board in device_name for board in _OTHER_BOARDS):
        return None
    return next((gpu.peak_flops for gpu in GPUS.values() if gpu.chip in device_name), None)
