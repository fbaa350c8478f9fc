"""Forms of a mask that form less than T x T scores, exact all: blocks, chunks and columns of a row of tokens."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from model.attention.rule import Rows
from model.config.pattern_config import Pattern, Patterns

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
"""Attention of query [.., T, d] to key and value [.., S, d] with a mask [.., T, S], or causal without one."""


class Gathered(NamedTuple):
    """Blocks of queries, side by side, that each see sinks, so many blocks before and after, and their own."""

    size: int
    before: int
    after: int
    sinks: int
    mask: Tensor
    """[B, n, size, K] bool."""

    @classmethod
    def of(cls, rows: Rows, pattern: Pattern) -> "Gathered":
        """Of a window, or of blocks that see nothing but themselves."""
        size = pattern.window or pattern.block
        before = int(bool(pattern.window))
        after = 0 if rows.causal else before
        starts = torch.arange(0, rows.length, size, device=rows.device)[:, None]
        within = torch.arange(-before * size, (1 + after) * size, device=rows.device)
        sinks = torch.arange(min(pattern.sinks, rows.length), device=rows.device).expand(len(starts), -1)
        first, end = starts - before * size, starts + (1 + after) * size
        sinks = sinks.masked_fill((sinks >= first) & (sinks < end), -1)  # these stand in the blocks, too
        keys = torch.cat([sinks, starts + within], dim=1)
        queries = starts + torch.arange(size, device=rows.device)
        return cls(size, before, after, sinks.shape[1], rows.grid(pattern, queries, keys))

    def within(self, seen: Tensor) -> "Gathered":
        """The same where `seen` [B, T, T] bool is, too; without sinks."""
        starts, last = torch.arange(self.mask.shape[1], device=seen.device)[:, None] * self.size, seen.shape[-1] - 1
        queries = starts + torch.arange(self.size, device=seen.device)
        keys = starts + torch.arange(-self.before * self.size, (1 + self.after) * self.size, device=seen.device)
        return self._replace(mask=self.mask & seen[:, queries.clamp(max=last)[..., None], keys.clamp(0, last)[:, None]])

    def attend(self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, d] of each -> [B, H, T, d]."""
        rows, heads, length, _ = query.shape
        blocks = self.mask.shape[1]
        query = _padded(query, blocks * self.size).unflatten(2, (blocks, self.size))
        mask = self.mask if len(self.mask) == 1 else self.mask.repeat_interleave(heads, dim=0)
        key, value = (self.keys(x).flatten(0, 1) for x in (key, value))
        found = kernel(query.flatten(0, 1), key, value, mask, False)
        return found.unflatten(0, (rows, heads)).flatten(2, 3)[:, :, :length]

    def keys(self, x: Tensor) -> Tensor:
        """[B, H, T, d] -> what each block may see, [B, H, n, K, d]."""
        blocks = self.mask.shape[1]
        own = _padded(x, blocks * self.size).unflatten(2, (blocks, self.size))
        parts = [x[:, :, None, : self.sinks].expand(-1, -1, blocks, -1, -1)] if self.sinks else []
        if self.before:
            parts.append(functional.pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1])
        parts.append(own)
        if self.after:
            parts.append(functional.pad(own, (0, 0, 0, 0, 0, 1))[:, :, 1:])
        return torch.cat(parts, dim=3)


