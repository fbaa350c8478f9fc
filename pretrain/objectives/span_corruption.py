"""Spans that are cut out (T5: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4)."""

from typing import TYPE_CHECKING

from data_pipeline.errors import DataError
from pretrain.objectives.objective import IGNORE, Objective, Setting

if TYPE_CHECKING:
    import numpy as np

NOISE_DENSITY = 0.15
"""Share of tokens that are cut out."""
MEAN_SPAN = 3.0
"""Tokens."""


class SpanCorruption(Objective):
    """Spans are cut out, each leaves a sentinel, and behind the same sentinel it stands in the labels.

    All windows have the same numbers of spans and of tokens cut out, so shapes are fixed: inputs [B, T - noise + spans
    + 1], labels [B, noise + spans + 1], both with end-of-text at the end.
    """

    name = "span_corruption"
    whole_windows = True

    def __init__(self, setting: Setting, density: float = NOISE_DENSITY, mean_span: float = MEAN_SPAN) -> None:
        """Raises DataError when the tokenizer has too few sentinels."""
        super().__init__(setting)
        context, tokenizer = setting.context, setting.tokenizer()
        self.noise = min(max(round(context * density), 1), context - 1)
        self.spans = min(max(round(self.noise / mean_span), 1), self.noise, context - self.noise)
        if len(tokenizer.sentinel_ids) < self.spans:
            raise DataError(
                f"span corruption of {context} tokens needs {self.spans} sentinels, the tokenizer has "
                f"{len(tokenizer.sentinel_ids)}: set data.tokenizer.sentinels={self.spans} and build again, or use a "
                "shorter context"
            )
        self._sentinels = tokenizer.sentinel_ids[: self.spans]
        self._eos = tokenizer.eos_id

    def arrays(
        self, windows: "np.ndarray", positions: "np.ndarray", starts: "np.ndarray | None", seed: int
    ) -> "dict[str, np.ndarray]":
        """Inputs, labels, and what the decoder reads: the labels, each a place later, behind end-of-text."""
        import numpy as np

        from data_pipeline.sampling.shuffle import hashed

        rows, left = len(windows), self.setting.context - self.noise
        kept = self._lengths(left, hashed(seed, "kept", positions, left - 1))
        cut = self._lengths(self.noise, hashed(seed, "cut", positions, self.noise - 1))
        inputs = np.empty((rows, left + self.spans + 1), np.int64)
        labels = np.empty((rows, self.noise + self.spans + 1), np.int64)
        for row in range(rows):
            lengths = np.stack([kept[row], cut[row]], axis=1).ravel()
            is_cut = np.repeat(np.tile([False, True], self.spans), lengths)
            window = np.maximum(windows[row, :-1], 0)
            inputs[row, :-1] = np.insert(window[~is_cut], np.cumsum(kept[row]), self._sentinels)
            labels[row, :-1] = np.insert(window[is_cut], np.cumsum(cut[row]) - cut[row], self._sentinels)
        inputs[:, -1] = labels[:, -1] = self._eos
        written = np.concatenate([np.full((rows, 1), self._eos), labels[:, :-1]], axis=1)
        short = np.any(windows[:, :-1] < 0, axis=1)  # spans are cut out of whole windows
        labels[short] = IGNORE
        made = {"input_ids": inputs, "labels": labels, "decoder_input_ids": written}
        return made | ({"padding": np.repeat(short, inputs.shape[1]).reshape(inputs.shape)} if short.any() else {})

    def label_sources(self, sources: "np.ndarray") -> "np.ndarray":
        """Labels are all of the source that their window begins in."""
        return sources[:, :1]

    def _lengths(self, total: int, draws: "np.ndarray") -> "np.ndarray":
        """`total` tokens in as many parts as there are spans, none empty, all ways as likely: int64 [B, spans].

        The smallest of the draws, one for each gap between two tokens, say where to cut.
        """
        import numpy as np

        cuts = np.sort(np.argsort(draws, axis=1, kind="stable")[:, : self.spans - 1], axis=1) + 1
        return np.diff(cuts, axis=1, prepend=0, append=total)
