"""What self attention costs whose scores are not q k^T over all keys, beside its maps. Free of torch."""

from typing import TYPE_CHECKING, NamedTuple

from model.config.mask_config import Site
from model.config.pattern_config import keys_seen
from model.config.scores_config import factors
from model.config.transformer import TransformerConfig
from model.costs.kernels import Attended, in_blocks

if TYPE_CHECKING:
    from model.costs.parts import Shape

_FP32 = 4


class Mixed(NamedTuple):
    """As in `Part`."""

    parameters: int
    flops: int
    saved: int
    forward_only: int = 0


def mixed(shape: "Shape", config: TransformerConfig, tokens: int, site: Site, *, causal: bool) -> Mixed | None:
    """Of a layer; None where scores are q k^T, as a decoder's are beside an encoder that sums its keys."""
    kind = config.scores.kind
    if kind == "synthesizer":
        return _synthesized(shape, config, tokens, causal=causal)
    if kind == "routing":
        return _within_clusters(shape, config, tokens, causal=causal)
    return _over_slots(shape, config, tokens) if kind == "linformer" and site == "enc_sa" else None


def formed_bytes(shape: "Shape", queries: int, keys: int, heads: int, rate: float) -> int:
    """Of weights that are formed."""
    square, size, low = heads * queries * keys, shape.size, shape.size < _FP32
    # The weights in fp32 and, where that is another type, in 16 bits; with dropout its factors and result.
    return shape.rows * square * (_FP32 + low * size + (rate > 0) * (1 if low else 2) * size)


def _synthesized(shape: "Shape", config: TransformerConfig, tokens: int, *, causal: bool) -> Mixed:
    heads, rate = config.heads, config.attention_rate
    parameters = config.scores.table_rows(config.context, config.width, heads)
    saved = (4 if "dot" in config.scores.parts else 2) * shape.vectors(tokens)  # what is read, values, q and k
    saved += _synthesizer_bytes(config, shape.rows, tokens, shape.size, documents=shape.dense_mask)
    saved += formed_bytes(shape, tokens, tokens, heads, rate)
    return Mixed(parameters, _synthesizer_flops(config, tokens, keys_seen(shape.patterns, tokens, causal)), saved)


def _within_clusters(shape: "Shape", config: TransformerConfig, tokens: int, *, causal: bool) -> Mixed:
    """As it is computed: over all keys with a mask."""
    rows, heads, rate = shape.rows, config.heads, config.attention_rate
    if config.scores.sorts(tokens, tokens, config.context) and not rate:
        return _by_cluster(shape, config, tokens, causal=causal)
    # What is read, queries, keys and values; what the maps gave, of which the norm of routed queries keeps a view, and
    # its statistics; what each head sees.
    kept = sum(config.score_channels) + config.width + 2 * config.scores.routed_heads_of(heads)
    saved = 4 * shape.vectors(tokens) + rows * tokens * kept * shape.size + rows * heads * tokens**2
    saved += formed_bytes(shape, tokens, tokens, heads, rate)
    found = _routing_flops(config, tokens, causal=causal)
    return Mixed(0, shape.scores(tokens, causal) + found, saved, found)


def _by_cluster(shape: "Shape", config: TransformerConfig, tokens: int, *, causal: bool) -> Mixed:
    """In blocks of the tokens of a cluster, and of a window; FLOPs are of what a query sees."""
    scores, heads, size = config.scores, config.heads, config.width // config.heads
    routed, window = scores.routed_heads_of(heads), scores.window_at(config.context)
    assert scores.cluster_window is not None
    sides = 1 if causal else 2
    seen = (heads - routed) * (sides * (window - 1) + 1) + routed * sides * scores.cluster_window
    # What is read, all queries and the result; of routed heads also keys, values, what queries were before their norm,
    # its statistics, and the order, there and back.
    saved = 3 * shape.vectors(tokens) + shape.rows * tokens * routed * ((3 * size + 2) * shape.size + 2 * 8)
    for count, block in ((heads - routed, window), (routed, scores.cluster_window)):
        of = Attended(shape.rows, tokens, count * size, count, shape.size, causal, documents=shape.dense_mask)
        masks = shape.rows * count if block == scores.cluster_window or shape.dense_mask else 1
        saved += in_blocks(of, block, (1 + sides) * block, masks)
    found = _routing_flops(config, tokens, causal=causal)
    return Mixed(0, tokens * 4 * seen * size + found, saved, found)


def _over_slots(shape: "Shape", config: TransformerConfig, tokens: int) -> Mixed:
    slots, rate = config.scores.slots, config.attention_rate
    formed = config.attention == "explicit" or rate > 0
    # What is read, queries, two copies of keys and values that are summed, and what they come to.
    saved = 4 * shape.vectors(tokens) + 2 * shape.vectors(slots)
    if config.positions == "rotary":
        saved += tokens * 2 * (config.width // config.heads // 2) * 2 * _FP32
    elif not formed:  # the queries are a view of all
        saved += 2 * shape.vectors(tokens) // config.queries_per_kv_head
    if formed:
        saved += formed_bytes(shape, tokens, slots, config.heads, rate)
    else:
        saved += shape.rows * config.heads * tokens * _FP32
    return Mixed(config.scores.slot_weights(config.context, config.heads), tokens * 8 * slots * config.width, saved)


def _synthesizer_flops(config: TransformerConfig, tokens: int, keys: float) -> int:
    """Of scores and of the weights times v, over so many keys of a query; tables give rows of the whole context."""
    width, rows, scores = config.width, config.context, config.scores
    of_part = {
        "dense": tokens * 2 * width * rows,
        "factorised_dense": tokens * 2 * width * sum(factors(rows)),
        "random": 0,
        "factorised_random": 2 * config.heads * tokens * scores.rank * tokens,
        "dot": round(2 * tokens * keys * width),
    }
    return sum(of_part[part] for part in scores.parts) + round(2 * tokens * keys * width)


def _synthesizer_bytes(config: TransformerConfig, rows: int, tokens: int, size: int, *, documents: bool) -> int:
    """Of what comes between the maps and the weights; `documents`: positions are each row's own."""
    heads, context, scores = config.heads, config.context, config.scores
    hidden, square, total = rows * tokens * config.width * size, heads * tokens * tokens * size, 0
    for part in scores.parts:
        mixed = 0 if part == "random" and scores.trainable and not documents else square
        if part in ("dense", "factorised_dense"):
            total += hidden + (rows * tokens * 8 if documents else 0)
            total += rows * heads * tokens * sum(factors(context)) * size if part == "factorised_dense" else 0
        if part not in ("random", "factorised_random") or documents:
            mixed = rows * square
        if part == "factorised_random" and documents:
            total += 2 * rows * heads * tokens * scores.rank * size
        total += mixed if len(scores.parts) > 1 else 0
    return total


def _routing_flops(config: TransformerConfig, tokens: int, *, causal: bool) -> int:
    """Of finding clusters; no gradient goes through it."""
    scores, routed = config.scores, config.scores.routed_heads_of(config.heads)
    clusters = scores.clusters_at(config.context)
    found = 2 * tokens * clusters * routed * (config.width // config.heads)
    if scores.assign == "balanced" and not causal:
        found += 2 * tokens**2 * clusters * routed
    return found
