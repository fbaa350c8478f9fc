"""How a run begins: it owns its folder, knows its data, and opens its parts where its newest checkpoint stands."""

import getpass
import os
import platform
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from data_pipeline.errors import ConfigError, DataError, RunError
from data_pipeline.files.filesystem import is_uri
from data_pipeline.files.mapped import told
from data_pipeline.sampling import packing_plan
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.sample_plan import Plan, go_on, told_cut, told_shares, wanted_phase
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import Manifest
from model.architectures import registry
from model.architectures.external import parse
from pretrain.checkpoint import checkpoint
from pretrain.checkpoint.ownership import check_own
from pretrain.checkpoint.retention import prune
from pretrain.checkpoint.saver import Saver
from pretrain.config.dataset_identity import complete, identity
from pretrain.config.schema import Config
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.engine.sequence import Ulysses
from pretrain.evaluation.batches import Batches
from pretrain.evaluation.evaluate import held_out
from pretrain.finetune.base import check_tokenizer, hold_base, prepare
from pretrain.health.monitor import Health
from pretrain.health.rollback import Past, read_past
from pretrain.life import Life
from pretrain.run import journal, origin
from pretrain.run.goodput import Goodput, earlier_goodput
from pretrain.run.lease import Lease
from pretrain.run.run_folder import RunFolder
from pretrain.run.signals import StopRequest
from pretrain.tracking.console import Console, slow_progress
from pretrain.tracking.metrics import Meter
from pretrain.tracking.recorder import Recorder
from pretrain.tracking.system_metrics import SystemSampler

VERIFY_UP_TO_BYTES = 10 * 2**30
"""A dataset up to this size is hashed in full at each start of a run; the ranks share the work."""


@dataclass(frozen=True)
class Claim:
    """A run that owns its folder and knows its data; the same on every rank, but for the lease, which is rank 0's."""

    config: Config
    """Completed by the dataset's vocabulary."""
    ranks: Ranks
    folder: RunFolder
    dataset: Dataset
    batches: Batches
    lease: Lease | None
    attempt: int


@dataclass(frozen=True)
class Parts:
    """What the loop works with, and where it begins."""

    step: int
    data: DataState
    engine: Engine
    recorder: Recorder
    system: SystemSampler
    life: Life
    saver: Saver
    health: Health
    meter: Meter


def claim(config: Config, ranks: Ranks, stack: ExitStack) -> Claim:
    """Open the data, own the run folder until the stack is closed, verify the data, and tie the folder to them.

    Raises:
        UserError: on every rank, with the same message.
    """
    folder = RunFolder(config.run_dir)
    check_sources(config, ranks)
    config.micro_batches(ranks.world_size)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    local_rank = int(os.environ["LOCAL_RANK"]) % local_ranks  # all are the first where nobody tells how many
    first_of_node = os.environ["LOCAL_RANK"] == "0"
    staged = os.environ.get("DUET_DATA")  # a copy on this node's disk
    source = config.data.model_copy(update={"path": staged}) if staged else config.data
    remote = is_uri(source.path)  # Then one rank reads the manifest for all.
    manifest = ranks.together(lambda: Manifest.load(source.path), only_first=True) if remote else None
    check = ranks.is_first if remote else first_of_node
    dataset = ranks.together(lambda: Dataset.of(source, check, manifest))
    acquired = partial(Lease.acquire, folder.path, Console(1).note)
    lease = ranks.together(lambda: stack.enter_context(acquired()) if ranks.is_first else None)
    attempt = ranks.broadcast(lease.attempt if lease else None)
    # Ranks that read the same copy share the work.
    part, parts = (local_rank, local_ranks) if staged else (ranks.rank, ranks.world_size)
    ranks.together(lambda: verify(dataset, part, parts, config.data.path))
    config = ranks.together(lambda: _tie(folder, config, dataset), only_first=True)
    if staged and config.data.packing == "best_fit":  # `_tie` has packed the first node's copy
        pack = partial(packing_plan.prepare, dataset, config.model.context, slow_progress())
        ranks.together(lambda: pack() if first_of_node else None)
    exchange = Ulysses(ranks) if ranks.sequence_parallel > 1 else None
    batches = ranks.together(lambda: Batches.of(config, dataset, ranks.device, exchange))
    return Claim(config, ranks, folder, dataset, batches, lease, attempt)


