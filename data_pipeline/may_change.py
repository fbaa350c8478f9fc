"""When a key of a configuration may change. It stands on the field: `lr: Annotated[float, may_change.IN_FORK] = 9e-4`.

A field that says nothing may not change. Standard library only: every room may import this leaf.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MayChange:
    """In a fork (a run that begins with a checkpoint of another one) and, unless it says otherwise, on resume."""

    why: str
    """What the key is about; docs/training.md has what holds for it."""
    on_resume: bool = True
    in_use: bool = False
    """When a trained model is used, too: `duet eval --set`, `duet generate --set`."""

    def __str__(self) -> str:
        when = "on resume" if self.on_resume else "in a fork"
        return f"{when}{' and in use' if self.in_use else ''}: {self.why}"


PLACE = MayChange("where things lie")
BUILD = MayChange("what the dataset was built from")
PHASE = MayChange("what is read from here on")
COMPUTED = MayChange("how it is computed")
WATCHED = MayChange("how it is watched")
IN_FORK = MayChange("what makes another run", on_resume=False)
THOUGHT = MayChange("how long it thinks", on_resume=False, in_use=True)
