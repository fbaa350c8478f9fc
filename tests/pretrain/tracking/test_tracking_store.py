"""What MLflow has is what counts: a store that was put back or emptied, and a run that was deleted or copied."""

import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import RunError
from pretrain.run.journal import Journal, Record
from pretrain.tracking import follower
from pretrain.tracking.follower import Tracker, assign, sync, unsent
from pretrain.tracking.mlflow_state import FORMAT, State, default_uri
from pretrain.tracking.mlflow_store import as_metrics, connect
from pretrain.tracking.mlflow_sync import Mirror
from tests.faults.tracked import assert_mirrors, run_of, until
from tests.runs import new_store


class Run:
    """A journal, and what writes to it."""

    def __init__(self, run_dir: Path, uri: str | None = None, sources: dict[str, Any] | None = None) -> None:
        run_dir.mkdir(parents=True)
        if uri is None:
            new_store(run_dir.parent / "mlflow.db")
        self.path = run_dir
        self.journal = Journal(run_dir / "metrics.jsonl", 1)
        self.step = 0
        where = {"mode": "online", "uri": uri, "experiment": "duet"}
        config = {"run": {"name": run_dir.name}, "tracking": where, "data": {"path": "d", "sources": sources or {}}}
        self.journal.event("start", resumed_from=None, config=config, tags={"git/commit": "c1"})
        assign(run_dir, uri=uri, experiment="duet", run_name=run_dir.name)

    def steps(self, number: int) -> "Run":
        for _ in range(number):
            self.step += 1
            self.journal.metrics(self.step, {"loss/train": 1.0 / self.step, "gate/density": 0.5})
        self.journal.event("checkpoint", step=self.step, path=f"checkpoints/step-{self.step}")
        return self

    def end(self) -> "Run":
        self.journal.event("end", status="FINISHED", reason="all steps done")
        return self


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "a")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(follower, "LONGEST_PAUSE_SECONDS", 0.2)


def store_of(run: Run) -> Path:
    return run.path.parent / "mlflow.db"


def shipped(run: Run) -> bool:
    state = State.load(run.path)
    return state is not None and state.offsets.get("metrics.jsonl") == (run.path / "metrics.jsonl").stat().st_size


def client_of(run: Run) -> Any:
    return connect(default_uri(run.path))


def test_a_store_put_back_to_an_older_copy_gets_what_it_lacks(run: Run, tmp_path: Path) -> None:
    sync(run.steps(30).path)
    shutil.copy(store_of(run), tmp_path / "older")
    (run.path / "logs").mkdir()
    node = Journal(run.path / "logs" / "system-n1.jsonl", 1)
    for step in range(10):
        node.metrics(step, {"system/n1.load": 0.5})
    assert sync(run.steps(20).end().path).num_metrics == 20 * 3 + 10 * 2
    shutil.copy(tmp_path / "older", store_of(run))
    done = sync(run.path)
    assert (done.num_metrics, done.status) == (20 * 3 + 10 * 2, "FINISHED")
    assert assert_mirrors(run.path) == 50 * 3 + 10 * 2
    assert run_of(run.path).data.tags["checkpoint/last"] == "step 50: checkpoints/step-50"
    assert sync(run.path).num_metrics == 0

    # Only a part of it is gone, whatever its tags say.
    with closing(sqlite3.connect(store_of(run))) as database, database:
        database.execute("DELETE FROM metrics WHERE step BETWEEN 11 AND 20")
        database.execute("DELETE FROM metrics WHERE key = 'training masks/density'")
        database.execute("DELETE FROM latest_metrics WHERE key = 'training masks/density'")
        database.execute("DELETE FROM params")
    assert sync(run.path).num_metrics == 10 * 3 + 40
    assert assert_mirrors(run.path) == 50 * 3 + 10 * 2
    assert run_of(run.path).data.params["data.path"] == "d"


def test_what_two_nodes_say_at_one_moment_is_sent_once() -> None:
    records = [Record("metrics", 7, 1, 3, {}, {}) for _ in range(2)]
    points = [(name, 1.0, record) for record in records for name in ("attempt", "load")]
    sent = [(metric.key, metric.value, metric.timestamp, metric.step) for metric in as_metrics(points)]
    assert sent == [("attempt", 1.0, 7, 3), ("load", 1.0, 7, 3)]


