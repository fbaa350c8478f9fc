"""Cross entropy of a tied head, by chunks of tokens: the logits [B T, V] are never held as a whole (docs/model.md A4).

At small C they are the largest tensor of a step by far.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.batch import IGNORE
from model.layers.chunks import chunk_tokens


class TokenLoss(NamedTuple):
    """Means over the labels that are not IGNORE; 0 when there is none. 0-d, float32 at least."""

    loss: Tensor
    """What training lowers: smoothed cross entropy plus the weighted z-loss."""
    cross_entropy: Tensor
    """In nats, with neither; without gradient."""
    z_loss: Tensor
    """Mean of log² Z without its weight; without gradient."""
    by_token: Tensor | None = None
    """[B, T]: cross entropy of each label, 0 where it is IGNORE; None while gradients are recorded."""
    chosen: Tensor | None = None
    """As in `model.batch.ModelOutput`."""


def token_loss(
    x: Tensor, table: Tensor, labels: Tensor, smoothing: float, z_weight: float, count: Tensor | None = None
) -> TokenLoss:
    """Loss of the logits x · table^T against the labels.

    With p = softmax(logits), Z = sum of exp(logits) and smoothing ε it is, for each token,

        -(1 - ε) log p[label] - ε/V · sum of log p + z_weight · log² Z

    Label smoothing: "Rethinking the Inception Architecture" (Szegedy et al. 2016, arXiv:1512.00567), section 7.
    z-loss: PaLM (arXiv:2204.02311), section 5.

    Args:
        x: [B, T, C].
        table: [V, C], of x's type.
        labels: [B, T] int64.
        smoothing: in [0, 1).
        z_weight: at least 0.
        count: 0-d, what the sums are divided by; the number of labels that are not IGNORE unless given.
    """
    chunk = chunk_tokens(labels.numel(), *table.shape)
    loss, cross_entropy, z_loss, by_token = _ChunkedLoss.apply(
        x.flatten(0, -2), table, labels.flatten(), smoothing, z_weight, chunk, torch.is_grad_enabled()
    )
    count = (labels != IGNORE).sum().clamp(min=1) if count is None else count.to(loss.dtype)
    by_token = None if by_token is None else by_token.view_as(labels)
    return TokenLoss(loss / count, cross_entropy / count, z_loss / count, by_token)


class _ChunkedLoss(torch.autograd.Function):
    """Sums over tokens. The gradients are made beside the loss, while a chunk's logits are there.

    The backward pass only scales them: so logits are computed once, and a table that ZeRO-3 has partitioned is needed
    in the forward pass alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, table: Tensor, labels: Tensor, smoothing: float, z_weight: float, chunk: int, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [N, C], table [V, C], labels [N] -> three 0-d sums and the last [N], as in `TokenLoss`."""
        exact = torch.promote_types(x.dtype, torch.float32)
        grad_x = torch.empty_like(x) if grad else None
        grad_table = None
        by_token = None if grad else torch.empty(len(x), dtype=exact, device=x.device)
        sums = torch.zeros(3, dtype=exact, device=x.device)
        for start in range(0, len(x), chunk):
            part, label = x[start : start + chunk], labels[start : start + chunk]
            counts = (label != IGNORE).to(exact)
            chosen = label.clamp(min=0)[:, None]
            logits = (part @ table.T).to(exact)
            picked = logits.gather(1, chosen)[:, 0]
            spread = logits.mean(1) if smoothing else picked
            # From here on the same memory holds exp(logits - largest), then the gradient.
            largest = logits.amax(1, keepdim=True)
            scores = logits.sub_(largest).exp_()
            total = scores.sum(1)
            log_z = total.log() + largest[:, 0]
            squared = log_z.square()
            loss = log_z - (1.0 - smoothing) * picked - smoothing * spread + z_weight * squared
            counted = torch.stack([loss, log_z - picked, squared]) * counts
            sums += counted.sum(1)
            if by_token is not None:
                by_token[start : start + chunk] = counted[1]
            if grad_x is None:
                continue
            scores *= ((1.0 + 2.0 * z_weight * log_z) * counts / total)[:, None]
            if smoothing:
                scores -= (smoothing / len(table) * counts)[:, None]
            scores.scatter_add_(1, chosen, (smoothing - 1.0) * counts[:, None])
            down = scores.to(x.dtype)
            torch.mm(down, table, out=grad_x[start : start + chunk])
            if not ctx.needs_input_grad[1]:  # a table that stays
                continue
            if grad_table is None:
                grad_table = (down.T @ part).to(x.dtype if chunk >= len(x) else exact)
            elif exact == x.dtype:
                grad_table.addmm_(down.T, part)
            else:
                grad_table += down.T @ part
        ctx.save_for_backward(grad_x, grad_table)
        loss_sum, nll, z = sums.unbind()
        nll, z = nll.clone(), z.clone()
        ctx.mark_non_differentiable(nll, z)
        return loss_sum.clone(), nll, z, by_token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass has kept."""
        grad_x, grad_table = ctx.saved_tensors
        of_table = None if grad_table is None else (grad_table * grad_loss).to(grad_x.dtype)
        ours = (grad_x * grad_loss).to(grad_x.dtype), of_table
        return *ours, None, None, None, None, None
