"""Learned dropout: a mask in [0, 1] that the model computes, by default by attention from what it masks.

It saves no compute: the mask comes from the finished output (docs/model.md B).
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.attention.attention import CausalAttention
from model.attention.cache import Cached
from model.attention.means import mean
from model.attention.visibility import CAUSAL, Visible
from model.config.mask_config import Site
from model.config.transformer import TransformerConfig
from model.layers.dropout import noise_site
from model.layers.layers import INIT_STD, Linear
from model.layers.noise import sample_keys, uniform, uniform_at
from model.masks.penalties import entropy, l1
from model.masks.site import SiteDropout, Statistics
from model.masks.telemetry import mask_statistics

_STEEPNESS = 60.0
"""Of the sigmoid around m = 0.5 (docs/model.md B3)."""


def cosine_mask(angle: Tensor) -> Tensor:
    """m = 0.5 cos(angle) + 0.5, in [0, 1] (docs/model.md B2). Any shape."""
    return angle.cos() * 0.5 + 0.5


def straight_through(forward: Tensor, mask: Tensor) -> Tensor:
    """The values of `forward`, with gradient 1 with respect to m (Bengio et al. 2013). Any shape."""
    through: Tensor = _StraightThrough.apply(forward.detach(), mask)
    return through


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Tensor, mask: Tensor) -> Tensor:
        return forward.view_as(forward)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class LearnedDropout(SiteDropout, Cached):
    """x -> x * m, with m = 0.5 cos(angle(x) + shift) + 0.5 rounded as configured (docs/model.md B1-B3)."""

    sides: list[Tensor] | None = None
    """While it is a list, each forward pass adds which elements of m are at least 0.5: [B, T, C] bool,
    or, where there is padding, [tokens, C]."""

    def __init__(self, config: TransformerConfig, site: Site, layer: int) -> None:
        """`layer` counts from 0 in its stream."""
        super().__init__(config, site, layer)
        self.config = config.learned_dropout
        if self.config.source == "elementwise":
            self.scale = nn.Parameter(nn.init.normal_(torch.empty(config.width), std=INIT_STD))
        elif self.config.source == "low_rank":
            self.down = Linear(config.width, config.mask_rank, bias=False)
            self.up = Linear(config.mask_rank, config.width, bias=False, std=config.mask_rank**-0.5)
        else:
            self.qkv = Linear(config.width, 3 * config.width, bias=False)
            self._attention = CausalAttention(config, config.heads, layer=0 if site == "embed" else layer)
        self.shift = nn.Parameter(torch.full((config.width,), self.config.shift_init))
        self._noise_site = noise_site(self.name)

    def mask(
        self, x: Tensor, keys: Tensor | None, source: Tensor | None, visible: Visible
    ) -> tuple[Tensor, Statistics]:
        """Mask x; see `SiteDropout.forward`."""
        mask = self._mask(x, source, visible)
        if self.sides is not None:
            self.sides.append(mask >= 0.5 if visible.padding is None else (mask >= 0.5)[~visible.padding])
        used = self._round(mask, keys, visible)
        statistics = {self.name: self._statistics(mask, used, visible)} if self.cache is None else {}
        return x * used.to(x.dtype), statistics

    def kept(self, x: Tensor, source: Tensor | None, visible: Visible) -> Tensor:
        """As the density counts them: at least half of the element is let through."""
        return self._round(self._mask(x, source, visible), None, visible) >= 0.5

    def _mask(self, x: Tensor, source: Tensor | None, visible: Visible) -> Tensor:
        return cosine_mask(at_least_fp32(self._angle(x, source, visible)) + at_least_fp32(self.shift))

    def _angle(self, x: Tensor, source: Tensor | None, visible: Visible) -> Tensor:
        if self.config.source == "elementwise":
            return at_least_fp32(self.scale) * at_least_fp32(x.detach())
        if self.config.source == "low_rank":
            return self.up(self.down(x))
        if self.config.source == "embed":
            assert source is not None
            x = source
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self._attention(query, key, value, None, visible)

    def _round(self, mask: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        if keys is None:
            if self.config.eval_rounding == "sample":
                # The same draws for every sequence, so that they depend on nothing but the position.
                nowhere = torch.zeros(1, dtype=torch.int64, device=mask.device)
                keys = sample_keys(self.config.eval_seed, nowhere[0], nowhere)
                if visible.positions is None:
                    return self._drawn(keys, mask)
                return (uniform_at(keys, self._noise_site, visible.positions, mask.shape[2]) < mask).to(mask.dtype)
            return _threshold(mask) if self.config.eval_rounding == "threshold" else mask
        rounding = self.config.rounding
        if rounding == "none":
            return mask
        if rounding in ("sigmoid", "sigmoid_ste"):
            soft = torch.sigmoid(_STEEPNESS * (mask - 0.5))
            return soft if rounding == "sigmoid" else straight_through(soft, mask)
        # For uniform noise the mean of what is kept is m.
        hard = self._drawn(keys, mask, visible.first) if rounding == "noise_ste" else _threshold(mask)
        return straight_through(hard, mask)

    def _drawn(self, keys: Tensor, mask: Tensor, first: int = 0) -> Tensor:
        """1 with probability m, else 0."""
        # Written over the noise: where numbers become truth values torch takes four times as long.
        below = uniform(keys, self._noise_site, (mask.shape[1], mask.shape[2]), first).expand(mask.shape).contiguous()
        return below.lt_(mask.detach()).to(mask.dtype)

    def _statistics(self, mask: Tensor, used: Tensor, visible: Visible) -> dict[str, Tensor]:
        """`entropy` and `l1`, as penalised, carry gradients; `mask_slope` is the mean |dm/dangle|, at most 0.5."""
        m = mask.detach()
        return {
            "entropy": entropy(mask, self.config.entropy.kind, visible),
            "l1": l1(mask, self.config.l1.kind, visible),
            "mask_slope": mean((m * (1.0 - m)).sqrt(), visible),
        } | mask_statistics(m, _threshold(used), visible)


class MaskSource(nn.Module):
    """What all masks come from with source `embed`: one attention over the embedded tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        """Projections [3C, C] and [C, C], both from N(0, 0.02)."""
        super().__init__()
        self._detach = config.learned_dropout.detach_embed
        self.qkv = Linear(config.width, 3 * config.width, bias=False)
        self.out = Linear(config.width, config.width, bias=False)
        self._attention = CausalAttention(config, config.heads)

    def forward(self, embedded: Tensor, visible: Visible = CAUSAL) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        # Detached is what comes in: what goes out would leave these weights without a gradient.
        query, key, value = self.qkv(embedded.detach() if self._detach else embedded).chunk(3, dim=-1)
        return self.out(self._attention(query, key, value, None, visible))


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 has 8 bits of mantissa: too few for an angle near a turning point of the cosine."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _threshold(mask: Tensor) -> Tensor:
    return mask.detach().clone().ge_(0.5)
