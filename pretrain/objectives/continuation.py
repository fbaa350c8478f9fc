"""The next tokens behind a prefix, a chunk of them, by a model that reads one sequence and writes another."""

from typing import TYPE_CHECKING

from pretrain.objectives.objective import IGNORE, Objective, Setting

if TYPE_CHECKING:
    import numpy as np


class NextChunk(Objective):
    """The source is the start of a window, as far as a random place; the target is the chunk behind it."""

    name = "continuation"
    labels_vary = continues_text = True
    against_documents = "reads the start of a window both ways, whatever documents are in it"

    def __init__(self, setting: Setting) -> None:
        """Every tokenizer has what it needs: end-of-text."""
        super().__init__(setting)
        self._eos, self._chunk = setting.tokenizer().eos_id, setting.targets

    def arrays(
        self, windows: "np.ndarray", positions: "np.ndarray", starts: "np.ndarray | None", seed: int
    ) -> "dict[str, np.ndarray]":
        """Inputs [B, T], labels [B, chunk], what the decoder reads, and padding.

        Of a window of n tokens the source has 1 to n - chunk, all as likely; where it is shorter than that, one token.
        """
        import numpy as np

        from data_pipeline.sampling.shuffle import hashed

        held = (windows >= 0).sum(axis=1)
        choices = np.maximum(held - self._chunk, 1).astype(np.uint64)
        lengths = 1 + (hashed(seed, "continuation", positions, 1)[:, 0] % choices).astype(np.int64)
        places = np.arange(self.setting.context)
        behind = (places >= lengths[:, None]) | (windows[:, :-1] < 0)
        wanted = lengths[:, None] + np.arange(self._chunk)
        targets = np.take_along_axis(windows, np.minimum(wanted, windows.shape[1] - 1), axis=1)
        targets[wanted >= windows.shape[1]] = -1
        start = np.full_like(targets[:, :1], self._eos)
        return {
            "input_ids": np.where(behind, 0, windows[:, :-1]),
            "labels": np.where(targets < 0, IGNORE, targets),
            "decoder_input_ids": np.concatenate([start, np.maximum(targets[:, :-1], 0)], axis=1),
            "segment_ids": np.where(behind, -1, 0),
            "padding": behind,
        }

    def label_sources(self, sources: "np.ndarray") -> "np.ndarray":
        """Labels are all of the source that their window begins in."""
        return sources[:, :1]

    @classmethod
    def restricts_attention(cls, packed: bool) -> bool:
        """A source sees all of itself, and no padding."""
        return True
