"""alpha-entmax: as a softmax, but scores far enough below the largest get exactly nothing.

p_i = [(alpha - 1) z_i - tau]_+ ^ (1 / (alpha - 1)) with tau such that the sum is 1: Peters, Niculae and Martins 2019
(arXiv:1905.05702), equation 5, whose gradient it has; that of alpha is of Correia, Niculae and Martins 2019
(arXiv:1909.00015), proposition 1. alpha = 1 is the softmax, 2 sparsemax.
"""

from typing import Any

import torch
from torch import Tensor

STEPS = 12
"""Of Newton's method; 9 were enough for every row that was tried, of up to 4,096 scores, to 1e-7."""
SMALLEST = 1.01
"""Of alpha: the gradient divides by (alpha - 1) squared, and a softmax differs by 0.02 at most."""


def entmax(scores: Tensor, alpha: Tensor | float) -> Tensor:
    """Weights over the last dimension of scores [..., T], fp32 at least; each row has one that is not -inf.

    Args:
        alpha: in [1.01, 2], of a shape that broadcasts to [..., 1]; a number has no gradient.
    """
    found: Tensor = _Entmax.apply(scores, alpha)
    return found


class _Entmax(torch.autograd.Function):
    """Keeps nothing but what it gives, and alpha."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Tensor | float) -> Tensor:
        below = alpha - 1.0
        # tau is -1 at least, so what is lower counts for nothing, however much.
        x = ((scores - scores.amax(-1, keepdim=True)) * below).clamp(min=-2.0)
        weights = (x - _tau(x, below)).clamp(min=0.0) ** (1.0 / below)
        weights = weights / weights.sum(-1, keepdim=True)
        ctx.alpha = None if isinstance(alpha, Tensor) else alpha
        ctx.save_for_backward(*(weights, alpha) if isinstance(alpha, Tensor) else (weights,))
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        weights, *given = ctx.saved_tensors
        alpha = given[0] if given else ctx.alpha
        slope = torch.where(weights > 0, weights ** (2.0 - alpha), 0.0)
        total = slope.sum(-1, keepdim=True)
        of_scores = slope * (gradient - (gradient * slope).sum(-1, keepdim=True) / total)
        if not ctx.needs_input_grad[1]:
            return of_scores, None
        share, below = slope / total, alpha - 1.0
        nats = torch.special.xlogy(weights, weights)
        of_alpha = (weights - share) / below**2 - (nats - share * nats.sum(-1, keepdim=True)) / below
        return of_scores, (gradient * of_alpha).sum(-1, keepdim=True).sum_to_size(alpha.shape)


def _tau(x: Tensor, below: Tensor | float) -> Tensor:
    """Where the norm of [x - tau]_+ of the order 1 / (alpha - 1) is 1, for x with a maximum of 0.

    The norm falls and is convex in tau. So Newton's method rises from -1, where the largest alone has a norm of 1, and
    never passes the place; the norm is nearly straight, so that it is there after a few steps.
    """
    tau = torch.full_like(x[..., :1], -1.0)
    for _ in range(STEPS):
        left = (x - tau).clamp(min=0.0)
        powers = torch.where(left > 0, left ** (1.0 / below - 1.0), 0.0)
        total = (powers * left).sum(-1, keepdim=True)
        tau = tau + (total - total ** (1.0 - below)) / powers.sum(-1, keepdim=True)
    return tau
