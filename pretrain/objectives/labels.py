"""Labels of texts, of their tokens, or where in them an answer stands (Devlin et al. 2019, arXiv:1810.04805)."""

from typing import TYPE_CHECKING

from data_pipeline.ingest.labels import ANSWER
from pretrain.objectives.objective import IGNORE, Objective

if TYPE_CHECKING:
    import numpy as np


class Labels(Objective):
    """A text is a row, cut off behind T tokens. An answer that is cut off is no label."""

    name = "labels"
    of_labels = labels_vary = True

    @property
    def needs_documents(self) -> bool:
        """A row is one document."""
        return False

    def arrays(
        self, windows: "np.ndarray", positions: "np.ndarray", starts: "np.ndarray | None", seed: int
    ) -> "dict[str, np.ndarray]":
        """Inputs [B, T], padding, and labels: [B, 1] of the texts, [B, T] of tokens, [B, 2] of where answers begin and
        end."""
        import numpy as np

        texts, labels = np.split(windows, 2, axis=1)
        behind = texts < 0
        if self.setting.label_kind == "sequence":
            labels = labels[:, :1]
        elif self.setting.label_kind == "span":
            labels = _places(labels, whole=behind[:, -1])
        return {
            "input_ids": np.maximum(texts, 0),
            "labels": np.where(labels < 0, IGNORE, labels),
            "padding": behind,
            "segment_ids": np.where(behind, -1, 0),
        }

    def label_sources(self, sources: "np.ndarray") -> "np.ndarray":
        """A text is of one source."""
        return sources[:, :1]

    @classmethod
    def restricts_attention(cls, packed: bool) -> bool:
        """Tokens see both ways, so padding has to be kept from them."""
        return True


def _places(labels: "np.ndarray", whole: "np.ndarray") -> "np.ndarray":
    """First and last token of each answer, int64 [B, 2], of labels [B, T]; -1 where there is none, or it may go on
    behind the row, which is not the `whole` text."""
    import numpy as np

    within = labels == ANSWER
    last = within.shape[1] - 1 - within[:, ::-1].argmax(axis=1)
    found = np.stack([within.argmax(axis=1), last], axis=1)
    found[~within.any(axis=1) | (within[:, -1] & ~whole)] = -1
    return found
