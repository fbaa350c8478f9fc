"""What Slurm would silently accept: a submission is looked at before it waits in a queue. Free of torch and pyarrow.

A mistake that would end the run raises; what may be meant becomes a warning.
"""

import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import ConfigError, DataError, RunError
from data_pipeline.files.filesystem import absolute, is_uri
from data_pipeline.storage.manifest import MANIFEST, Manifest
from launch.slurm import client
from launch.slurm.site import Cluster, node_range, seconds
from model.costs.totals import CostsUnknown, num_parameters
from pretrain.config.dataset_identity import Built, complete
from pretrain.config.schema import Config
from pretrain.metric_names import CHECKPOINT_MS, STEP_MS
from pretrain.planning.costs import fitting, more_gpus
from pretrain.planning.memory import memory, state_bytes
from pretrain.run import origin
from pretrain.run.journal import Record
from pretrain.run.lease import check_unowned
from pretrain.run.run_folder import RunFolder
from pretrain.run.run_listing import tail
from pretrain.tracking.durations import duration

GIB = 1 << 30
LARGEST_FACTOR = 4
"""Numbers of nodes to propose go up to so many times what was asked for."""


@dataclass(frozen=True)
class Checked:
    """One line of what was looked at."""

    about: str
    text: str
    warning: bool = False


def check_data(config: Config, *, later: bool) -> tuple[Config, list[Checked]]:
    """Dataset and tokenizer are there and fit the run folder; the configuration with all paths absolute.

    With `later` another job makes the dataset, and there may be none yet.

    Raises:
        UserError: they are not, or they are others than the run's own.
    """
    config = origin.resolve(_absolute(config))
    place = config.data.path
    remote, path = is_uri(place), Path(place)
    if later and (remote or not (path / MANIFEST).is_file()):
        return config, [Checked("data", f"{place}: no dataset yet; the job looks again", warning=True)]
    manifest = Manifest.load(place)
    if remote:
        from data_pipeline.storage.remote_shards import check_sizes  # a store is asked through pyarrow

        check_sizes(place, manifest.shards)
    else:
        _check_files(path, manifest)
    config = complete(config, Built(manifest))
    identity = {"fingerprint": manifest.fingerprint, "path": place}
    origin.check(config, identity)
    folder = RunFolder(config.run_dir)
    if folder.has_trained():
        folder.check(config, identity)
    tokens = manifest.splits["train"].tokens
    return config, [Checked("data", f"{place}: {tokens:,} tokens, fingerprint {manifest.fingerprint[:12]}")]


def _check_files(path: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        file = path / shard.path
        size = file.stat().st_size if file.is_file() else None
        if size != shard.bytes:
            state = "is missing" if size is None else f"has {size} bytes, the manifest says {shard.bytes}"
            raise DataError(f"shard {file} {state}; restore it from a copy, or run `duet data build --overwrite`")
    if not any((path / "tokenizer").glob("*")):
        raise DataError(f"{path / 'tokenizer'}: the tokenizer is missing; restore it from a copy, or build again")


def check_folder(config: Config, clock: float | None) -> list[Checked]:
    """The run folder is nobody's at the moment, can be written to, and its run is not over. `clock` as in the lease.

    Raises:
        UserError: it is not so.
    """
    folder = RunFolder(config.run_dir)
    check_unowned(folder.path, clock)
    there = folder.path
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"{folder.path}: cannot be made: {there} is no folder that you may write to")
    if (switch := folder.path / "slurm" / "stop").exists():
        raise RunError(f"{switch}: the kill switch is there, and a job would end at once; remove it to go on")
    saved = folder.saved_steps()
    if not saved:
        folder.check_never_saved()
        return [Checked("run", f"{folder.path} (new)")]
    if saved[-1] >= config.train.steps:
        raise RunError(
            f"{folder.path}: finished: its newest checkpoint is of step {saved[-1]}, train.steps={config.train.steps}; "
            "raise train.steps, or start a new run with another run.name"
        )
    return [Checked("run", f"{folder.path} (goes on after step {saved[-1]})")]


