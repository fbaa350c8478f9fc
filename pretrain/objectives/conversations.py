"""What the assistant says in a conversation; of plain text among them, each next token."""

from typing import TYPE_CHECKING

from pretrain.objectives.causal import Causal
from pretrain.objectives.objective import IGNORE, Setting

if TYPE_CHECKING:
    import numpy as np


class Conversations(Causal):
    """Labels are the tokens after the inputs, where these are marked as to be written: `Manifest.chat_template`."""

    name = "conversations"
    of_conversations = labels_vary = True

    def __init__(self, setting: Setting) -> None:
        """Every tokenizer has what it needs."""
        super().__init__(setting)
        self._vocab_size = setting.tokenizer().vocab_size

    @property
    def predicts_every_token(self) -> bool:
        """Not what is only read."""
        return False

    def arrays(
        self, windows: "np.ndarray", positions: "np.ndarray", starts: "np.ndarray | None", seed: int
    ) -> "dict[str, np.ndarray]":
        """Inputs and labels [B, T], padding, and where documents are, if they are kept apart."""
        import numpy as np

        written = windows >= self._vocab_size
        made = super().arrays(windows - self._vocab_size * written, positions, starts, seed)
        return made | {"labels": np.where(written[:, 1:], made["labels"], IGNORE)}
