"""Labels of characters as labels of tokens, and how a dataset stores them."""

import numpy as np

from data_pipeline.config import LabelsConfig
from data_pipeline.ingest.readers import Labelled
from data_pipeline.tokenize.tokenizer import Tokenizer


class LabelTokens:
    """Writes texts with labels. A document is its tokens, a question with an end-of-text before the text, and behind
    them its labels, whose numbers are added to the size of the vocabulary: one of the whole text, or one of each of the
    text's tokens. A text of which the tokenizer leaves nothing is an end-of-text without a label."""

    def __init__(self, labels: LabelsConfig, tokenizer: Tokenizer) -> None:
        """`labels`: as `data.labels`."""
        self.by_token, self._none = labels.kind != "sequence", labels.values - 1
        self._tokenizer = tokenizer

    def framed(self, ids: np.ndarray, labelled: Labelled | None, offsets: np.ndarray | None) -> np.ndarray:
        """Tokens, int64 [n], of a text with its labels behind them; of a question (None) with end-of-text.

        Args:
            offsets: of the text's tokens, as `Tokenizer.encode_with_offsets` gives them, if labels are `by_token`.
        """
        if labelled is None:
            return np.append(ids, self._tokenizer.eos_id).astype(np.int64)
        if not len(ids):
            ids, labels = np.array([self._tokenizer.eos_id]), np.array([self._none])
        elif offsets is not None:
            labels = labels_of_tokens(offsets, labelled)
        else:
            labels = np.array([stretch.label for stretch in labelled.stretches])
        return np.concatenate([ids, labels + self._tokenizer.vocab_size]).astype(np.int64)


def labels_of_tokens(offsets: np.ndarray, labelled: Labelled) -> np.ndarray:
    """The label of each token, int64 [n]: that of the first stretch which holds one of its characters.

    Args:
        offsets: where the tokens' characters begin and end, int64 [n, 2].
    """
    found = np.full(len(offsets), labelled.elsewhere, np.int64)
    starts, ends = offsets[:, 0], offsets[:, 1]
    for stretch in reversed(labelled.stretches):
        found[ends.searchsorted(stretch.start, "right") : starts.searchsorted(stretch.end, "left")] = stretch.label
    return found