def check_nodes(config: Config, cluster: Cluster) -> list[Checked]:
    """At least one of the numbers of nodes can share the batch.

    Raises:
        ConfigError: none can; names the nearest that do.
    """
    least, most = node_range(cluster.nodes)
    ranks = cluster.ranks_per_node
    largest = min(LARGEST_FACTOR * most, config.global_batch // ranks)
    fitting = [n for n in range(1, largest + 1) if _shares(config, n * ranks)]
    usable = [n for n in fitting if least <= n <= most]
    if not usable:
        near = [n for n in fitting if n < least][-1:] + [n for n in fitting if n > most][:1]
        told = f"numbers of nodes that can: {' or '.join(map(str, near))}" if near else "no number of nodes can"
        raise ConfigError(
            f"--nodes {cluster.nodes} with {ranks} rank(s) each: batch.tokens={config.batch.tokens} is "
            f"{config.global_batch} sequences in micro-batches of {config.batch.micro_batch or 'any size'}, which they "
            f"cannot share evenly; {told}"
        )
    micro, accumulation = config.micro_batches(usable[-1] * ranks)
    batch = f"{usable[-1]} node(s) x {ranks} rank(s) x {accumulation} x {micro} sequences"
    if least == most:
        return [Checked("nodes", batch)]
    idle = [str(n) for n in range(least, most + 1) if n not in usable]
    rest = f"; of {', '.join(idle)} nodes some would be idle" if idle else ""
    return [Checked("nodes", f"at most {batch}{rest}", warning=bool(idle))]


def check_memory(config: Config, cluster: Cluster) -> list[Checked]:
    """Weights, gradients and optimizer state fit the site's GPUs; activations are estimated.

    Raises:
        ConfigError: they cannot fit; names what would.
    """
    if not cluster.gpus_per_node or config.model.vocab_size is None:
        return []
    try:
        parameters = num_parameters(config.model)
    except CostsUnknown as error:
        return [Checked("memory", f"not looked at: {error}", warning=True)]
    least, most = node_range(cluster.nodes)
    ranks = next(n for n in range(least, most + 1) if _shares(config, n * cluster.ranks_per_node))
    ranks *= cluster.ranks_per_node
    state, step = state_bytes(config, parameters, ranks), memory(config, ranks)
    told = (
        f"{parameters:,} parameters at ZeRO {config.engine.zero_stage} over {ranks} ranks: {state / GIB:.1f} GiB of "
        f"state, some {step.total / GIB:.1f} GiB in all at the fullest moment of a step ({step.moment})"
    )
    if cluster.gpu_memory_gib is None:
        return [Checked("memory", f"{told}; gpu_memory_gib of the site is not known", warning=True)]
    told += f"; a GPU has {cluster.gpu_memory_gib:g} GiB"
    size = cluster.gpu_memory_gib * GIB
    if max(state, step.total) <= size:
        return [Checked("memory", told)]
    fits, more = [*fitting(config, ranks, size)], more_gpus(config, ranks, size)
    if more:
        fits.append(f"{more[0]} times the nodes with batch.micro_batch={more[1]}")
    told += f". What would fit: {', '.join(fits) or 'a smaller model only'}"
    if state > size:
        raise ConfigError(told)
    return [Checked("memory", told, warning=True)]


def check_time(config: Config, cluster: Cluster, links: int) -> list[Checked]:
    """Time limit and signal lead beside what the run's journal measured; nothing without one."""
    folder = RunFolder(config.run_dir)
    if not folder.run_file.exists() or not folder.journal.is_file():
        return [Checked("time", f"{cluster.time}; steps and saves of this run are not measured yet")]
    records = tail(folder.journal)
    steps, saves = _measured(records, STEP_MS), _measured(records, CHECKPOINT_MS)
    if not steps:
        return [Checked("time", f"{cluster.time}; steps of this run are not measured yet")]
    before, least = folder.facts().get("world_size"), node_range(cluster.nodes)[0] * cluster.ranks_per_node
    scale = before / least if before else 1.0
    left = config.train.steps - max(folder.saved_steps(), default=0)
    step = statistics.median(steps) * scale
    of_a_job = seconds(cluster.time) - cluster.signal_lead
    starts = math.ceil(left * step / of_a_job)
    told = f"{cluster.time}; {left:,} steps of {step:.3g} s are left, {duration(left * step)}, so {starts} start(s)"
    told += f" (measured on {before} ranks)" if before != least else " (as measured)"
    found = [Checked("time", told)]
    if not cluster.requeue and links < starts:
        found = [Checked("time", f"{told}; this site does not requeue: --chain {starts}", warning=True)]
    needed = max(steps) * scale + max(saves, default=0.0)
    if needed > cluster.signal_lead:
        text = f"{cluster.signal_lead} s before the end the run is told to save, and a step with a save took "
        text += f"{needed:.0f} s; give the site a signal_lead of {math.ceil(1.5 * needed)}"
        found.append(Checked("signal", text, warning=True))
    return found


def check_site(cluster: Cluster, python: str) -> list[Checked]:
    """What the site names on shared file systems is there; inside a container nothing can be seen from here.

    Raises:
        ConfigError: it is not.
    """
    for key, value in (("setup", cluster.setup), ("container", cluster.container), ("apptainer", cluster.apptainer)):
        if value and value.startswith("/") and not Path(value).exists():
            raise ConfigError(f"{key}: {value} is not there; nodes see the same file systems, so name what is")
    if cluster.container or cluster.apptainer:
        return [Checked("python", f"{python}, inside the container")]
    if "/" in python and not os.access(python, os.X_OK):
        raise ConfigError(f"python: {python} is no program here; name one on a file system that the nodes see, too")
    return [Checked("python", python)]


def check_environment(script: str) -> list[Checked]:
    """What of the environment sbatch goes by, beside the script."""
    overruled = client.overruled(script)
    said = {True: "is left out: the script decides", False: "goes to sbatch: the script does not say"}
    return [
        Checked("site", f"{name}={value} of the environment {said[name in overruled]}", warning=True)
        for name, value in sorted(os.environ.items())
        if name.startswith("SBATCH_")
    ]


def check_mounts(config: Config, cluster: Cluster) -> list[Checked]:
    """A container sees the run folder, with the code in it, and the dataset."""
    if not (cluster.container or cluster.apptainer):
        return []
    seen = [Path(source) for source, _, target in (m.partition(":") for m in cluster.mounts) if target in ("", source)]
    hidden = [
        path
        for path in (str(config.run_dir), config.data.path)
        if not is_uri(path) and not any(Path(path).is_relative_to(mount) for mount in seen)
    ]
    text = "in none of the mounts, so the container sees it only if the site mounts it by itself"
    return [Checked("mounts", f"{path}: {text}", warning=True) for path in hidden]


def _absolute(config: Config) -> Config:
    """Nothing in it depends on where one stands: the job runs in its run folder."""
    run = config.run.model_copy(update={"dir": str(config.run_dir.absolute())})
    data = config.data.model_copy(
        update={
            "path": absolute(config.data.path),
            "cache": str(Path(config.data.cache).absolute()) if config.data.cache else None,
        }
    )
    tracking = config.tracking
    file = (tracking.uri or "").removeprefix("sqlite:///")
    if tracking.uri and file != tracking.uri and not file.startswith("/"):
        tracking = tracking.model_copy(update={"uri": f"sqlite:///{Path(file).absolute()}"})
    return config.model_copy(update={"run": run, "data": data, "tracking": tracking})


def _shares(config: Config, ranks: int) -> bool:
    try:
        config.micro_batches(ranks)
    except ConfigError:
        return False
    return True


def _measured(records: list[Record], name: str) -> list[float]:
    """Values in seconds of a metric that is recorded in milliseconds."""
    return [record.metrics[name] / 1e3 for record in records if name in record.metrics]
