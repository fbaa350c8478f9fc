"""Attention over sums of all keys: "Linformer: Self-Attention with Linear Complexity", arXiv:2006.04768, equation 7."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.softmax import Softmax
from model.attention.visibility import Visible
from model.config.transformer import TransformerConfig

_EVERYTHING = Visible(causal=False)


class Linformer(Softmax):
    """softmax(q (E k)^T / sqrt(d)) F v over k' slots; E and F are [k', N], or [H, k', N] with `sharing=none`.

    The sums over positions come before any mask could act, so it is for streams that see both ways. Padding adds
    nothing to them.
    """

    value_slots: nn.Parameter | None

    def __init__(self, config: TransformerConfig, name: str) -> None:
        """E and F start at N(0, 1 / N), so that a slot is as large as a key."""
        super().__init__(config, name, config.attention_rate)
        sharing = config.scores.sharing
        self.shared: tuple[SharedSlots, ...] = ()
        """Those of all layers, which the first one has: no submodule of the others."""
        if sharing == "layerwise":
            self.slots = SharedSlots(config)
            self.shared = (self.slots,)
            return
        heads = config.heads if sharing == "none" else None
        self.key_slots = _slots(config, heads)
        self.value_slots = None if sharing == "key_value" else _slots(config, heads)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        """See `Softmax.forward`; all of a text is seen but its padding."""
        return super().forward(query, self.slots_of(key, visible), self._values(value, visible), keys, _EVERYTHING)

    def slots_of(self, key: Tensor, visible: Visible) -> Tensor:
        """E k, [B, H, T, d] -> [B, H, k', d]."""
        return self.shared[0](key, visible) if self.shared else _summed(key, self.key_slots, visible)

    def _values(self, value: Tensor, visible: Visible) -> Tensor:
        if self.shared or self.value_slots is None:
            return self.slots_of(value, visible)
        return _summed(value, self.value_slots, visible)


class SharedSlots(nn.Module):
    """E = F [k', N] of all layers: a module that each of them calls, so that partitioned weights are gathered."""

    def __init__(self, config: TransformerConfig) -> None:
        """Starts as those of a layer."""
        super().__init__()
        self.weight = _slots(config, None)

    def forward(self, x: Tensor, visible: Visible) -> Tensor:
        """[B, H, T, d] -> [B, H, k', d]."""
        return _summed(x, self.weight, visible)


def share_slots(model: nn.Module) -> None:
    """With `sharing=layerwise`: all layers of a model take the slots of the first."""
    found = [module for module in model.modules() if isinstance(module, Linformer) and module.shared]
    for other in found[1:]:
        del other.slots
        other.shared = found[0].shared


def _slots(config: TransformerConfig, heads: int | None) -> nn.Parameter:
    shape = (config.scores.slots, config.context)
    return nn.Parameter(torch.empty(shape if heads is None else (heads, *shape)).normal_(std=config.context**-0.5))


def _summed(x: Tensor, slots: Tensor, visible: Visible) -> Tensor:
    """[B, H, T, d] -> [B, H, k', d], by slots [k', N] or [H, k', N]."""
    if visible.padding is not None:
        x = x.masked_fill(visible.padding[:, None, :, None], 0.0)
    slots = slots[..., : x.shape[2]]
    if slots.dim() == 3:
        return torch.einsum("hst,bhtd->bhsd", slots, x).contiguous()
    return functional.linear(x.transpose(2, 3), slots).transpose(2, 3).contiguous()
