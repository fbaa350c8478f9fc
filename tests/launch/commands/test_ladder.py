"""`duet study ladder`: equal budgets, learning rates that are looked for, and curves that noise does not bend."""

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_pipeline.errors import ConfigError
from data_pipeline.storage.manifest import Manifest
from launch.commands.study import report
from launch.local.study_runs import is_done
from pretrain.config.dataset_identity import Built, complete, identity
from pretrain.config.schema import Config, dump
from pretrain.metric_names import BITS_PER_BYTE, LOSS, TOKENS_PER_SECOND, VALIDATION
from pretrain.run.journal import Journal
from pretrain.run.run_folder import RunFolder
from pretrain.study.ladder import Ladder, load_ladder, training_flops, vertex
from pretrain.study.ladder_page import fit_of
from pretrain.study.page import Page
from pretrain.study.power_law import Trial, fit, tell
from pretrain.study.results import JOURNAL, Results, keep
from pretrain.study.spec import StudyRun, parsed
from tests.runs import CHARACTERS, SMALL, build_dataset, duet

LADDER: dict[str, Any] = {
    "name": "rungs",
    "config": [CHARACTERS, *SMALL, "model.learned_dropout.enabled=false", "data.path=data", "train.eval_every=20"],
    "seeds": [1, 2],
    "baseline": "off",
    "rates": [0.001, 0.003],
    "arms": {
        "off": {"about": "whole feed forwards", "config": []},
        "gates": {"about": "half of the blocks", "config": ["model.block_gates={kind: top, blocks: 4, density: 0.5}"]},
    },
    "sizes": {
        "xs": {"about": "width 16", "config": ["model.width=16"], "tokens": "10K"},
        "s": {"about": "width 24", "config": ["model.width=24", "model.heads=4"], "tokens": "15K"},
        "m": {"about": "width 32", "config": ["model.width=32"], "tokens": "20K", "seeds": [3]},
    },
}
BUDGETS = np.geomspace(1e12, 1e14, 4)


def runs(noise: float, growth: float) -> list[Trial]:
    """Two arms of known curves, three seeds; the second one's gap grows by `growth`."""
    random = np.random.default_rng(5)
    power = (BUDGETS / 1e13) ** -0.15
    gap = 0.05 + growth * (power[0] - power) / (power[0] - power[-1])
    return [
        Trial(arm, flops, 1.2 + 0.8 * (flops / 1e13) ** -0.15 + above + noise * random.standard_normal())
        for flops, grown in zip(BUDGETS, gap, strict=True)
        for arm, above in (("plain", 0.0), ("other", float(grown)))
        for _ in range(3)
    ]


def test_a_known_curve_is_found_again() -> None:
    found = fit(runs(0.0, 0.0), shared=True)
    assert found.scale == pytest.approx(1e13)
    assert found.c["plain"] == found.c["other"] == pytest.approx(0.15, rel=0.01)
    assert found.a["plain"] == pytest.approx(1.2, abs=0.02) and found.b["plain"] == pytest.approx(0.8, abs=0.02)
    assert found.loss("other", 3e12) - found.loss("plain", 3e12) == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize(("growth", "sides"), [(0.0, (-1, 1)), (0.1, (1, 1)), (-0.04, (-1, -1))])
def test_a_gap_is_said_to_move_only_where_noise_does_not_explain_it(growth: float, sides: tuple[int, int]) -> None:
    told = tell(runs(0.004, growth), "plain")
    low, high, moved = told.gaps["other"]
    assert (low.value, high.value) == pytest.approx((0.05, 0.05 + growth), abs=0.01)
    assert all(gap.low < gap.value < gap.high for gap in (low, high, moved))
    assert (np.sign(moved.low), np.sign(moved.high)) == sides
    assert told.noise == pytest.approx(0.004, rel=0.5)
    assert told.exponent.low < told.exponent.value < told.exponent.high


