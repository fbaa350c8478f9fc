"""A trained run and its export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.export.portable import write_export
from pretrain.inference.trained import find_checkpoint
from tests.runs import SMALL

SHAPE = ["model.learned_dropout.sites=[enc_ff,dec_sa,embed]", "model.learned_dropout.source=embed", "model.bias=true"]


@pytest.fixture(scope="session")
def run(ranks: Callable[..., list[Any]], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ZeRO 3 on two ranks; checkpoints of steps 1 and 3."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    args = [*SMALL, *SHAPE, f"data.path={dataset}", f"run.dir={folder}", "train.steps=3", "engine.zero_stage=3"]
    ranks("tests.distributed.cases:train_run", 2, args=args)
    return folder


@pytest.fixture(scope="session")
def exported(run: Path) -> Path:
    """Of the run's newest checkpoint, in fp32."""
    folder = run.parent / "exported"
    write_export(*find_checkpoint(run), folder)
    return folder
