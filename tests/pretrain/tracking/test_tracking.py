"""MLflow beside a run: one run for all attempts, with all that was journaled, once, and what the run is made of."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, RunError
from pretrain.config.schema import load
from pretrain.run import provenance
from pretrain.run.journal import Journal, Record, read
from pretrain.tracking.follower import assign, sync
from pretrain.tracking.mlflow_names import ATTEMPT, Names, flat, mirrored, shipped, text
from pretrain.tracking.mlflow_state import State, default_uri
from pretrain.tracking.mlflow_store import connect
from tests.faults.tracked import Writer, assert_mirrors, run_of
from tests.runs import ROOT, SMALL, duet

Ranks = Callable[..., list[Any]]


def test_killed_while_writing_and_resumed_100_steps_back_is_one_run(tmp_path: Path) -> None:
    """A rollback, a torn line, a status that is mended, and a neighbour that makes the new store at the same time."""
    run_dir, neighbour = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    first, beside = Writer(run_dir), Writer(neighbour)
    beside.tell("steps 1 20")
    first.tell("steps 1 200")
    first.tell("shipped")
    first.tell("steps 201 300")
    first.die()
    assert beside.end(), "two runs made the new store at once"
    assert not list(run_dir.parent.glob(".*.tmp"))
    assert_mirrors(neighbour)
    assert run_of(run_dir).info.status == "RUNNING"
    assert sync(run_dir).status == "KILLED"
    assert run_of(run_dir).info.end_time == list(read(run_dir / "metrics.jsonl"))[-1].time
    assert_mirrors(run_dir)

    second = Writer(run_dir, lr=5e-4, resumed_from=200)
    second.tell("steps 201 400")
    second.tell("shipped")
    assert run_of(run_dir).info.status == "RUNNING", "the next attempt mends what sync said"
    assert sync(run_dir).status == "RUNNING", "a live run's status is left alone"
    assert second.end()
    points = assert_mirrors(run_dir)

    run = run_of(run_dir)
    assert run.info.experiment_id == run_of(neighbour).info.experiment_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.lr": "0.001", "a": "None"}
    tags = run.data.tags
    assert tags["drift/optimizer.lr"] == "0.001 → 0.0005 (attempt 2)"
    assert (tags["restarts"], tags["git/commit"]) == ("1", "c2")
    assert tags["checkpoint/last"] == "step 400: checkpoints/step-400"
    assert tags["mlflow.note.content"].startswith("Finished at step 400, resumed once: training loss 6.0000 → 2.0125")
    assert sorted({name.split("/")[0] for name in run.data.metrics})[0] == "loss", "the first section of the page"

    # A crash after the server said yes and before that was on disk: the same run, and it has all.
    state = State.load(run_dir)
    assert state
    State(state.uri, state.experiment, state.run_name, state.created, state.key).save(run_dir)
    synced = sync(run_dir)
    assert (synced.run_id, synced.status) == (state.run_id, "FINISHED")
    assert synced.num_metrics == 0
    assert points == assert_mirrors(run_dir)

    Journal(run_dir / "metrics.jsonl", 1).event("end", status="FAILED", reason="taken over")
    assert sync(run_dir).status == "FINISHED", "what an older attempt writes late is not the run's end"


def test_offline_and_synced_later_from_another_place(tmp_path: Path) -> None:
    """Attempts that never had a way to MLflow: the folder is moved, and the command line sends all of both."""
    made = tmp_path / "node" / "a"
    for attempt, resumed_from in enumerate([None, 100], start=1):
        writer = Writer(made, mode="offline", lr=1e-3 / attempt, resumed_from=resumed_from)
        writer.tell(f"steps {(resumed_from or 0) + 1} 200")
        writer.tell("system n1 1 10")
        if attempt == 1:
            writer.die()
    result = writer.tell("end FINISHED 1")
    assert result == {"complete": False, "callers": {}}, "offline makes no call"
    assert writer.process.wait(30) == 0
    assert not (tmp_path / "node" / "mlflow.db").exists()
    (made / "code").mkdir()
    (made / "code" / "attempt-000001.diff").write_text("a change\n")
    (made / "report.html").write_text("a report")

    (tmp_path / "node").rename(tmp_path / "login")
    run_dir = tmp_path / "login" / "a"
    done = duet("track", "sync", str(run_dir))
    assert done.returncode == 0, done.stderr
    assert ", FINISHED; " in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == "", "MLflow and its migrations say nothing on the terminal"
    assert assert_mirrors(run_dir) > 1500
    run = run_of(run_dir)
    assert run.data.tags["drift/optimizer.lr"] == "0.001 → 0.0005 (attempt 2)"
    client = connect(default_uri(run_dir))
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["code", "report.html"]
    assert [f.path for f in client.list_artifacts(run.info.run_id, "code")] == ["code/attempt-000001.diff"]

    # Moved once more, store and all: the curves come along, files stay where the store says.
    (tmp_path / "login").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "a"
    assert sync(moved).num_metrics == 0
    assert_mirrors(moved)
    assert (tmp_path / "login" / "mlartifacts").is_dir(), "what was sent now went to the old place"
    shutil.rmtree(tmp_path / "login")
    (tmp_path / "login").symlink_to(tmp_path / "moved")
    client = connect(default_uri(moved))
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["code", "report.html"]


def test_a_training_run_is_in_mlflow_with_all_that_it_is_made_of(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    args = [*SMALL, f"data.path={dataset}", f"run.dir={run_dir}", "train.steps=12", "train.checkpoint_every=5"]
    ranks("tests.distributed.cases:train_run", 2, args=[*args, "tracking.mode=offline"], signal_at=[7, 15])
    second = [*args, "tracking.mode=online", "train.log_every=2", "profile.steps=[9,10]"]
    ranks("tests.distributed.cases:train_run", 2, args=second, reported=True)
    sync(run_dir)  # what 10 s were not enough for on a busy machine
    assert_mirrors(run_dir)
    run = run_of(run_dir)
    assert run.info.status == "FINISHED"
    flat = load([*args, "tracking.mode=offline"]).model_dump(mode="json")
    assert run.data.params["optimizer.lr"] == str(flat["optimizer"]["lr"])
    assert run.data.params["model.learned_dropout.entropy.start_step"] == "0"
    tags = run.data.tags
    assert tags["drift/train.log_every"] == "1 → 2 (attempt 2)"
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert tags["dataset/fingerprint"] == manifest["fingerprint"]
    assert tags["dataset/tokenizer"] == manifest["tokenizer"]["sha256"]
    assert (tags["restarts"], tags["python"]) == ("1", sys.version.split()[0])
    assert tags["checkpoint/last"].startswith("step 12: checkpoints/")
    if (ROOT / ".git").exists():
        assert len(tags["git/commit"]) == 40
    sections = sorted({name.split("/")[0] for name in run.data.metrics if "/" in name})
    assert sections == ["loss", "optim", "speed", "training data", "training health", "training masks", "usage"]
    client = connect(default_uri(run_dir))
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "run.json", "code", "profile", "report.html"} <= files
    code = {f.path for f in client.list_artifacts(run.info.run_id, "code")}
    assert {"code/attempt-000001.json", "code/attempt-000002.json"} <= code
    environment = json.loads((run_dir / "code" / "attempt-000002.json").read_text())
    assert environment["packages"]["mlflow"].startswith("3.")


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_source_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    package = checkout / "venv" / "package"
    package.mkdir(parents=True)
    assert provenance.source(checkout) == ({}, b"")
    git(checkout, "init")
    tags, _ = provenance.source(checkout)
    assert tags["git/commit"].startswith("unknown: fatal: "), "nothing is committed yet"
    (checkout / "a.py").write_text("a = 1\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "one")
    tags, diff = provenance.source(checkout)
    assert (len(tags["git/commit"]), tags["git/changed_files"], diff) == (40, "0", b"")
    assert provenance.source(package) == ({}, b""), "the checkout is somebody else's"
    (checkout / "a.py").write_text("a = 2\n")
    (checkout / "new.py").write_text("b = 1\n")
    tags, diff = provenance.source(checkout)
    assert tags["git/changed_files"] == "2"
    assert b"+a = 2" in diff
    assert b"# ?? new.py\n" in diff
    (checkout / "a.py").write_text("x" * 2 * provenance.MAX_DIFF_BYTES)
    _, diff = provenance.source(checkout)
    assert provenance.MAX_DIFF_BYTES < len(diff) < provenance.MAX_DIFF_BYTES + 100
    assert diff.endswith(b" bytes\n")

    monkeypatch.setattr(provenance, "SOURCE", checkout)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hush")
    tags = provenance.record(tmp_path / "code", 3)
    assert (tags["slurm/job_id"], tags["slurm/nodes"]) == ("17", "n[1-2]")
    assert sorted(f.name for f in (tmp_path / "code").iterdir()) == ["attempt-000003.diff", "attempt-000003.json"]
    assert not any(b"hush" in f.read_bytes() for f in (tmp_path / "code").iterdir())


def test_another_server_gets_a_run_of_its_own_from_the_start(tmp_path: Path) -> None:
    def state(uri: str | None) -> State:
        assert assign(tmp_path, uri=uri, experiment="e", run_name="a") == (uri or default_uri(tmp_path))
        found = State.load(tmp_path)
        assert found
        return found

    first = state("http://one:5000")
    first.run_id, first.offsets = "r1", {"metrics.jsonl": 7}
    first.save(tmp_path)
    assert state("http://one:5000") == first
    other = state("http://two:5000")
    assert (other.run_id, other.offsets) == (None, {})
    assert other.key != first.key
    assert state(None).uri is None, "the store beside the run folder may move with it"
    assert state(default_uri(tmp_path)).uri is None


def test_a_tracking_state_of_format_1_goes_on_where_it_was(tmp_path: Path) -> None:
    old = {"uri": None, "experiment": "duet", "run_name": "first", "params": {"a": "1"}, "tags": {}, "format": 1,
           "created": 1763000000000, "key": "k", "run_id": "r", "pending": False, "offset": 4711}  # fmt: skip
    (tmp_path / "tracking.json").write_text(json.dumps(old))
    assert State.load(tmp_path) == State(None, "duet", "first", 1763000000000, "k", "r", {"metrics.jsonl": 4711})


@pytest.mark.parametrize(
    "uri", ["localhost:5000", "./mlruns", "http://", "ftp://host/x", "https://me:secret@host/", "me:secret@host"]
)
def test_uris_of_no_use_are_refused_without_telling_the_password(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri") as refused:
        load([f"tracking.uri={uri}"])
    assert "secret" not in str(refused.value)


def test_an_untracked_run_and_a_newer_state(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a tracked run"):
        sync(tmp_path)
    (tmp_path / "tracking.json").write_text('{"format": 5}')
    with pytest.raises(RunError, match="format 5 is not known"):
        sync(tmp_path)


def test_of_masks_the_mirror_gets_a_few_summaries_and_nothing_twice() -> None:
    step = {
        "loss/total": 2.0,
        "loss/train": 2.0,
        "gate/density": 0.5,
        "gate/density/enc_ff/0": 0.5,
        "gate/mask_near_one": 0.5,
        "time/tokens_per_second": 8.0,
        "time/tokens_per_second_per_device": 8.0,
        "system/memory_gib": 1.0,
        "system/host_memory_gib": 1.0,
        "data/tokens_seen": 16.0,
        "data/samples_seen": 1.0,
        "health/restarts": 2.0,
    }
    few = {
        "loss/train": 2.0,
        "training masks/density": 0.5,
        "speed/tokens_per_second": 8.0,
        "usage/memory_gib": 1.0,
        "training data/tokens_seen": 16.0,
        ATTEMPT: 3.0,
    }
    assert shipped(Record("metrics", 0, 3, 1, step, {})) == few
    more = {"penalty/l0": 0.1, "time/rank_spread": 1.0, "system/host_memory_gib": 2.0}
    assert shipped(Record("metrics", 0, 3, 1, step | more, {})) == few | {
        "loss/total": 2.0,
        "training masks/l0": 0.1,
        "speed/rank_spread": 1.0,
        "speed/tokens_per_second_per_device": 8.0,
        "usage/host_memory_gib": 2.0,
    }
    validation = {"loss/val": 2.0, "loss/val_bits_per_byte": 1.5}
    there = shipped(Record("metrics", 0, 3, 1, validation, {}))
    assert there == {**validation, "loss/val_perplexity": math.exp(2.0), ATTEMPT: 3.0}
    assert "loss/val_perplexity" not in shipped(Record("metrics", 0, 3, 1, {"loss/val": 1e4}, {}))


def test_if_asked_for_the_mirror_gets_least_mean_and_greatest_of_the_layers_as_the_first_version_did() -> None:
    density = {"gate/density/enc_ff/0": 0.5, "gate/density/enc_ff/1": 0.25, "gate/density/dec_ff/0": 1.0}
    values = {"loss/train": 2.0} | density | {"gate/entropy/enc_ff/0": math.nan, "gate/entropy/enc_ff/1": 0.1}
    record = Record("metrics", 0, 3, 1, values, {})
    first = shipped(record, Names(first=True))
    renamed = {name.replace("training health/", "progress/").replace("training masks/", "mask/"): value
               for name, value in shipped(record, Names(all_masks=True)).items()}  # fmt: skip
    assert renamed == first
    assert first == {
        "loss/train": 2.0,
        "mask/density_enc_ff_min": 0.25,
        "mask/density_enc_ff_mean": 0.375,
        "mask/density_enc_ff_max": 0.5,
        "mask/density_dec_ff_min": 1.0,
        "mask/density_dec_ff_mean": 1.0,
        "mask/density_dec_ff_max": 1.0,
        "progress/nonfinite_values": 3.0,
        "progress/attempt": 3.0,
    }


def test_of_a_validation_the_mirror_gets_every_source_and_of_heads_the_mean() -> None:
    values = {"loss/val": 2.0, "loss/val/web": 2.5, "loss/val_bits_per_byte/a/b (c)": 1.5}
    values |= {"attention/dropped": 0.25, "attention/dropped/dec_sa/00/h1": 0.25}
    assert shipped(Record("metrics", 0, 3, 1, values, {})) == {
        "loss/val": 2.0,
        "loss/val.web": 2.5,
        "loss/val_bits_per_byte.a-x2f-b -x28-c-x29-": 1.5,
        "loss/val_perplexity": math.exp(2.0),
        "attention/dropped": 0.25,
        ATTEMPT: 3.0,
    }


def unescaped(name: str) -> str:
    return re.sub("-x([0-9a-f]+)-", lambda found: chr(int(found[1], 16)), name)


def test_names_are_accepted_distinct_and_can_be_read_back() -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    choose = random.Random(20)
    parts = [*"abx2dEö漢é (){}[]<>%&=?*+~'\"|\\/.:_- \t\n\0", "-x", "-x2f-", "..", "x28-"]
    names = {"".join(choose.choices(parts, k=choose.randint(1, 8))) for _ in range(20_000)}
    names |= {
        ".",
        "..",
        "/",
        "a/",
        "/a",
        "a//b",
        "../a",
        "a/..",
        "web (en)",
        "web [en]",
        "web\n",
        "-x28-",
        "(",
        "-x2",
        "-x2f",
    }
    for pattern in ("data/epoch_{}", "loss/val/{}", "{}"):
        shown = {name: mirrored(pattern.format(name)) for name in names}
        assert len(set(shown.values())) == len(names)
        for name, there in shown.items():
            _validate_metric_name(there)
            if pattern == "loss/val/{}":
                assert unescaped(there.removeprefix("loss/val.")) == name
    keys = flat({"data": {"sources": {name: {"weight": 1} for name in names}}})
    assert len(keys) == len(names)
    for key in keys:
        _validate_param_name(key)


def test_names_that_need_no_other_stay_and_long_ones_are_bounded() -> None:
    same = ["loss/train", "loss", "optim/lr", "a/.b", "loss/größe", "a b:c", "a-xy"]
    assert [mirrored(name) for name in same] == same
    assert mirrored("gate/val_density") == "training masks/val_density"
    long = [mirrored(f"data/epoch_{'x' * 300}{end}") for end in "ab"]
    assert len(set(long)) == 2
    assert all(len(name) <= 250 and name.startswith("training data/epoch_xxx") for name in long)
    assert flat({"a": {"b%(c)/": [1], "d": {}}}) == {"a.b-x25--x28-c-x29--x2f-": "[1]"}


def test_values_that_are_too_long_or_no_text_are_cut_and_say_so() -> None:
    assert text("x" * 6000) == "x" * 6000
    cut = text("x" * 6001)
    assert len(cut) == 6000
    assert cut.endswith("(cut: 6,001 characters are in the run folder)")
    assert text("a\udcff\0") == "a\\udcff\\x00"
