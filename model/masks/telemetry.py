"""What is told about masks and streams beside their penalties."""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.attention.means import by_channel, mean, without_padding
from model.attention.visibility import CAUSAL, Visible

KEPT = "kept"
MOMENTS = "_moments"


def mask_statistics(mask: Tensor, kept: Tensor, visible: Visible = CAUSAL) -> dict[str, Tensor]:
    """Of the elements of one mask in one micro-batch, padding left out.

    Args:
        mask: [B, T, C] in [0, 1], before rounding, without gradient.
        kept: [B, T, C], true or 1 at the elements that the rounding let through.
        visible: says where padding is.

    Returns:
        0-d float32: `density`, the share kept; `mask_mean`; `mask_near_zero` and `mask_near_one`, the shares of
        m < 0.1 and of m > 0.9. And `kept`, float64 [C + 1]: how many positions kept each channel, and how many there
        are.
    """
    # Comparisons in place, and so as numbers: torch takes four times as long where truth values are written.
    passed = kept.float()
    holds = torch.ones_like(passed[..., :1])
    counts = torch.cat([without_padding(x, visible).flatten(0, 1).sum(0) for x in (passed, holds)])
    return {
        "density": mean(passed, visible),
        "mask_mean": mean(mask, visible),
        "mask_near_zero": mean(mask.clone().lt_(0.1), visible),
        "mask_near_one": mean(mask.clone().gt_(0.9), visible),
        KEPT: counts.double(),
    }


def moments(x: Tensor, visible: Visible) -> Tensor:
    """Of vectors [B, T, C], padding left out: the mean of each channel and the mean of all squares, float64 [C + 1]."""
    x = x.detach().float()
    return torch.cat([by_channel(x, visible), mean(x.square(), visible)[None]]).double()


def told(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is told of a step, from what the model gives, averaged over the step's micro-batches.

    Numbers stay as they are, in any shape [...]. Moments [..., C + 1] become numbers [...]:

    - of each mask `always_on/…` and `always_off/…`, the channels that every position of the step kept, or none, and
      their means over the masks;
    - `…_std`, the standard deviation over all elements, and `…_spread`, that over tokens (root mean square over
      channels).
    """
    numbers: dict[str, Tensor] = {}
    for name, values in means.items():
        kind, _, mask = name.partition("/")
        if kind == KEPT:
            kept, positions = values[..., :-1], values[..., -1:]
            numbers[f"always_on/{mask}"] = (kept == positions).sum(-1).to(values.dtype)
            numbers[f"always_off/{mask}"] = (kept == 0).sum(-1).to(values.dtype)
        elif name.endswith(MOMENTS):
            what, channels, squares = name.removesuffix(MOMENTS), values[..., :-1], values[..., -1]
            numbers[f"{what}_std"] = (squares - channels.mean(-1).square()).clamp(min=0).sqrt()
            numbers[f"{what}_spread"] = (squares - channels.square().mean(-1)).clamp(min=0).sqrt()
        else:
            numbers[name] = values
    for kind in ("always_on", "always_off"):
        if found := [values for name, values in numbers.items() if name.startswith(f"{kind}/")]:
            numbers[kind] = torch.stack(found).mean(0)
    return numbers
