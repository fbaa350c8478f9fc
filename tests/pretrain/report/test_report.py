"""The report: one page that needs nothing else and tells what the journal tells."""

import html
import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError, RunError
from data_pipeline.files.atomic import write_json
from pretrain.report import plots as report_plots
from pretrain.report.plots import PANELS
from pretrain.report.report import write_report
from pretrain.run.journal import Journal
from pretrain.run.lease import Lease
from pretrain.run.run_summary import load, verdict

FACTS = {
    "format": 1,
    "name": "tiny <&> run",
    "dataset": {"path": "data/wiki", "fingerprint": "ab" * 32, "order0_entropy": 4.4673},
    "parameters": 10_123_456,
    "world_size": 2,
    "versions": {"torch": "2.13.0"},
    "host": "<script>alert(1)</script>",
}


def journal_steps(run_dir: Path, attempt: int, first: int, last: int, *, resumed: bool = False) -> Journal:
    noise = random.Random(attempt)
    journal = Journal(run_dir / "metrics.jsonl", attempt)
    journal.event("start", resumed_from=first if resumed else None, world_size=2)
    for step in range(first + 1, last + 1):
        metrics = {
            "loss/draft": 3 + 6 * math.exp(-step / 30),
            "loss/train": 2 + 6 * math.exp(-step / 30) + noise.gauss(0, 0.02),
            "gate/density": 0.5,
            "optim/lr": 1e-3,
            "optim/grad_norm": math.nan if step == 7 else 1.0,
            "data/tokens_seen": 4096 * step,
        }
        if step % 2 == 0:
            metrics |= {"time/tokens_per_second": 43_210.9, "time/mfu": 0.41, "time/step_ms": 90 + noise.random()}
            metrics |= {"time/data_ms": 2, "time/forward_ms": 30, "time/backward_ms": 40, "time/optimizer_ms": 10}
            metrics |= {"system/memory_gib": 11.5, "system/peak_memory_gib": 12.5, "optim/update_ratio": 1e-3}
            metrics |= {"time/goodput": 0.9, "time/rank_spread": 1.05}
        if step % 20 == 0:
            metrics["time/checkpoint_ms"] = 20
        for site in ("enc_ff", "dec_ff"):
            for layer in range(3):
                metrics[f"gate/density/{site}/{layer:02d}"] = 1 - step / 200 - layer / 10
                metrics[f"gate/entropy/{site}/{layer:02d}"] = step / 200 + layer / 10
                metrics[f"gate/multiplier/{site}/{layer:02d}"] = step / 1000
        metrics |= {"loss/earlier_step": 3.0, "refine/change/01": 0.5, "ponder/steps": 2.5, "ponder/share/2": 0.5}
        of_heads = ("alpha", "span", "zeros", "fullest", "empty", "dropped")
        metrics |= {f"attention/{kind}/dec_sa/00/h0": 1.5 for kind in of_heads}
        journal.metrics(step, metrics)
        if step % 20 == 0:
            losses = {
                "loss/val": 2.25 - attempt / 8,
                "loss/val_in_order": 2.5,
                **{f"labels/val_{score}": 0.5 for score in ("accuracy", "exact", "f1")},
                "loss/val_bits_per_byte": 1.75 - attempt / 8,
            }
            for number in range(9):
                losses |= {f"loss/val/s{number}": 2.0 + number, f"loss/val_bits_per_byte/s{number}": 1.0 + number}
            journal.metrics(step, losses)
            journal.event("sample", step=step, text=f"attempt {attempt}: <b>bold</b> & $x_1$ ⟶ text")
    return journal


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run:\n  name: 'a<i>b'\n")
    (folder / "run.json").write_text(json.dumps(FACTS))
    journal_steps(folder, 1, 0, 70).close()
    journal = journal_steps(folder, 2, 60, 100, resumed=True)
    journal.event("warning", text="odd <thing>")
    journal.event("slowest", step=88, rank=3, host="node<7>", ratio=1.456)
    journal.event("end", status="FINISHED", reason="all steps done")
    journal.close()
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Path:
    return write_report([run_dir], None)