def open_parts(claim: Claim, stop: StopRequest, started: float, stack: ExitStack) -> Parts:
    """Build the model, stand where its newest checkpoint does, and open what trains, tells, saves and watches.

    `started` is when the program began, in seconds since the epoch. The recorder is closed with the stack.

    Raises:
        UserError: on every rank, with the same message.
    """
    config, ranks, folder, train = claim.config, claim.ranks, claim.folder, claim.config.train
    torch.manual_seed(config.run.seed)
    model = registry.build(config.model)
    begun = ranks.together(lambda: bool(folder.saved_steps()), only_first=True)
    ranks.together(lambda: prepare(model, config, begun=begun))
    parameters = sum(p.numel() for p in model.parameters())
    engine = Engine(model, config, ranks)
    recorder = ranks.together(lambda: stack.enter_context(Recorder(config, folder, ranks, claim.attempt)))
    stack.enter_context(told(lambda error: recorder.__exit__(type(error), error, None)))
    found = _newest(claim, recorder.warning)
    step = found.manifest.step if found else 0
    goodput, past, damaged = ranks.together(lambda: _earlier(claim, step, started), only_first=True)
    data = _restore(claim, engine, found, past, recorder.warning)
    facts = _facts(claim, parameters) | {"started": started}
    ranks.together(lambda: recorder.start(step, facts, past.num_rollbacks))
    if shares := told_shares(claim.dataset, config.data, data.phases[-1]):
        recorder.note(shares)
    for line in told_cut(claim.dataset, data.phases[-1]):
        recorder.note(line)
    if damaged:
        recorder.warning(journal.told_damaged(damaged))
    warn = recorder.warning if ranks.is_first else lambda text: print(f"warning: {text}", file=sys.stderr)
    samples = os.environ["LOCAL_RANK"] == "0"
    nodes = int(ranks.sum(torch.tensor(samples)))
    system = SystemSampler(folder.logs, claim.attempt, step, samples, warn, nodes if ranks.is_first else 0)
    life = Life(folder.path, ranks, stop, claim.lease, recorder)
    saver = Saver(
        engine,
        folder.checkpoints,
        ranks,
        still_ours=claim.lease.check if claim.lease else lambda: None,
        sync_journal=recorder.sync_journal,
        prune=lambda step: prune(folder.checkpoints, train.keep_checkpoints, train.keep_every, folder.id, upto=step),
        warn=recorder.warning,
        published=life.published,
    )
    health = Health(config, ranks, engine, recorder, folder.logs, past)
    meter = Meter(config, engine, ranks, goodput, restarts=claim.attempt - 1)
    return Parts(step, data, engine, recorder, system, life, saver, health, meter)


def check_sources(config: Config, ranks: Ranks) -> None:
    """Whether all ranks have read the same architecture: one from outside is a file, or a package, of each node.

    Raises:
        ConfigError: names the ranks and what each of them has read.
    """
    _, name, sha256 = parse(config.model.architecture)
    number = int(sha256 or "0", 16) >> 196  # 60 bits of it
    largest, least = ranks.largest(number, -number)
    if largest == -least:
        return
    found: dict[str, list[str]] = {}
    for rank, (node, source) in enumerate(ranks.gather((platform.node(), f"{name} {(sha256 or 'of ours')[:12]}"))):
        found.setdefault(source, []).append(f"rank {rank} on {node}")
    told = "; ".join(
        f"{source} on {', '.join(places[:3])}{f' and {len(places) - 3} more' if len(places) > 3 else ''}"
        for source, places in found.items()
    )
    raise ConfigError(
        f"model.architecture: the source of {name} is not the same on all nodes, by its sha256: {told}; name a file "
        "that all nodes share, or copy the same one to each"
    )


def verify(dataset: Dataset, part: int, parts: int, path: str) -> None:
    """Compares a dataset, or a node's copy of that at `path`, with its hashes, as far as that is quick; record batches
    are when they are first touched, and remote shards as they come."""
    try:
        if not dataset.is_remote and sum(shard.bytes for shard in dataset.manifest.shards) <= VERIFY_UP_TO_BYTES:
            dataset.verify(part=part, parts=parts)
        elif part == 0:
            dataset.tokenizer()
    except DataError as error:
        if dataset.name == path:
            raise
        raise DataError(f"{error}. It is in this node's copy of {path}: remove {dataset.name}") from error


def _tie(folder: RunFolder, config: Config, dataset: Dataset) -> Config:
    """Complete the configuration by the dataset's vocabulary and tie the run folder to both."""
    config = origin.resolve(folder.kept(config))
    if not folder.has_trained():
        check_tokenizer(config, dataset.manifest.tokenizer.sha256)
    config = complete(config, dataset)
    config.objective.check(dataset)
    if config.data.packing == "best_fit":
        packing_plan.prepare(dataset, config.model.context, slow_progress())
    # Both splits must be large enough for one window.
    Plan(dataset, wanted_phase(dataset, config.data, config.model.context), config.run.seed)
    held_out(dataset, config)
    origin.check(config, identity(config, dataset))
    folder.claim(config, identity(config, dataset))
    hold_base(config, Console(1).warning)  # before it is read: a run that trains goes on removing others
    return config


