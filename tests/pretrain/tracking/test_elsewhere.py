"""The journal in TensorBoard, read back by its own reader; and a webhook, with receivers that hang and die."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, RunError
from launch.slurm import policy
from pretrain.config.schema import load
from pretrain.run.journal import Journal, read, series
from pretrain.tracking import follower
from pretrain.tracking.follower import Tracker
from pretrain.tracking.tensorboard import NOTES, EventFiles
from pretrain.tracking.webhook import Webhook, about, address, post
from tests.faults.tracked import until
from tests.runs import SMALL, duet

Ranks = Callable[..., list[Any]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(follower, "LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr("pretrain.tracking.webhook.SECONDS", 0.3)


class Receiver:
    """A real HTTP server; it hangs, refuses, or dies and comes back on the same port."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.mood = "well"
        self.asked = 0
        self._free = threading.Event()
        self.port = 0
        self.start()

    def start(self) -> None:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.asked += 1
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if receiver.mood == "hung":
                    receiver._free.wait()
                    return
                if receiver.mood == "well":
                    receiver.heard.append(body)
                    receiver.tokens.append(self.headers["Authorization"])
                if receiver.mood == "no web server":
                    self.wfile.write(b"220 ready\r\n")
                    return
                if receiver.mood == "moved":
                    self.send_response(302)
                    self.send_header("Location", f"{receiver.url}/elsewhere")
                    self.end_headers()
                    return
                self.send_response(204 if receiver.mood == "well" else 500)
                self.end_headers()

            def do_GET(self) -> None:
                receiver.asked += 1

            def log_message(self, *given: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def die(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def close(self) -> None:
        self._free.set()
        self.die()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks"

    @property
    def events(self) -> list[str]:
        return [event["event"] for event in self.heard]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a folder; a step that is there twice is an error."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read_back = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.SCALARS: 0})
    read_back.Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in read_back.Tags()["scalars"]:
        points = [(point.step, point.value) for point in read_back.Scalars(tag)]
        assert len(dict(points)) == len(points), tag
        found[tag] = dict(points)
    return found


def of_journal(run_dir: Path, name: str) -> dict[int, Any]:
    points = series(read(run_dir / "metrics.jsonl"))[name]
    return {point.step: pytest.approx(point.value, rel=1e-6) for point in points}


def test_tensorboard_shows_what_counts_after_kills_and_rollbacks(tmp_path: Path) -> None:
    """Live in three attempts, the second of which lost its notes; and exported at the end."""
    (tmp_path / "logs").mkdir()
    journal, node = (Journal(tmp_path / name, 1) for name in ("metrics.jsonl", "logs/system-n1.jsonl"))

    def steps(first: int, last: int, by: float, mirror: EventFiles) -> None:
        for step in range(first, last + 1):
            journal.metrics(step, {"loss/train": by * step, "gate/density/enc_ff/00": 0.5, "gate/density": 0.5})
            if step % 10 == 0:
                node.metrics(step, {"system/n1.load": by})
            if by == 1.0 and 1 < step < 19:  # told late, as that of a save is
                journal.metrics(step - 1, {"time/checkpoint_ms": 1.0})
            if step % 7 == 0:
                mirror.bring(last=False)

    mirror = EventFiles(tmp_path)
    journal.event("start", resumed_from=None, config={"a": 1})
    steps(1, 20, 1.0, mirror)
    mirror.bring(last=False)
    older = (tmp_path / "tensorboard" / NOTES).read_text()
    steps(21, 30, 1.0, mirror)
    (tmp_path / "tensorboard" / NOTES).write_text(older)  # a crash came before they were written
    mirror = EventFiles(tmp_path)
    mirror.bring(last=False)
    assert shown(tmp_path / "tensorboard")["loss/train"] == of_journal(tmp_path, "loss/train")
    journal.event("start", resumed_from=12)
    steps(13, 18, 2.0, mirror)
    journal.event("rollback", step=18, resumed_from=15, data=None, text="back")
    steps(16, 24, 3.0, mirror)
    journal.event("sample", step=24, text="Once")
    lost = [json.dumps({"metrics.jsonl": offset}) for offset in (7, (tmp_path / "metrics.jsonl").stat().st_size + 7)]
    for damaged in ("[]", '{"metrics.jsonl": null}', '{"metrics.jsonl": -5}', "{", *lost):
        (tmp_path / "tensorboard" / NOTES).write_text(damaged)
        assert not EventFiles(tmp_path)._offsets, "all is written anew"
    mirror = EventFiles(tmp_path, all_masks=True)
    mirror.bring(last=True)
    found = shown(tmp_path / "tensorboard")
    expected = of_journal(tmp_path, "loss/train")
    assert found["loss/train"] == expected and max(expected) == 24
    assert found["training masks/density_enc_ff_mean"] == dict.fromkeys(expected, 0.5)
    assert shown(tmp_path / "tensorboard" / "n1")["usage/n1.load"] == {10: 1, 20: 3}

    done = duet("track", "export", str(tmp_path), "--to", "tensorboard", "--out", str(tmp_path / "boards"))
    assert done.returncode == 0, done.stderr
    assert shown(tmp_path / "boards" / tmp_path.name) == found
    again = duet("track", "export", str(tmp_path), "--to", "tensorboard")
    assert again.returncode == 0 and shown(tmp_path / "tensorboard") == found, "in place of the live ones"
    assert duet("track", "export", str(tmp_path), "--to", "paper").returncode == 2


def test_tensorboard_shows_the_newest_attempt_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node of the second one is an hour behind."""
    journal, now = Journal(tmp_path / "metrics.jsonl", 1), time.time()
    for behind, resumed_from in ((0, None), (3600, 3)):
        monkeypatch.setattr(time, "time", lambda behind=behind: now - behind)
        journal.event("start", resumed_from=resumed_from)
        for step in range((resumed_from or 0) + 1, 6):
            journal.metrics(step, {"loss/train": 1.0 * step + behind})
        EventFiles(tmp_path).bring(last=True)
    assert shown(tmp_path / "tensorboard")["loss/train"] == of_journal(tmp_path, "loss/train")


@pytest.mark.usefixtures("quick")
def test_a_webhook_hears_every_change_once_from_a_receiver_that_hangs_fails_and_dies(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUET_WEBHOOK_TOKEN", "hush")
    monkeypatch.setenv("HOOK", receiver.url)
    said: list[str] = []
    journal = Journal(tmp_path / "metrics.jsonl", 1)
    journal.event("end", status="FAILED", reason="before")
    tracker = Tracker(lambda _: Webhook(tmp_path, "first", "env:HOOK"), said.append)
    tracker.start()
    journal.event("start", resumed_from=None, config={}, job="7", host="n1")
    until(lambda: receiver.events == ["started"])
    receiver.mood = "hung"
    asked = receiver.asked
    journal.metrics(12, {"loss/train": 2.0})
    journal.event("spike", step=12, text="the loss spiked", spikes=[])
    until(lambda: receiver.asked > asked)
    since = time.monotonic()
    for step in range(13, 513):
        journal.metrics(step, {"loss/train": 2.0})
    assert time.monotonic() - since < 5.0, "who writes waits for nothing"
    until(lambda: said)
    receiver.mood = "failing"
    journal.event("hang", step=512, text="no progress")
    until(lambda: receiver.asked > asked + 3)
    receiver.die()
    receiver.mood = "well"
    receiver.start()
    until(lambda: len(said) == 2)
    journal.event("end", status="FINISHED", reason="all steps done")
    assert tracker.close(30.0)
    assert receiver.events == ["started", "spiked", "stalled", "done"]
    assert ["is tried again" in said[0], "is back" in said[1]] == [True, True]
    assert all("http://127.0.0.1 " in text and "hooks" not in text for text in said), "an address may be a secret"
    spiked = receiver.heard[1]
    assert (spiked["run"], spiked["folder"], spiked["step"], spiked["attempt"]) == ("first", str(tmp_path), 12, 1)
    assert spiked["text"] == "first: spiked, step 12: the loss spiked"
    assert set(receiver.tokens) == {"Bearer hush"}


@pytest.mark.usefixtures("quick")
def test_a_receiver_that_hangs_holds_up_neither_the_end_nor_the_policy(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver.mood = "hung"
    journal = Journal(tmp_path / "metrics.jsonl", 1)
    tracker = Tracker(lambda _: Webhook(tmp_path, "first", receiver.url), lambda _: None)
    tracker.start()
    journal.event("start", resumed_from=None, config={})
    until(lambda: receiver.asked)
    since = time.monotonic()
    assert not tracker.close(0.2)
    assert time.monotonic() - since < 5.0
    config = {"name": "first", "config": {"tracking": {"webhook": receiver.url}}}
    (tmp_path / "run.json").write_text(json.dumps(config))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    given = [str(tmp_path), "--rc", "1"]
    assert policy.main(given) == policy.Action.REQUEUE, "with or without a receiver"
    assert "the webhook did not hear of it: TimeoutError" in capsys.readouterr().out
    receiver.mood = "well"
    assert policy.main([*given, "--max-crashes", "1"]) == policy.Action.STOP
    assert receiver.events == ["failed"]
    assert "2 failures since the beginning" in receiver.heard[0]["text"]
    assert policy.main([*given, "--max-crashes", "5"]) == policy.Action.REQUEUE
    assert receiver.events == ["failed", "requeued"]


def test_a_run_tells_its_webhook_and_tensorboard(
    ranks: Ranks, dataset: Path, receiver: Receiver, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    more = [f"tracking.webhook={receiver.url}", "tracking.tensorboard=true", "train.steps=6", "tracking.mode=off"]
    ranks("tests.distributed.cases:train_run", 1, args=[*SMALL, f"data.path={dataset}", f"run.dir={run_dir}", *more])
    assert receiver.events == ["started", "done"]
    assert receiver.heard[1]["step"] == 6
    found = shown(run_dir / "tensorboard")
    assert found["loss/train"] == of_journal(run_dir, "loss/train")
    assert found["loss/val_perplexity"].keys() == {6}


def test_addresses_of_no_use_are_refused_without_telling_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in ("hooks.example.org", "ftp://host/x", "https://host/?token=secret", "env:", "env:A B"):
        with pytest.raises(ConfigError, match=r"tracking\.webhook") as refused:
            load([f"tracking.webhook={wrong}"])
        assert "secret" not in str(refused.value).replace("holds a secret", "")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(RunError, match="has no https://… in NOWHERE"):
        Webhook(tmp_path, "first", "env:NOWHERE")
    hosts = ("host/a secret", "höst/secret", "[host/secret", "host:secret/", "user:secret@host/", "/secret")
    for wrong in (f"https://{host}" for host in hosts):
        monkeypatch.setenv("HOOK", wrong)
        for given in ("env:HOOK", wrong):
            with pytest.raises(RunError) as told:
                address(given)
            assert "secret" not in str(told.value)


def test_what_answers_otherwise_gets_the_token_nowhere_else_and_stops_no_policy(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = {"event": "done", "text": ""} | about(tmp_path, "first", 1, 1, 0)
    monkeypatch.setenv("DUET_WEBHOOK_TOKEN", "hush")
    for receiver.mood, said in (("moved", "302"), ("no web server", "no answer of a web server")):
        with pytest.raises(OSError, match=said):
            post(receiver.url, event)
    assert receiver.asked == 2, "and no redirect was followed"
    monkeypatch.setenv("DUET_WEBHOOK_TOKEN", "hush\nhush")
    with pytest.raises(OSError, match="not sent") as told:
        post(receiver.url, event)
    assert "hush" not in str(told.value)