def is_png(content: bytes) -> bool:
    return content.startswith(b"\x89PNG\r\n")


def test_a_report_tells_the_numbers_and_escapes_all_text(run_dir: Path, page: Path) -> None:
    assert page == run_dir / "report.html"
    assert is_png((run_dir / "report.png").read_bytes())
    text = page.read_text()
    run = load(run_dir)
    assert f"Finished at step 100, resumed once: training loss {run.points['loss/train'][0].value:.4f}" in text
    assert "Validation: 1.5000 bits per byte, 66% below the 4.4673 of byte frequencies alone." in text
    assert "step 88: rank 3 on node&lt;7&gt; took 1.46 times the mean" in text
    for number in ("10,123,456", "43,210", "1.00e-03", ">2.000<"):
        assert number in text
    assert "attempt 2: &lt;b&gt;bold&lt;/b&gt; &amp; $x_1$ ⟶ text" in text
    for escaped in ("tiny &lt;&amp;&gt; run", "a&lt;i&gt;b", "odd &lt;thing&gt;", "&lt;script&gt;alert(1)"):
        assert escaped in text
    assert "<script>alert" not in text
    for name in ("loss/val/s8", "loss/val_bits_per_byte/s8"):
        assert f">{name}<" in text
    titles = [html.unescape(title) for title in re.findall(r"<figcaption>(.*?)</figcaption>", text)]
    assert titles == [panel.title for panel in PANELS], "the journal has all that can be drawn"
    assert text.count("data:image/png;base64,") == len(PANELS)
    plots = list((run_dir / "report-plots").iterdir())
    assert len(plots) == len(PANELS)
    assert all(is_png(plot.read_bytes()) for plot in plots)


def test_a_page_asks_for_nothing_from_anywhere(page: Path) -> None:
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page.read_text())
    assert not re.search(r"https?:|url\(|<link|@import|src=\"[^\"]", text)


def charts(page: Path) -> dict[str, Any]:
    """The data of each chart, by its title."""
    data = r'(?:<script type="application/json">(.*?)</script>)?'
    found = re.findall(rf"<figcaption>([^<]*)</figcaption><img[^>]*>{data}</figure>", page.read_text())
    assert len(found) == page.read_text().count("<figcaption>")
    return {html.unescape(title): json.loads(data) for title, data in found if data}


def test_a_chart_has_the_curve_of_the_journal_and_a_picture_none(run_dir: Path, page: Path) -> None:
    drawn, run = charts(page), load(run_dir)
    assert set(drawn) == {panel.title for panel in PANELS if not panel.still}
    loss, validation = drawn["Loss"]["series"]
    assert (loss["name"], validation["name"], drawn["Loss"]["unit"]) == ("training", "validation", "nats per token")
    assert loss["x"] == [p.step for p in run.points["loss/train"]]
    assert loss["y"] == pytest.approx([p.value for p in run.points["loss/train"]], rel=1e-5)
    assert drawn["Loss by tokens"]["series"][0]["x"] == [4096 * p.step for p in run.points["loss/train"]]
    assert drawn["Validation, bits per byte"]["levels"] == [{"y": 4.4673, "name": "byte frequencies alone: 4.467"}]
    assert drawn["Gradient norm"]["series"][0]["y"][6] is None, "not a number"
    assert [line["name"] for line in drawn["Validation by source"]["series"]] == [f"s{n}" for n in range(9)]


