"""SIGKILL of a rank in every phase of a save: the previous checkpoint is never lost, and a torn one never loaded."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import RanksFailed
from tests.distributed.cases_checkpoint import PHASES

Ranks = Callable[..., list[Any]]
CASES = "tests.distributed.cases_checkpoint:"
KILLS, EACH, AT_MOST = 100, 10, 400
"""Of the drill: at least so many, at least so many of them seen in each phase; it gives up after AT_MOST."""
DURING_STEPS = "in the background, steps going on"


class Death(NamedTuple):
    """Where a kill hit, as the bytes tell that the ranks had written by then."""

    phase: str
    steps: int
    """Steps that training had taken since the save began."""


def kill(ranks: Ranks, root: Path, victim: int, **how: Any) -> Death:
    """Kill rank `victim` of two while it saves, and compare what a new start loads with what was to be saved."""
    (root / "digests").mkdir(parents=True)
    with pytest.raises(RanksFailed, match="-9"):
        ranks(f"{CASES}die_while_saving", 2, root=str(root), victim=victim, **how)
    content = (root / "phases").read_bytes()
    phases, steps = [PHASES[byte] for byte in content[:2]], content[2:]
    wanted = {int(file.name): file for file in (root / "digests").iterdir() if file.suffix != ".tmp"}
    newest, before = sorted(wanted, reverse=True)[:2]
    results = ranks(f"{CASES}load_after_death", 2, root=str(root / "checkpoints"))
    for result in results:
        assert result["warnings"] == []
        assert result["step"] in (newest, before), "the previous checkpoint was lost"
        assert result["loaded"] == json.loads(wanted[result["step"]].read_text()), "a torn checkpoint was loaded"
        if phases[0] in ("after the manifest", "in retention"):
            assert result["step"] == newest
        if phases[0] in ("before the shards", "in a shard", "between shards"):
            assert result["step"] == before
    assert results[0] == results[1]
    return Death(phases[victim], steps[victim])


@pytest.mark.parametrize(
    ("victim", "phase", "steps"),
    [
        (0, "before the shards", 0),
        (1, "before the shards", 0),
        (0, "in a shard", 0),
        (1, "in a shard", 3),
        (0, "between shards", 3),
        (1, "between shards", 0),
        (0, "before the manifest", 0),
        (0, "after the manifest", 0),
        (0, "in retention", 0),
        (0, "in a shard", 3),
    ],
)
def test_a_rank_killed_in_a_phase_of_a_save(ranks: Ranks, tmp_path: Path, victim: int, phase: str, steps: int) -> None:
    death = kill(ranks, tmp_path, victim, at=phase, steps_between=steps)
    assert death.phase == phase
    assert death.steps >= steps


@pytest.mark.drill
def test_ranks_killed_at_random_times(ranks: Ranks, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    seen: Counter[str] = Counter()
    kills, since = 0, time.monotonic()
    while kills < KILLS or min(seen[name] for name in (*PHASES, DURING_STEPS)) < EACH:
        assert kills < AT_MOST, f"not every phase was hit {EACH} times: {dict(seen)}"
        victim = choose.choice([0, 0, 1])  # rank 0 has more phases
        death = kill(ranks, tmp_path / str(kills), victim, after=choose.uniform(0.0, 0.6))
        kills += 1
        seen[death.phase] += 1
        if death.steps and death.phase in ("before the shards", "in a shard", "between shards"):
            seen[DURING_STEPS] += 1
    print(f"{kills} kills in {time.monotonic() - since:.0f} s, by phase: {dict(seen)}")
