"""Duet from Python: the notebook of docs/ runs, and gives what the command line gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import duet_pretrain as duet
from data_pipeline.errors import ConfigError
from pretrain.metric_names import LOSS, VALIDATION
from pretrain.run.run_summary import load
from tests.runs import ROOT, program

NOTEBOOK, PAGE = ROOT / "docs" / "python.ipynb", ROOT / "docs" / "python.md"
RUN = """
import json, runpy, signal, sys
import duet_pretrain as duet
from data_pipeline.errors import RunError
notebook = json.load(open(sys.argv[1]))
runpy.run_path(sys.argv[2])["run"](notebook)
json.dump(notebook, open("ran.ipynb", "w"))
handler = signal.getsignal(signal.SIGTERM)
try:
    duet.train("data.path=nowhere", "run.name=other")
except RunError as error:
    assert "ended with code 2" in str(error), error
    assert signal.getsignal(signal.SIGTERM) is handler
else:
    raise AssertionError("no data, and no error")
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the notebook ran."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    made = str(ROOT / "docs" / "make_notebook.py")
    done = program("-c", RUN, str(NOTEBOOK), made, cwd=folder, MPLBACKEND="agg", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return folder


def test_the_notebook_shows_what_it_gives(ran: Path) -> None:
    kept, new = (json.loads(file.read_text()) for file in (NOTEBOOK, ran / "ran.ipynb"))
    for cell, again in zip(kept["cells"], new["cells"], strict=True):
        assert cell["source"] == again["source"]
        outputs = cell.get("outputs", [])
        assert [one["output_type"] for one in outputs] == [one["output_type"] for one in again.get("outputs", [])]
        assert len("".join(outputs[0].get("text", [])).splitlines() if outputs else []) == len(
            "".join(again["outputs"][0].get("text", [])).splitlines() if outputs else []
        )
    for name in duet.__all__:
        assert f"duet.{name}" in NOTEBOOK.read_text() and f"`{name}(" in PAGE.read_text()


def test_a_dataset(ran: Path) -> None:
    data = duet.open_dataset(ran / "data" / "mine")
    text = (ROOT / "LICENSE").read_text()
    [begins], [ends] = data.texts("train"), data.texts("validation", "mine")
    assert text.startswith(begins) and text.endswith(ends)
    assert len(begins) + len(ends) > 0.99 * len(text), "a word may be cut between them"
    windows = list(data.windows(16, "validation"))
    [tokens] = data.documents("validation")
    assert windows[1][0] == windows[0][-1], "every token is predicted once"
    assert np.concatenate([window[:-1] for window in windows]).tolist() == tokens[: 16 * len(windows)].tolist()
    assert data.num_tokens("validation") == len(tokens) + 1


def test_a_model_and_the_journal(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ran)
    model = duet.load("runs/python")
    assert (model.run, model.step, duet.load("runs/python", 1).step) == ("python", 20, 1)
    ids = model.tokenizer.encode(["You may"])[0].tolist()
    assert torch.equal(model.logits("You may"), model.module(torch.tensor([ids]))[0])
    [greedy] = model.generate(["You may"], tokens=5, temperature=0.0)
    said = program("launch.cli", "generate", "runs/python", "--prompt", "You may", "--tokens", "5", "--greedy")
    assert said.stdout == f"You may{greedy}\n"
    for wrong in (lambda: model.logits(""), lambda: model.logits("a" * 400), lambda: model.generate("You may")):
        with pytest.raises(ConfigError):
            wrong()
    points = load(Path("runs/python")).points
    steps, validations = duet.journal("runs/python"), duet.journal("runs/python", "validation")
    assert steps["step"].tolist() == list(range(1, 21)) and validations["step"].tolist() == [10, 20]
    assert steps["loss/train"].tolist() == [point.value for point in points[LOSS]]
    assert validations["loss/val"].tolist() == [point.value for point in points[VALIDATION]]
    assert {len(column) for column in steps.values()} == {20}


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps"):
        duet.train("train.stpes=3")
    with pytest.raises(AttributeError, match="it has build"):
        duet.nothing  # noqa: B018
