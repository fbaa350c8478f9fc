"""The next token of each."""

from typing import TYPE_CHECKING

from pretrain.objectives.objective import IGNORE, Objective

if TYPE_CHECKING:
    import numpy as np


class Causal(Objective):
    """Labels are the tokens after the inputs."""

    name = "causal"
    takes_packed = takes_boundaries = continues_text = True

    @property
    def predicts_every_token(self) -> bool:
        """Unless the first token of a document is nobody's label, or windows drop the text between them."""
        return not (self.needs_documents or self.setting.packed)

    def arrays(
        self, windows: "np.ndarray", positions: "np.ndarray", starts: "np.ndarray | None", seed: int
    ) -> "dict[str, np.ndarray]":
        """Inputs and labels [B, T], and where documents are, if they are kept apart."""
        inputs, labels = next_tokens(windows, starts)
        made = {"input_ids": inputs, "labels": labels} | self.padding(windows)
        if self.setting.document_mask:
            from pretrain.objectives.documents import sequences

            assert starts is not None
            made["segment_ids"], made["position_ids"] = sequences(starts, *inputs.shape)
        return made


def next_tokens(windows: "np.ndarray", document_starts: "np.ndarray | None" = None) -> "tuple[np.ndarray, np.ndarray]":
    """Inputs [B, T] and the token after each, of windows int64 [B, T + 1]; IGNORE where there is none (-1).

    With `document_starts`, the first token of a document is nobody's label: what came before has no say in it.
    """
    import numpy as np

    labels = np.where(windows[:, 1:] < 0, IGNORE, windows[:, 1:])
    if document_starts is not None:
        row, column = np.divmod(document_starts, windows.shape[1])
        labels[row, column - 1] = IGNORE
    return np.maximum(windows[:, :-1], 0), labels
