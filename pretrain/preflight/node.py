"""What a preflight looks at on each node, without the other ranks: GPUs, disks, data, versions, a matrix product."""

import hashlib
import os
import platform
import shutil
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.errors import RunError, UserError
from data_pipeline.files.atomic import disk_errors
from data_pipeline.storage.dataset import Dataset
from pretrain.config.dataset_identity import complete
from pretrain.config.schema import Config
from pretrain.planning.costs import checkpoint_bytes
from pretrain.preflight import gpu
from pretrain.preflight.verdict import Finding, Report, brief

PROBE_BYTES = 8 * 2**20
SHM, MIN_SHM_MIB = "/dev/shm", 512  # noqa: S108
"""Free on a node with GPUs: containers often have 64 MiB, and NCCL fails in the first large collective."""
MIN_TEMPORARY_MIB = 1024
"""Where compiled code goes."""
LEAD_SHARE = 0.5
"""Of the time between the planned signal and the limit that writing a checkpoint may take; the rest is for a step."""
TRACKING_SECONDS = 3.0
PACKAGES = ("torch", "deepspeed")
SOURCE = Path(__file__).resolve().parents[2]
ROOMS = ("data_pipeline", "launch", "model", "pretrain")
MATMUL_SIZE, MATMUL_ROUNDS = {"cuda": 4096, "cpu": 512}, 10


def check_node(config: Config, report: Report, local_size: int, world_size: int, at: Callable[[str], None]) -> None:
    """Add to a report what is of the node: one rank of each calls this. `at` hears what is being looked at."""
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "gpu": lambda: _look_at_gpus(report),
        "version": lambda: _note_versions(config, report),
        "data": lambda: _look_at_data(config, report),
        "disk": lambda: _look_at_disks(config, report, local_size / world_size),
    }
    if report.rank == 0:  # the one that talks to MLflow
        looks["tracking"] = lambda: _look_at_tracking(config)
    for name, look in looks.items():
        at(name)
        try:
            report.findings += look()
        except UserError as error:
            report.findings.append(Finding(name, "place", str(error)))
        except Exception as error:  # a bug or a machine that does what none should; the others' answers are wanted, too
            traceback.print_exc()
            report.findings.append(Finding(name, "node", f"{name}: {brief(error)}"))


def expected_gpus() -> int:
    """GPUs that Slurm gave the job on this node; outside of Slurm, those that torch sees."""
    given = os.environ.get("SLURM_GPUS_ON_NODE")
    return int(given) if given else 0 if "SLURM_JOB_ID" in os.environ else torch.cuda.device_count()


