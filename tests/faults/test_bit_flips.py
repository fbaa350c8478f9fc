"""One flipped bit in a checkpoint never becomes another model: a start passes it over, what reads weights refuses."""

import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import CheckpointError
from pretrain.checkpoint.checkpoint import Checkpoint, newest
from pretrain.engine.distributed import Ranks
from pretrain.run.checkpoint_folder import step_path
from tests.checkpoints import manifest_of, write_manifest
from tests.flips import flip_each

FIXTURE = Path(__file__).parent.parent / "pretrain" / "checkpoints" / "format3" / "step-000000002"
FEW, DRILL = 60, 1500


class Alone(Ranks):
    """One rank, which needs no process group."""

    def gather(self, value):  # type: ignore[no-untyped-def]
        return [value]

    def largest(self, *flags):  # type: ignore[no-untyped-def]
        return list(flags)

    def broadcast(self, value):  # type: ignore[no-untyped-def]
        return value


@pytest.mark.parametrize("number", [FEW, pytest.param(DRILL, marks=pytest.mark.drill)])
def test_a_flipped_bit_is_passed_over_or_changes_nothing(tmp_path: Path, number: int) -> None:
    for step in (2, 4):
        shutil.copytree(FIXTURE, step_path(tmp_path, step))
        content = manifest_of(step_path(tmp_path, step))
        write_manifest(step_path(tmp_path, step), content | {"format": 4, "step": step, "saved": float(step)})
    alone = Ranks.__new__(Alone)
    Ranks.__init__(alone, 0, 1, torch.device("cpu"), None)
    subject = step_path(tmp_path, 4)
    whole = contents(Checkpoint(subject))

    def judge() -> str:
        warnings: list[str] = []
        found = newest(tmp_path, alone, warnings.append)
        assert found
        if found.manifest.step == 2:
            assert any(str(subject) in text for text in warnings)
            with pytest.raises(CheckpointError):
                Checkpoint(subject).verify()
            return "passed over"
        return "nothing changed" if contents(found) == whole else "another checkpoint"

    found = flip_each(sorted(subject.iterdir()), number, 20, judge)
    print(f"{number} flips: {dict(found)}")
    assert found["another checkpoint"] == 0
    assert found.total() == number


def contents(checkpoint: Checkpoint) -> tuple[str, dict[str, bytes]]:
    """All that it holds."""
    weights = {name: values.numpy().tobytes() for name, values in checkpoint.weights().items()}
    return checkpoint.manifest.model_dump_json(), weights
