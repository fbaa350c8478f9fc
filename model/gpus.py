"""What GPUs hold and can do. Free of torch."""

import difflib
import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """A board, from its maker's data sheet."""

    chip: str
    """Words of the name that CUDA gives it."""
    memory_gb: int
    """In 10^9 bytes; CUDA reports a few per cent more, which leave room for its context and for fragments."""
    peak_flops: float
    """Dense bf16 FLOP/s, summed in fp32, without sparsity."""


GPUS = {
    "a10": Gpu("A10", 24, 125e12),
    "a10g": Gpu("A10G", 24, 70e12),
    "a30": Gpu("A30", 24, 165e12),
    "a40": Gpu("A40", 48, 149.7e12),
    "a100-40gb": Gpu("A100", 40, 312e12),
    "a100": Gpu("A100", 80, 312e12),
    "a800": Gpu("A800", 80, 312e12),
    "l4": Gpu("L4", 24, 121e12),
    "l40": Gpu("L40", 48, 181e12),
    "l40s": Gpu("L40S", 48, 362e12),
    "h20": Gpu("H20", 96, 148e12),
    "h100": Gpu("H100", 80, 989e12),
    "h100-pcie": Gpu("H100 PCIe", 80, 756e12),
    "h100-nvl": Gpu("H100 NVL", 94, 835e12),
    "h800": Gpu("H800", 80, 989e12),
    "h200": Gpu("H200", 141, 989e12),
    "h200-nvl": Gpu("H200 NVL", 141, 835e12),
    "gh200": Gpu("GH200", 96, 989e12),
    "b200": Gpu("B200", 180, 2250e12),
    "gb200": Gpu("GB200", 186, 2500e12),
    "rtx3090": Gpu("RTX 3090", 24, 71e12),
    "rtx4090": Gpu("RTX 4090", 24, 165.2e12),
    "rtx5090": Gpu("RTX 5090", 32, 209.5e12),
    "rtx-a6000": Gpu("RTX A6000", 48, 154.8e12),
    "rtx6000-ada": Gpu("RTX 6000 Ada", 48, 364.2e12),
    "mi210": Gpu("MI210", 64, 181e12),
    "mi300x": Gpu("MI300X", 192, 1307e12),
    "mi325x": Gpu("MI325X", 256, 1307e12),
}
"""By the name that `duet plan --gpu` takes."""
_OTHER_BOARDS = re.compile(r"\b(MIG|Laptop|Max-Q|4090 D|H800 PCIe|A800 40GB|3090 Ti)\b")
_MAKERS = re.compile("nvidia|geforce|tesla|amd|instinct")


def find(name: str) -> Gpu | None:
    """The board of a name in any case and spelling, such as `RTX 4090`, `A100-80GB` or `NVIDIA L4`."""
    return _BY_SPELLING.get(_spelling(name))


def near(name: str) -> list[str]:
    """At most three names of GPUS like this one."""
    return difflib.get_close_matches(name.lower(), GPUS, n=3)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name CUDA gives it; None for one that is not known here."""
    if _OTHER_BOARDS.search(device_name):
        return None
    found = [gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.chip}\b", device_name)]
    return max(found, key=lambda gpu: len(gpu.chip)).peak_flops if found else None


def _spelling(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _MAKERS.sub("", name.lower()))


_BY_SPELLING = {_spelling(f"{name}{size}"): gpu for name, gpu in GPUS.items() for size in ("", f"{gpu.memory_gb}gb")}
