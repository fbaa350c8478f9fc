"""Documents in windows of text: their numbers in a row, and places in them."""

import numpy as np


def sequences(document_starts: np.ndarray, rows: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents in inputs [B, T]; each row begins one, and padding is one, too.

    Args:
        document_starts: `row * (T + 1) + column`, ascending, as a reader gives them.
        rows: B.
        context: T.

    Returns:
        number of each token's document in its row, from 0, int32 [B, T]; and its place in it, from 0, int64 [B, T].
    """
    row, column = np.divmod(document_starts, context + 1)
    inside = column < context  # The last token of a window is a label only.
    begins = np.zeros((rows, context), bool)
    begins[:, 0] = True
    begins[row[inside], column[inside]] = True
    where = np.flatnonzero(begins)
    flat = np.arange(rows * context)
    lengths = np.diff(where, append=rows * context)
    return np.cumsum(begins, axis=1, dtype=np.int32) - 1, (flat - np.repeat(where, lengths)).reshape(rows, context)