@pytest.mark.parametrize("more", [2, 15], ids=["still shorter", "longer again"])
def test_a_journal_that_lost_lines_which_were_sent_is_mirrored_from_there(run: Run, more: int) -> None:
    """As when a node loses power: what was noted is on disk, the journal's last lines were not yet."""
    sync(run.steps(20).path)
    kept = (run.path / "metrics.jsonl").stat().st_size
    sync(run.steps(10).path)
    os.truncate(run.path / "metrics.jsonl", kept - 1)
    run.journal = Journal(run.path / "metrics.jsonl", 2)
    run.journal.event("start", resumed_from=20, config={}, tags={"git/commit": "c2"})
    run.step = 20
    mirror = Mirror(run.steps(more).path, print)
    mirror.bring(last=False)
    assert mirror.num_metrics == more * 3
    assert sync(run.path).num_metrics == 0, "MLflow had it all"
    assert run_of(run.path).data.tags["git/commit"] == "c2"
    mirror.bring(last=False)
    assert (mirror.num_metrics, shipped(run)) == (more * 3, True)


@pytest.mark.usefixtures("quick")
def test_a_store_that_changes_under_a_running_mirror(run: Run, tmp_path: Path) -> None:
    """Put back, replaced by an empty file, and removed."""
    said: list[str] = []
    (run.path / "config.yaml").write_text("a: 1\n")
    mirror = Mirror(run.steps(10).path, said.append)
    tracker = Tracker(lambda warn: mirror, said.append)
    tracker.start()

    def until_it_rests() -> None:
        until(lambda: shipped(run) and not mirror.files_due)

    until_it_rests()
    shutil.copy(store_of(run), tmp_path / "older")
    run.steps(20)
    until_it_rests()
    shutil.copy(tmp_path / "older", store_of(run))
    run.steps(5)
    until_it_rests()
    assert assert_mirrors(run.path) == 35 * 3
    before = run_of(run.path).info.run_id

    store_of(run).write_bytes(b"")
    run.steps(5)
    until(lambda: said)
    until_it_rests()
    anew = run_of(run.path).info.run_id
    assert re.search(f"no run {before} any more; .* as run {anew}", said[0])
    store_of(run).unlink()
    run.steps(5).end()
    assert tracker.close(60.0)
    assert assert_mirrors(run.path) == 45 * 3
    found = run_of(run.path)
    assert (found.info.status, found.data.params["data.path"]) == ("FINISHED", "d")
    assert [f.path for f in client_of(run).list_artifacts(found.info.run_id)] == ["config.yaml"]


def test_a_deleted_run_or_experiment_is_named_with_the_way_on(run: Run) -> None:
    run_id = sync(run.steps(5).end().path).run_id
    client = client_of(run)
    client.delete_run(run_id)
    with pytest.raises(RunError, match=f"mlflow runs restore --run-id {run_id}, or .* --new-run"):
        sync(run.path)
    client.restore_run(run_id)
    assert sync(run.path).run_id == run_id
    client.delete_run(run_id)
    anew = sync(run.path, new_run=True)
    assert (anew.run_id != run_id, anew.num_metrics) == (True, 5 * 3)
    assert_mirrors(run.path)

    experiment = run_of(run.path).info.experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(RunError, match=f"mlflow experiments restore --experiment-id {experiment}"):
        sync(run.path, new_run=True)


def test_a_run_that_is_gone_for_good_is_made_anew(run: Run) -> None:
    run_id = sync(run.steps(5).end().path).run_id
    with closing(sqlite3.connect(store_of(run))) as database, database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table}")
    said: list[str] = []
    assert sync(run.path, said.append).num_metrics == 5 * 3
    assert run_id in said[0]
    assert_mirrors(run.path)

    store_of(run).write_bytes(b"no database" * 1000)
    with pytest.raises(RunError, match="move the file away"):
        sync(run.path)
    store_of(run).unlink()
    assert sync(run.path).num_metrics == 5 * 3


