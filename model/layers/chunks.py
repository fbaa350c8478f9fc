"""How many tokens' logits the loss holds at a time. Free of torch: login nodes count what they take."""

CHUNK_BYTES = 64 * 2**20
"""Of a chunk's logits in fp32, unless the table's gradient is larger (benchmarks/loss.md)."""


def chunk_tokens(tokens: int, vocabulary: int, width: int) -> int:
    """Tokens whose logits are held at a time; all chunks are about as large.

    Each chunk adds to the gradient of the table [V, C], which is held in any case: a chunk of C tokens is as large.
    """
    most = max(1, width, CHUNK_BYTES // (4 * vocabulary))
    return -(-tokens // -(-tokens // most))
