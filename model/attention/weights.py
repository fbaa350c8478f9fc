"""How scores become weights where it is not a softmax; the weights are formed, since no kernel has these."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from model.attention.forms import Gathered, hidden
from model.attention.rule import Rows
from model.attention.softmax import Softmax
from model.attention.visibility import Visible
from model.config.pattern_config import Pattern
from model.config.transformer import TransformerConfig
from model.layers.entmax import SMALLEST, entmax

TRIM = 64
"""Keys that no span of a layer reaches are left out in steps of so many."""
_FEWEST = 4
"""Steps of a text from which on this pays (benchmarks/attention.md)."""
_blocks = lru_cache(maxsize=8)(torch.inference_mode(False)(Gathered.of))
"""For all batches of that length; never made in inference mode: no backward pass takes that."""


def mixer_of(config: TransformerConfig, heads: int, name: str, *, aligned: bool = True) -> Softmax:
    """What an attention of a stream mixes its values with, as the configuration says.

    Args:
        name: keys its noise.
        aligned: queries and keys are of one text.
    """
    if config.weights.kind == "entmax":
        return Entmax(config, heads, name)
    if config.weights.kind == "adaptive_span" and aligned:
        return AdaptiveSpan(config, heads, name)
    return Softmax(config, name, config.attention_rate)


class Entmax(Softmax):
    """alpha-entmax in the place of the softmax: "Adaptively Sparse Transformers", arXiv:1909.00015, section 3.

    Tells of each head in training: `alpha`, and `zeros`, the share of the visible keys that get a weight of 0.
    """

    def __init__(self, config: TransformerConfig, heads: int, name: str) -> None:
        """alpha = 1 + sigmoid(a), a of each head from 0 on, unless the configuration gives one."""
        super().__init__(config, name, config.attention_rate, formed=True)
        self._fixed = config.weights.alpha
        if config.weights.learned:
            self.alpha_logit = nn.Parameter(torch.zeros(heads))

    def _normalised(self, scores: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self._fixed is not None:
            alpha: Tensor | float = self._fixed
        else:
            alpha = _Held.apply(1.0 + self.alpha_logit.to(scores.dtype).sigmoid(), SMALLEST, 2.0).view(-1, 1, 1)
        weights = entmax(scores, alpha)
        if keys is not None:
            seen = scores.detach() > -torch.inf
            zeros = ((weights.detach() == 0) & seen).float().sum((0, 2, 3)) / seen.sum((0, 2, 3))
            learned = {"alpha": alpha.detach().flatten()} if isinstance(alpha, Tensor) else {}
            self._tell(zeros=zeros, **learned)
        return weights


class AdaptiveSpan(Softmax):
    """A softmax whose weights fall to 0 over a ramp, from a distance on that each head learns.

    "Adaptive Attention Span in Transformers", arXiv:1905.07799, equations 3 to 5. Keys that no head of the layer
    reaches are left out of a long text, in blocks of the widest head's reach. Tells of each head in training: `span`,
    z in tokens, as penalised, with its gradient.
    """

    counts = True

    def __init__(self, config: TransformerConfig, heads: int, name: str) -> None:
        """z = max_span u, with u of each head in [0, 1]."""
        super().__init__(config, name, config.attention_rate, formed=True)
        self._most = config.weights.max_span or config.context
        self._ramp = config.weights.ramp
        self.share = nn.Parameter(torch.full((heads,), config.weights.span_init))

    def spans(self) -> Tensor:
        """z [H] in tokens, fp32 at least; a key at a distance of z + ramp or more gets nothing."""
        share: Tensor = _Held.apply(self.share.to(torch.promote_types(self.share.dtype, torch.float32)), 0.0, 1.0)
        return share * self._most

    def reach(self) -> int:
        """Tokens that the widest head sees, its own included; of a span that is no number all."""
        return math.ceil(self.spans().nan_to_num(self._most).max().item() + self._ramp)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        """See `Softmax.forward`."""
        # Noise on weights is that of a place in T x T, compiled layers have fixed shapes, and of a short text nothing
        # would be left out: the device is not asked for the spans.
        drops = self._rate and keys is not None
        if drops or torch.compiler.is_compiling() or key.shape[2] < _FEWEST * TRIM:
            return super().forward(query, key, value, keys, visible)
        size = -(-self.reach() // TRIM) * TRIM
        if visible.key_positions is not None:
            return super().forward(query, *_reached(key, value, size, visible))
        mask, length = visible.mask, query.shape[2]
        alike = mask is None or (isinstance(mask, Tensor) and mask.shape[1] == 1)
        if not alike or length != key.shape[2] or length < _FEWEST * size:
            return super().forward(query, key, value, keys, visible)
        blocks = _blocks(Rows(torch.Size((1, length)), query.device, visible.causal), Pattern(window=size))
        if isinstance(mask, Tensor):
            blocks = blocks.within(mask[:, 0])
        spans = self.spans()
        if keys is not None:
            self._tell(span=spans)
        return blocks.attend(lambda *given: self._in_blocks(spans, *given), query, key, value)

    def _in_blocks(
        self, spans: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, _: bool
    ) -> Tensor:
        """Of blocks [B H, n, w, d] of queries, and [B H, n, K, d] of keys from w places before the first one on."""
        assert mask is not None
        scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        scores = scores + hidden(mask, scores.dtype)
        keys = torch.arange(key.shape[2], device=key.device)
        queries = keys[: query.shape[2]] + query.shape[2]
        weights = self._spanned(scores.unflatten(0, (-1, len(spans))), spans, queries, keys)
        return weights.flatten(0, 1).to(value.dtype) @ value

    def _normalised(self, scores: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        assert visible.aligned
        queries = visible.positions
        if queries is None:
            queries = torch.arange(scores.shape[2], device=scores.device)[None]
        # A copy, since the compiler takes no tensor twice.
        others = queries.clone() if visible.key_positions is None else visible.key_positions
        spans = self.spans()
        if keys is not None:
            self._tell(span=spans)
        return self._spanned(scores, spans, queries[:, None], others[:, None])

    def _spanned(self, scores: Tensor, spans: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights: Tensor = _Spanned.apply(scores, spans.to(scores.dtype), self._ramp, queries, keys)
        return weights


def _reached(key: Tensor, value: Tensor, reach: int, visible: Visible) -> tuple[Tensor, Tensor, None, Visible]:
    """What is kept of a text in a cache, without the first of it as far as no query comes within `reach` of them."""
    queries, at, mask = visible.positions, visible.key_positions, visible.mask
    assert queries is not None and at is not None and (mask is None or isinstance(mask, Tensor))
    near = (queries[:, :, None] - at[:, None]).abs() < reach
    first = int(near.flatten(0, 1).any(0).int().argmax())
    mask = None if mask is None else mask[..., first:]
    return key[:, :, first:], value[:, :, first:], None, visible._replace(mask=mask, key_positions=at[:, first:])


class _Held(torch.autograd.Function):
    """clamp(x, low, high), whose gradient leads back from outside, where the optimizer's momentum carries x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        [x], (low, high) = ctx.saved_tensors, ctx.bounds
        outwards = ((x >= high) & (gradient < 0)) | ((x <= low) & (gradient > 0))
        return gradient.masked_fill(outwards, 0.0), None, None


