"""Means over the positions of a batch, to which padding adds nothing."""

from torch import Tensor

from model.attention.visibility import Visible


def mean(x: Tensor, visible: Visible) -> Tensor:
    """Mean of x [B, T, ...] over all that stands at a position with a token -> 0-d.

    Without padding every micro-batch has as many positions, and the plain mean is as good; with padding the sum is
    divided by `visible.num_tokens`, so that the mean over micro-batches is that over all tokens.
    """
    if visible.padding is None:
        return x.mean()
    return by_channel(x.reshape(*x.shape[:2], -1), visible).mean()


def by_channel(x: Tensor, visible: Visible) -> Tensor:
    """The same of x [B, T, C], for each channel: [C]."""
    if visible.padding is None:
        return x.mean(dim=(0, 1))
    count = (~visible.padding).sum().clamp(min=1) if visible.num_tokens is None else visible.num_tokens
    return without_padding(x, visible).sum(dim=(0, 1)) / count.to(x.dtype)


def without_padding(x: Tensor, visible: Visible) -> Tensor:
    """x [B, T, C] with 0 where there is no token."""
    return x if visible.padding is None else x.masked_fill(visible.padding[..., None], 0)
