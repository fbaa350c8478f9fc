"""The held-out text that probes are trained and tested on."""

from typing import Literal, NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sampling.windows import Windows

TRAIN = 2 / 3
"""Share of the text that probes are trained on."""


class Chosen(NamedTuple):
    """Numbers of windows, int64 [n] each."""

    train: np.ndarray
    test: np.ndarray
    apart: Literal["documents", "text"]
    """No document is in both; or there is but one, which was cut."""


def choose(windows: Windows, tokens: int) -> Chosen:
    """Windows of about so many tokens, evenly from all of the text; those to train on come before those to test on.

    Raises:
        DataError: there is too little text to have both.
    """
    count = min(len(windows), max(2, tokens // windows.context))
    chosen = np.unique(np.linspace(0, len(windows) - 1, count).astype(np.int64))
    middle = min(int(TRAIN * len(chosen)), len(chosen) - 1)
    documents = [[number for number, _ in windows.origin(int(index)).documents] for index in chosen]
    first, last = np.array([(of_window[0], of_window[-1]) for of_window in documents]).T
    for begin in (first[middle], first[middle] + 1):  # of the test's documents
        train, test = chosen[last < begin], chosen[first >= begin]
        if len(train) and len(test):
            return Chosen(train, test, "documents")
    if middle == 0:
        raise DataError(
            f"the held-out text has {windows.num_tokens} tokens: too few to train probes and test them; hold out more"
        )
    return Chosen(chosen[:middle], chosen[middle:], "text")