class _Spanned(torch.autograd.Function):
    """chi exp(s) / sum(chi exp(s)) of scores [B, H, .., T, S] over the last dimension, of which it keeps the result
    alone; spans z [H], positions of queries [.., T] and of keys [.., S]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, spans: Tensor, ramp: int, queries: Tensor, keys: Tensor) -> Tensor:
        spans = spans.view(-1, *[1] * (scores.dim() - 2))
        chi = _chi(spans, ramp, queries, keys)
        weights = scores.masked_fill(chi == 0, -torch.inf).softmax(-1) * chi
        weights = weights / weights.sum(-1, keepdim=True)
        ctx.ramp = ramp
        ctx.save_for_backward(weights, spans, queries, keys)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weights, spans, queries, keys = ctx.saved_tensors
        of_scores = weights * (gradient - (gradient * weights).sum(-1, keepdim=True))
        chi = _chi(spans, ctx.ramp, queries, keys)
        # The logarithm of chi is added to the scores; it rises with z inside the ramp only.
        of_spans = torch.where((chi > 0) & (chi < 1), of_scores / chi / ctx.ramp, 0.0)
        return of_scores, of_spans.sum((0, *range(2, of_spans.dim()))), None, None, None


def _chi(spans: Tensor, ramp: int, queries: Tensor, keys: Tensor) -> Tensor:
    """In [0, 1]: 1 up to z, 0 from z + ramp on."""
    distance = (queries[..., None] - keys[..., None, :]).abs().to(spans.dtype)
    return ((spans + ramp - distance) / ramp).clamp(0.0, 1.0)
