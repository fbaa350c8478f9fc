"""What an objective is: facts about it, which login nodes read, and arrays that it makes of windows.

Free of numpy at import: the functions that need it import it, since its threads are not wanted on login nodes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from data_pipeline.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from data_pipeline.storage.dataset import Dataset
    from data_pipeline.tokenize.tokenizer import Tokenizer

IGNORE = -100
"""A label that counts for nothing, as in `model.batch`."""


@dataclass(frozen=True)
class Setting:
    """What an objective has to know of a run."""

    context: int
    """T, the tokens of a window's inputs."""
    tokenizer: "Callable[[], Tokenizer]"
    """The dataset's; called where pieces of it are needed."""
    document_mask: bool = False
    """The model keeps the documents of a window apart."""
    mask_boundaries: bool = False
    """The first token of a document is nobody's label."""
    packed: bool = False
    """Windows hold whole documents, and padding behind them."""
    two_sequences: bool = False
    """The model reads one sequence and writes another."""
    targets: int = 0
    """Tokens that it writes of a window, at most; or that it predicts."""
    label_kind: str = "none"
    """What labels are of, as `model.head.kind` has it."""
    labels: tuple[str, ...] = ()
    """Their names; of places none."""
    target_span: int = 1
    """Neighbours that are predicted together, at most."""


class Objective(ABC):
    """Makes inputs and labels. What is random in them depends on the run's seed and a sample's position alone, so that
    any rank, micro-batch or restart makes the same."""

    name: ClassVar[str]
    """As `data.objective` has it."""
    of_pairs: ClassVar[bool] = False
    """It reads pairs of source and target, else windows of text."""
    of_conversations: ClassVar[bool] = False
    """It reads conversations, in packed windows of stored tokens, which may be marked."""
    of_labels: ClassVar[bool] = False
    """It reads texts with labels."""
    whole_windows: ClassVar[bool] = False
    """It can make nothing of a window that the text does not fill."""
    takes_packed: ClassVar[bool] = False
    """Windows may hold several documents and padding (`data.packing=best_fit`)."""
    takes_boundaries: ClassVar[bool] = False
    """The first token of a document can be nobody's label (`data.mask_boundaries`)."""
    against_documents: ClassVar[str] = ""
    """Why the documents of a window cannot be kept apart (`model.document_mask`); completes "data.objective=NAME …"."""
    labels_vary: ClassVar[bool] = False
    """Samples hold unequal numbers of labels."""
    continues_text: ClassVar[bool] = False
    """What was learned is to continue a text: samples are written in training, and texts generated after it."""

    in_order: ClassVar["type[Objective] | None"] = None
    """Another one by which the same model predicts every token of held-out text: bits per byte are of that."""

    def __init__(self, setting: Setting) -> None:
        """Raises DataError when the tokenizer lacks the pieces that it needs."""
        self.setting = setting

    @property
    def needs_documents(self) -> bool:
        """Whether it has to know where documents begin."""
        return self.setting.document_mask or self.setting.mask_boundaries

    @property
    def predicts_every_token(self) -> bool:
        """Whether the losses of all labels add up to the likelihood of the text, so that it has bits per byte."""
        return False

    @abstractmethod
    def arrays(
        self, windows: "np.ndarray", positions: "np.ndarray", starts: "np.ndarray | None", seed: int
    ) -> "dict[str, np.ndarray]":
        """What a model is shown, by the names of `model.batch.Batch`.

        Args:
            windows: int64 [B, T + 1], -1 where there is no token; of pairs int64 [B, 2 T], sources and targets.
            positions: of the samples in the run, int64 [B].
            starts: where documents begin, `row * (T + 1) + column`, ascending; None unless `needs_documents`.
            seed: of the run.
        """

    def label_sources(self, sources: "np.ndarray") -> "np.ndarray":
        """Of the sources that the tokens of windows are of, int64 [n, T + 1], those of the labels: int64 [n, labels],
        or [n, 1] where those of a window are all of one."""
        return sources[:, 1:]

    def padding(self, windows: "np.ndarray") -> "dict[str, np.ndarray]":
        """Where the inputs of windows of text hold no token, bool [B, T]; nothing where all do."""
        behind = windows[:, :-1] < 0
        return {"padding": behind} if self.setting.packed or behind.any() else {}

    @classmethod
    def restricts_attention(cls, packed: bool) -> bool:
        """Whether attention needs a mask: tokens see neither all before them, nor all of the text."""
        return False

    @classmethod
    def check(cls, dataset: "Dataset") -> None:
        """Raises DataError unless it is for what the dataset holds: pairs, or text."""
        pairs, chat = dataset.manifest.pairs, dataset.manifest.chat_template is not None
        if chat and not cls.of_conversations:
            raise DataError(
                f"{dataset.path} holds conversations, which data.objective={cls.name} is not for; take "
                "data.objective=conversations data.packing=best_fit, or build the text without messages_key"
            )
        if cls.of_conversations and not chat:
            raise DataError(
                f"data.objective={cls.name} needs conversations, and {dataset.path} holds none; build a dataset with "
                "data.sources.NAME.messages_key"
            )
        if (dataset.manifest.labels is not None) != cls.of_labels:
            raise DataError(
                f"data.objective={cls.name} needs texts with labels, and {dataset.path} holds none; build a dataset "
                "with data.labels"
                if cls.of_labels
                else f"{dataset.path} holds texts with labels, which data.objective={cls.name} is not for; take "
                "data.objective=labels with model.head.kind, or build the text without data.labels"
            )
        if pairs and not cls.of_pairs:
            raise DataError(
                f"{dataset.path} holds pairs of source and target, which data.objective={cls.name} is not for; "
                "take data.objective=pairs, or build the text without target_key"
            )
        if cls.of_pairs and not pairs:
            raise DataError(
                f"data.objective={cls.name} needs pairs of source and target, and {dataset.path} holds text; build a "
                "dataset with data.sources.NAME.target_key"
            )
