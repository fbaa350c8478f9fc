"""The Feedback Transformer (Fan et al. 2020, arXiv:2002.09402, section 3): docs/model.md H.

One function, `FeedbackStack.forward`, reads token after token, in training as in decoding.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.architectures.backbone import Backbone, Embedded, Hidden, SourceSequence
from model.architectures.blocks import Residual
from model.architectures.feedback.spec import FeedbackConfig
from model.attention.cache import Cached
from model.attention.softmax import Softmax
from model.attention.visibility import CAUSAL, Visible
from model.layers.layers import INIT_STD, FeedForward, Linear, residual_std, stream_norm
from model.layers.noise import of_step
from model.layers.positions import rotate
from model.masks.sites import dropout_at


class Memories(NamedTuple):
    """What a token reads, of all layers."""

    key: Tensor
    """[B, H / g, S, d], the null memory first."""
    value: Tensor
    seen: Tensor | None = None
    """[B, S] bool: which of them hold a token of the text; None for all."""


class FeedbackLayer(nn.Module):
    """Attention to the memories of earlier tokens, then feed forward, of one token."""

    def __init__(self, config: FeedbackConfig, layer: int) -> None:
        """A map to queries and one out; keys and values come from the memory."""
        super().__init__()
        self._post_norm = config.norm_position == "post"
        self._heads, self._group = config.heads, config.queries_per_kv_head
        self._rotary = config.positions == "rotary"
        std = residual_std(config)
        self.attention_norm = stream_norm(config)
        self.query = Linear(config.width, config.width, bias=config.bias)
        self.mixer = Softmax(config, f"dec_sa/{layer:02d}", config.attention_rate)
        self.out = Linear(config.width, config.width, bias=config.bias, std=std)
        self.attention_dropout = dropout_at(config, "dec_sa", layer)
        self.ff_norm = stream_norm(config)
        self.ff = FeedForward(config, std)
        self.ff_dropout = dropout_at(config, "dec_ff", layer)

    def forward(self, x: Tensor, memories: Memories, keys: Tensor | None, position: Tensor) -> Tensor:
        """x [B, 1, C] at position [B, 1], noise keys [B] or None in evaluation -> [B, 1, C]."""
        stream = Residual(x, keys, None, CAUSAL, self._post_norm)
        query = self.query(stream.normed(self.attention_norm)).unflatten(-1, (self._heads, -1))
        query = (rotate(query, position) if self._rotary else query).transpose(1, 2)
        key, value, seen = memories
        if self._group > 1:
            key, value = (part.repeat_interleave(self._group, dim=1) for part in (key, value))
        mask = None if seen is None else seen[:, None, None]
        mixed = self.mixer(query, key, value, keys, Visible(causal=False, mask=mask))
        stream.add(self.out(mixed.transpose(1, 2).flatten(2)), self.attention_dropout, self.attention_norm)
        stream.feed(self.ff, self.ff_dropout, self.ff_norm)
        return stream.x


class MemoryWriter(nn.Module):
    """m = Σ softmax(a)_l h_l over the embedded token and the layers' outputs; W_k and W_v are there once for all."""

    def __init__(self, config: FeedbackConfig) -> None:
        """a [L + 1] starts at 0, the null memory [C] at N(0, 0.02)."""
        super().__init__()
        self._heads = config.heads // config.queries_per_kv_head
        self._rotary = config.positions == "rotary"
        self.shares = nn.Parameter(torch.zeros(config.layers + 1))
        self.nothing = nn.Parameter(torch.empty(config.width).normal_(std=INIT_STD))
        self.norm = stream_norm(config)
        self.key_value = Linear(config.width, 2 * config.width // config.queries_per_kv_head, bias=config.bias)

    def forward(self, states: list[Tensor], position: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, 1, C] of a token at position [B, 1] -> key and value [B, H / g, 1, d]; of none: the null one's."""
        if states:
            memory = (torch.stack(states, dim=-1) * self.shares.softmax(0)).sum(-1)
        else:
            memory = self.nothing.expand(len(position), 1, -1)
        key, value = self.key_value(self.norm(memory)).chunk(2, dim=-1)
        key, value = (part.unflatten(-1, (self._heads, -1)) for part in (key, value))
        return (rotate(key, position) if self._rotary else key).transpose(1, 2), value.transpose(1, 2)


class FeedbackStack(nn.Module):
    """All layers, token by token."""

    def __init__(self, config: FeedbackConfig) -> None:
        """The layers, and what writes their memory."""
        super().__init__()
        self._most = config.memory
        self.layers = nn.ModuleList(FeedbackLayer(config, layer) for layer in range(config.layers))
        self.writer = MemoryWriter(config)

    def forward(
        self, x: Tensor, memories: Memories, first: int, keys: Tensor | None, positions: Tensor, holds: Tensor | None
    ) -> tuple[Tensor, Memories]:
        """Read tokens x [B, T, C] one after the other.

        Args:
            memories: of what was read before.
            first: number of the first of these tokens in its text, which keys its noise.
            keys: [B] int64, which key the noise of training; None asks for evaluation.
            positions: [B, T] int64.
            holds: [B, T] bool, False where there is no token; None where all are.

        Returns:
            What the last layer gives, [B, T, C], and the memories, all of them.
        """
        found = []
        for number in range(x.shape[1]):
            position = positions[:, number : number + 1]
            noise = None if keys is None else of_step(keys, first + number)
            states, read = [x[:, number : number + 1]], self._last(memories)
            for layer in self.layers:
                states.append(layer(states[-1], read, noise, position))
            found.append(states[-1])
            key, value = self.writer(states, position)
            seen = None
            if holds is not None:
                assert memories.seen is not None
                seen = torch.cat([memories.seen, holds[:, number : number + 1]], dim=1)
            memories = Memories(torch.cat([memories.key, key], 2), torch.cat([memories.value, value], 2), seen)
        return torch.cat(found, dim=1), memories

    def _last(self, memories: Memories) -> Memories:
        """The null memory and as many of the last ones as are read."""
        if self._most is None or memories.key.shape[2] <= self._most + 1:
            return memories
        key, value = (torch.cat([x[:, :, :1], x[:, :, -self._most :]], 2) for x in memories[:2])
        if memories.seen is None:
            return Memories(key, value)
        return Memories(key, value, torch.cat([memories.seen[:, :1], memories.seen[:, -self._most :]], 1))


class Feedback(Backbone, Cached):
    """T steps, each through all layers; a cache holds one key and one value a token, whatever the number of layers."""

    def __init__(self, config: FeedbackConfig) -> None:
        """A list of one stack, whose calls are what activation checkpointing computes again."""
        super().__init__()
        self._segment = config.segment
        self.stack = nn.ModuleList([FeedbackStack(config)])

    def forward(self, embedded: Embedded, keys: Tensor | None, source: SourceSequence | None = None) -> Hidden:
        """See `Backbone.forward`."""
        x, positions = embedded.tokens, embedded.visible.positions
        rows, length = x.shape[:2]
        if positions is None:
            positions = torch.arange(length, device=x.device).expand(rows, -1)
        [stack] = self.stack
        assert isinstance(stack, FeedbackStack)
        key, value = stack.writer([], torch.zeros_like(positions[:, :1]))
        if self.cache is not None:
            return self._cached(stack, embedded, Memories(key, value), positions)
        memories, found = Memories(key, value), []
        for first in range(0, length, self._segment):
            part = slice(first, first + self._segment)
            made, memories = stack(x[:, part], memories, first, keys, positions[:, part], None)
            found.append(made)
        return Hidden(torch.cat(found, dim=1), embedded.statistics)

    def _cached(self, stack: FeedbackStack, embedded: Embedded, memories: Memories, positions: Tensor) -> Hidden:
        assert self.cache is not None
        count, before = positions.shape[1], self.cache.held(self)
        holds = self.cache.holds() if self.cache.padded else None
        if before is not None:
            memories = Memories(*(torch.cat(pair, 2) for pair in zip(memories[:2], before, strict=True)))
        if holds is not None:
            always = holds.new_ones(len(holds), 1)
            memories = memories._replace(seen=torch.cat([always, holds[:, :-count]], dim=1))
            holds = holds[:, -count:]
        x, memories = stack(embedded.tokens, memories, 0, None, positions, holds)
        self.cache.append(self, memories.key[:, :, -count:], memories.value[:, :, -count:])
        return Hidden(x, embedded.statistics)
