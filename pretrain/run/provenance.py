"""Where an attempt comes from: its source, its packages, its machine. Holds no secrets and no environment variables
but Slurm's own."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.files.atomic import write_atomic, write_json
from duet_pretrain import SOURCE

PACKAGES = ("configs", "data_pipeline", "launch", "model", "pretrain", "slurm")
"""Folders in SOURCE that are ours, wherever that is."""
MODULE = "duet_pretrain.py"
"""A file beside them."""
SNAPSHOT, SNAPSHOT_DIFF = "snapshot.json", "snapshot.diff"
"""What `source` said of the code that a snapshot (`launch.slurm.snapshot`) is a copy of; in its folder."""
MAX_DIFF_BYTES = 1 << 20
GIT_SECONDS = 30.0
SLURM = {"slurm/job_id": "SLURM_JOB_ID", "slurm/nodes": "SLURM_JOB_NODELIST", "slurm/restarts": "SLURM_RESTART_COUNT"}


def check_code() -> None:
    """Whether this is the code that the batch script of this job names, when it names one.

    Raises:
        ConfigError: it is not; says what overrules PYTHONPATH.
    """
    wanted = os.environ.get("DUET_ONLY_CODE")
    if wanted and Path(wanted).resolve() != SOURCE:
        raise ConfigError(
            f"the code of this job is {wanted}, but that in {SOURCE} runs: PYTHONPATH={os.environ.get('PYTHONPATH')} "
            f"does not reach {sys.executable}, or is overruled by the container, a sitecustomize or a .pth file there"
        )


def record(folder: Path, attempt: int) -> dict[str, str]:
    """Write `attempt-NNNNNN.json` into `folder`, and `attempt-NNNNNN.diff` when the source differs from its commit.

    Returns:
        the short facts, as tags: `git/commit`, `slurm/job_id`, …

    Raises:
        OSError: the files cannot be written.
    """
    folder.mkdir(exist_ok=True)
    tags = {"host": platform.node(), "python": platform.python_version()}
    tags |= {tag: os.environ[name] for tag, name in SLURM.items() if name in os.environ}
    git, diff = source(SOURCE)
    stem = folder / f"attempt-{attempt:06d}"
    write_json(
        stem.with_suffix(".json"),
        tags | git | {"platform": platform.platform(), "packages": _packages(), "source": str(SOURCE)},
    )
    if diff:
        write_atomic(stem.with_suffix(".diff"), diff)
    return tags | git


def source(root: Path) -> tuple[dict[str, str], bytes]:
    """Tags and the difference to the commit, cut at MAX_DIFF_BYTES; of a snapshot those of the code it is a copy of.

    Nothing unless `root` itself is a checkout or a snapshot of one.
    """
    if (root / SNAPSHOT).is_file():
        diff_file = root / SNAPSHOT_DIFF
        return json.loads((root / SNAPSHOT).read_text()), diff_file.read_bytes() if diff_file.is_file() else b""
    if not (root / ".git").exists():  # an installed package may lie within somebody else's checkout
        return {}, b""
    try:
        commit = git(root, "rev-parse", "HEAD").decode().strip()
        changed = git(root, "status", "--porcelain").splitlines(keepends=True)
        diff = git(root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
        diff = b"".join(b"# " + line for line in changed) + diff  # names the files that git does not know, too
    except (OSError, subprocess.SubprocessError) as error:  # no git here, not our files, a disk that hangs
        said = getattr(error, "stderr", None) or str(error).encode()
        return {"git/commit": f"unknown: {said.decode(errors='replace').strip().splitlines()[0]}"}, b""
    if len(diff) > MAX_DIFF_BYTES:
        diff = diff[:MAX_DIFF_BYTES] + b"\n# cut: the difference has %d bytes\n" % len(diff)
    return {"git/commit": commit, "git/changed_files": str(len(changed))}, diff


def git(root: Path, *arguments: str) -> bytes:
    """What a command of git says of a checkout; raises OSError or subprocess.SubprocessError."""
    return subprocess.run(
        ["git", "-C", str(root), *arguments],
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # a look must not write into the checkout
        capture_output=True,
        timeout=GIT_SECONDS,
        check=True,
    ).stdout


def _packages() -> dict[str, str]:
    found = (distribution.metadata for distribution in distributions())  # parsed at each look
    return dict(sorted({str(metadata["Name"]): str(metadata["Version"]) for metadata in found}.items()))
