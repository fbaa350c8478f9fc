"""Bytes that attention with a pattern keeps for its backward pass, by the form it is computed in (`Pattern.form`)."""

from typing import NamedTuple

from model.config.pattern_config import Pattern, Patterns

_FP32 = 4


class Attended(NamedTuple):
    """What attention within a stream is computed over."""

    rows: int
    tokens: int
    width: int
    heads: int
    size: int
    """Bytes of an element."""
    causal: bool
    documents: bool
    """A mask is each row's own."""
    dense: bool = False
    """Other attentions form their weights, so the mask that all share is T x T."""


class Kept(NamedTuple):
    """Of an attention."""

    saved: int
    """Bytes of masks and sums, and of what follows."""
    views: bool = True
    """Queries, keys and values are kept as they come; else copies of them are in `saved`."""
    result: bool = False
    """The kernel's result is in `saved`: it is not the one that the next map reads, but laid out otherwise."""


def kept_by(patterns: Patterns, of: Attended) -> Kept:
    """Of a layer's patterns, one for each group of heads."""
    of = of._replace(width=of.width // len(patterns), heads=of.heads // len(patterns))
    each = [_kept(pattern, of) for pattern in patterns]
    saved = sum(kept.saved for kept in each)
    anew = len(patterns) > 1 or _form(patterns[0], of) not in ("full", "dense")
    saved -= 0 if anew else of.rows * of.tokens * of.width * of.size
    return Kept(saved, any(kept.views for kept in each), anew)


def kept_by_streams(of: Attended, asking: int) -> Kept:
    """Where so many of the tokens only ask: two attentions, whose results are put together."""
    keys = of.tokens - asking
    mask = asking * keys * of.size if asking < keys else 0
    results = of.rows * of.tokens * of.width * of.size
    return Kept(of.rows * of.heads * of.tokens * _FP32 + mask + results, result=True)


def _form(pattern: Pattern, of: Attended) -> str:
    form = pattern.form(of.tokens, documents=of.documents, both_ways=not of.causal)
    return "dense" if of.dense and form != "full" else form


def _kept(pattern: Pattern, of: Attended) -> Kept:
    form, rows = _form(pattern, of), of.rows if of.documents else 1
    if form == "chunks":
        chunks = pattern.chunks(of.tokens, of.causal)
        scores = sum(len(chunk.queries) * (len(chunk.far) + len(chunk.near)) for chunk in chunks)
        copied = sum(2 * (len(chunk.far) + len(chunk.near)) for chunk in chunks if chunk.far)
        return Kept(_saved(of, of.tokens, of.tokens + copied) + rows * scores * of.size)
    if form in ("full", "dense"):
        mask = 0 if form == "full" and not of.documents else rows * of.tokens**2
        return Kept(_saved(of, of.tokens, of.tokens) + mask * of.size)
    each_head = of.rows * of.heads if of.documents else 1
    if form == "strided":
        lines = -(-of.tokens // pattern.stride)
        whole = lines * pattern.stride
        mask = 0 if of.causal and not of.documents else each_head * whole * lines
        return Kept(_saved(of, whole, 4 * whole) + mask * of.size, views=False)
    if form == "union":
        return Kept(_by_one_softmax(of, pattern.stride), views=False)
    size = pattern.window or pattern.block
    seen = min(pattern.sinks, of.tokens) + size * (1 + bool(pattern.window) * (1 if of.causal else 2))
    return Kept(in_blocks(of, size, seen, each_head), views=False)


def _by_one_softmax(of: Attended, stride: int) -> int:
    """Copies in blocks and by columns, weights, and those of the columns once more."""
    lines, low = -(-of.tokens // stride), of.size < _FP32
    near = 2 if of.causal else 3
    vectors = (3 + near) * _FP32 + (1 + near) * of.size  # of queries and keys in fp32, and of values
    weights = (near * stride + lines) * (_FP32 + low * of.size) + lines * of.size
    return of.rows * lines * stride * (vectors * of.width + of.heads * weights)


def in_blocks(of: Attended, size: int, seen: int, masks: int) -> int:
    """Blocks of `size` queries with copies of the keys they see, and so many masks."""
    blocks = -(-of.tokens // size)
    mask = masks * blocks * size * seen
    return _saved(of, blocks * size, 2 * blocks * (size + seen)) + mask * of.size


def _saved(of: Attended, queries: int, vectors: int) -> int:
    """Sums of so many queries, and so many vectors, the result's own among them."""
    return of.rows * (of.heads * queries * _FP32 + vectors * of.width * of.size)
