"""The target of a pair, from its source."""

from typing import TYPE_CHECKING

from pretrain.objectives.causal import next_tokens
from pretrain.objectives.objective import IGNORE, Objective, Setting

if TYPE_CHECKING:
    import numpy as np


class Pairs(Objective):
    """A model of two sequences reads the source and writes the target; a decoder alone reads both on end."""

    name = "pairs"
    of_pairs = labels_vary = True
    against_documents = "has one pair in a row"

    def __init__(self, setting: Setting) -> None:
        """Every tokenizer has what it needs: end-of-text."""
        super().__init__(setting)
        self._eos = setting.tokenizer().eos_id

    def arrays(
        self, windows: "np.ndarray", positions: "np.ndarray", starts: "np.ndarray | None", seed: int
    ) -> "dict[str, np.ndarray]":
        """Inputs and labels [B, T], padding, and what the decoder reads, or how far the sources go."""
        import numpy as np

        if not self.setting.two_sequences:
            return joined(windows)
        sources, targets = np.split(windows, 2, axis=1)
        start = np.full_like(targets[:, :1], self._eos)
        return {
            "input_ids": np.maximum(sources, 0),
            "labels": np.where(targets < 0, IGNORE, targets),
            "decoder_input_ids": np.concatenate([start, np.maximum(targets[:, :-1], 0)], axis=1),
            "segment_ids": np.where(sources < 0, -1, 0),
            "padding": sources < 0,
        }

    def label_sources(self, sources: "np.ndarray") -> "np.ndarray":
        """A pair is of one source."""
        return sources[:, :1]

    @classmethod
    def restricts_attention(cls, packed: bool) -> bool:
        """A source sees all of itself, and no padding."""
        return True


def joined(pairs: "np.ndarray") -> "dict[str, np.ndarray]":
    """Pairs int64 [B, 2 T] for a decoder alone: inputs and labels [B, T], lengths of the sources as prefixes, int64
    [B], and padding, bool [B, T].

    The source is the prefix, which may be seen whole; labels are the target's. Of pairs of more than T + 1 tokens the
    source is cut to what the target leaves, but not below half of them, and then the target.
    """
    import numpy as np

    rows, context = len(pairs), pairs.shape[1] // 2
    sources, targets = pairs[:, :context], pairs[:, context:]
    lengths, wanted = (sources >= 0).sum(axis=1), (targets >= 0).sum(axis=1)
    room = context + 1
    prefixes = np.minimum(lengths, np.maximum(room - wanted, room // 2))
    on_end = np.full((rows, room), -1, np.int64)
    for row, prefix in enumerate(prefixes.tolist()):
        on_end[row, :prefix] = sources[row, :prefix]
        target = min(int(wanted[row]), room - prefix)
        on_end[row, prefix : prefix + target] = targets[row, :target]
    inputs, labels = next_tokens(on_end)
    labels[np.arange(context) < prefixes[:, None] - 1] = IGNORE
    return {"input_ids": inputs, "labels": labels, "prefix_lengths": prefixes, "padding": on_end[:, :-1] < 0}
