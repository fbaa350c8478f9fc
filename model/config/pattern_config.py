"""What the attention of each layer sees of a text: windows, sinks, global tokens, strides. Free of torch."""

from functools import lru_cache
from math import log2
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, model_validator

CHUNK = 256
"""Queries that share a slice of the keys, where a window is computed chunk by chunk."""
_MOST_GATHERED = 128
"""Tokens of the widest window that is computed in blocks of its own width (benchmarks/attention.md)."""
_FEWER = 3
"""A query is scored against one in so many of a row's keys at most, where one softmax over window and stride pays."""
_MOST = 2**31 - 1
"""Of tokens that a key may name: more than any text has."""
FEWEST = 256
"""Tokens in a row from which on other forms than a mask T x T pay."""


class QueryChunk(NamedTuple):
    """Queries that are computed together, and the keys that one of them may see."""

    queries: range
    near: range
    """Keys around them."""
    far: list[int]
    """Other keys: sinks, and ends of blocks."""


Form = Literal["full", "dense", "gathered", "chunks", "strided", "union"]
"""How a pattern is computed where FlexAttention does not run: as if there were none; with a mask T x T; blocks of
queries with those of keys that they see; chunks of queries, one after the other; each column of T / stride rows on its
own; the same and blocks, by one softmax."""


