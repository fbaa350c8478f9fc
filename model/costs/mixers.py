"""What attention costs whose scores are not q k^T over all keys. Free of torch."""

from model.config.scores_config import factors
from model.config.transformer import TransformerConfig


def synthesizer_flops(config: TransformerConfig, tokens: int, keys: float) -> int:
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


def synthesizer_bytes(config: TransformerConfig, rows: int, tokens: int, size: int, *, documents: bool) -> int:
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
