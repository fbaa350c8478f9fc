"""What is said of a text that is read both ways, in the place of its hidden tokens."""

from typing import Literal

from pydantic import BaseModel

NO_LABELS = "model.head.labels are not set: take them from the dataset, or give them, such as model.head.labels=[a,b]"


class HeadConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A map from what the layers give to labels, in the place of the token table (docs/labels.md)."""

    kind: Literal["none", "sequence", "token", "span"] = "none"
    """`sequence`: a label of a text, from the mean over its tokens; `token`: one of each token; `span`: at which tokens
    the answer to a question begins and ends. `none`: the tokens that were hidden."""
    labels: tuple[str, ...] | None = None
    """Of `sequence` and `token`; taken from the dataset unless given."""

    @property
    def outputs(self) -> int:
        """Rows of the map: labels, of `span` begin and end; 0 where they are not known yet."""
        return 2 if self.kind == "span" else len(self.labels or ())