@pytest.mark.parametrize("beside", [True, False], ids=["in the same store", "elsewhere"])
def test_a_copied_run_folder_becomes_a_run_of_its_own_when_its_owner_says_so(run: Run, beside: bool) -> None:
    original = sync(run.steps(5).path).run_id
    copy = run.path.parent / ("b" if beside else "elsewhere/a")
    shutil.copytree(run.path, copy)
    journal = Journal(copy / "metrics.jsonl", 1)
    journal.metrics(6, {"loss/train": 0.1})
    with pytest.raises(RunError, match=f"a copy of {run.path}.*duet track sync {copy} --new-run"):
        sync(copy)
    said: list[str] = []
    tracker = Tracker(partial(Mirror, copy), said.append)
    tracker.start()
    assert not tracker.close(60.0)
    assert [f"duet track sync {copy} --new-run" in text for text in said] == [True]
    done = sync(copy, new_run=True)
    assert (done.run_id != original, done.num_metrics) == (True, 5 * 3 + 2)
    assert assert_mirrors(copy) == 5 * 3 + 2
    assert sync(copy).run_id == done.run_id
    assert sync(run.path).run_id == original
    assert assert_mirrors(run.path) == 5 * 3
    moved = run.path.rename(run.path.with_name("moved"))
    assert sync(moved).run_id == original, "a folder that was moved is no copy"


def spoil(content: dict[str, Any]) -> Iterator[str | bytes]:
    yield json.dumps(content | {"offsets": {"metrics.jsonl": 1}})
    yield json.dumps(content | {"run_id": "0" * 32})
    yield json.dumps({name: value for name, value in content.items() if name != "sha256"})
    yield json.dumps(content | {"format": "3"})
    yield "[" * 100_000
    yield '{"format": 2, "uri": 7}'
    yield b"\xff\xfe\0"
    yield ""


def test_damaged_notes_are_made_anew_from_journal_and_server(run: Run) -> None:
    run_id = sync(run.steps(5).path).run_id
    notes = run.path / "tracking.json"
    content = json.loads(notes.read_text())
    assert content["format"] == FORMAT
    for number, damage in enumerate(spoil(content)):
        run.steps(1)
        notes.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
        said: list[str] = []
        done = sync(run.path, said.append)
        assert (done.run_id, done.num_metrics) == (run_id, 3), number
        assert str(notes) in said[0]
        assert len(said) == 1
        assert json.loads(notes.read_text())["format"] == FORMAT
    notes.unlink()
    assert sync(run.path).run_id == run_id
    notes.write_text("{")
    assign(run.path, uri=None, experiment="duet", run_name="a", warn=said.append)
    assert len(said) == 2, "training begins again, and says so"
    assert sync(run.path).run_id == run_id
    assert assert_mirrors(run.path) == 13 * 3


def test_notes_of_format_2_go_on(run: Run) -> None:
    run_id = sync(run.steps(5).path).run_id
    state = State.load(run.path)
    assert state
    old = {"format": 2, "uri": None, "experiment": "duet", "run_name": "a", "created": state.created, "key": state.key,
           "run_id": run_id, "offsets": {"metrics.jsonl": 4711}, "attempt": 1}  # fmt: skip
    (run.path / "tracking.json").write_text(json.dumps(old))
    said: list[str] = []
    done = sync(run.steps(1).path, said.append)
    assert (done.run_id, done.num_metrics, said) == (run_id, 3, [])


def test_a_run_keeps_the_names_it_began_with(run: Run) -> None:
    """One of the first version has no tag that tells of its names."""
    client = client_of(run)
    client.delete_tag(sync(run.path).run_id, "duet.names")
    assert sync(run.steps(5).path).num_metrics == 5 * 3
    assert sorted(run_of(run.path).data.metrics) == ["loss/train", "mask/density", "progress/attempt"]
    assert sync(run.path, all_masks=True).num_metrics == 0