class Chunks(NamedTuple):
    """Chunks of queries, one after the other, that each see a slice of the keys and some far ones."""

    sizes: tuple[int, ...]
    """Queries."""
    near: tuple[tuple[int, int], ...]
    """From and to which key."""
    far: tuple[Tensor, ...]
    """[n] int64, other keys."""
    masks: tuple[Tensor, ...]
    """[B, 1, Q, K] bool, of far keys and near ones."""

    @classmethod
    def of(cls, rows: Rows, pattern: Pattern) -> "Chunks":
        """Of a window with sinks, or of blocks and ends of blocks."""
        chunks = pattern.chunks(rows.length, rows.causal)
        far = [torch.tensor(chunk.far, dtype=torch.int64, device=rows.device) for chunk in chunks]
        masks = []
        for chunk, others in zip(chunks, far, strict=True):
            queries, near = (torch.arange(r.start, r.stop, device=rows.device) for r in (chunk.queries, chunk.near))
            masks.append(rows.grid(pattern, queries[None], torch.cat([others, near])[None]))
        near_ = tuple((chunk.near.start, chunk.near.stop) for chunk in chunks)
        return cls(tuple(len(chunk.queries) for chunk in chunks), near_, tuple(far), tuple(masks))

    def attend(self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, d] of each -> [B, H, T, d]."""
        found = []
        parts = zip(query.split(self.sizes, dim=2), self.near, self.far, self.masks, strict=True)
        for part, (first, last), far, mask in parts:
            keys, values = key[:, :, first:last], value[:, :, first:last]
            if len(far):
                keys = torch.cat([key.index_select(2, far), keys], dim=2)
                values = torch.cat([value.index_select(2, far), values], dim=2)
            found.append(kernel(part, keys, values, mask, False))
        return torch.cat(found, dim=2)


class Strided(NamedTuple):
    """Positions that are a multiple of the stride apart: each column of a row that is cut into lines."""

    stride: int
    mask: Tensor | None
    """[B, stride, n, n] bool; None where each sees all before it."""

    @classmethod
    def of(cls, rows: Rows, pattern: Pattern) -> "Strided":
        """Of a stride alone."""
        if rows.alike and rows.causal:
            return cls(pattern.stride, None)
        columns = _columns(rows, pattern.stride)
        return cls(pattern.stride, rows.grid(pattern, columns, columns))

    def attend(self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, d] of each -> [B, H, T, d]."""
        rows, heads, length, _ = query.shape
        lines = -(-length // self.stride)

        def cut(x: Tensor) -> Tensor:
            return _in_columns(_padded(x, lines * self.stride), self.stride).flatten(0, 1)

        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask.repeat_interleave(heads, dim=0)
        found = kernel(cut(query), cut(key), cut(value), mask, self.mask is None)
        return _in_order(found.unflatten(0, (rows, heads)))[:, :, :length]


class Union(NamedTuple):
    """A window, and positions that are a multiple of its width away: one softmax over the scores of both."""

    near: Gathered
    far: Tensor
    """[B, stride, n, n] bool, of each column of a row that is cut into lines; what the window has left out."""

    @classmethod
    def of(cls, rows: Rows, pattern: Pattern) -> "Union":
        """Of a window and a stride as wide, which share the query's own position alone."""
        columns = _columns(rows, pattern.stride)
        far = rows.grid(Pattern(stride=pattern.stride), columns, columns)
        own = torch.eye(columns.shape[1], dtype=torch.bool, device=rows.device)
        return cls(Gathered.of(rows, Pattern(window=pattern.window)), far & ~own)

    def attend(self, _: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, d] of each -> [B, H, T, d]; no kernel has it, and the scores of both parts are formed."""
        length, size, lines = query.shape[2], self.near.size, self.far.shape[-1]
        query, key, value = (_padded(x, lines * size) for x in (query, key, value))
        # As precise as a kernel's sums.
        low, wide = value.dtype, torch.promote_types(value.dtype, torch.float32)
        query, key = query.to(wide) * query.shape[3] ** -0.5, key.to(wide)
        near = query.unflatten(2, (lines, size)) @ self.near.keys(key).transpose(3, 4)
        near = near + hidden(self.near.mask, wide)[:, None]
        far = _in_columns(query, size) @ _in_columns(key, size).transpose(3, 4) + hidden(self.far, wide)[:, None]
        weights = torch.cat([near.flatten(2, 3), _in_order(far)], dim=-1).softmax(-1).to(low)
        close, others = weights.split([near.shape[-1], lines], dim=-1)
        found = (close.unflatten(2, (lines, size)) @ self.near.keys(value)).flatten(2, 3)
        return (found + _in_order(_in_columns(others, size) @ _in_columns(value, size)))[:, :, :length]


class Asking(NamedTuple):
    """T keys in their order, queries of the same, and of n more positions, of which the last sees all keys."""

    length: int
    """T."""
    mask: Tensor | None
    """[1, 1, n, T] bool; None where there are as many."""
    device: torch.device

    @classmethod
    def of(cls, length: int, count: int, device: torch.device) -> "Asking":
        """T keys, and n positions that ask."""
        if count == length:
            return cls(length, None, device)
        return cls(length, _lower(count, length, device), device)

    def attend(self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query [B, H, T + n, d], key and value [B, H, T, d] -> [B, H, T + n, d]."""
        own, asking = query[:, :, : self.length], query[:, :, self.length :]
        found = kernel(own, key, value, None, True), kernel(asking, key, value, self.mask, self.mask is None)
        return torch.cat(found, dim=2)

    def dense(self) -> Tensor:
        """[1, 1, T + n, T] bool."""
        own = _lower(self.length, self.length, self.device)
        return torch.cat([own, own if self.mask is None else self.mask], dim=2)


def _lower(queries: int, keys: int, device: torch.device) -> Tensor:
    """[1, 1, T, S] bool: the last query sees all keys, the one before it one less."""
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class Halves(NamedTuple):
    """One mask for each half of the heads."""

    masks: tuple["Mask", ...]


Mask = Tensor | BlockMask | Gathered | Chunks | Strided | Union | Asking | Halves | None
"""What is seen: [B, G, T, S] bool for each of G groups of heads side by side, a form of it, or None: see `Visible`."""
_FORMS: dict[str, Callable[[Rows, Pattern], Mask]] = {
    "gathered": Gathered.of,
    "chunks": Chunks.of,
    "strided": Strided.of,
    "union": Union.of,
}


def mask_of(rows: Rows, patterns: Patterns, *, in_blocks: bool, dense: bool) -> Mask:
    """The mask of a layer's patterns.

    Args:
        in_blocks: FlexAttention takes it.
        dense: the weights are formed, so the mask is T x T.
    """
    return (_shared if rows.alike else _made)(rows, patterns, in_blocks, dense)


def _made(rows: Rows, patterns: Patterns, in_blocks: bool, dense: bool) -> Mask:
    if rows.whole and all(pattern.covers(rows.length) for pattern in patterns):
        return None
    if dense:
        return rows.dense(patterns)
    if in_blocks:
        masks: list[Mask] = [rows.blocks(pattern) for pattern in patterns]
    else:
        masks = [_form(rows, pattern) for pattern in patterns]
    return masks[0] if len(masks) == 1 else Halves(tuple(masks))


def _form(rows: Rows, pattern: Pattern) -> Mask:
    documents, prefix = not rows.alike, rows.prefixes is not None
    form = pattern.form(rows.length, documents=documents, prefix=prefix, both_ways=not rows.causal)
    if form == "full" and rows.whole:
        return None
    return _FORMS[form](rows, pattern) if form in _FORMS else rows.dense((pattern,))


_shared = lru_cache(maxsize=8)(torch.inference_mode(False)(_made))
"""Of rows that are alike, for all batches of that length; never made in inference mode: no backward pass takes that."""


def hidden(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where a bool mask is False, else 0: what is added to scores.

    Torch fills by a mask that is broadcast in seven times the time of an addition, forward and backward.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _padded(x: Tensor, length: int) -> Tensor:
    return functional.pad(x, (0, 0, 0, length - x.shape[2])) if length > x.shape[2] else x


def _columns(rows: Rows, stride: int) -> Tensor:
    """[stride, n]: positions of each column of a row that is cut into lines."""
    lines = torch.arange(0, rows.length, stride, device=rows.device)
    return torch.arange(stride, device=rows.device)[:, None] + lines


def _in_columns(x: Tensor, stride: int) -> Tensor:
    """[B, H, T, d] -> [B, H, stride, T / stride, d]."""
    return x.unflatten(2, (-1, stride)).transpose(2, 3)


def _in_order(x: Tensor) -> Tensor:
    """The way back."""
    return x.transpose(2, 3).flatten(2, 3)
