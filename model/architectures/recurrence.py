"""A stack of layers applied several times with the same weights, and tokens that halt (docs/model.md A13)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.architectures.backbone import Embedded, Hidden
from model.architectures.blocks import EncoderLayer
from model.attention.cache import Cached
from model.attention.means import mean
from model.config.transformer import TransformerConfig
from model.layers.layers import INIT_STD, Embedding
from model.layers.noise import of_step
from model.layers.positions import sinusoid
from model.masks.site import Statistics

Streams = tuple[Tensor, ...]
"""[B, T, C] each; tokens are predicted from the last."""
Hold = Callable[[Tensor, Tensor], Tensor]
"""Of a stream before and after a layer, [B, T, C]: after, but before where a token has halted."""
Apply = Callable[[Streams, Tensor | None, Hold], tuple[Streams, Statistics]]
"""Leads the streams through all layers once, with the noise keys of this step."""
Keep = Callable[[Streams, range], None]
"""Puts into the cache what streams that stay as they are give to these further steps."""


class Repeated(NamedTuple):
    """What came of all steps."""

    streams: Streams
    """After the last one."""
    x: Tensor
    """[B, T, C], from which tokens are predicted."""
    statistics: Statistics
    """Of each mask the means over the steps."""
    taken: Tensor | None = None
    """[B, T] float32: the steps of each token, where tokens halt; `remainder` as large: the weight of its last one."""
    remainder: Tensor | None = None

    def hidden(self, embedded: Embedded, most: int) -> Hidden:
        """With what is told of the steps, `most` for a token."""
        statistics, visible = embedded.statistics | self.statistics, embedded.visible
        if self.taken is None or self.remainder is None:
            return Hidden(self.x, statistics)
        shares = {f"ponder_share/{n}": mean((self.taken == n).float(), visible) for n in range(1, most + 1)}
        told = {"ponder_steps": mean(self.taken, visible)} | shares
        return Hidden(
            self.x, statistics, penalised={"ponder": mean(self.taken + self.remainder, visible)}, metrics=told
        )


class Recurrence(Cached):
    """Applies a stack `recurrence.steps` times. Before a step a vector of its own is added to each stream.

    Where tokens halt, it is by adaptive computation time, with p_k the halting unit's word after step k:

        n = the first k with p_1 + … + p_k >= 1 - epsilon, or the last one        R = 1 - (p_1 + … + p_(n-1))
        x = p_1 h_1 + … + p_(n-1) h_(n-1) + R h_n

    (Graves 2016, arXiv:1603.08983, equations 5 to 13). A token that has halted stays in the stream as it is, through
    all layers, and is seen there by those that go on. Training runs every step, so that all ranks call all modules as
    often; decoding stops when all tokens have halted.
    """

    def __init__(self, config: TransformerConfig, streams: int = 1) -> None:
        """`streams`: how many go through the stack; each has step vectors of its own."""
        super().__init__()
        self.steps = config.recurrence.steps
        self._epsilon = config.recurrence.epsilon
        kind = config.recurrence.step_embedding
        self.step_embed = Embedding(self.steps * streams, config.width) if kind == "learned" else None
        self._sines = kind == "sinusoidal"
        self.halting = Halting(config.width, config.recurrence.halt_bias) if config.recurrence.halt else None

    def forward(self, apply: Apply, keep: Keep, streams: Streams, keys: Tensor | None) -> Repeated:
        """Streams [B, T, C], noise keys [B] or None in evaluation."""
        halted = None if self.halting is None else _Halted(streams[-1], self._epsilon)
        hold = _after if halted is None else halted.hold
        found: list[Statistics] = []
        for step in range(self.steps):
            if self.cache is not None:
                self.cache.step = step
            begin = tuple(hold(x, self._marked(x, step, number, len(streams))) for number, x in enumerate(streams))
            streams, masks = apply(begin, None if keys is None else of_step(keys, step), hold)
            found.append(masks)
            if halted is None or self.halting is None:
                continue
            if step == self.steps - 1:
                halted.add(streams[-1], None)
                break
            halted.add(streams[-1], self.halting(streams[-1]))
            if self.cache is not None and self.cache.may_stop and not halted.running.any():
                keep(streams, range(step + 1, self.steps))
                break
        if halted is None:
            return Repeated(streams, streams[-1], _over_steps(found))
        return Repeated(streams, halted.x, _over_steps(found), halted.taken, halted.remainder)

    def _marked(self, x: Tensor, step: int, number: int, streams: int) -> Tensor:
        """Stream x, its `number` of so many, with the vector of a step."""
        if self.step_embed is not None:
            row: Tensor = self.step_embed(torch.full((), step * streams + number, device=x.device))
            return x + row
        if self._sines:
            return x + (sinusoid(torch.full((), step, device=x.device), x.shape[-1]) * (2**0.5 * INIT_STD)).to(x.dtype)
        return x


class Halting(nn.Module):
    """How likely each token is to halt: p = sigmoid(w h + b), in fp32 at least."""

    def __init__(self, width: int, bias: float) -> None:
        """w [1, C] starts at N(0, 0.02), b at `bias`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width).normal_(std=INIT_STD))
        self.bias = nn.Parameter(torch.full((1,), bias))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T]."""
        kind = torch.promote_types(x.dtype, torch.float32)
        return functional.linear(x.to(kind), self.weight.to(kind), self.bias.to(kind))[..., 0].sigmoid()


class _Halted:
    """Who has halted, and what the tokens have gathered so far."""

    def __init__(self, x: Tensor, epsilon: float) -> None:
        self.x = torch.zeros_like(x)
        self.running = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        self._sum = torch.zeros(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        self.taken, self.remainder = torch.zeros_like(self._sum), torch.zeros_like(self._sum)
        self._enough = 1.0 - epsilon

    def hold(self, before: Tensor, after: Tensor) -> Tensor:
        return torch.where(self.running[..., None], after, before)

    def add(self, x: Tensor, probability: Tensor | None) -> None:
        """A step gave x [B, T, C]; probability [B, T] that a token halts now, None where all must."""
        left = 1.0 - self._sum
        if probability is None:
            last, weight = self.running, left
        else:
            last = self.running & (self._sum + probability >= self._enough)
            weight = torch.where(last, left, probability)
        weight = weight * self.running
        self.x = self.x + weight[..., None].to(x.dtype) * x
        self.taken = self.taken + self.running
        self.remainder = torch.where(last, left, self.remainder)
        self._sum = self._sum + weight
        self.running = self.running & ~last


def one_repeated_stream(
    recurrence: Recurrence, layers: nn.ModuleList, embedded: Embedded, keys: Tensor | None
) -> Hidden:
    """Encoder layers, one after the other, and all of them several times."""
    visible = embedded.visible

    def apply(streams: Streams, keys: Tensor | None, hold: Hold) -> tuple[Streams, Statistics]:
        [x] = streams
        statistics: Statistics = {}
        for layer in layers:
            after, masks = layer(x, keys, embedded.mask_source, visible)
            x = hold(x, after)
            statistics |= masks
        return (x,), statistics

    def keep(streams: Streams, steps: range) -> None:
        for layer in layers:
            assert isinstance(layer, EncoderLayer)
            layer.keep(streams[0], visible, steps)

    return recurrence(apply, keep, (embedded.tokens,), keys).hidden(embedded, recurrence.steps)


def _after(before: Tensor, after: Tensor) -> Tensor:
    return after


def _over_steps(found: list[Statistics]) -> Statistics:
    """Means, each mask by itself."""
    return {
        mask: {name: torch.stack([step[mask][name] for step in found]).mean(0) for name in told}
        for mask, told in found[0].items()
    }