def test_all_masks_are_there_once_they_are_asked_for(run: Run) -> None:
    for step in range(1, 5):
        run.journal.metrics(step, {"gate/density": 0.5, "gate/density/enc_ff/00": 0.5, "gate/always_on": 0.1})
    run.step = 4
    assert sync(run.steps(2).path).num_metrics == 4 * 2 + 2 * 3
    assert assert_mirrors(run.path) == 4 * 2 + 2 * 3
    assert sync(run.path, all_masks=True).num_metrics == 4 * 4
    assert_mirrors(run.path, all_masks=True)
    run.journal.metrics(7, {"gate/always_on": 0.1})
    assert sync(run.end().path).num_metrics == 2, "from then on, too"
    assert_mirrors(run.path, all_masks=True)


def test_the_page_and_its_columns_are_filled(run: Run) -> None:
    fields = {"command": "duet train a b=c", "user": "ada", "parameters": 1234, "world_size": 2, "device": "H200"}
    tags = {"git/commit": "c0ffee", "dataset/fingerprint": "f" * 64}
    config = {"data": {"path": "/data/books"}, "model": {"vocab_size": 65}}
    run.journal.event("start", resumed_from=None, config=config, tags=tags, **fields)
    for _ in range(2):
        done = sync(run.steps(2).path)
        found = run_of(run.path)
        wanted = {
            "source.name": "duet train a b=c",
            "source.type": "LOCAL",
            "source.git.commit": "c0ffee",
            "user": "ada",
        }
        assert {name: found.data.tags[f"mlflow.{name}"] for name in wanted} == wanted
        assert "1,234 parameters, data /data/books, 2 rank(s), H200" in found.data.tags["mlflow.note.content"]
        [dataset] = found.inputs.dataset_inputs
        assert (dataset.dataset.name, dataset.dataset.digest) == ("books", "f" * 36)
        assert json.loads(dataset.dataset.source) == {"uri": "/data/books"}
        [experiment] = [e for e in client_of(run).search_experiments() if e.name == "duet"]
        assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
        place = f"/#/experiments/{experiment.experiment_id}/runs/{found.info.run_id}/model-metrics"
        assert done.page == f"http://127.0.0.1:5000{place}?workflowType=machine_learning"


def test_a_metric_that_mlflow_refuses_is_left_out_and_told(run: Run) -> None:
    for step in range(20):
        run.journal.metrics(100 + step, {"": 1.0, "loss/train": 0.5})
    said: list[str] = []
    assert sync(run.path, said.append).num_metrics == 20 * 2
    assert len(said) == 1
    assert "refuses ''" in said[0]
    assert sorted(run_of(run.path).data.metrics) == ["loss/train", "training health/attempt"]


def test_names_that_mlflow_refuses_are_all_there(tmp_path: Path) -> None:
    sources = ["web (en)", "web [en]", "web", "a/b", "..", "größe", "\udcff", "x" * 300]
    run = Run(tmp_path / "a", sources={name: {"paths": ["p" * 7000]} for name in sources})
    for step in range(3):
        values = {f"data/epoch_{name}": float(number) for number, name in enumerate(sources)}
        run.journal.metrics(step, values | {f"loss/val/{name}": 1.0 + number for number, name in enumerate(sources)})
    said: list[str] = []
    assert sync(run.end().path, said.append).num_metrics == 3 * (2 * len(sources) + 1)
    assert said == []
    data = run_of(run.path).data
    assert data.metrics["training data/epoch_web -x28-en-x29-"] == 0.0
    assert data.metrics["training data/epoch_web -x5b-en-x5d-"] == 1.0
    assert len([name for name in data.params if name.endswith(".paths") or "-x-" in name]) == len(sources)
    assert sync(run.path).num_metrics == 0


@pytest.mark.usefixtures("quick")
def test_at_the_end_it_is_said_what_was_not_sent(run: Run) -> None:
    run.steps(10)
    assert unsent(run.path) == "not there yet: steps from 1 on"
    sync(run.path)
    run.steps(5)
    assert unsent(run.path) == "not there yet: steps from 11 on"


def test_a_store_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    """MLflow by itself tries for 51 seconds in silence."""
    run = Run(tmp_path / "a", "sqlite:////proc/mlflow.db").steps(1)
    with pytest.raises(RunError, match=r"cannot write /proc/mlflow.db: no file or folder can be made there"):
        sync(run.path)
