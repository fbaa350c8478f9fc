"""The last tokens of a random order (Yang et al. 2019, arXiv:1906.08237, equations 3 and 5)."""

from typing import TYPE_CHECKING

from pretrain.objectives.causal import Causal
from pretrain.objectives.objective import IGNORE, Objective

if TYPE_CHECKING:
    import numpy as np


class RandomOrder(Objective):
    """All T + 1 tokens of a window in an order of its own; the last ones are predicted, each from all before it.

    The order is one of spans of neighbours, all ways as likely; within a span it is the text's. What a partly filled
    window lacks comes last.
    """

    name = "permutation"
    continues_text = True
    in_order = Causal

    def arrays(
        self, windows: "np.ndarray", positions: "np.ndarray", starts: "np.ndarray | None", seed: int
    ) -> "dict[str, np.ndarray]":
        """Inputs [B, T] and labels [B, n] in that order, and their places in the text."""
        import numpy as np

        order = self._order(windows, positions, seed)
        tokens, targets = np.take_along_axis(windows, order, axis=1), self.setting.targets
        last = tokens[:, -targets:]
        return {
            "input_ids": np.maximum(tokens[:, :-1], 0),
            "labels": np.where(last < 0, IGNORE, last),
            "position_ids": order[:, :-1],
            "query_positions": order[:, -targets:],
        } | self.padding(tokens)

    def _order(self, windows: "np.ndarray", positions: "np.ndarray", seed: int) -> "np.ndarray":
        """Places in the order in which they are read, int64 [B, T + 1]."""
        import numpy as np

        from data_pipeline.sampling.shuffle import hashed

        width, span = windows.shape[1], self.setting.target_span
        rank = hashed(seed, "order", positions, width)
        if span > 1:
            lengths = 1 + (hashed(seed, "order: spans", positions, width) % np.uint64(span)).astype(np.int64)
            begins = np.zeros_like(windows)
            ends = np.minimum(lengths.cumsum(axis=1), width)  # what begins behind the window is none
            for row, end in zip(begins, ends, strict=True):
                row[end[end < width]] = 1
            rank = np.take_along_axis(rank, begins.cumsum(axis=1), axis=1)
        rank = np.where(windows < 0, np.uint64(2**64 - 1), rank)
        return np.argsort(rank, axis=1, kind="stable")