class Pattern(NamedTuple):
    """Which positions a query sees of its text: its own, and the union of all that is set here.

    All counts from the text's first token. A text read both ways is seen alike from both sides.
    """

    full: bool = False
    """Everything."""
    window: int = 0
    """Less than so far away."""
    sinks: int = 0
    """The first so many."""
    marked: tuple[int, ...] = ()
    """These see everything and are seen by all."""
    stride: int = 0
    """At a distance that it divides."""
    block: int = 0
    """In the query's own block of so many."""
    summary: int = 0
    """The last so many of each `period`."""
    period: int = 0

    def sees(self, q: Any, k: Any) -> Any:
        """Whether the query at position q sees the key at k, of whole numbers or tensors of them.

        Causality, documents and prefixes stand in `model.attention.rule`.
        """
        seen = (q == k) | self.full
        if self.window:
            seen = seen | (abs(q - k) < self.window)
        if self.sinks:
            seen = seen | (k < self.sinks)
        for position in self.marked:
            seen = seen | (q == position) | (k == position)
        if self.stride:
            seen = seen | ((q - k) % self.stride == 0)
        if self.block:
            seen = seen | (q // self.block == k // self.block)
        if self.summary:
            seen = seen | (k % self.period >= self.period - self.summary)
        return seen

    def covers(self, tokens: int) -> bool:
        """Whether it sees all of a text of so many tokens."""
        return self.full or self.stride == 1 or max(self.window, self.block) >= tokens

    def retained(self) -> tuple[int, int] | None:
        """How many of a text's first positions, and of its last, later queries need; None: all."""
        if self.full or self.stride or self.summary:
            return None
        return max([self.sinks, *(position + 1 for position in self.marked)]), max(self.window, self.block, 1)

    def form(self, tokens: int, *, documents: bool = False, prefix: bool = False, both_ways: bool = False) -> Form:
        """How it is computed over rows of so many tokens: the fastest, as measured on a CPU (benchmarks/attention.md).

        Args:
            documents: positions do not count from the start of the row, so sinks and blocks have no fixed columns.
            prefix: the start of each row is seen by all of it.
            both_ways: a query sees what comes after it, too.
        """
        if self.covers(tokens):
            return "full"
        near = self.window or self.block
        counted = self.sinks or self.block or self.summary
        if prefix or self.marked or (documents and counted) or tokens < max(FEWEST, 4 * max(near, self.period)):
            return "dense"
        if self.stride and (near or counted):
            few = _FEWER * ((2 + both_ways) * near + tokens / self.stride) <= tokens
            pays = few and tokens >= (1 + both_ways) * FEWEST
            return "union" if pays and self.window == self.stride and not counted else "dense"
        if self.stride:
            return "strided"
        if not self.summary and (self.block or near <= _MOST_GATHERED):
            return "gathered"
        return "chunks" if tokens > CHUNK else "dense"

    def chunks(self, tokens: int, causal: bool) -> list[QueryChunk]:
        """What is seen in rows of one text of so many tokens; without strides and marked positions."""
        found, wide, long = [], max(self.window - 1, 0), max(self.block, 1)
        far = [
            k
            for k in range(tokens)
            if k < self.sinks or (self.summary and k % self.period >= self.period - self.summary)
        ]
        for start in range(0, tokens, CHUNK):
            end = min(start + CHUNK, tokens)
            first = max(0, min(start - wide, start // long * long))
            last = end if causal else min(tokens, max(end + wide, -(-end // long) * long))
            others = [k for k in far if k < first or (k >= last and not causal)]
            found.append(QueryChunk(range(start, end), range(first, last), others))
        return found


FULL = Pattern(full=True)
Patterns = tuple[Pattern, ...]
"""Of a layer: one, or one of each half of its heads."""


@lru_cache(maxsize=256)
def keys_seen(patterns: Patterns, tokens: int, causal: bool) -> float:
    """By the last query of a text, or by the one in the middle where it is read both ways; the mean over the heads.

    So a layer without a pattern has `tokens` of them, and FLOPs are counted over a square in either case.
    """
    query = tokens - 1 if causal else tokens // 2
    return sum(bool(p.sees(query, key)) for p in patterns for key in range(tokens)) / len(patterns)


class PatternConfig(BaseModel, extra="forbid", frozen=True):
    """What attention within a stream, and that of its masks, sees of a text (docs/attention.md).

    Local windows: "Longformer" (Beltagy et al. 2020, arXiv:2004.05150, section 3.1); sinks: Xiao et al. 2023
    (arXiv:2309.17453, section 3). Strided and fixed: Child et al. 2019 (arXiv:1904.10509, sections 4.2 and 4.3).
    """

    kind: Literal["full", "window", "strided", "fixed"] = "full"
    """Everything; a window; a window and every `stride`th token before; the own block and the ends of those before."""
    window: int | None = Field(default=None, ge=1, le=_MOST)
    """For `window`: so many tokens, the query's own included; to either side where a text is read both ways."""
    windows: list[int] = []
    """For `window`: that of each layer, in the place of one for all; `duet checkpoint shrink --spans` writes them."""
    sinks: int = Field(default=0, ge=0, le=_MOST)
    """For `window`: the first so many tokens of a text are seen by all of it."""
    globals: list[int] = []
    """For `window`: positions from 0 that see everything and are seen by all, as far as causality allows."""
    full_every: int = Field(default=0, ge=0)
    """Layers n, 2 n, …, counted from 1, see everything; none unless given."""
    stride: int | None = Field(default=None, ge=2, le=_MOST)
    """For `strided` and `fixed`: length of the window or block; a power of two near √context unless given."""
    summary: int | None = Field(default=None, ge=1, le=_MOST)
    """For `fixed`: so many tokens at the end of each block are seen by all after it; stride / 4 unless given."""
    merge: Literal["union", "alternate", "heads"] = "union"
    """For `strided` and `fixed`: each head sees both parts; layers take the first and the second in turn; or half of
    the heads takes each."""

    def of_layer(self, layer: int, context: int) -> Patterns:
        """What the heads of a layer see; `layer` counts from 0 in its stream."""
        if self.kind == "full" or (self.full_every and (layer + 1) % self.full_every == 0):
            return (FULL,)
        if self.kind == "window":
            window = self.windows[layer] if self.windows else self.window
            assert window is not None
            return (Pattern(window=window, sinks=self.sinks, marked=tuple(self.globals)),)
        stride = self.stride_at(context)
        near, far = Pattern(window=stride), Pattern(stride=stride)
        if self.kind == "fixed":
            near, far = Pattern(block=stride), Pattern(summary=self.summary or max(1, stride // 4), period=stride)
        if self.merge == "heads":
            return near, far
        if self.merge == "alternate":
            turn = layer - (layer // self.full_every if self.full_every else 0)  # full layers take none
            return (far if turn % 2 else near,)
        return (near._replace(stride=far.stride, summary=far.summary, period=far.period),)

    def stride_at(self, context: int) -> int:
        """Of `strided` and `fixed` at a context: "close to √n" (section 4.2)."""
        return self.stride or max(2, 2 ** round(log2(context) / 2))

    @model_validator(mode="after")
    def _keys_are_of_the_kind(self) -> "PatternConfig":
        sparse = ("strided", "fixed")
        of = {
            "window": ("window",),
            "windows": ("window",),
            "sinks": ("window",),
            "globals": ("window",),
            "stride": sparse,
            "merge": sparse,
        }
        of |= {"summary": ("fixed",), "full_every": ("window", *sparse)}
        for key, kinds in of.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.kind not in kinds:
                raise ValueError(f"pattern.{key} is for pattern.kind={' or '.join(kinds)}, not {self.kind}")
        if self.windows and (self.window or self.full_every or min(self.windows) < 1):
            raise ValueError("pattern.windows is a width of 1 or more for each layer; leave window and full_every out")
        if self.kind == "window" and self.window is None and not self.windows:
            raise ValueError("pattern.kind=window: how wide? set pattern.window, such as 512")
        if self.full_every == 1:
            raise ValueError("pattern.full_every=1 makes every layer full; leave pattern out, or take 2 or more")
        if min(self.globals, default=0) < 0 or len(set(self.globals)) < len(self.globals):
            raise ValueError(f"pattern.globals takes different positions from 0 on, not {self.globals}")
        return self

    def check(self, layers: int, heads: dict[str, int], context: int) -> None:
        """Raises ValueError unless it fits a model of these."""
        if self.full_every > layers:
            raise ValueError(f"pattern.full_every={self.full_every}: of {layers} layers none would be full")
        if self.windows and len(self.windows) != layers:
            raise ValueError(f"pattern.windows has {len(self.windows)} widths, and there are layers={layers}")
        if self.sinks > context:
            raise ValueError(f"pattern.sinks={self.sinks}: a text has context={context} tokens; take fewer, such as 4")
        if max(self.globals, default=0) >= context:
            raise ValueError(f"pattern.globals: no text has a position {max(self.globals)}, since context={context}")
        if self.merge == "alternate" and layers < 2:
            raise ValueError("pattern.merge=alternate takes turns between layers, so it needs layers >= 2")
        if self.kind in ("strided", "fixed") and self.stride_at(context) > context:
            raise ValueError(f"pattern.stride={self.stride} is more than context={context}; take about its root")
        if self.summary and self.summary > self.stride_at(context):
            raise ValueError(f"pattern.summary={self.summary} is more than a block of {self.stride_at(context)} tokens")
        for key, count in heads.items():
            if self.merge == "heads" and count % 2:
                raise ValueError(f"pattern.merge=heads gives half of the heads to each part, and {key}={count} is odd")
