"""What follows the end of a run: a report that takes long, fails, is broken off or is the death of rank 0."""

import json
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain.run.journal import read
from tests.runs import ROOT, SMALL, wait_for_step

HOOK = ROOT / "tests" / "afterwards"


class Terminal:
    """`duet train` on two ranks in a terminal of its own; Ctrl-C goes to its foreground process group."""

    def __init__(self, folder: Path, dataset: Path, steps: int, orders: dict[str, object], grace: float = 0.5) -> None:
        self.run_dir, self.reporting, self.said = folder / "run", folder / "reporting", ""
        changes = {"AFTERWARDS": json.dumps(orders), "GRACE": str(grace), "OMP_NUM_THREADS": "1"}
        changes |= {"PYTHONPATH": str(HOOK), "TERM": "dumb"}
        settings = [*SMALL, f"data.path={dataset}", f"run.dir={self.run_dir}", f"train.steps={steps}"]
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", sys.executable, "-P", "-m", "launch.cli", "train", *settings, "--ranks=2"],
            env=os.environ | changes,
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def wait_for_report(self) -> None:
        end = time.monotonic() + 120
        while not self.reporting.exists():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def ends(self) -> int:
        code = self.process.wait(120)
        self._reader.join(60)
        return code

    def _read(self) -> None:
        while True:
            try:
                text = os.read(self._master, 1 << 16)
            except OSError:  # nobody has the terminal any more
                return
            self.said += text.decode()

    def ended(self) -> list[tuple[object, object]]:
        return [(r.fields["status"], r.fields["code"]) for r in read(self.run_dir / "metrics.jsonl") if r.kind == "end"]


def test_ctrl_c_on_two_ranks_ends_as_on_one_though_the_report_is_slow(dataset: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, dataset, 100_000, {"go": str(tmp_path / "go")})
    wait_for_step(terminal.run_dir / "metrics.jsonl", 3, terminal.process)
    terminal.ctrl_c()
    terminal.wait_for_report()
    with pytest.raises(subprocess.TimeoutExpired):
        terminal.process.wait(3)  # longer than the launcher waits when a rank has failed
    (tmp_path / "go").touch()
    assert terminal.ends() == 130, terminal.said
    assert "(stopped)" in terminal.said
    assert f"report      {terminal.run_dir}/report.html" in terminal.said
    assert "error" not in terminal.said
    assert (terminal.run_dir / "report.html").exists()
    assert terminal.ended() == [("KILLED", 130)]


@pytest.mark.drill
def test_a_second_ctrl_c_leaves_the_report_out_and_says_how_to_make_it(dataset: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, dataset, 100_000, {"go": str(tmp_path / "go")}, grace=60)
    wait_for_step(terminal.run_dir / "metrics.jsonl", 3, terminal.process)
    terminal.ctrl_c()
    terminal.wait_for_report()
    terminal.ctrl_c()
    assert terminal.ends() == 130, terminal.said
    assert "(stopped)" in terminal.said
    assert f"report {terminal.run_dir}` makes it" in terminal.said
    assert "error" not in terminal.said


def test_a_finished_run_is_done_though_its_report_was_the_death_of_rank_0(dataset: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, dataset, 3, {"then": "kill"})
    assert terminal.ends() == 0, terminal.said
    assert "warning: the run is over (all steps done) and saved; rank 0 ended with code -9" in terminal.said
    assert f"`duet report {terminal.run_dir}` makes the report" in terminal.said
    assert terminal.ended() == [("FINISHED", 0)]


@pytest.mark.drill
@pytest.mark.parametrize("steps", [3, 100_000])
def test_a_report_of_90_seconds(dataset: Path, tmp_path: Path, steps: int) -> None:
    terminal = Terminal(tmp_path, dataset, steps, {"seconds": 90}, grace=15)
    wait_for_step(terminal.run_dir / "metrics.jsonl", 3, terminal.process)
    if steps > 3:
        terminal.ctrl_c()
    terminal.wait_for_report()
    began = time.monotonic()
    code = terminal.ends()
    assert code == (130 if steps > 3 else 0), terminal.said
    assert f"report      {terminal.run_dir}/report.html" in terminal.said
    assert "rank 1" not in terminal.said
    print(f"drill: report of 90 s, two ranks, {terminal.ended()[0][0]}: {time.monotonic() - began:.0f} s, code {code}")
