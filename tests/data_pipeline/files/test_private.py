"""Places that others can write to: nothing of theirs is read, run or overwritten in our name. A real second user."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.building.api import build
from data_pipeline.building.build_state import working_folder
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.files.atomic import open_lock, write_atomic
from data_pipeline.files.private import own_folder
from data_pipeline.sampling.packing_plan import prepare
from data_pipeline.storage.shard_cache import ShardCache
from pretrain.engine.caches import CACHES, own_caches
from tests.data_pipeline.storage.test_recorded import settings
from tests.runs import ROOT

OTHER = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as a second user")


def as_other(work: Callable[[], object]) -> None:
    """Does something as another user, in a process of its own."""

    def act() -> None:
        os.setgid(OTHER)
        os.setuid(OTHER)
        work()

    child = multiprocessing.get_context("fork").Process(target=act)
    child.start()
    child.join()
    assert child.exitcode == 0


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """As /tmp: anybody may write there."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    folder.chmod(0o1777)
    shared = Path(tempfile.gettempdir())
    for parent in (tmp_path, *tmp_path.parents):
        if shared in parent.parents:
            parent.chmod(0o755)
    return folder


def test_a_folder_is_made_for_its_user_alone(scratch: Path) -> None:
    before = os.umask(0)
    try:
        assert own_folder(scratch / "a" / "b").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    assert own_folder(scratch / "a" / "b") == scratch / "a" / "b"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(scratch: Path, mode: int) -> None:
    (scratch / "mine").mkdir()
    (scratch / "mine").chmod(mode)
    for given in (False, True):
        with pytest.raises(DataError, match=r"scratch/mine is open to others"):
            own_folder(scratch / "mine", given=given)


def test_links_and_files_are_no_folders(scratch: Path) -> None:
    (scratch / "real").mkdir(mode=0o700)
    (scratch / "link").symlink_to("real")
    (scratch / "dangling").symlink_to("nothing")
    (scratch / "file").touch()
    for name in ("link", "dangling", "file"):
        with pytest.raises(DataError, match=rf"scratch/{name}"):
            own_folder(scratch / name)
    assert own_folder(scratch / "link", given=True)


@needs_root
def test_a_folder_of_another_user_is_refused(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"duet-{os.getuid()}", f"duet-cache-{os.getuid()}", "given", "duet-cache"]

    def plant() -> None:
        for name in names:
            (scratch / name).mkdir(mode=0o755)

    as_other(plant)
    (scratch / "mine").mkdir()
    as_other(lambda: (scratch / "link").symlink_to("mine"))
    with pytest.raises(DataError, match="duet-cache is another user's"):
        ShardCache(scratch / "duet-cache", 10**6)
    for name in ("given", "link"):
        with pytest.raises(DataError, match=f"{name} is (another user's|a link)"):
            own_folder(scratch / name, given=True)
    for variable in CACHES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DUET_CACHE", str(scratch))
    with pytest.raises(ConfigError, match=rf"duet-{os.getuid()} is another user's"):
        own_caches()
    monkeypatch.setenv("DUET_CACHE", "")
    for variable in CACHES:
        monkeypatch.setenv(variable, str(scratch / variable))
    monkeypatch.setenv(CACHES[1], str(scratch / "given"))
    with pytest.raises(ConfigError, match=f"{CACHES[1]}: .*given is another user's"):
        own_caches()


def test_compiled_code_lies_where_it_was_to(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in CACHES:
        monkeypatch.setenv(variable, "/elsewhere")
    monkeypatch.setenv("DUET_CACHE", str(scratch))
    own_caches()
    own_caches()
    for variable in CACHES:
        folder = Path(os.environ[variable])
        assert folder.parent == scratch / f"duet-{os.getuid()}"
        assert folder.stat().st_mode & 0o777 == 0o700


def test_locks_and_temporary_files_are_not_opened_through_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("thesis")
    build(settings(tmp_path, shard_tokens=4096))
    root = tmp_path / "d"
    (root / "packing").mkdir()
    (root / "packing" / ".lock").symlink_to(precious)
    with pytest.raises(DataError, match=r"\.lock|packing"):
        prepare_packed(root)
    (root / ".lock").unlink(missing_ok=True)
    (root / ".lock").symlink_to(precious)
    with pytest.raises(DataError, match="a link stands"), working_folder(root):
        pass
    with pytest.raises(OSError):
        open_lock(root / ".lock")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(precious)
    write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert precious.read_text() == "thesis"


def prepare_packed(root: Path) -> None:
    from data_pipeline.storage.dataset import Dataset

    prepare(Dataset.open(root), 16)


STAGING = ROOT / "slurm" / "pretrain.sbatch"


def stage(data: Path, own: Path) -> subprocess.CompletedProcess[str]:
    """What the batch script does on each node."""
    script = STAGING.read_text().partition("--ntasks-per-node=1 bash -c '")[2].partition("' stage ")[0]
    command = ["bash", "-c", script, "stage", str(data), str(own / "data-0"), str(own)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_dataset_is_staged_in_a_folder_of_the_user(scratch: Path) -> None:
    data = scratch / "data"
    data.mkdir()
    (data / "manifest.json").write_text("{}")
    own = scratch / "node" / f"duet-{os.getuid()}"
    for _ in range(2):
        done = stage(data, own)
        assert done.returncode == 0, done.stderr
    assert (own / "data-0" / "manifest.json").read_text() == "{}"
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    assert stage(data, own).returncode == 1
    own.rename(own.with_name("other"))
    own.symlink_to("other")
    assert stage(data, own).returncode == 1


@needs_root
def test_nothing_is_staged_in_a_folder_of_another_user(scratch: Path) -> None:
    data = scratch / "data"
    data.mkdir()
    (data / "manifest.json").write_text("{}")
    own = scratch / f"duet-{os.getuid()}"
    precious = scratch / "precious"
    precious.write_text("thesis")

    def plant() -> None:
        own.mkdir(mode=0o700)
        (own / "data-0").mkdir()
        (own / "data-0" / "manifest.json").write_text("{}")
        (own / "data-0.lock").symlink_to(precious)

    as_other(plant)
    done = stage(data, own)
    assert done.returncode == 1 and str(own) in done.stderr
    assert precious.read_text() == "thesis"


@needs_root
def test_training_does_not_take_code_that_another_user_compiled(scratch: Path) -> None:
    planted = scratch / f"duet-{os.getuid()}"
    as_other(lambda: planted.mkdir(mode=0o755))
    program = "from pretrain.engine.caches import own_caches\ntry: own_caches()\nexcept Exception as e: print(e)"
    environment = {k: v for k, v in os.environ.items() if k not in CACHES} | {"TMPDIR": str(scratch)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert f"{planted} is another user's" in done.stdout
