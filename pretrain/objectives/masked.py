"""Tokens that are hidden, from all others (Devlin et al. 2019, arXiv:1810.04805, section 3.1)."""

from typing import TYPE_CHECKING

from data_pipeline.errors import DataError
from pretrain.objectives.objective import IGNORE, Objective, Setting

if TYPE_CHECKING:
    import numpy as np

    from data_pipeline.tokenize.tokenizer import Tokenizer

MASK = "<mask>"
RATE = 0.15
"""Share of tokens that are chosen."""


class Masked(Objective):
    """Of the first T tokens of a window each is chosen with probability `RATE`, but the ends of documents.

    Of the chosen 80 % become the mask, 10 % a token drawn evenly from the vocabulary, 10 % stay; they are the labels.
    """

    name = "masked"
    takes_packed = labels_vary = True

    def __init__(self, setting: Setting) -> None:
        """Raises DataError if the tokenizer has no mask."""
        super().__init__(setting)
        tokenizer = setting.tokenizer()
        self._mask, self._eos, self._vocab_size = mask_id(tokenizer), tokenizer.eos_id, tokenizer.vocab_size

    def arrays(
        self, windows: "np.ndarray", positions: "np.ndarray", starts: "np.ndarray | None", seed: int
    ) -> "dict[str, np.ndarray]":
        """Inputs and labels [B, T], and the segments of documents that are kept apart and of padding."""
        import numpy as np

        from data_pipeline.sampling.shuffle import hashed
        from pretrain.objectives.documents import sequences

        inputs = windows[:, :-1].copy()
        choose, change, other = (
            hashed(seed, f"mask {draw}", positions, inputs.shape[1]) for draw in ("choose", "change", "other")
        )
        behind = inputs < 0
        chosen = (choose < int(RATE * 2**64)) & ~behind & (inputs != self._eos)
        labels = np.where(chosen, inputs, IGNORE)
        inputs[chosen & (change < int(0.8 * 2**64))] = self._mask
        drawn = chosen & (change >= int(0.8 * 2**64)) & (change < int(0.9 * 2**64))
        inputs[drawn] = (other[drawn] % np.uint64(self._vocab_size)).astype(np.int64)
        made = {"input_ids": np.maximum(inputs, 0), "labels": labels} | self.padding(windows)
        if self.setting.document_mask:
            assert starts is not None
            made["segment_ids"], made["position_ids"] = sequences(starts, *inputs.shape)
        if behind.any():  # which no token is to see
            made["segment_ids"] = np.where(behind, -1, made.get("segment_ids", 0))
        return made

    def label_sources(self, sources: "np.ndarray") -> "np.ndarray":
        """Labels are of the inputs themselves."""
        return sources[:, :-1]

    @classmethod
    def restricts_attention(cls, packed: bool) -> bool:
        """Tokens see both ways, so padding has to be kept from them."""
        return packed


def mask_id(tokenizer: "Tokenizer") -> int:
    """Id of the tokenizer's mask. Raises DataError if it has none."""
    for token in range(tokenizer.vocab_size):
        if tokenizer.piece(token) == MASK:
            return token
    raise DataError(f"the tokenizer has no {MASK}: add it to data.tokenizer.user_defined_symbols and build again")
