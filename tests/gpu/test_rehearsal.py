"""`make gpu` without a GPU: its plan stands, faults that are planted are found, and the trainer needs no MLflow."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import RunError
from pretrain.engine.engine import _sum_of_squares
from pretrain.run import journal
from tests.gpu import __main__ as gpu
from tests.gpu import attention, lines, models
from tests.gpu.lines import PACKAGES, Tracer, cuda_only, of_source
from tests.gpu.parts import PARTS, Entry
from tests.gpu.results import BEGIN, END, Result, Results
from tests.gpu.setting import Setting, each
from tests.gpu.training import Waits
from tests.model.situations import optional
from tests.runs import ROOT, SMALL, program

SPEED = Entry("speed", "b", "tests.gpu.planted:wrong", 60)


def entry(name: str, seconds: int = 60, *needs: str) -> Entry:
    return Entry(name, "b", f"tests.gpu.planted:{name}", seconds, needs)


def ran(folder: Path, *entries: Entry) -> dict[str, str]:
    results = Results(folder)
    with open(folder / "log.txt", "a") as log:
        gpu.Runner(results, "cpu", log, folder).run(entries, 600)
    return {name: found.status for name, found in Results(folder).parts.items()}


def test_every_part_is_there_and_all_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    for part in PARTS:
        module, _, function = part.target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert [part.section for part in gpu.chosen(["a", "mfu-760m"])].count("b") == 1
    with pytest.raises(gpu.UserError, match="--only nothing: expected of a, adapters, attention, b, bare"):
        gpu.chosen(["nothing"])


def test_parts_are_judged_by_themselves_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SLOWER", 1)
    parts = [entry("right"), entry("raises"), entry("hangs", 1), entry("right", 60, "no_such_package"), SPEED]
    parts[3] = parts[3]._replace(name="needs")
    statuses = {"right": "passed", "raises": "broken", "hangs": "out of time", "needs": "left out", "speed": "missed"}
    assert ran(tmp_path, *parts) == statuses
    results = Results(tmp_path)
    assert [row["name"] for row in results.parts["hangs"].rows] == ["before"], "what it found is lost"
    assert results.parts["needs"].note == "needs no_such_package"
    assert [part.name for part in parts if not results.is_done(part, "cpu")] == ["raises", "hangs", "needs"]
    assert not results.is_done(parts[0], "cuda"), "a rehearsal counts for a GPU"
    assert gpu._judged(SPEED._replace(section="a"), 0, results.parts["speed"].rows) == ("failed", "planted")
    assert gpu._judged(SPEED, 0, []) == ("broken", "it gave no row")
    monkeypatch.setattr("tests.gpu.results.PARTS", parts)
    table = results.table()
    assert (
        "| | planted | 2 | at most 1 | **no** |" in table and "| as it must be | 1 of one | at most 1 | cpu |" in table
    )
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}Nothing yet.\n{END}after\n")
    with pytest.raises(RunError, match="right, raises, hangs, needs, speed ran on a CPU"):
        results.write_page(page)
    for found in results.parts.values():
        found.device = "cuda"
    results.write_page(page)
    assert page.read_text() == f"before\n{BEGIN}{results.table()}{END}after\n"


def test_a_fault_that_is_planted_makes_a_row_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting, made = Setting("cpu", tmp_path), lambda: optional("decoder")
    assert all(row.ok for row in models._beside(setting, "decoder", made))
    assert attention._beside(setting, "window", "gathered", torch.float32) < attention.LIMITS[torch.float32]
    gathered, turned = attention.Gathered.attend, models.turned
    monkeypatch.setattr(models, "turned", lambda batch: dataclasses.replace(turned(batch), seed=8))
    assert not any(row.ok for row in models._beside(setting, "decoder", made)), "the noise is another"
    monkeypatch.setattr(
        attention.Gathered, "attend", lambda self, *rest: gathered(self._replace(mask=self.mask.roll(1, 3)), *rest)
    )
    assert attention._beside(setting, "window", "gathered", torch.float32) > attention.LIMITS[torch.float32]
    [row] = each({"raises": lambda: iter([1 // 0])})  # type: ignore[list-item]
    assert not row.ok and row.note.startswith("ZeroDivisionError")


def test_waiting_for_the_device_is_seen_where_it_happens() -> None:
    with Waits("cpu") as waits:
        _sum_of_squares([torch.ones(())])
    [(place, count)] = waits.places.items()
    assert "pretrain/engine/engine.py:" in place and count == 1


SOURCE = '''
def work(cuda, device):
    if cuda and device:
        one()
    if device.type != "cuda":
        return 0
    with two:
        three()
def only(device):  # CUDA only
    """Said."""
    return four(
        device)
def not_so(device, fast):
    if fast or device.is_cuda:
        five()
    if not device.is_cuda:
        six()
    else:
        seven()
'''


def test_lines_of_cuda_alone_are_found_and_those_reached_are_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert of_source(SOURCE) == {4: 4, 7: 7, 8: 8, 11: 12, 19: 19}
    found = cuda_only()
    results, file = Results(tmp_path), "pretrain/engine/snapshot.py"
    of_today, of_before = lines.named(file), f"{file} 0123456789ab"
    for name, expected in ((of_before, True), (of_today, False)):
        results.add("one", Result("passed", 1.0, "cuda", "now", reached={name: [*found[file]]}))
        assert any(line.startswith(file) for line in results.missed_lines("cuda")) == expected
    assert "pretrain/engine/snapshot.py" in found and all(file.startswith(PACKAGES) for file in found)
    assert any("_compiled_flex" in line for line in lines.missed(found, {}))
    (tmp_path / "made.py").write_text("def f(cuda):\n    if cuda:\n        return 1\n    return 2\n")
    monkeypatch.setattr(lines, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted, made = {"made.py": {3: 3}}, importlib.import_module("made")
    for cuda, missed in ((False, ["made.py:3: return 1"]), (True, [])):
        with Tracer(wanted) as tracer:
            made.f(cuda)
        assert list(lines.missed(wanted, tracer.reached)) == missed


WITHOUT = """
import importlib.metadata, runpy, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
    del sys.modules[name]
sys.modules["mlflow"] = None
known = importlib.metadata.Distribution.from_name
def from_name(name):
    if name == "mlflow":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.Distribution.from_name = from_name
from pretrain.report import report
report.write = lambda runs, out: None
sys.argv = ["pretrain", *sys.argv[1:]]
runpy.run_module("pretrain", run_name="__main__")
"""


def test_the_trainer_needs_no_mlflow(dataset: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.path={dataset}", f"run.dir={tmp_path / 'run'}", "train.steps=2"]
    done = program("-c", WITHOUT, *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    start = next(record for record in journal.read(tmp_path / "run" / "metrics.jsonl") if record.kind == "start")
    assert {"torch", "deepspeed"} < start.fields["versions"].keys() and "mlflow" not in start.fields["versions"]
    assert sys.modules.get("mlflow", "") is not None