def test_one_exponent_is_given_up_where_it_does_not_fit() -> None:
    assert tell(runs(0.004, 0.0), "plain").p > 0.05
    bent = [point._replace(loss=point.loss + 0.3 * (point.flops / 1e13) ** -0.6) for point in runs(0.004, 0.0)[6:]]
    steep = [point for point in bent if point.arm == "other"] + [p for p in runs(0.004, 0.0) if p.arm == "plain"]
    assert tell(steep, "plain").p < 0.05
    one_seed = tell(runs(0.0, 0.0)[::3], "plain")
    assert np.isnan(one_seed.p) and np.isnan(one_seed.exponent.low)
    with pytest.raises(ValueError, match="plain has 2 budgets; a curve of three numbers needs three"):
        fit(runs(0.0, 0.0)[:12], shared=True)


def test_a_curve_without_a_floor_is_said_to_have_none(folder: Path) -> None:
    ladder = load_ladder(Path("rungs.yaml"))
    assert ladder
    even = [Trial(arm, flops, 9 - 0.5 * np.log10(flops)) for arm in ladder.arms for flops in BUDGETS]
    bent = [point._replace(loss=1 + (point.flops / 1e13) ** -0.3) for point in even]
    assert ["no floor" in "\n".join(fit_of(ladder, points)[0]) for points in (even, bent)] == [True, False]


