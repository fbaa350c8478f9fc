"""BatchNorm for encoders that see both ways (docs/model.md A8)."""

import torch
from torch import Tensor, nn

EPS = 1e-5
MOMENTUM = 0.1
"""Weight of a micro-batch in the running statistics, from the tenth on."""


class BatchNorm(nn.Module):
    """Each channel less its mean, over its standard deviation, times a gain (Ioffe and Szegedy 2015, arXiv:1502.03167).

    In training both are those of the micro-batch, over all rows and positions but padding; in evaluation running means
    of them, which are buffers with torch's names. Statistics are in fp32 at least. The first ten micro-batches weigh
    alike in the running means, so that evaluation can be trusted from the first step on.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int, *, bias: bool) -> None:
        """Over `width` channels; with a bias [C] beside the gain [C] where the model has biases."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, training: bool, padding: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C].

        Args:
            training: normalise by the micro-batch, and let it into the running means.
            padding: [B, T] bool, True where a position counts for nothing.
        """
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = self._of_batch(exact, padding) if training else (self.running_mean, self.running_var)
        normed = (exact - mean) * torch.rsqrt(variance + EPS) * self.weight
        return (normed if self.bias is None else normed + self.bias).to(x.dtype)

    def _of_batch(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        if padding is None:
            number = x.new_full((), x.shape[0] * x.shape[1])  # of a number, `torch.tensor` would wait for a GPU
            variance, mean = torch.var_mean(x, dim=(0, 1), correction=0)
        else:
            counted = (~padding).to(x.dtype)[..., None]
            number = counted.sum().clamp(min=1)
            mean = (x * counted).sum(dim=(0, 1)) / number
            variance = ((x - mean).square() * counted).sum(dim=(0, 1)) / number
        unbiased = number / (number - 1).clamp(min=1)  # as torch, in the running mean only; one token has none
        self._remember(mean, variance * unbiased)
        return mean, variance

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        weight = self.num_batches_tracked.reciprocal().clamp(min=MOMENTUM)
        for running, found in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(found.to(running.dtype), weight.to(running.dtype))


def apply_norm(norm: nn.Module, x: Tensor, keys: Tensor | None, padding: Tensor | None) -> Tensor:
    """Any norm of a stream x [B, T, C]; without noise keys this is evaluation. `padding` [B, T] as above."""
    return norm(x, keys is not None, padding) if isinstance(norm, BatchNorm) else norm(x)
