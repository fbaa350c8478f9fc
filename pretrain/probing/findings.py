"""What came of probing runs, as a file keeps it. Free of torch."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from data_pipeline.errors import RunError
from data_pipeline.files.atomic import write_atomic

FILE = "probes.json"


class Question(BaseModel, extra="forbid", frozen=True):
    """What is asked of every state."""

    classes: int
    asked: tuple[int, int]
    """Tokens to train on, and to test on."""
    majority: float
    """Accuracy of the class that is the most frequent in training, always given."""
    entropy: float
    """In bits: see `pretrain.probing.linear.entropy`."""


class Answer(BaseModel, extra="forbid", frozen=True):
    """What a probe got right."""

    accuracy: float
    bits: float
    """See `pretrain.probing.linear.Score`."""


class Probed(BaseModel, extra="forbid", frozen=True):
    """A state of a run."""

    run: str
    stream: str
    depth: int
    trained: dict[str, Answer]
    """By question."""
    random: dict[str, Answer]
    """The same of a model of this shape as it is before training."""

    @property
    def name(self) -> str:
        """Within its run."""
        return f"{self.stream} {self.depth}" if self.depth else self.stream


class Findings(BaseModel, extra="forbid", frozen=True):
    """Of one or several runs, on the same tokens."""

    dataset: str
    """Its fingerprint."""
    context: int
    tokens: tuple[int, int]
    """In the windows to train on, and to test on."""
    apart: Literal["documents", "text"]
    """See `pretrain.probing.text.Chosen`."""
    seed: int
    """Of the models that were not trained."""
    questions: dict[str, Question]
    states: list[Probed]
    likeness: list[list[float]]
    """Of each state to each, in their order."""

    def write(self, folder: Path) -> None:
        """Into `folder`, as FILE."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Findings":
        """What `write` wrote. Raises RunError for a damaged file."""
        try:
            return cls.model_validate_json((folder / FILE).read_bytes())
        except (OSError, ValidationError) as error:
            raise RunError(f"{folder / FILE}: cannot be read: {error}; write it again with duet study probe") from error