def test_the_best_rate_is_between_those_that_were_tried() -> None:
    rates = [1e-3, 2e-3, 4e-3]
    assert vertex(rates, [(np.log(rate / 1.7e-3)) ** 2 for rate in rates]) == pytest.approx(1.7e-3)
    assert vertex(rates, [3.0, 2.0, 1.0]) == 4e-3 and vertex(rates, [1.0, 1.0, 1.0]) == 1e-3
    assert vertex(rates, [3.0, 2.0, np.inf]) == 2e-3, "beside one that diverged it is the best"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build_dataset(CHARACTERS, tmp_path / "data")
    (tmp_path / "rungs.yaml").write_text(yaml.safe_dump(LADDER, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_arms_of_a_size_train_for_equal_flops_and_mistakes_are_placed(folder: Path) -> None:
    ladder = load_ladder(Path("rungs.yaml"))
    assert ladder
    rates = {size: dict.fromkeys(ladder.arms, 0.002) for size in ladder.sizes}
    study = ladder.climb(rates)
    for size in ladder.sizes:
        off, gates = (ladder.loaded(size, arm) for arm in ladder.arms)
        found = {run.arm: run.config() for run in study.runs([size])}
        budgets = [
            training_flops(whole.model_copy(update={"train": found[arm].train}))
            for arm, whole in (("off", off), ("gates", gates))
        ]
        step = budgets[0] / found["off"].train.steps
        assert abs(budgets[1] - budgets[0]) <= step / 2
        assert found["gates"].train.steps > found["off"].train.steps, "closed blocks cost nothing"
    assert [run.seed for run in study.runs(["m"])] == [3, 3]
    report(Path("rungs.yaml"))
    page = Path("rungs.md").read_text()
    for mark in ("results: rates-xs", "results: m", "picture: m-validation", "results: fit", "picture: fit-curves"):
        assert f"<!-- {mark} -->" in page, "a page that is begun before any run has room for all that follows"
    for change, said in (
        ({"baseline": "of"}, "baseline: there is no arm of"),
        ({"config": ["model.witdh=3"]}, "sizes.xs, arms.off: command line: unknown key"),
        ({"config": [*LADDER["config"], "profile.steps=[80,90]"]}, "sizes.xs, arms.off: .*beyond train.steps=78"),
        (
            {"arms": LADDER["arms"] | {"off": {"about": "a", "config": ["optimizer.lr=1"]}}},
            "optimizer.lr=1: a ladder has",
        ),
        ({"sizes": dict(reversed(LADDER["sizes"].items()))}, "sizes.s, arms.off: .*from the smallest to the largest"),
        ({"sizes": {"xs": LADDER["sizes"]["xs"], "same": LADDER["sizes"]["xs"]}}, "sizes.same, arms.off: .* has 7,792"),
        ({"sizes": {"xs": LADDER["sizes"]["xs"], "rates-xs": LADDER["sizes"]["s"]}}, "sizes.rates-xs: a table"),
        ({"rates": [0.001, 0.001, 0.003]}, "rates: .*given twice: 0.001"),
        ({"rates": [0.0, 0.001]}, "rates.0: Input should be greater than 0"),
        ({"seeds": [1, 1]}, "seeds: .*given twice: 1"),
    ):
        Path("bad.yaml").write_text(yaml.safe_dump(LADDER | change, sort_keys=False))
        with pytest.raises(ConfigError, match=said):
            load_ladder(Path("bad.yaml"))


def journalled(run: StudyRun, config: Config, rate: float) -> None:
    """What a run says that ends as rates do: above 0.01 it diverges."""
    run.path.mkdir(parents=True)
    (run.path / "config.yaml").write_text(dump(config))
    (run.path / "checkpoints").mkdir()
    RunFolder(run.path).claim(config, identity(config, Built(Manifest.load(config.data.path))))
    journal = Journal(run.path / "metrics.jsonl", 1)
    tags = {"host": "node-7", "git/commit": "unknown: ['git', '-C', '/home/you'] timed out", "python": "3"}
    journal.event("start", config=config.model_dump(mode="json"), parameters=5, tags=tags)
    diverges = rate > 0.01
    loss = math.nan if diverges else (math.log(rate / 0.002)) ** 2
    told = {str(name): loss for name in ([LOSS] if diverges else [LOSS, BITS_PER_BYTE, VALIDATION])}
    journal.metrics(1, told | {str(TOKENS_PER_SECOND): 9.0})
    why = "RunError: the gradients were not finite 10 steps in a row, up to step 10: the run has diverged\n  on a host"
    journal.event("end", **{"status": "FAILED", "reason": why} if diverges else {"status": "FINISHED", "reason": "all"})
    journal.close()


def test_a_rate_at_which_a_run_diverges_loses_and_the_page_says_so(folder: Path) -> None:
    given = LADDER | {"rates": [0.003, 1.0]}
    ladder, kept = parsed(Ladder, given, Path("rungs.yaml")), Path("rungs/journals")
    search = ladder.search()
    for run in search.runs():
        config = complete(run.config(), Built(Manifest.load("data")))
        journalled(run, config, config.optimizer.lr)
        keep(run, kept, diverged=True)
    assert not is_done(run) and is_done(run, diverged=True)
    results = Results(search, kept)
    assert ladder.rates_of(results)["xs"] == {"off": 0.003, "gates": 0.003}
    table = [*Page(search, results, Path("rungs.md"), computed=True).table("rates-xs")]
    [lost] = [line for line in table if "half of the blocks, at 1](" in line]
    executed = training_flops(results.of("rates-xs", "gates.1")[0].config)
    assert f" 5 | {executed:.3g} | [∞, diverged](" in lost and "| training FLOPs, computed |" in table[0]
    assert executed < (results.of("rates-xs", "gates.1")[0].flops or 0.0)
    said = gzip.decompress((kept / run.place / JOURNAL).read_bytes())
    assert not [word for word in (b"on a host", b"node-7", b"/home/you") if word in said] and b'"python": "3"' in said
    with pytest.raises(ConfigError, match="off diverged at every rate; rates: give lower ones"):
        ladder.model_copy(update={"rates": [1.0]}).rates_of(results)


@pytest.mark.drill
def test_a_ladder_is_climbed_and_told(folder: Path) -> None:
    (folder / "rungs.yaml").write_text(yaml.safe_dump(LADDER | {"rates": [0.001, 0.003, 1e30]}, sort_keys=False))
    left = duet("study", "ladder", "rungs.yaml", "--dry-run", cwd=folder)
    assert "rates: 12 runs, of which 0 are done" in left.stdout, left.stderr
    done = duet("study", "ladder", "rungs.yaml", "--jobs", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("its loss counts as infinite") == 4
    again = duet("study", "ladder", "rungs.yaml", cwd=folder)
    assert "sizes: 10 runs, of which 10 are done" in again.stdout, again.stderr
    assert duet("study", "report", "rungs.yaml", cwd=folder).returncode == 0
    text = (folder / "rungs.md").read_text()
    assert "for all arms" in text and "| gates |" in text and "rungs/fit-curves.png" in text
