"""A job's code is what it was at its submission: nothing more, nothing less, and once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import RunError
from launch.slurm.snapshot import take
from pretrain.run import provenance
from pretrain.run.provenance import MODULE
from tests.runs import ROOT


def git(root: Path, *arguments: str) -> str:
    identity = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for role in ("AUTHOR", "COMMITTER"):
        identity |= {f"GIT_{role}_NAME": "a", f"GIT_{role}_EMAIL": "a@b"}
    done = subprocess.run(["git", "-C", root, *arguments], env=os.environ | identity, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "it's a checkout"
    (root / "model").mkdir(parents=True)
    (root / "model" / "a.py").write_text("A = 1\n")
    (root / "gone.py").write_text("")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / ".gitignore").write_text("ignored\nruns/\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "ignored").write_text("x" * 5_000_000)
    return root


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def test_it_is_the_checkout_as_it_lies_on_disk(checkout: Path, tmp_path: Path) -> None:
    (checkout / "model" / "a.py").write_text("A = 2\n")
    (checkout / "new\nfile.py").write_text("B = 1\n")
    (checkout / "gone.py").unlink()
    taken = take(tmp_path / "run" / "code", 1.0, checkout)
    assert files(taken) == {
        "model/a.py", "new\nfile.py", "run.sh", ".gitignore", "snapshot.json", "snapshot.diff"
    }  # fmt: skip
    assert (taken / "model" / "a.py").read_text() == "A = 2\n"
    assert os.access(taken / "run.sh", os.X_OK)
    assert not os.access(taken / "model" / "a.py", os.X_OK)
    facts, diff = provenance.source(taken)
    assert facts == {"git/commit": git(checkout, "rev-parse", "HEAD"), "git/changed_files": "3"}
    assert b"+A = 2" in diff
    assert b"?? " in diff, "names the file that git does not know"
    assert not list((tmp_path / "run" / "code").glob(".*")), "nothing half is left"


def test_the_same_code_is_there_once_and_other_code_beside_it(checkout: Path, tmp_path: Path) -> None:
    code = tmp_path / "run" / "code"
    first = take(code, 1.0, checkout)
    inode = (first / "model" / "a.py").stat().st_ino
    assert take(code, 1.0, checkout) == first
    assert (first / "model" / "a.py").stat().st_ino == inode, "copied again"
    (checkout / "model" / "a.py").write_text("A = 3\n")
    second = take(code, 1.0, checkout)
    assert second != first
    assert (first / "model" / "a.py").read_text() == "A = 1\n"
    git(checkout, "commit", "-qam", "the same content, now committed")
    third = take(code, 1.0, checkout)
    assert provenance.source(third)[0]["git/commit"] == git(checkout, "rev-parse", "HEAD")
    assert len(list(code.iterdir())) == 3


def test_an_altered_snapshot_is_not_taken_for_the_code(checkout: Path, tmp_path: Path) -> None:
    taken = take(tmp_path / "run" / "code", 1.0, checkout)
    (taken / "model" / "a.py").chmod(0o644)
    (taken / "model" / "a.py").write_text("A = 9\n")
    with pytest.raises(RunError, match="no longer what was copied there"):
        take(tmp_path / "run" / "code", 1.0, checkout)


def test_what_is_too_large_is_named_and_nothing_is_copied(checkout: Path, tmp_path: Path) -> None:
    (checkout / "corpus.txt").write_text("x" * 2_000_000)
    with pytest.raises(RunError, match=r"(?s)make 1\.9 MiB.*corpus\.txt: 1\.9 MiB.*--untracked-mib=1"):
        take(tmp_path / "run" / "code", 1.0, checkout)
    assert not (tmp_path / "run" / "code").exists()
    assert "corpus.txt" in files(take(tmp_path / "run" / "code", 2.0, checkout))


def test_runs_inside_the_checkout_are_no_code(checkout: Path) -> None:
    run = checkout / "out" / "first"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "weights").write_text("x" * 2_000_000)
    first = take(run / "code", 1.0, checkout)
    assert not [name for name in files(first) if name.startswith("out")]
    assert take(run / "code", 1.0, checkout) == first, "a snapshot holds the one before"


def test_a_folder_with_a_repository_of_its_own_is_told(checkout: Path, tmp_path: Path) -> None:
    other = checkout / "vendor"
    other.mkdir()
    git(other, "init", "-q")
    (other / "x.py").write_text("")
    git(other, "add", "-A")
    git(other, "commit", "-qm", "x")
    with pytest.raises(RunError, match=r"vendor/?: a repository of its own"):
        take(tmp_path / "run" / "code", 1.0, checkout)


def test_links_to_folders_stay_inside(checkout: Path, tmp_path: Path) -> None:
    (checkout / "same").symlink_to("model")
    (checkout / "dangling").symlink_to("nothing")
    (checkout / "file").symlink_to("run.sh")
    taken = take(tmp_path / "run" / "code", 1.0, checkout)
    (checkout / "model" / "a.py").write_text("A = 2\n")
    assert (taken / "same" / "a.py").read_text() == "A = 1\n"
    assert (taken / "file").read_text() == "#!/bin/sh\n"
    assert take(tmp_path / "run" / "code", 1.0, checkout) != taken
    (checkout / "out").symlink_to("..")
    with pytest.raises(RunError, match="out: a link to a folder outside"):
        take(tmp_path / "run" / "code", 1.0, checkout)


def test_an_installed_package_is_its_files(tmp_path: Path) -> None:
    installed = tmp_path / "site-packages"
    for name in (
        "configs/model/tiny.yaml",
        "model/__init__.py",
        "model/__pycache__/x.pyc",
        "torch/__init__.py",
        MODULE,
    ):
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text(name)
    taken = take(tmp_path / "run" / "code", 1.0, installed)
    assert files(taken) == {"configs/model/tiny.yaml", "model/__init__.py", "duet_pretrain.py", "snapshot.json"}
    assert provenance.source(taken) == ({}, b"")


def test_the_snapshot_of_this_code_is_what_a_job_imports(tmp_path: Path) -> None:
    taken = take(tmp_path / "run" / "code", 100.0)
    program = "import json, pretrain.run.provenance as p; print(json.dumps([str(p.SOURCE), p.record(p.Path('.'), 1)]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(taken)},
        capture_output=True,
        text=True,
        check=True,
    )
    source, tags = json.loads(done.stdout)
    assert source == str(taken)
    if (ROOT / ".git").exists():
        assert tags["git/commit"] == git(ROOT, "rev-parse", "HEAD")
        assert json.loads((tmp_path / "attempt-000001.json").read_text())["git/commit"] == tags["git/commit"]


def test_what_others_may_not_read_they_may_not_read_in_the_copy(checkout: Path, tmp_path: Path) -> None:
    secret = checkout / ".env"
    secret.write_text("PASSWORD=x\n")
    secret.chmod(0o600)
    taken = take(tmp_path / "run" / "code", 1.0, checkout)
    assert (taken / ".env").stat().st_mode & 0o777 == 0o400
    assert (taken / "run.sh").stat().st_mode & 0o777 == 0o555
