"""A disk that is full where a run writes: one error, or none where what was refused is no part of the result."""

import os
import subprocess
import sys
from pathlib import Path

from data_pipeline.files.atomic import write_atomic
from pretrain.run.job_records import JobFolder
from tests.runs import ROOT, SMALL, duet, program

FULL = "/dev/full"


def test_a_log_that_cannot_be_written_stops_no_run_and_changes_no_exit_code(dataset: Path, tmp_path: Path) -> None:
    """Else a full disk ends a run as a crash, which a batch script tries again."""
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    for rank in range(2):
        (run / "logs" / f"rank-{rank}.log").symlink_to(FULL)
    command = ("train", "data/characters", *SMALL, f"data.path={dataset}", f"run.dir={run}", "--ranks", "2")
    (run / ".heartbeat.tmp").symlink_to(FULL)
    refused = duet(*command, "train.steps=2")
    assert (refused.returncode, refused.stderr.count("error: ")) == (2, 1), refused.stderr
    assert f"error: cannot write {run}: the disk is full" in refused.stderr
    (run / ".heartbeat.tmp").unlink()
    assert (done := duet(*command, "train.steps=2")).returncode == 0, done.stderr


def test_what_a_command_prints_to_a_full_disk() -> None:
    with open(FULL, "w") as full:
        command = [sys.executable, "-P", "-m", "launch.cli", "config", "presets"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: where this prints to: the disk is full\n")


def test_a_refused_write_names_its_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    """By the limit of a file's size, which also takes a part of what is written, as a full disk does."""
    script = (
        "import sys, pathlib, resource, signal\n"
        "from data_pipeline.files.atomic import write_atomic\n"
        "from pretrain.run.job_records import JobFolder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "write, exclude = write_atomic, JobFolder(folder).exclude\n"
        "for call, *given in ((write, folder / 'text', 'n' * 400), (exclude, 'n2', 'x')):\n"
        "    try: call(*given)\n"
        "    except OSError as error: print(error.filename)\n"
    )
    write_atomic(tmp_path / "text", "old")
    jobs = JobFolder(tmp_path)
    jobs.exclude("n1", "x")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "text"), str(tmp_path / "slurm" / "exclude.jsonl")]
    assert (tmp_path / "text").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["slurm", "text"]
    jobs.exclude("n3", "x")
    assert [record["node"] for record in jobs.excluded()] == ["n1", "n3"]


ORDER = """
import os, runpy
from pathlib import Path
fsync, replace, noted = os.fsync, os.replace, Path.cwd() / "order"
def synced(number):
    fsync(number)
    if os.readlink(f"/proc/self/fd/{number}").endswith("metrics.jsonl"):
        with open(noted, "a") as file: print("journal", os.fstat(number).st_size, file=file)
def replaced(old, new, **folders):
    if "checkpoints" in str(new):
        with open(noted, "a") as file: print(Path(new).parent.name, 0, file=file)
    replace(old, new, **folders)
os.fsync, os.replace = synced, replaced
runpy.run_module("launch.cli", run_name="__main__")
"""


def test_a_power_loss_leaves_no_checkpoint_whose_steps_the_journal_does_not_know(dataset: Path, tmp_path: Path) -> None:
    """What was not synced when a manifest gets its name may be lost."""
    command = ("train", "data/characters", *SMALL, f"data.path={dataset}", "run.dir=run", "train.steps=3")
    done = program("-c", ORDER, *command, "train.checkpoint_every=1", "train.eval_every=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    journal, kept, saved = (tmp_path / "run" / "metrics.jsonl").read_bytes(), 0, 0
    for what, size in map(str.split, (tmp_path / "order").read_text().splitlines()):
        kept = int(size) or kept
        if what.startswith("step-"):
            saved = int(what.removeprefix("step-"))
            assert f'"step": {saved}, "metrics"'.encode() in journal[:kept], f"step {saved} was not on disk"
    assert saved == 3
