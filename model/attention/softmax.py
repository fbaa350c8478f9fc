"""How scores become weights, and weights a result: the softmax, by whatever kernel fits."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from data_pipeline.errors import ConfigError
from model.attention.forms import Asking, Chunks, Gathered, Halves, Mask, Strided, Union, hidden
from model.attention.visibility import Visible
from model.config.transformer import TransformerConfig
from model.layers.dropout import noise_site, weight_dropout

SHORT_ROWS = (16, 128)
"""So few and so many keys: products of whole rows are faster there in bf16 on a CPU (benchmarks/masks.md)."""
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


class Softmax(nn.Module):
    """softmax(q k^T / sqrt(d)) v, as "Attention Is All You Need", equation 1, over what is visible.

    What an attention mixes its values with. It has no parameters, and a cache keeps its keys and values.
    """

    counts = False
    """It asks for the positions of queries and keys."""

    def __init__(self, config: TransformerConfig, name: str = "", rate: float = 0.0, *, formed: bool = False) -> None:
        """`name` of the attention keys the noise; `rate` is that of dropout on the weights, in training.

        `formed`: the weights always are, since no kernel has them.
        """
        super().__init__()
        self.name = name
        self._kernel = "explicit" if formed else config.attention
        self._told: dict[str, dict[str, Tensor]] = {}
        self._rate = rate
        self._site = noise_site(f"attention/{name}")
        self._most_keys = config.most_keys

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        """Query [B, H, T, d], key and value [B, H, S, d], noise keys [B] or None in evaluation -> [B, H, T, d].

        Raises:
            ConfigError: no fused kernel takes these, and the configuration wants one.
        """
        if self._kernel == "explicit" or (self._rate and keys is not None):
            weights = self._formed(query, key, keys, visible).to(value.dtype)
            if self._rate and keys is not None:
                weights = weight_dropout(weights, keys, self._site, self._rate, max(self._most_keys, weights.shape[-1]))
            return weights @ value
        return self._attend(query, key, value, visible.mask, visible.causal)

    def weights(self, query: Tensor, key: Tensor, visible: Visible) -> Tensor:
        """What each query gives each key in evaluation, [B, H, T, S] in fp32 at least."""
        return self._formed(query, key, None, visible)

    def keep(self, key: Tensor) -> None:
        """Put into the cache what is kept of keys [B, H, T, d] beside themselves: nothing."""

    def told(self) -> dict[str, dict[str, Tensor]]:
        """What is told of the last pass in training, once: 0-d tensors by head, such as `dec_sa/00/h0`, and name."""
        told, self._told = self._told, {}
        return told

    def _tell(self, **heads: Tensor) -> None:
        """Of each of the heads [H]."""
        told = [dict(zip(heads, values, strict=True)) for values in zip(*heads.values(), strict=True)]
        self._told = {f"{self.name}/h{head}": values for head, values in enumerate(told)}

    def _formed(self, query: Tensor, key: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        return self._normalised(self._masked(self._scores(query, key, visible), visible), keys, visible)

    def _masked(self, scores: Tensor, visible: Visible) -> Tensor:
        """Scores [B, H, T, S], -inf where a key is not seen."""
        mask = visible.mask
        assert mask is None or isinstance(mask, Tensor)
        if mask is None and visible.causal:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        elif mask is not None and 1 < mask.shape[1] < scores.shape[1]:
            mask = mask.repeat_interleave(scores.shape[1] // mask.shape[1], dim=1)
        if mask is None:
            return scores
        return scores + hidden(mask, scores.dtype)

    def _scores(self, query: Tensor, key: Tensor, visible: Visible) -> Tensor:
        """[B, H, T, S], of keys that are not seen, too; B may be 1 where all rows have the same."""
        return query @ key.transpose(2, 3) * query.shape[3] ** -0.5

    def _normalised(self, scores: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        """Scores [B, H, T, S], -inf where a key is not seen -> weights, in fp32 at least."""
        return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, causal: bool) -> Tensor:
        if isinstance(mask, Tensor) and 1 < mask.shape[1] < query.shape[1]:
            mask = Halves(mask.split(1, dim=1))
        if isinstance(mask, Halves):
            queries, keys, values = (x.chunk(len(mask.masks), dim=1) for x in (query, key, value))
            groups = zip(queries, keys, values, mask.masks, strict=True)
            return torch.cat([self._attend(q, k, v, m, causal) for q, k, v, m in groups], dim=1)
        if isinstance(mask, BlockMask):
            return _in_blocks(query, key, value, mask)
        kernel = _fused if self._kernel == "flash" else plain
        if isinstance(mask, Gathered | Chunks | Strided | Union | Asking):
            return mask.attend(kernel, query, key, value)
        return kernel(query, key, value, mask, causal and mask is None)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention by what is fastest there: a `Kernel` (model/attention/forms.py)."""
    low = key.device.type == "cpu" and key.dtype == torch.bfloat16
    if low and SHORT_ROWS[0] <= key.shape[-2] <= SHORT_ROWS[1] and query.requires_grad:
        return _WholeRows.apply(query, key, value, mask, causal)
    return _kernel(query, key, value, mask, causal)


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


class _WholeRows(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v of what a `Kernel` takes, in training.

    On a CPU the backward pass of torch's kernel hands oneDNN a small product for each head and block of queries. This
    one keeps no more, and forms the weights again. Scores are in fp32, as in the kernel.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal = causal
        return _weights(query, key, mask, causal).to(value.dtype) @ value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        weights = _weights(query, key, mask, ctx.causal)
        by_value = weights.to(grad.dtype).transpose(-1, -2) @ grad
        by_weight = (grad @ value.transpose(-1, -2)).float()
        # Of the same numbers, rounded alike: where one key has all the weight, nothing is to be left.
        scores = by_weight.sub_((by_weight * weights).sum(-1, keepdim=True)).mul_(weights)
        scores = scores.mul_(query.shape[-1] ** -0.5).to(query.dtype)
        return scores @ key, scores.transpose(-1, -2) @ query, by_value, None, None


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """[.., T, S] in fp32."""
    query, key = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (query, key))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (scores if mask is None else scores.add_(hidden(mask, scores.dtype))).softmax(-1)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    try:
        with sdpa_kernel(_FUSED):
            return _kernel(query, key, value, mask, causal)
    except RuntimeError as error:
        if not any(text in str(error) for text in ("No available kernel", "No viable backend")):
            raise
        raise ConfigError(
            f"model.attention=flash: torch has no fused kernel for heads of {query.shape[-1]} channels in "
            f"{query.dtype} on {query.device.type}; take auto"
        ) from error


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention over [B, H, T, d]; compiled on CUDA, elsewhere in the plain form that torch has for checks.

    Not run on a GPU yet: checked against the dense mask in the plain form only.
    """
    if query.is_cuda and not torch.compiler.is_compiling():
        return _compiled_flex()(query, key, value, block_mask=mask)
    found = flex_attention(query, key, value, block_mask=mask)
    assert isinstance(found, Tensor)
    return found


@cache
def _compiled_flex() -> Callable[..., Any]:  # CUDA only
    return torch.compile(flex_attention, dynamic=False)
