"""The next token behind a prefix that is read both ways (Raffel et al. 2020, arXiv:1910.10683, section 3.2)."""

from typing import TYPE_CHECKING

from pretrain.objectives.causal import next_tokens
from pretrain.objectives.objective import IGNORE, Objective

if TYPE_CHECKING:
    import numpy as np


class Prefix(Objective):
    """A prefix of 1 to T - 1 tokens, all as likely, may look both ways; labels begin with the token behind it."""

    name = "prefix"
    labels_vary = True
    against_documents = "reads the start of a window both ways, whatever documents are in it"

    def arrays(
        self, windows: "np.ndarray", positions: "np.ndarray", starts: "np.ndarray | None", seed: int
    ) -> "dict[str, np.ndarray]":
        """Inputs and labels [B, T], and lengths of the prefixes, int64 [B]."""
        import numpy as np

        from data_pipeline.sampling.shuffle import hashed

        inputs, labels = next_tokens(windows)
        context = inputs.shape[1]
        lengths = 1 + (hashed(seed, "prefix", positions, 1)[:, 0] % np.uint64(max(1, context - 1))).astype(np.int64)
        labels[np.arange(context) < lengths[:, None] - 1] = IGNORE
        return {"input_ids": inputs, "labels": labels, "prefix_lengths": lengths} | self.padding(windows)

    @classmethod
    def restricts_attention(cls, packed: bool) -> bool:
        """A prefix sees all of itself."""
        return True
