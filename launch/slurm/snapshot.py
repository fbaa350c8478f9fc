"""The code of a submission, copied into the run folder: edits after it reach neither the job nor its requeues.

A snapshot is named by its content, so the same code is there once. Free of torch.
"""

import hashlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from data_pipeline.errors import RunError
from data_pipeline.files.atomic import disk_errors
from pretrain.run.provenance import MODULE, PACKAGES, SNAPSHOT, SNAPSHOT_DIFF, SOURCE, git, source

MIB = 1 << 20
MOST_NAMED = 5
"""Large files in an error."""


def take(code: Path, untracked_mib: float, root: Path = SOURCE, *, dry_run: bool = False) -> Path:
    """Copy the code at `root` to `code/snapshot-HASH`, unless it is there; returns that folder.

    With `dry_run` nothing is copied.

    Of a checkout: what git tracks, as it lies on disk, and what it neither tracks nor ignores, up to `untracked_mib`;
    nothing of the folder that `code` is in. Commit and difference are noted inside (`pretrain.run.provenance`). Of an
    installed package: its files.

    Raises:
        RunError: files that git does not know are too large; names them. Or git fails, or the disk.
    """
    facts, diff = source(root)
    made = {SNAPSHOT: json.dumps(facts, indent=1).encode()} | ({SNAPSHOT_DIFF: diff} if diff else {})
    names = _checkout(root, code.parent, untracked_mib) if (root / ".git").exists() else _installed(root)
    names = sorted(set(names) - made.keys())
    there = code / _name(_read(root, names), made)
    if dry_run:
        return there
    if there.is_dir():
        if _name(_read(there, names), made) != there.name:
            raise RunError(f"{there}: no longer what was copied there; remove it, and submit again")
        return there
    temporary = code / f".{uuid.uuid4().hex}.tmp"
    with disk_errors(code, RunError):
        try:
            copied = code / _name(_copy(root, names, temporary), made)  # what was edited meanwhile has its own name
            for name, content in made.items():
                (temporary / name).write_bytes(content)
            if not copied.is_dir():
                os.replace(temporary, copied)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return copied


def _name(files: Iterable[tuple[str, bytes]], made: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in chain(files, sorted(made.items())):
        digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return f"snapshot-{digest.hexdigest()[:16]}"


def _read(root: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        path = root / name
        if _is_folder_link(path):
            yield name, os.fsencode(path.readlink())
        else:
            yield name, path.read_bytes() if path.is_file() else b""  # altered, in a snapshot


def _copy(root: Path, names: list[str], target: Path) -> Iterator[tuple[str, bytes]]:
    for name, content in _read(root, names):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if _is_folder_link(root / name):
            copy.symlink_to(os.fsdecode(content))
            yield name, content
            continue
        copy.write_bytes(content)
        copy.chmod((root / name).stat().st_mode & 0o555)  # what others may not read, they may not read here either
        yield name, content


def _installed(root: Path) -> list[str]:
    return [
        MODULE,
        *(
            str(file.relative_to(root))
            for package in PACKAGES
            for file in (root / package).rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        ),
    ]


def _checkout(root: Path, run_dir: Path, untracked_mib: float) -> list[str]:
    tracked = [name for name in _listed(root, "--recurse-submodules") if (root / name).exists()]  # not removed
    runs = run_dir.resolve()
    untracked = [
        name
        for name in _listed(root, "--others", "--exclude-standard")
        if not runs.is_relative_to(root) or not (root / name).resolve().is_relative_to(runs)
    ]
    for name in [*tracked, *untracked]:
        path = root / name
        if _is_folder_link(path) and (path.readlink().is_absolute() or not path.resolve().is_relative_to(root)):
            raise RunError(f"{path}: a link to a folder outside, and the job would read it as it is then; copy it in")
        if path.is_dir() and not path.is_symlink():
            raise RunError(f"{path}: a repository of its own inside the checkout; name it in .gitignore")
    sizes = {name: (root / name).stat().st_size for name in untracked if (root / name).is_file()}
    if sum(sizes.values()) > untracked_mib * MIB:
        large = sorted(sizes, key=lambda name: -sizes[name])[:MOST_NAMED]
        told = "\n".join(f"  {name}: {sizes[name] / MIB:.1f} MiB" for name in large)
        raise RunError(
            f"{root}: the code of a job is copied, and files that git does not know make "
            f"{sum(sizes.values()) / MIB:.1f} MiB of it; the largest:\n{told}\n"
            f"name them in .gitignore or .git/info/exclude, or allow more than --untracked-mib={untracked_mib:g}"
        )
    return [*tracked, *(name for name in untracked if (root / name).exists())]


def _is_folder_link(path: Path) -> bool:
    return path.is_symlink() and path.is_dir()


def _listed(root: Path, *options: str) -> list[str]:
    try:
        return [os.fsdecode(name) for name in git(root, "ls-files", "-z", *options).split(b"\0") if name]
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        raise RunError(f"{root}: git cannot list the code: {said.decode(errors='replace').strip()}") from error