def test_what_is_to_be_known_first_stands_on_top(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", 1)
    tags = {"git/commit": "c0ffee" * 7, "git/changed_files": "2"}
    facts = {"command": "duet train a 'b <c>'", "device": "H200", "world_size": 8, "host": "n7", "tags": tags}
    journal.event("start", resumed_from=None, **facts)
    text = write_report([tmp_path], None).read_text()
    for told in (
        "duet train a &#x27;b &lt;c&gt;&#x27;",
        "c0ffeec0ffee, 2 files changed",
        "8 × H200, n7",
        "<dt>took</dt>",
    ):
        assert told in text


def test_points_after_a_rollback_are_the_new_ones(run_dir: Path) -> None:
    points = load(run_dir).points["loss/train"]
    assert [p.step for p in points] == list(range(1, 101))
    assert {p.attempt for p in points if p.step > 60} == {2}


@pytest.mark.parametrize("facts", [None, {}, {"dataset": None}, {"name": "x", "dataset": {"order0_entropy": None}}])
def test_missing_pieces_are_left_out(tmp_path: Path, facts: dict[str, Any] | None) -> None:
    if facts is not None:
        (tmp_path / "run.json").write_text(json.dumps(facts))
    journal = Journal(tmp_path / "metrics.jsonl", 1)
    journal.event("start", resumed_from=None)
    journal.metrics(1, {"loss/train": math.nan})
    text = write_report([tmp_path], tmp_path / "new" / "page.html").read_text()
    assert is_png((tmp_path / "new" / "page.png").read_bytes())
    assert "Killed without a word at step 1" in text
    assert "It was never validated." in text


def test_a_run_whose_owner_lives_is_said_to_run(tmp_path: Path) -> None:
    with Lease.acquire(tmp_path):
        Journal(tmp_path / "metrics.jsonl", 1).event("start", resumed_from=None)
        assert verdict(load(tmp_path))[0] == "Still running at step 0: no training step."
        assert ">running</span>" in write_report([tmp_path], None).read_text()


def test_a_run_that_failed_before_its_first_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", 1)
    journal.event("start", resumed_from=None)
    journal.event("end", status="FAILED", reason="RuntimeError: no memory")
    assert verdict(load(tmp_path))[0] == "Failed (RuntimeError: no memory) at step 0: no training step."
    assert is_png(write_report([tmp_path], None).with_suffix(".png").read_bytes())


def test_several_runs_are_sorted_by_validation_loss(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_plots, "PANELS", PANELS[:2])
    other = run_dir.parent / "b"
    other.mkdir()
    journal_steps(other, 1, 0, 40).close()
    empty = run_dir.parent / "c"
    empty.mkdir()
    Journal(empty / "metrics.jsonl", 1).event("start", resumed_from=None)
    page = write_report([empty, other, run_dir], None)
    assert page == run_dir.parent / "report.html"
    text = page.read_text()
    assert "Lowest validation loss: tiny &lt;&amp;&gt; run, 2.000 nats per token." in text
    rows = re.findall(r"<tr><td>(.*?)</td>", text)
    assert rows[:3] == ["tiny &lt;&amp;&gt; run", "b", "c"]


def test_runs_of_different_datasets_are_sorted_by_bits_per_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_plots, "PANELS", PANELS[:1])
    for name, loss, bits in (("coarse", 1.0, 2.0), ("fine", 2.0, 1.0)):
        (tmp_path / name).mkdir()
        facts = FACTS | {"name": name, "dataset": {"path": "d", "fingerprint": name * 8, "order0_entropy": 4.0}}
        (tmp_path / name / "run.json").write_text(json.dumps(facts))
        journal = Journal(tmp_path / name / "metrics.jsonl", 1)
        journal.metrics(1, {"loss/val": loss, "loss/val_bits_per_byte": bits})
        journal.close()
    text = write_report([tmp_path / "coarse", tmp_path / "fine"], None).read_text()
    assert re.findall(r"<tr><td>(.*?)</td>", text) == ["fine", "coarse"]
    assert "nats per token do not compare" in text
    assert "Fewest bits per byte: fine, 1.000." in text
    assert "Lowest validation loss" not in text


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({}, {"optimizer": {"lr": 2}}, None),
        ({"train": {"eval_tokens": 5}}, {"train": {"eval_tokens": 6}}, None),
        ({"data": {"objective": "causal"}}, {"data": {"objective": "prefix"}}, "by data.objective: the same"),
        ({"train": {"eval_whole_at_end": False}}, {"train": {"eval_whole_at_end": True}}, "eval_whole_at_end"),
        ({"tokenizer": "a"}, {"tokenizer": "b"}, "Their tokenizers differ"),
        ({"model": {"architecture": f"/a/b.py:C@{64 * '0'}"}}, {"model": {"architecture": "refined"}}, None),
    ],
)  # fmt: skip
def test_runs_that_do_not_compare_are_not_ranked_by_nats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: dict[str, Any], other: dict[str, Any], told: str | None
) -> None:
    monkeypatch.setattr(report_plots, "PANELS", PANELS[:1])
    for name, more in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        config = {"run": {"name": name}, "model": {"context": 64}} | more
        (tmp_path / name / "config.yaml").write_text(json.dumps(config))
        journal = Journal(tmp_path / name / "metrics.jsonl", 1)
        journal.event("start", resumed_from=None, tags={"dataset/tokenizer": more.get("tokenizer", "t")})
        journal.metrics(
            1, {"loss/val": 1.0 if name == "one" else 2.0, "loss/val_bits_per_byte": 3.0, "loss/train": 1.0}
        )
        journal.close()
    text = write_report([tmp_path / "other", tmp_path / "one"], None).read_text()
    assert ("Lowest validation loss: one, 1.000" in text) == (told is None)
    assert ("Fewest bits per byte" in text) == (told is not None)
    assert told is None or told in text
    settings = text.split("Settings in which they differ")[1].split("</table>")[0]
    keys = re.findall(r"<tr><td>(.*?)</td>", settings)
    assert len(keys) == 1 and "False" not in settings and "/a/" not in settings and 13 * "0" not in settings
    assert "run.name" not in keys and "model.context" not in keys
    lines = charts(tmp_path / "report.html")["Loss"]["series"]
    assert {line["name"] for line in lines} == {"one", "one validation", "other", "other validation"}


