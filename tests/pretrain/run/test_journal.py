"""The journal: nothing whole is lost, whatever a crash leaves behind."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.errors import RunError
from pretrain.config.sections import HealthConfig
from pretrain.health.rollback import read_past
from pretrain.run.goodput import earlier_goodput
from pretrain.run.journal import MOST_RECORDS, Journal, line_of, noting, read, read_from, series
from tests.conftest import ROOT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, attempt: int, steps: range, resumed_from: int | None = None) -> None:
    journal = Journal(path, attempt)
    journal.event("start", resumed_from=resumed_from, world_size=1)
    for step in steps:
        journal.metrics(step, {"loss/train": attempt + step / 100})
    journal.close()


def test_records_come_back_as_written(path: Path) -> None:
    before = time.time_ns() // 1_000_000
    journal = Journal(path, 3)
    journal.event("start", resumed_from=7, world_size=2, host="n1")
    journal.metrics(8, {"loss/train": 1 / 3, "data/tokens_seen": 2**53})
    journal.event("checkpoint", step=8, path="checkpoints/step-000000008")
    journal.event("sample", step=8, text="first\nsecond \u2028 ünï \ud800")
    journal.event("end", status="FINISHED", reason="all steps done")
    journal.close()
    start, metrics, checkpoint, sample, end = read(path)
    assert start.kind == "start"
    assert start.fields == {"resumed_from": 7, "world_size": 2, "host": "n1"}
    assert (metrics.step, metrics.attempt) == (8, 3)
    assert metrics.metrics == {"loss/train": 1 / 3, "data/tokens_seen": 2.0**53}
    assert before <= metrics.time <= time.time() * 1000 + 1
    assert (checkpoint.step, checkpoint.fields["path"]) == (8, "checkpoints/step-000000008")
    assert sample.fields["text"] == "first\nsecond \u2028 ünï \ud800"
    assert end.fields == {"status": "FINISHED", "reason": "all steps done"}
    assert len(path.read_bytes().splitlines()) == 5


def test_a_line_torn_at_any_byte_is_taken_out_and_all_before_it_stays(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write(whole, 1, range(1, 4))
    content = whole.read_bytes()
    last_line = content.rindex(b"\n", 0, -1) + 1
    for cut in range(last_line, len(content)):
        path = tmp_path / f"cut-{cut}"
        path.write_bytes(content[:cut])
        assert [r.step for r in read(path)] == [None, 1, 2], "a reader leaves the torn line alone"
        assert path.read_bytes() == content[:cut]
        Journal(path, 2).metrics(9, {"loss/train": 9.0})
        records = list(read(path))
        assert [r.step for r in records if r.kind == "metrics"] == [1, 2, 9]
        notices = [r for r in records if r.kind == "warning"]
        assert [r.fields["torn"] for r in notices] == ([content[last_line:cut].decode()] if cut > last_line else [])


def test_what_an_attempt_that_stood_still_wrote_when_the_next_had_begun_does_not_count(path: Path) -> None:
    write(path, 1, range(1, 6))
    stood_still = Journal(path, 1)
    write(path, 2, range(3, 4), resumed_from=2)
    stood_still.metrics(6, {"loss/train": 1.06})
    stood_still.event("end", status="FAILED", reason="")
    write(path, 3, range(4, 5), resumed_from=3)
    assert [(r.kind, r.attempt) for r in read(path)][6:] == [
        ("start", 2),
        ("metrics", 2),
        ("start", 3),
        ("metrics", 3),
    ]
    assert [point.value for point in series(read(path))["loss/train"]] == [1.01, 1.02, 2.03, 3.04]


def test_a_journal_that_is_one_long_torn_line(path: Path) -> None:
    path.write_bytes(b'{"format": 1, "x": "' + b"\0\xff" * 100_000)
    Journal(path, 1).metrics(1, {"a": 1.0})
    assert [r.kind for r in read(path)] == ["warning", "metrics"]


def test_what_a_killed_process_wrote_is_whole_and_the_next_attempt_goes_on(path: Path) -> None:
    script = (
        "import sys, pathlib; from pretrain.run.journal import Journal\n"
        "j = Journal(pathlib.Path(sys.argv[1]), 1)\n"
        "for step in range(10**9): j.metrics(step, {f'gate/{i}': step + i / 7 for i in range(50)})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not path.exists() or path.stat().st_size < 1_000_000:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    Journal(path, 2).metrics(-1, {"gate/0": 0.0})
    steps = [r.step for r in read(path) if r.kind == "metrics"]
    assert steps == [*range(len(steps) - 1), -1]


def test_a_full_disk_raises_and_leaves_no_half_line(path: Path) -> None:
    script = (
        "import sys, pathlib, resource; from pretrain.run.journal import Journal\n"
        "j = Journal(pathlib.Path(sys.argv[1]), 1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    for step in range(100): j.metrics(step, {'loss/train': 1.0})\n"
        "except OSError as error: print(step, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    failed_at, message = done.stdout.split(" ", 1)
    assert "could be written" in message
    assert path.read_bytes().endswith(b"\n")
    assert [r.step for r in read(path)] == list(range(int(failed_at)))


def test_a_rollback_supersedes_the_older_attempts_points_after_it(path: Path) -> None:
    write(path, 1, range(1, 8))
    write(path, 2, range(5, 7), resumed_from=4)
    write(path, 3, range(7, 9), resumed_from=6)
    points = series(read(path))["loss/train"]
    assert [(p.step, p.attempt) for p in points] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3), (8, 3)]
    assert points[4].value == 2.05
    write(path, 4, range(0))
    assert series(read(path)) == {}, "an attempt from scratch supersedes all"


def test_a_long_journal_is_thinned_evenly_and_keeps_its_ends(path: Path) -> None:
    """Each kind of line by itself: one in ten tells of the time, one in a thousand of a validation."""
    steps = 5 * MOST_RECORDS
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            metrics = {"loss/train": 1.0 / step} | ({"time/step_ms": 1.0} if step % 10 == 0 else {})
            lines = [metrics] + ([{"loss/val": 2.0}] if step % 1000 == 0 else [])
            for line in lines:
                record = {"format": 1, "kind": "metrics", "time": step, "attempt": 1, "step": step, "metrics": line}
                file.write(json.dumps(record) + "\n")
    points = series(read(path))
    loss = [p.step for p in points["loss/train"]]
    assert (loss[0], loss[-1], points["time/step_ms"][-1].step) == (1, steps, steps)
    assert MOST_RECORDS / 2 < len(loss) < 2 * MOST_RECORDS
    assert loss == sorted(set(loss))
    assert max(b - a for a, b in pairwise(loss)) <= 10
    assert [p.step for p in points["loss/val"]] == list(range(1000, steps + 1, 1000))

    back = 3 * MOST_RECORDS
    write(path, 2, range(back + 1, back + 4), resumed_from=back)
    points = series(read(path))
    loss = [p.step for p in points["loss/train"]]
    assert loss == sorted(set(loss))
    assert loss[-1] == back + 3
    assert {p.attempt for p in points["loss/train"] if p.step > back} == {2}


def test_nonfinite_values_are_strict_json_and_come_back(path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    journal = Journal(path, 1)
    journal.metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    assert journal.num_nonfinite == 3
    json.loads(path.read_text(), parse_constant=refuse)
    (record,) = read(path)
    assert math.isnan(record.metrics["a"])
    assert (record.metrics["b"], record.metrics["c"], record.metrics["d"]) == (math.inf, -math.inf, 1.5)


BROKEN = (
    *(b"{nonsense", b"[]", b"3", b"null", b"", b'{"format": 1}', b'{"format": 99, "kind": "metrics"}', b"\0" * 4096),
    *(b"\xff\xfe", b"[" * 100_000, b'{"a":' * 2000 + b"1" + b"}" * 2000),
    b'{"format": 1, "kind": "metrics", "time": 1, "attempt": 1, "step": "2", "metrics": {}}',
    b'{"format": 1, "kind": "metrics", "time": 1, "attempt": 1, "step": 2, "metrics": []}',
    b'{"format": 1, "kind": "metrics", "time": 1, "attempt": 1, "step": 2, "metrics": {"a": 1' + b"0" * 400 + b"}}",
    b'{"format": 1, "kind": "metrics", "time": 1, "attempt": 1, "step": 2, "metrics": {"a": true}}',
    b'{"format": 1, "kind": "end", "time": 1, "attempt": 1}',
    b'{"format": 2, "kind": "metrics", "time": 1, "attempt": 1, "step": 2, "metrics": {}}',
)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_in_the_middle_is_named_and_passed_over(path: Path, broken: bytes) -> None:
    write(path, 1, range(1, 3))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], broken, lines[2], b""]))
    damaged: list[str] = []
    assert [(r.kind, r.step) for r in noting(read(path), damaged)] == [
        ("start", None),
        ("metrics", 1),
        ("damaged", None),
        ("metrics", 2),
    ]
    assert len(damaged) == 1
    assert damaged[0].startswith("metrics.jsonl:3: ")
    [found, (_, end)] = read_from(path, len(lines[0]) + len(lines[1]) + 2)
    assert (found[0].fields["text"], end) == (damaged[0], path.stat().st_size)
    assert [p.step for p in series(read(path))["loss/train"]] == [1, 2]


def test_a_block_of_zeros_at_the_end_is_taken_out(path: Path) -> None:
    write(path, 1, range(1, 3))
    with open(path, "ab") as file:
        file.write(b"\0" * 1_000_000)
    Journal(path, 2).metrics(3, {"a": 1.0})
    assert [r.kind for r in read(path)] == ["start", "metrics", "metrics", "warning", "metrics"]
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize("lost", ["start", "rollback"])
def test_a_start_or_rollback_whose_line_is_damaged_shows_in_what_follows(path: Path, lost: str) -> None:
    """Else the steps that were taken again would count twice."""
    write(path, 1, range(1, 8))
    if lost == "start":
        write(path, 2, range(5, 10), resumed_from=4)
    else:
        journal = Journal(path, 1)
        journal.event("rollback", resumed_from=4, text="back", data={})
        for step in range(5, 10):
            journal.metrics(step, {"loss/train": 2 + step / 100})
        journal.close()
    whole = series(read(path))
    assert [p.value for p in whole["loss/train"]] == [1 + step / 100 for step in range(1, 5)] + [
        2 + step / 100 for step in range(5, 10)
    ]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:8], flip_a_bit(lines[8], 77), *lines[9:]]))
    assert [r.kind for r in read(path)][8:10] == ["damaged", lost]
    assert series(read(path)) == whole
    assert earlier_goodput(read(path), 9, 0.0).productive >= 0
    assert read_past(read(path), 4, HealthConfig()).num_rollbacks == (lost == "rollback")


def flip_a_bit(line: bytes, number: int) -> bytes:
    changed = bytearray(line)
    changed[number // 8] ^= 1 << number % 8
    return bytes(changed)


@pytest.mark.parametrize("flips", [400, pytest.param(40_000, marks=pytest.mark.drill)])
def test_no_bit_that_flips_in_a_line_is_taken_for_something_else(path: Path, flips: int) -> None:
    journal = Journal(path, 1)
    journal.event("start", resumed_from=None, config={"optimizer": {"lr": 0.01}})
    for step in range(1, 4):
        journal.metrics(step, {"loss/train": 1 / step, "optim/lr": 1e-3 * step})
    journal.event("rollback", resumed_from=2, text="back", data={"samples_seen": 128})
    journal.close()
    whole, records = path.read_bytes(), list(read(path))
    newlines = {i for i, byte in enumerate(whole) if byte == 10}
    for number in random.Random(25).sample(range(8 * len(whole)), min(flips, 8 * len(whole))):
        path.write_bytes(flip_a_bit(whole, number))
        found = [record for record in read(path) if record.kind != "damaged"]
        assert all(record in records for record in found)
        assert len(found) >= len(records) - (2 if number // 8 in newlines else 1)
    print(f"journal: {min(flips, 8 * len(whole))} flips, none accepted as something else")


def test_lines_of_format_1_are_read() -> None:
    records = list(read(Path(__file__).parents[1] / "run-format-1" / "metrics.jsonl"))
    assert [r.kind for r in records if r.kind not in ("metrics", "checkpoint")] == ["start", "end"]
    assert [r.step for r in records if "loss/train" in r.metrics] == list(range(1, 7))


def test_a_newer_format_is_refused(path: Path) -> None:
    path.write_bytes(line_of('{"format": 99, "kind": "metrics"}'))
    with pytest.raises(RunError, match="format 99 .* this version reads 2"):
        list(read(path))


def test_no_journal(path: Path) -> None:
    with pytest.raises(RunError, match="there is no journal"):
        list(read(path))


def test_a_follower_goes_on_from_its_offset(path: Path) -> None:
    write(path, 1, range(1, 4))
    offsets = [offset for _, offset in read_from(path, 0)]
    assert offsets[-1] == path.stat().st_size
    for index, offset in enumerate(offsets):
        assert [r for r, _ in read_from(path, offset)] == list(read(path))[index + 1 :]


def test_import_is_free_of_torch_and_mlflow() -> None:
    script = (
        "import sys, pretrain.run.journal, pretrain.tracking.console; assert not {'torch', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