def _newest(claim: Claim, warn: Callable[[str], None]) -> checkpoint.Checkpoint | None:
    """The newest checkpoint, or that of `run.start_from` for a run without one that has an origin; None: from scratch.

    Raises:
        CheckpointError: none is whole, or those that the journal tells of are gone.
        RunError: labels weighed otherwise when it was trained.
    """
    config, ranks, folder = claim.config, claim.ranks, claim.folder
    found = checkpoint.newest(folder.checkpoints, ranks, warn)
    if found:
        _check_weighing(found.manifest, config, folder)
        return found
    ranks.together(folder.check_never_saved)
    if config.run.start_from is None or config.finetune.kind != "none":
        return None
    begun = ranks.together(lambda: checkpoint.Checkpoint(origin.checkpoint_folder(config)))
    ranks.together(lambda: begun.verify(ranks.rank, ranks.world_size))
    return begun


def _restore(
    claim: Claim, engine: Engine, found: checkpoint.Checkpoint | None, past: Past, warn: Callable[[str], None]
) -> DataState:
    """Load what `_newest` has found: where the data stand.

    Raises:
        CheckpointError: it is another run's, or does not fit.
        DataError: it was trained on other data, or they do not last until the end.
    """
    config, ranks, folder, dataset = claim.config, claim.ranks, claim.folder, claim.dataset
    step = found.manifest.step if found else 0

    def load() -> DataState:
        fresh = DataState(fingerprint=dataset.manifest.fingerprint, seed=config.run.seed)
        stood = found.data_state(config.run.seed) if found else fresh
        if found:
            check_own(found, folder if found.path.parent == folder.checkpoints else origin.folder(config))
        if past.data:  # rolled back to this step, and not saved since
            stood = DataState.model_validate(past.data)
        data = go_on(stood, dataset, config.data, config.model.context)
        left = (config.train.steps - step) * config.global_batch
        Plan(dataset, data.phases[-1], data.seed).schedule.check(data.samples_seen + left)
        if found:
            found.load(engine)
            found.restore_rng(ranks)
            for state, now in engine.types.items():
                if (saved := found.manifest.state.get("types", {}).get(state)) != now:
                    warn(f"{found.path}: {state} was saved as {saved} and is {now} now: it was converted")
        return data

    data = ranks.together(load)
    ranks.together(lambda: folder.went_on(config, identity(config, dataset)), only_first=True)
    return data


def _check_weighing(manifest: checkpoint.CheckpointManifest, config: Config, folder: RunFolder) -> None:
    """Whether the rest of the run would weigh labels as its beginning did. Raises RunError."""
    if manifest.format >= 4 or not config.labels_vary or manifest.step >= config.train.steps:
        return
    new = "run.dir=NEW" if config.run.dir else "run.name=NEW"
    command = shlex.join(["duet", "train", "--from", f"{folder.path}@{manifest.step}", new])
    raise RunError(
        f"{folder.path}: an older version has trained this run, in which labels weighed alike within a micro-batch; "
        "now they do over the whole step. Here micro-batches hold unequal numbers of labels, so it would go on as "
        f"another run; begin a new one with its checkpoint: {command}"
    )


def _earlier(claim: Claim, step: int, started: float) -> tuple[Goodput, Past, list[str]]:
    """What the journal tells of the attempts before this one, up to `step`; and what in it is damaged."""
    path, damaged = claim.folder.journal, list[str]()
    goodput = earlier_goodput(journal.noting(journal.read(path), damaged), step, started)
    return goodput, read_past(journal.read(path), step, claim.config.health), damaged


def _facts(claim: Claim, parameters: int) -> dict[str, Any]:
    """What run.json and the journal tell of the machine and the sizes."""
    ranks = claim.ranks
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor() or "CPU"
    return {
        "parameters": parameters,
        "world_size": ranks.world_size,
        "device": device,
        "host": platform.node(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "command": os.environ.get("DUET_COMMAND") or shlex.join(["duet-rank", *sys.argv[1:]]),
        "user": _user(),
        "start_from": claim.config.run.start_from,
        "versions": _versions("torch", "deepspeed", "mlflow", "pyarrow", "sentencepiece"),
    }


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed: MLflow need not be where a run does not track."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _user() -> str | None:
    """None in a container that does not know its user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None
