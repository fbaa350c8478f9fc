"""`duet study`: a grid of real runs, stopped and gone on with, and a page that the kept journals alone write again."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import ConfigError, RunError
from pretrain.config.schema import load
from pretrain.metric_names import VALIDATION
from pretrain.run.journal import Point, read
from pretrain.study import plots
from pretrain.study.results import Result, Results, is_kept
from pretrain.study.spec import Study, load_study
from tests.runs import CHARACTERS, ROOT, SMALL, build_dataset, duet, start_duet, wait_for_step

MASKS = ["model.learned_dropout.enabled=true", "model.learned_dropout.entropy.ramp_steps=0"]
STUDY: dict[str, Any] = {
    "name": "small",
    "config": [CHARACTERS, *SMALL, "data.path=data", "train.steps=60", "train.eval_every=30"],
    "sections": {
        "core": {
            "title": "Masks or none",
            "seeds": [1, 2],
            "baseline": "core/off",
            "equal": [{"what": "parameters", "arms": ["off", "core/masks"], "within": 1.0}],
            "arms": {
                "off": {"about": "no masks", "config": ["model.learned_dropout.enabled=false"]},
                "masks": {"about": "learned", "config": MASKS},
            },
        },
        "rates": {"title": "Rates", "seeds": [1], "arms_of": "core", "settings": {"low": ["optimizer.lr=0.001"]}},
        "gpu": {
            "title": "Elsewhere",
            "seeds": [1],
            "on_request": True,
            "arms": {"large": {"about": "large", "config": ["model.width=64"]}},
        },
    },
}


def changed(place: str, value: object) -> dict[str, Any]:
    """The study with one value changed, by its dotted place."""
    study: dict[str, Any] = json.loads(json.dumps(STUDY))
    *way, last = place.split(".")
    part: Any = study
    for key in way:
        part = part[key]
    part[last] = value
    return study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_dataset(CHARACTERS, tmp_path / "data")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return tmp_path


def test_a_study_is_stopped_and_goes_on_and_its_page_follows_from_what_it_kept(folder: Path) -> None:
    """Ctrl-C in the first run; later the whole page is written again without any run."""
    first = folder / "runs" / "small" / "core" / "off" / "seed-1"
    stopped, tries = 60, 0
    while stopped == 60 and (tries := tries + 1) <= 5:  # a test that is held up comes when the first run is over
        shutil.rmtree(folder / "runs", ignore_errors=True)
        process = start_duet("study", "run", "small.yaml", log=folder / f"log-{tries}", cwd=folder)
        wait_for_step(first / "metrics.jsonl", 3, process)
        process.send_signal(signal.SIGINT)
        code, said = process.wait(120), (folder / f"log-{tries}").read_text()
        stopped = max(r.step or 0 for r in read(first / "metrics.jsonl") if r.kind == "checkpoint")
    assert code == 130, said
    assert "core/off/seed-1: stopped" in said
    assert 3 <= stopped < 60

    done = duet("study", "run", "small.yaml", "--jobs", "2", "--only", "core", "--only", "rates/off", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 runs, of which 0 are done" in done.stdout and "within 17" in done.stdout
    starts = [r.fields["resumed_from"] for r in read(first / "metrics.jsonl") if r.kind == "start"]
    assert starts == [None, stopped]
    left = duet("study", "run", "small.yaml", "--dry-run", cwd=folder).stdout
    assert "6 runs, of which 5 are done" in left and "left: rates/low/masks/seed-1" in left

    assert duet("study", "report", "small.yaml", cwd=folder).returncode == 0
    page, kept = folder / "small.md", folder / "small"
    text = page.read_text()
    assert text.count(f"[{loss(folder, 'core/masks/seed-2'):.4f}]") == 1
    assert "| **large**: large | not run |" in text and "| masks of |" in text
    assert re.search(r"\| masks \| \*\*\[[0-9.]+\]\([^)]+\)\*\* \| not run \|", text)
    for name in ("core-validation", "core-masks", "core-sites"):
        assert (kept / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"small/{name}.png" in text
    roundings = json.loads((kept / "journals/core/masks/seed-1/roundings.json").read_text())
    assert roundings["threshold"]["loss/val"] == pytest.approx(loss(folder, "core/masks/seed-1"), abs=1e-5)
    assert len({roundings[kind]["loss/val"] for kind in ("threshold", "sample", "none")}) == 3
    for file in kept.rglob("*.yaml"):
        assert str(folder) not in file.read_text()

    (folder / "runs").rename(folder / "gone")
    page.write_text(text.replace("# small", "# Words of mine").replace(" not run |", " typed |"))
    before = {file: file.read_bytes() for file in kept.rglob("*.gz")}
    assert duet("study", "report", "small.yaml", cwd=folder).returncode == 0
    assert page.read_text() == text.replace("# small", "# Words of mine")
    assert before == {file: file.read_bytes() for file in kept.rglob("*.gz")}
    left = duet("study", "run", "small.yaml", "--dry-run", cwd=folder).stdout
    assert "6 runs, of which 5 are done, 5 of them without a run folder, by what is kept in small/journals" in left
    assert "left: rates/low/masks/seed-1" in left

    (folder / "gone").rename(folder / "runs")
    (folder / "small.yaml").write_text(
        yaml.safe_dump(changed("config", [*STUDY["config"], "train.steps=61"]), sort_keys=False)
    )
    refused = duet("study", "run", "small.yaml", cwd=folder)
    assert refused.returncode == 2 and "train.steps: 60 in the run, 61 now" in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("in a study: the old values, another `name` in its file, or")
    untold = duet("study", "report", "small.yaml", cwd=folder)
    assert untold.returncode == 2 and "train.steps: 60 in the run, 61 in the study" in untold.stderr


def test_thirty_two_arms_look_different(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {f"arm-{number}": {"about": "a", "config": []} for number in range(32)}
    study = Study.model_validate(changed("sections", {"many": {"title": "Many", "seeds": [1], "arms": arms}}))
    config = load([])
    points: dict[str, list[Point]] = {VALIDATION: [Point(step, float(step), 1, 0) for step in (0, config.train.steps)]}
    results = {run.arm: [Result(run, points, config, 1, {})] for run in study.runs()}
    figures: list[Any] = []
    monkeypatch.setattr(plots, "png", lambda figure, **_: figures.append(figure))
    plots._validation(results, "nats per token")
    [figure] = figures
    for axes in figure.axes:
        lines = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
        assert len(lines) == 32
    figure.draw_without_rendering()
    [legend] = figure.legends
    named, drawn = legend.get_window_extent(), figure.axes[1].get_window_extent()
    assert named.x0 >= drawn.x1 and named.y0 >= 0, "all names stand beside the curves"


def loss(folder: Path, place: str) -> float:
    """Validation loss after the last step, from the run's own journal."""
    journal = read(folder / "runs" / "small" / place / "metrics.jsonl")
    return [r.metrics["loss/val"] for r in journal if "loss/val" in r.metrics][-1]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("name", "small", "data is not a dataset: there is no such folder"),
        ("name", "Not a folder", "name: 'Not a folder' is no name here: small letters, digits, "),
        ("sections.core.seeds", [True], "sections.core.seeds.0: Input should be a valid integer"),
        ("sections.core.seeds", [1, -1], "sections.core.seeds.1: Input should be greater than or equal to 0"),
        ("sections.core.seed", 1, "sections.core.seed: unknown key; there are title, unit, "),
        ("sections.core.baseline", "core/of", "there is no core/of; there are core/masks, core/off, gpu/large"),
        ("sections.rates.arms_of", "gone", "gone has no arms"),
        ("sections.rates.settings", {}, "arms_of and settings need each other"),
        ("sections.core.arms.masks.config", ["model.witdh=3"], "core/masks/seed-1: command line: unknown key"),
        ("sections.core.arms.masks.config", ["run.seed=3"], "core/masks/seed-1: run.seed=3: a study names its runs"),
        ("sections.core.arms.masks.config", ["model/none"], "core/masks/seed-1: model/none"),
    ],
)
def test_mistakes_in_a_study_are_told_with_their_place(tmp_path: Path, place: str, value: object, said: str) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(changed(place, value), sort_keys=False))
    done = duet("study", "run", "small.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: a\nname: b\n", "name is given twice"),
        (b"a: [1\nb: 2\n", r'in "[^<"]*bad\.yaml", line 2'),
        (b"a: \xff\n", "'utf-8' codec"),
        (b"a: " + b"[" * 5000, "recursion"),
    ],
)
def test_a_file_that_is_no_study_is_told(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"bad.yaml: cannot be read as YAML: (.|\n)*{said}"):
        load_study(tmp_path / "bad.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="pipe.yaml: no such file"):
        load_study(tmp_path / "pipe.yaml")


def test_what_was_kept_of_other_settings_is_not_told(tmp_path: Path) -> None:
    """Neither by an arm whose settings were changed, nor by one that took the name of another."""
    study = load_study(ROOT / "docs" / "experiments" / "gates.yaml")
    run = study.runs()[0]
    kept = ROOT / "docs" / "experiments" / "gates" / "journals"
    assert Results(study, kept).of(run.section, run.arm, run.setting)
    arm = study.sections[run.section].arms[run.arm]
    assert is_kept(run, kept)
    arm.config.append("optimizer.weight_decay=0.5")
    other = r"optimizer.weight_decay: [0-9.]+ in the run, 0.5 in the study"
    with pytest.raises(RunError, match=other):
        Results(study, kept).of(run.section, run.arm, run.setting)
    with pytest.raises(RunError, match=other):
        is_kept(study.runs()[0], kept)


def test_a_study_is_tracked_beside_its_runs_unless_told() -> None:
    for given, uri in (([], "sqlite:///runs/small/mlflow.db"), (["tracking.uri=http://there"], "http://there")):
        study = Study.model_validate(changed("config", [*STUDY["config"], *given]))
        assert study.runs()[0].config().tracking.uri == uri


def test_arms_that_are_to_be_equal_and_are_not(folder: Path) -> None:
    equal = {"what": "parameters", "arms": ["off", "masks"], "within": 0.01}  # a list of one
    (folder / "small.yaml").write_text(yaml.safe_dump(changed("sections.core.equal", equal), sort_keys=False))
    done = duet("study", "run", "small.yaml", cwd=folder)
    assert done.returncode == 2 and "they are to be within 1%" in done.stderr
    assert not (folder / "runs").exists()
    unknown = duet("study", "run", "small.yaml", "--only", "cores", cwd=folder)
    assert unknown.returncode == 2
    assert "cores: no such section or arm; sections, with their arms: core (off, masks), rates (off," in unknown.stderr


@pytest.mark.parametrize("study", sorted((ROOT / "docs" / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_published_page_says_what_its_journals_say(study: Path, tmp_path: Path) -> None:
    """No figure of a table was typed: the page is the same when it is written again from what lies beside it."""
    shutil.copytree(study.parent, tmp_path / "experiments")
    done = duet("study", "report", f"experiments/{study.name}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "experiments" / f"{study.stem}.md"
    assert page.read_text() == study.with_suffix(".md").read_text()
