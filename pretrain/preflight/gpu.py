"""The GPUs of a node as nvidia-smi sees them, before any rank opens one."""

import csv
import io
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.preflight.verdict import Finding

SECONDS = 20.0
"""What nvidia-smi may take; without persistence mode it initialises every GPU first."""
GPU_FIELDS = "index,uuid,name,driver_version,memory.total,memory.free,ecc.errors.uncorrected.volatile.total"
PROCESS_FIELDS = "gpu_uuid,pid,process_name,used_memory"
MIN_FREE = 0.95
"""Share of a GPU's memory that must be free."""


@dataclass(frozen=True)
class GpuState:
    """One line of `nvidia-smi --query-gpu`. Memory in MiB; None is what the GPU does not tell."""

    index: int
    uuid: str
    name: str
    driver: str
    memory: float | None
    free: float | None
    ecc_errors: int | None
    """Uncorrected ones since the driver was loaded."""


@dataclass(frozen=True)
class Process:
    """One line of `nvidia-smi --query-compute-apps`."""

    gpu: str
    """UUID."""
    pid: int
    name: str
    memory: float | None


def parse_gpus(text: str) -> list[GpuState]:
    """Output of `nvidia-smi --query-gpu=GPU_FIELDS --format=csv,noheader,nounits`.

    Raises:
        ValueError: it is something else, such as an error message of the driver.
    """
    return [
        GpuState(int(index), uuid, name, driver, _number(memory), _number(free), _count(errors))
        for index, uuid, name, driver, memory, free, errors in _rows(text, 7)
    ]


def parse_processes(text: str) -> list[Process]:
    """Output of `nvidia-smi --query-compute-apps=PROCESS_FIELDS --format=csv,noheader,nounits`.

    Raises:
        ValueError: it is something else.
    """
    return [Process(gpu, int(pid), name, _number(memory)) for gpu, pid, name, memory in _rows(text, 4)]


def inspect(expected: int, ours: set[int] | None) -> tuple[list[Finding], dict[str, str]]:
    """What is wrong with the GPUs, and what must be the same on all nodes.

    Args:
        expected: GPUs that the job has on this node; with 0 nothing is asked.
        ours: their numbers where nvidia-smi shows others, too; None: as many as are expected are shown.
    """
    if not expected:
        return [], {}
    try:
        gpus = parse_gpus(_ask(f"--query-gpu={GPU_FIELDS}"))
        processes = parse_processes(_ask(f"--query-compute-apps={PROCESS_FIELDS}"))
    except FileNotFoundError:
        return [_bad(f"{expected} GPUs are expected, but there is no nvidia-smi")], {}
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        return [_bad(f"nvidia-smi: {error}")], {}
    if ours is not None and len(gpus) > expected:
        gpus = [gpu for gpu in gpus if gpu.index in ours]
    models = ", ".join(sorted({gpu.name for gpu in gpus}))
    same = {"GPU driver": ", ".join(sorted({gpu.driver for gpu in gpus})), "GPU model": models}
    return list(judge_gpus(gpus, processes, expected)), same


def judge_gpus(gpus: list[GpuState], processes: list[Process], expected: int) -> Iterator[Finding]:
    """What is wrong, while no rank of ours has opened a GPU: any process on one is somebody else's."""
    if len(gpus) < expected:
        yield _bad(f"{len(gpus)} of {expected} GPUs are there")
    busy = {process.gpu for process in processes}
    for gpu in gpus:
        if gpu.ecc_errors:
            yield _bad(f"GPU {gpu.index} has {gpu.ecc_errors} uncorrected ECC errors")
        for process in processes:
            if process.gpu == gpu.uuid:
                yield _bad(f"GPU {gpu.index} is in use by process {process.pid} ({process.name})")
        if gpu.uuid not in busy and gpu.memory and gpu.free is not None and gpu.free < MIN_FREE * gpu.memory:
            yield _bad(f"GPU {gpu.index} has {gpu.free:,.0f} of {gpu.memory:,.0f} MiB free, though no process is on it")


def _ask(query: str) -> str:
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=SECONDS
    )
    if done.returncode:
        raise ValueError((done.stdout + done.stderr).strip() or f"exit code {done.returncode}")
    return done.stdout


def _rows(text: str, columns: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    for row in rows:
        if len(row) != columns:
            raise ValueError(", ".join(row))
    return rows


def _number(cell: str) -> float | None:
    # [N/A], [Not Supported], [Unknown Error], …
    return None if cell.startswith("[") or cell == "N/A" else float(cell)


def _count(cell: str) -> int | None:
    number = _number(cell)
    return None if number is None else int(number)


def _bad(text: str) -> Finding:
    return Finding("gpu", "node", text)