def devices(local_rank: int, local_size: int) -> list[torch.device]:
    """This rank's share of the node's GPUs; the CPU where there are none."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    count = torch.cuda.device_count()
    return [torch.device("cuda", index) for index in range(local_rank % count, count, local_size)]


def multiply(device: torch.device) -> tuple[bool, float]:
    """Matrix products of small whole numbers, exact in any precision; whether they are right, and GFLOP/s at best.

    Checked as by Freivalds (1977): C x = A (B x), here without rounding.
    """
    size = MATMUL_SIZE[device.type]
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (size, size), generator=random).to(device, kind) for _ in range(2))
    x = torch.randint(0, 2, (size,), generator=random).to(device, torch.float64)
    best = float("inf")
    product: Tensor = a @ b
    for _ in range(MATMUL_ROUNDS):
        wait(device)
        since = time.perf_counter()
        product = torch.mm(a, b)
        wait(device)
        best = min(best, time.perf_counter() - since)
    right = torch.equal(product.double() @ x, a.double() @ (b.double() @ x))
    return right, 2 * size**3 / best / 1e9


def code_hash(root: Path) -> str:
    """Of all Python files below the packages of `root`, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(file for room in ROOMS for file in (root / room).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _look_at_gpus(report: Report) -> Iterator[Finding]:
    numbers = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS") or ""
    ours = {int(number) for number in numbers.split(",")} if numbers.replace(",", "").isdigit() else None
    expected = expected_gpus()
    findings, same = gpu.inspect(expected, ours)
    report.same |= same
    yield from findings
    if not findings and torch.cuda.device_count() < expected:
        yield Finding("gpu", "node", f"torch sees {torch.cuda.device_count()} of {expected} GPUs")


def _note_versions(config: Config, report: Report) -> Iterator[Finding]:
    report.same |= {"Python": platform.python_version(), "code hash": code_hash(SOURCE)}
    place, external, sha256 = config.model.architecture.rpartition("@")
    if external:  # a file or a package, which each node reads for itself
        report.same[f"source of {place.rpartition(':')[2]}"] = sha256[:12]
    report.same |= {package: version(package) for package in PACKAGES}
    return iter(())


def _look_at_data(config: Config, report: Report) -> Iterator[Finding]:
    path = _data(config).path
    try:
        dataset = Dataset.of(_data(config), check=False)
        dataset.tokenizer()
        # The same one on every node: a shard that is damaged for all is no node's fault.
        dataset.shard(dataset.shards_of("train")[0]).read(0, check=True)
        report.same["fingerprint of the data"] = dataset.manifest.fingerprint[:16]
    except OSError as error:
        yield Finding("data", "place", f"the dataset {path} cannot be read: {error}")


def _data(config: Config) -> DataConfig:
    """What training reads here: the node's own copy where the batch script made one."""
    return config.data.model_copy(update={"path": os.environ.get("DUET_DATA") or config.data.path})


def _look_at_disks(config: Config, report: Report, share: float) -> Iterator[Finding]:
    """`share`: of a checkpoint, what this node writes."""
    checkpoints = (config.run_dir / "checkpoints").absolute()
    place = next(folder for folder in (checkpoints, *checkpoints.parents) if folder.is_dir())
    yield from _probe_writing(place, report)
    size = _checkpoint_bytes(config)
    free = shutil.disk_usage(place).free
    if size and free < 2 * size:
        room = "no checkpoint" if free < size else "one checkpoint only"
        yield Finding(
            "disk",
            "place" if free < size else "warning",
            f"{place} has room for {room}: {free / 2**30:.2f} GiB are free and one takes about {size / 2**30:.2f}",
        )
    lead = float(os.environ.get("DUET_STOP_LEAD") or 0)
    if size and lead and report.write_mib_s:
        seconds = share * size / 2**20 / report.write_mib_s
        if seconds > LEAD_SHARE * lead:
            yield Finding(
                "disk",
                "warning",
                f"this node's share of a checkpoint would take {seconds:.0f} s to write at {report.write_mib_s:.0f} "
                f"MiB/s; the planned signal comes {lead:.0f} s before the limit (DUET_STOP_LEAD), raise it",
            )
    if expected_gpus() and (shm := shutil.disk_usage(SHM).free / 2**20) < MIN_SHM_MIB:
        yield Finding("shm", "warning", f"{SHM} has {shm:.0f} MiB free, NCCL may need {MIN_SHM_MIB}")
    temporary = tempfile.gettempdir()
    if (left := shutil.disk_usage(temporary).free / 2**20) < MIN_TEMPORARY_MIB:
        yield Finding("temporary", "warning", f"{temporary} has {left:.0f} MiB free; compiled code goes there")


def _probe_writing(place: Path, report: Report) -> Iterator[Finding]:
    """Write, flush and remove a file like a checkpoint's; random, so that no file system compresses it."""
    probe = place / f".preflight-{report.node}-{os.getpid()}"
    content = os.urandom(PROBE_BYTES)
    with disk_errors(place, RunError):
        try:
            since = time.perf_counter()
            with open(probe, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            report.write_mib_s = PROBE_BYTES / 2**20 / (time.perf_counter() - since)
        finally:
            probe.unlink(missing_ok=True)
    return iter(())


def _checkpoint_bytes(config: Config) -> float:
    """As `duet plan` counts it; 0 when the data, which know the vocabulary, cannot be read: that is told elsewhere."""
    try:
        return checkpoint_bytes(complete(config, Dataset.of(_data(config), check=False)))
    except (OSError, UserError):
        return 0


def _look_at_tracking(config: Config) -> Iterator[Finding]:
    uri = config.tracking.uri
    if config.tracking.mode != "online" or not uri or not uri.startswith("http"):
        return
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=TRACKING_SECONDS).close()  # noqa: S310 - http or https
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            yield Finding("tracking", "warning", f"MLflow at {uri} answers {error.code}; training does not wait for it")
    except (OSError, HTTPException, ValueError) as error:  # also what answers is no web server, or the port no number
        yield Finding(
            "tracking", "warning", f"MLflow at {uri} cannot be reached ({error}); training does not wait for it"
        )
