"""The promise of exact, elastic data on actual ranks: processes that meet over gloo, and one that is killed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from data_pipeline.config import DataConfig
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.sample_plan import Plan, go_on
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from launch.commands.data_plan import locate_lines
from pretrain.run.journal import read
from tests.conftest import RanksFailed
from tests.runs import SMALL

Ranks = Callable[..., list[Any]]
CONTEXT = 32
FIRST = {"weights": {"large": 5, "middle": 2, "small": 1}}
SECOND = {"weights": {"large": 1, "small": 3}, "order": "block", "packing": "best_fit", "phase": 2}
STARTS = [  # world, data, global batch, steps, step at which the last rank is killed
    (1, FIRST, 24, 3, None),
    (2, FIRST, 24, 8, 8),
    (3, FIRST, 12, 6, None),
    (2, SECOND, 6, 5, 4),
    (8, SECOND, 16, 3, None),
    (1, SECOND, 10, 3, None),
]


def test_ranks_that_come_and_go_read_the_reference_order(ranks: Ranks, mixed: Dataset, tmp_path: Path) -> None:
    began = []
    for world, data, global_batch, steps, kill_at in STARTS:
        arguments = {
            "path": str(mixed.path),
            "folder": str(tmp_path),
            "data": data,
            "context": CONTEXT,
            "global_batch": global_batch,
            "steps": steps,
        }
        if kill_at is None:
            began.append(set(ranks("tests.data_pipeline.cases:read_steps", world, **arguments)))
        else:
            with pytest.raises(RanksFailed, match=r"exit codes \[.*-9\]"):
                ranks("tests.data_pipeline.cases:read_steps", world, **arguments, kill_at=kill_at)
    # 24 x 3, then 24 x 6 of the 8; 12 x 6; 6 x 3 of the 5; 16 x 3: whoever starts goes on from what was saved.
    assert began == [{0}, {216}, {306}, {354}]

    seen: dict[int, str] = {}
    for line in (tmp_path / "read.jsonl").read_text().splitlines():
        step = json.loads(line)
        positions = [position for position, _ in step]
        assert positions == list(range(positions[0], positions[0] + len(positions)))
        for position, digest in step:
            # What a killed start had read is read again by the next.
            assert seen.setdefault(position, digest) == digest
    assert sorted(seen) == list(range(354 + 30))

    state = DataState(fingerprint=mixed.manifest.fingerprint, seed=3)
    state = go_on(state, mixed, DataConfig.model_validate({"path": "d", **FIRST}), CONTEXT)
    reference = rows(mixed, state, 288)
    state = go_on(state.after(288, 0), mixed, DataConfig.model_validate({"path": "d", **SECOND}), CONTEXT)
    assert list(map(seen.__getitem__, range(384))) == reference + rows(mixed, state, 96)


def rows(dataset: Dataset, state: DataState, samples: int) -> list[str]:
    """Hashes of the tokens at the next positions, read window by window."""
    plan = Plan(dataset, state.phases[-1], state.seed)
    windows = list(plan.windows.values())
    source, index = plan.at(np.arange(state.samples_seen, state.samples_seen + samples))
    return [
        xxhash.xxh3_64_hexdigest(windows[k].read(np.array([i]))[0].tobytes())
        for k, i in zip(source.tolist(), index.tolist(), strict=True)
    ]


def test_a_run_changes_its_mixture_in_a_phase_of_its_own(ranks: Ranks, mixed: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = [*SMALL, f"data.path={mixed.path}", f"run.dir={run}", "schedule.kind=constant", "train.eval_every=100"]

    def train(world: int, *more: str) -> None:
        ranks("tests.distributed.cases:train_run", world, args=[*args, *more])

    train(2, "train.steps=4", "data.weights={large: 3, small: 1}")
    with pytest.raises(RanksFailed, match=r"in phase 1 of its data, at sample 32, .*weight of large: 3/4, now 1/2"):
        train(1, "train.steps=8", "data.weights={large: 1, small: 1}")
    train(1, "train.steps=8", "data.weights={large: 1, small: 1}", "data.phase=2")
    lengths = {name: len(Windows.of(mixed, "train", 16, source=name)) for name in ("large", "small")}
    last = [record.metrics for record in read(run / "metrics.jsonl") if "data/samples_seen" in record.metrics][-1]
    assert last["data/samples_seen"] == 64
    assert last["data/epoch_large"] == (24 + 16) / lengths["large"]
    assert last["data/epoch_small"] == (8 + 16) / lengths["small"]
    first, second = list(locate_lines([], run, 4, text=False)), list(locate_lines([], run, 5, text=False))
    assert sum("  small  " in line for line in first) == 2
    assert sum("  small  " in line for line in second) == 4


def test_data_that_do_not_last_are_refused_before_the_first_step(ranks: Ranks, mixed: Dataset, tmp_path: Path) -> None:
    repeat = ["data.sources.small.paths=[x]", "data.sources.small.repeat=1", "data.weights={small: 1}"]
    args = [*SMALL, f"data.path={mixed.path}", f"run.dir={tmp_path / 'run'}", *repeat, "train.steps=1000"]
    with pytest.raises(RanksFailed, match=r"the data end at sample \d+ .*small \d+\. Train fewer steps"):
        ranks("tests.distributed.cases:train_run", 2, args=args)
    assert not (tmp_path / "run" / "checkpoints").exists()
