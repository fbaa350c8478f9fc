"""A step of refinement (docs/model.md E5): the same weights, time after time."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.architectures.blocks import EncoderLayer
from model.architectures.refined.spec import RefinedConfig
from model.attention.cache import Cache, Cached
from model.attention.forms import Mask
from model.attention.visibility import Visible
from model.layers.chunks import chunk_tokens
from model.layers.layers import Linear, stream_norm
from model.masks.site import Statistics

_OPEN = -2.0
"""Start of the gate's bias: a share of 0.12, near to leaving vectors as they are."""
_RATE = 0.1
"""Start of the gradient step's length."""


class Refiner(nn.Module):
    """Self attention and feed forward; then, where configured, re-weighting and a gradient step.

    Without a norm behind it: with one, a step that was trained three times did worse at its fourth (docs/model.md E5).
    """

    def __init__(self, config: RefinedConfig) -> None:
        """Its masks are called those of a layer behind the encoder's."""
        super().__init__()
        self.layer = EncoderLayer(config, config.layers)
        self.reweighting = Reweighting(config) if config.refine.reweight else None
        self.descent = Descent() if config.refine.gradient else None

    def forward(
        self, x: Tensor, keys: Tensor | None, source: Tensor | None, visible: Visible, ids: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        """Vectors [B, T, C] -> [B, T, C], and the statistics of masks.

        Args:
            keys: [B] noise keys of this step, or None in evaluation.
            source: [B, T, C] of masks that share one.
            visible: its `mask` is a tensor; all that mixes positions keeps to it.
            ids: [B, T], the tokens that the vectors are of.
            table: [V, C], the token table, for the gradient step.
        """
        x, statistics = self.layer(x, keys, source, visible)
        if self.reweighting is not None:
            x = self.reweighting(x, visible.mask)
        if self.descent is not None:
            assert table is not None
            x = self.descent(x, ids, table)
        return x, statistics


class Reweighting(Cached):
    """Vectors move towards those that are like them: h ← (1 - g) h + g c.

    With weights by likeness, over all j ≠ i that are visible,

        c_i = Σ_j softmax_j(cos(h_i, h_j) / τ) h_j
        g_i = sigmoid(a mean_j cos(h_i, h_j) + b) · sigmoid(W [LN h_i; c_i])
    """

    def __init__(self, config: RefinedConfig) -> None:
        """W [C, 2C] with bias, a and b."""
        super().__init__()
        self._temperature = config.refine.temperature
        self.norm = stream_norm(config)
        self.gate = Linear(2 * config.width, config.width, bias=True)
        nn.init.constant_(self.gate.bias, _OPEN)
        self.relevance = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """x [B, T, C], mask [B, 1, T, T] or [1, 1, T, T] bool -> [B, T, C]."""
        known, itself = x, torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        if self.cache is not None:
            known, itself, mask = self._with_earlier(x, self.cache)
        assert isinstance(mask, Tensor)
        others = mask[:, 0] & ~itself
        alone = ~others.any(-1, keepdim=True)  # a softmax over nothing is NaN
        units = functional.normalize(x, dim=-1)
        others_units = units if known is x else functional.normalize(known, dim=-1)
        likeness = (units @ others_units.transpose(1, 2)).to(torch.promote_types(x.dtype, torch.float32))
        weights = (likeness / self._temperature).masked_fill(~(others | (itself & alone)), -torch.inf).softmax(-1)
        centre = weights.to(x.dtype) @ known
        mean = (likeness * others).sum(-1, keepdim=True) / others.sum(-1, keepdim=True).clamp(min=1)
        a, b = self.relevance.unbind()
        relevance = torch.sigmoid(a * mean + b).to(x.dtype)
        share = relevance * torch.sigmoid(self.gate(torch.cat([self.norm(x), centre], dim=-1)))
        return (1.0 - share) * x + share * centre

    def _with_earlier(self, x: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        """All vectors so far [B, S, C], which of them each new one is and which it sees, [B, T, S] and [B, 1, T, S]."""
        known, _, mask = cache.extend(self, x[:, None], x[:, None, :, :0])
        own, others = cache.places(self)
        itself = own[:, :, None] == others[:, None]
        return known[:, 0], itself, torch.ones_like(itself)[:, None] if mask is None else mask


class Descent(nn.Module):
    """A step down the gradient of E = -log p(token | h), each vector's own: h ← h - η clip(∇E).

    p is the softmax of W_tok times h, normed without a gain. As E of a vector knows no other vector, nothing passes
    from one position to another. The gradient is clipped at norm 1, and counts as a constant in the backward pass.
    """

    def __init__(self) -> None:
        """η = softplus of one number."""
        super().__init__()
        self.rate = nn.Parameter(torch.full((1,), math.log(math.expm1(_RATE))))

    def forward(self, x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        """x [B, T, C], ids [B, T], table [V, C] -> [B, T, C]."""
        gradient = surprise_gradient(x.detach(), ids, table.detach())
        clipped = gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1.0)
        return x - functional.softplus(self.rate).to(x.dtype) * clipped.to(x.dtype)


def surprise(x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """E of vectors [..., C] whose tokens are ids [...], with a table [V, C] -> [...], in nats."""
    logits = functional.layer_norm(x, x.shape[-1:]) @ table.T
    return logits.logsumexp(-1) - logits.gather(-1, ids[..., None])[..., 0]


@torch.no_grad()
def surprise_gradient(x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Gradient of `surprise` with respect to x [B, T, C], in fp32 at least; logits are held by chunks of tokens.

    With n = (h - mean) / s, g = Wᵀ (softmax(W n) - onehot) is that with respect to n, and the one with respect to h is
    (g - mean(g) - n · mean(g · n)) / s.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    flat, labels = x.flatten(0, 1).to(exact), ids.flatten()
    deviation = (flat.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    normed = (flat - flat.mean(-1, keepdim=True)) / deviation
    found = []
    for vectors, own in zip(*(v.split(chunk_tokens(len(flat), *table.shape)) for v in (normed, labels)), strict=True):
        errors = (vectors.to(table.dtype) @ table.T).to(exact).softmax(-1)
        errors.scatter_add_(1, own[:, None], -torch.ones_like(errors[:, :1]))
        found.append((errors.to(table.dtype) @ table).to(exact))
    of_normed = torch.cat(found)
    projected = normed * (of_normed * normed).mean(-1, keepdim=True)
    return ((of_normed - of_normed.mean(-1, keepdim=True) - projected) / deviation).view_as(x)
