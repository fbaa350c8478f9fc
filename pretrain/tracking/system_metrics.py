"""What the machines are doing: a thread on each node that samples them into a journal of the node's own.

Nobody reads the curves of hundreds of nodes. Of more than EACH_NODE, rank 0's thread sums up the newest samples in one
more journal, which mirrors take in place of the others: the least, the mean, the greatest, and of which nodes they are.
"""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

import psutil
import pynvml

from data_pipeline.errors import RunError
from pretrain.run.journal import Journal, read_from

EACH_NODE = 8
"""Up to so many nodes, mirrors show each."""
OF_ALL = "nodes.jsonl"
SECONDS = 10.0
FIRST_SECONDS = 0.1
"""What the rates of the first sample, at the start, are taken over."""
JOIN_SECONDS = 5.0


def node_name() -> str:
    """Short host name, of the characters that MLflow takes in the name of a metric."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname().split(".")[0])


def journal_path(logs: Path, node: str) -> Path:
    """Where a node's samples are: metrics records, like the run's own journal."""
    return logs / f"system-{node}.jsonl"


def mirrored_files(run_dir: Path) -> list[Path]:
    """What mirrors take of a run's samples: each node's, or where there is one, the file that sums them up."""
    logs = run_dir / "logs"
    of_all = logs / OF_ALL
    return [of_all] if of_all.exists() else sorted(logs.glob("system-*.jsonl"))


class SystemSampler:
    """Use as a context: one rank of each node samples at once, every SECONDS, and when it ends.

    Names are `system/NODE.…`: `cpu_percent`, `memory_gib` in use, `disk_free_gib` where the run folder lies,
    `net_mib_s` in and out (all interfaces but the loopback; what InfiniBand moves past the kernel is not seen) and,
    for each GPU that NVML shows and as far as it can tell, `gpu0_util_percent`, `gpu0_memory_gib`, `gpu0_power_w`,
    `gpu0_temp_c`.
    """

    def __init__(
        self,
        logs: Path,
        attempt: int,
        step: int,
        active: bool,
        warn: Callable[[str], None],
        of_nodes: int = 0,
    ) -> None:
        """`active` on the rank that samples; `warn` hears, once, why samples are missing. `of_nodes`: on rank 0, how
        many there are, whose samples it sums up when there are many, or were once."""
        self.step = step
        """The last finished step; the training loop advances it."""
        self._logs = logs
        self._attempt = attempt
        self._active = active
        self._warn = warn
        self._of_nodes = of_nodes
        self._warned = False
        self._node = node_name()
        self._network = (0.0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-sampler", daemon=True)

    def __enter__(self) -> "SystemSampler":
        if self._active:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._stop.set()
            self._thread.join(JOIN_SECONDS)  # a driver that hangs must not hold up the end

    def _run(self) -> None:
        try:
            self._logs.mkdir(exist_ok=True)
            many = self._of_nodes > EACH_NODE or (self._of_nodes > 0 and (self._logs / OF_ALL).exists())
            all_nodes = AllNodes(self._logs, self._attempt) if many else None
            journal = Journal(journal_path(self._logs, self._node), self._attempt)
            gpus = _open_gpus()
        except (OSError, pynvml.NVMLError) as error:
            self._report(error)
            return
        psutil.cpu_percent()  # from here on
        self._network = (time.monotonic(), _network_bytes())
        self._stop.wait(FIRST_SECONDS)
        while not self._stop.is_set():
            self._record(journal, gpus, all_nodes)
            self._stop.wait(SECONDS)
        self._record(journal, gpus, all_nodes)
        journal.close()
        if all_nodes:
            all_nodes.close()

    def _record(self, journal: Journal, gpus: list[Any], all_nodes: "AllNodes | None") -> None:
        try:
            values = self._sample() | {name: value for i, gpu in enumerate(gpus) for name, value in _sample_gpu(i, gpu)}
            journal.metrics(self.step, {f"system/{self._node}.{name}": value for name, value in values.items()})
            if all_nodes:
                all_nodes.sum_up(self.step)
        except (OSError, RunError, psutil.Error, pynvml.NVMLError) as error:  # the next sample may work
            self._report(error)

    def _sample(self) -> dict[str, float]:
        (before, bytes_before), self._network = self._network, (time.monotonic(), _network_bytes())
        now, bytes_now = self._network
        memory = psutil.virtual_memory()
        return {
            "cpu_percent": psutil.cpu_percent(),
            "memory_gib": (memory.total - memory.available) / 2**30,
            "disk_free_gib": psutil.disk_usage(str(self._logs)).free / 2**30,
            "net_mib_s": (bytes_now - bytes_before) / 2**20 / (now - before),
        }

    def _report(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"system metrics of {self._node} are incomplete: {type(error).__name__}: {error}")


class AllNodes:
    """Sums up what each node has sampled since the last time; no node's clock is asked.

    Of `cpu_percent` comes `system/nodes.cpu_percent_min`, `…_mean` and `…_max`, of `gpu0_util_percent` and its like
    `system/nodes.gpu_util_percent_min` and so on, over all GPUs. The record's `where` names the node, and the GPU, of
    each least and greatest. `system/nodes.heard` is how many nodes had something new to say.
    """

    def __init__(self, logs: Path, attempt: int) -> None:
        """Raises OSError."""
        self._logs = logs
        self._journal = Journal(logs / OF_ALL, attempt)
        self._read = {file: file.stat().st_size for file in logs.glob("system-*.jsonl")}

    def sum_up(self, step: int) -> None:
        """Record what is new. Raises OSError."""
        values: dict[str, list[tuple[float, str]]] = {}
        heard = 0
        for file in self._logs.glob("system-*.jsonl"):
            node, newest = file.stem.removeprefix("system-"), dict[str, float]()
            for record, behind in read_from(file, self._read.get(file, 0)):
                newest, self._read[file] = record.metrics or newest, behind
            heard += bool(newest)
            for name, value in newest.items():
                what = name.removeprefix(f"system/{node}.")
                if gpu := re.match(r"(gpu\d+)_", what):
                    values.setdefault(f"gpu{what[gpu.end(1) :]}", []).append((value, f"{node}.{gpu[1]}"))
                else:
                    values.setdefault(what, []).append((value, node))
        summary, where = {"system/nodes.heard": float(heard)}, {}
        for what, found in values.items():
            for word, (value, place) in (("min", min(found)), ("max", max(found))):
                summary[f"system/nodes.{what}_{word}"], where[f"{what}_{word}"] = value, place
            summary[f"system/nodes.{what}_mean"] = fmean(value for value, _ in found)
        self._journal.metrics(step, summary, where=where)

    def close(self) -> None:
        """Have all records on disk. Raises OSError."""
        self._journal.close()


def _network_bytes() -> int:
    interfaces = psutil.net_io_counters(pernic=True)
    return sum(counts.bytes_sent + counts.bytes_recv for name, counts in interfaces.items() if name != "lo")


def _open_gpus() -> list[Any]:
    """NVML's handles; none on a machine without an NVIDIA driver."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]


def _sample_gpu(index: int, gpu: Any) -> Iterator[tuple[str, float]]:
    """What this GPU can tell: a slice of one (MIG) has no utilisation, for example."""
    questions: dict[str, Callable[[], float]] = {
        "util_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "memory_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**30,
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        "temp_c": lambda: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    }
    for name, ask in questions.items():
        with suppress(pynvml.NVMLError_NotSupported):
            yield f"gpu{index}_{name}", ask()