def test_what_is_not_a_run_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no such folder; expected a run folder, with metrics\.jsonl"):
        write_report([tmp_path / "nowhere"], None)
    with pytest.raises(RunError, match=r"no metrics\.jsonl in it; expected"):
        write_report([tmp_path], None)
    (tmp_path / "runs" / "first" / "attempts").mkdir(parents=True)
    with pytest.raises(RunError, match=r"runs: a folder of runs, such as .*/runs/first; name these"):
        write_report([tmp_path / "runs"], None)
    with pytest.raises(RunError, match="first: a run that has not trained yet"):
        write_report([tmp_path / "runs" / "first"], None)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(RunError, match="empty; expected"):
        write_report([tmp_path], None)
    with pytest.raises(RunError, match="at least one"):
        write_report([], None)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match=r"--out .*page\.PNG: .*end in \.html"):
        write_report([tmp_path], tmp_path / "page.PNG")
    assert not (tmp_path / "report.html").exists()


def test_a_page_takes_the_place_of_files_only(run_dir: Path, tmp_path: Path) -> None:
    """Not that of a device or a pipe, nor that of its own picture."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    ways_on = {"pipe": "name the page's file", ".": "name the page's file", "report.png": "let it end in .html"}
    for name, way_on in ways_on.items():
        with pytest.raises(RunError, match=way_on):
            write_report([run_dir], tmp_path / name)
    with pytest.raises(RunError, match="a file stands where a folder is needed"):
        write_report([run_dir], tmp_path / "file" / "report.html")
    with pytest.raises(DataError, match="a device or a pipe"):
        write_json(tmp_path / "pipe", {})
    with pytest.raises(DataError, match=r"x.json: '\"path\": \"a\\udcff\"' in it is not UTF-8"):
        write_json(tmp_path / "x.json", {"path": "a\udcff"})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["file"]
