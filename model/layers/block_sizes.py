"""When to compute open blocks of a feed forward one by one, and when all of them. Free of torch: planning reads it.

Both give the same, so it is a question of speed only. A block by itself costs some calls more; what it saves are the
products of the tokens that left it closed (benchmarks/gates.md).
"""

LEAST_PRODUCTS = 2**22
"""Multiplications of one of a block's maps, were it computed for all tokens, from which groups of tokens pay."""
LEAST_WEIGHTS = 2**16
"""Of one of a block's maps, from which a single token's open blocks pay."""
LEAST_PRODUCTS_CUDA = 2**33
"""An estimate from the time of a launch and of a product: not measured on a GPU yet."""


def pays(rows: int, width: int, block_width: int, *, cuda: bool = False) -> bool:
    """Whether open blocks alone are faster than all of them.

    Args:
        rows: tokens.
        block_width: hidden units of a block.
    """
    products = rows * width * block_width
    if cuda:
        return products >= LEAST_PRODUCTS_CUDA
    return products >= (LEAST_WEIGHTS if rows == 1 else LEAST_PRODUCTS)
