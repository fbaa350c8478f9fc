"""Attention over sums of all keys: "Linformer: Self-Attention with Linear Complexity", arXiv:2006.04768, equation 7."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.softmax import Softmax
from model.attention.visibility import Visible
from model.config.transformer import TransformerConfig

_EVERYTHING = Visible(causal=False)


class Linformer(Softmax):
    """softmax(q (E k)^T / sqrt(d)) F v over k' slots; E and F [k', N] are shared by the heads of a layer.

    The sums over positions come before any mask could act, so it is for streams that see both ways. Padding adds
    nothing to them.
    """

    def __init__(self, config: TransformerConfig, name: str) -> None:
        """E and F start at N(0, 1 / N), so that a slot is as large as a key."""
        super().__init__(config, name, config.attention_rate)
        shape, std = (config.scores.slots, config.context), config.context**-0.5
        self.key_slots = nn.Parameter(torch.empty(shape).normal_(std=std))
        self.value_slots = nn.Parameter(torch.empty(shape).normal_(std=std))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        """See `Softmax.forward`; all of a text is seen but its padding."""
        value = _summed(value, self.value_slots, visible)
        return super().forward(query, self.slots_of(key, visible), value, keys, _EVERYTHING)

    def slots_of(self, key: Tensor, visible: Visible) -> Tensor:
        """E k, [B, H, T, d] -> [B, H, k', d]."""
        return _summed(key, self.key_slots, visible)


def _summed(x: Tensor, slots: Tensor, visible: Visible) -> Tensor:
    """[B, H, T, d] -> [B, H, k', d]."""
    if visible.padding is not None:
        x = x.masked_fill(visible.padding[:, None, :, None], 0.0)
    return functional.linear(x.transpose(2, 3), slots[:, : x.shape[2]]).transpose(2, 3).contiguous()
