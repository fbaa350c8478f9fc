"""Bytes that an attention keeps for its backward pass, as torch saves them. Free of torch."""

from typing import TYPE_CHECKING, Any

from model.config.pattern_config import FULL
from model.config.transformer import TransformerConfig
from model.costs.kernels import Attended, Kept, kept_by, kept_by_streams
from model.costs.mixers import formed_bytes

if TYPE_CHECKING:
    from model.costs.parts import Shape

_FP32 = 4


def attention_bytes(
    shape: "Shape",
    queries: int,
    keys: int,
    heads: int,
    *,
    causal: bool,
    group: int = 1,
    rate: float = 0.0,
    cross: bool = False,
    aligned: bool = True,
    read: bool = True,
    in_layer: bool = False,
) -> int:
    """Saved from the projections to the result; `read`: by a linear map, which keeps it; `in_layer`: not of a mask."""
    config, rows, size, shared = shape.transformer, shape.rows, shape.size, shape.sharing > 1
    heads //= shape.sharing
    turned = config.positions == "rotary" and aligned
    total = shape.vectors(queries) if read else 0
    patterns = shape.patterns if aligned and not shape.in_blocks else (FULL,)
    formed = in_layer and config.weights.shapes(aligned=aligned)
    seen = keys - shape.asking
    if formed or config.attention == "explicit" or rate:
        total += shape.vectors(queries) + 2 * shape.vectors(seen)
        if formed and config.weights.kind == "adaptive_span":
            total += (rows if shape.dense_mask else 1) * (queries + keys) * 8  # positions
        total += formed_bytes(shape, queries, seen, heads, rate)
    else:
        kept = Kept(rows * heads * queries * 4 + (rows * queries * keys * size if shape.dense_mask else 0))
        if aligned:
            dense = config.needs_weights
            of = Attended(rows, keys, config.width // shape.sharing, heads, size, causal, shape.dense_mask, dense)
            kept = kept_by_streams(of, shape.asking) if shape.asking else kept_by(patterns, of)
        # Where ranks share rows, what is read is a copy of the result.
        total += kept.saved + (0 if (read and not shared) or kept.result else shape.vectors(queries))
        # Kernels read views of the projections, or turned and repeated copies beside them; of what came from other
        # ranks, turned before it went, they read views, too.
        if kept.views:
            total += shape.vectors(queries) + 2 * shape.vectors(keys if group == 1 else seen)
        if kept.views and shared:
            total += 2 * shape.vectors(keys) // group if group > 1 else 0
        elif kept.views and turned and group == 1:
            total += shape.vectors(keys) + (0 if cross else shape.vectors(queries))
        elif kept.views and not turned and not cross and group > 1:
            total += 2 * shape.vectors(keys) // group
    if turned:
        half = config.width // (heads * shape.sharing) // 2
        apart = config.document_mask or shared or shape.asking
        total += (shape.held(queries + keys) if apart else queries + keys) * half * 2 * _FP32
    return total


def in_layers(config: TransformerConfig) -> dict[str, Any]:
    """Of the attentions in layers; those of masks have neither."""
    return {"group": config.queries_per_kv_head, "rate": config.attention_rate, "in_layer": True}
