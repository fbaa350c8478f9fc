"""What is told about a mask beside its penalties."""

from torch import Tensor


def mask_statistics(mask: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Of the elements of one mask in one micro-batch.

    Args:
        mask: [B, T, C] in [0, 1], before rounding, without gradient.
        kept: [B, T, C] bool: which elements the rounding let through.

    Returns:
        0-d float32: `density`, the share kept; `mask_mean`; `mask_near_zero` and `mask_near_one`, the shares of
        m < 0.1 and of m > 0.9; `always_on` and `always_off`, the channels that every position kept, or none.
    """
    per_channel = kept.float().flatten(0, -2).sum(0)
    positions = kept.numel() // kept.shape[-1]
    return {
        "density": per_channel.sum() / kept.numel(),
        "mask_mean": mask.mean(),
        "mask_near_zero": (mask < 0.1).float().mean(),
        "mask_near_one": (mask > 0.9).float().mean(),
        "always_on": (per_channel == positions).sum().float(),
        "always_off": (per_channel == 0).sum().float(),
    }
