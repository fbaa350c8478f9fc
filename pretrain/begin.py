"""How a run begins: it owns its folder, knows its data, and stands where its newest checkpoint does."""

import os
import platform
import shlex
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import torch

from data_pipeline.errors import DataError, RunError
from data_pipeline.sampling import packing_plan
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.sample_plan import Plan, go_on, wanted_phase
from data_pipeline.storage.dataset import Dataset
from pretrain.checkpoint import checkpoint
from pretrain.checkpoint.ownership import check_own
from pretrain.config.dataset_identity import complete, identity
from pretrain.config.schema import Config
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.evaluation.evaluate import held_out
from pretrain.run import origin
from pretrain.run.lease import Lease
from pretrain.run.run_folder import RunFolder
from pretrain.tracking.console import Console, slow_progress
from pretrain.tracking.recorder import Recorder

VERIFY_UP_TO_BYTES = 10 * 2**30
"""A dataset up to this size is hashed in full at each start of a run; the ranks share the work."""


def pack(config: Config, dataset: Dataset) -> None:
    """Plan the windows that hold whole documents, unless that was done."""
    packing_plan.prepare(dataset, config.model.context, slow_progress())


def own(folder: RunFolder, stack: ExitStack) -> Lease:
    """Become the owner of the run folder, until the stack is closed. Raises RunError while another one is."""
    folder.path.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(Lease.acquire(folder.path, Console(1).note))


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


def claim(folder: RunFolder, config: Config, dataset: Dataset) -> Config:
    """Complete the configuration by the dataset's vocabulary and tie the run folder to both."""
    config = origin.resolve(complete(config, dataset))
    config.objective.check(dataset)
    if config.data.packing == "best_fit":
        pack(config, dataset)
    # Both splits must be large enough for one window.
    Plan(dataset, wanted_phase(dataset, config.data, config.model.context), config.run.seed)
    held_out(dataset, config)
    origin.check(config, identity(config, dataset))
    folder.claim(config, identity(config, dataset))
    return config


def restore(
    config: Config, ranks: Ranks, folder: RunFolder, dataset: Dataset, engine: Engine, recorder: Recorder
) -> tuple[int, DataState]:
    """Load the newest checkpoint: the step it was made at and where the data stand. Step 0 when there never was one.

    A run without one begins with that of `run.start_from`, if it has an origin.

    Raises:
        CheckpointError: none is whole, or those that the journal tells of are gone.
        DataError: it was trained on other data, or they do not last until the end.
        RunError: labels weighed otherwise when it was trained.
    """
    found, owner = checkpoint.newest(folder.checkpoints, ranks, recorder.warning), folder
    if found:
        _check_weighing(found.manifest, config, folder)
    else:
        ranks.together(folder.check_never_saved)
        if config.run.start_from is not None:
            owner = origin.folder(config)
            found = ranks.together(lambda: checkpoint.Checkpoint(origin.checkpoint_folder(config)))
            ranks.together(lambda: found.verify(ranks.rank, ranks.world_size))
    step = found.manifest.step if found else 0

    def load() -> DataState:
        fresh = DataState(fingerprint=dataset.manifest.fingerprint, seed=config.run.seed)
        stood = found.data_state(config.run.seed) if found else fresh
        if found:
            check_own(found, owner)
        data = go_on(stood, dataset, config.data, config.model.context)
        left = (config.train.steps - step) * config.global_batch
        Plan(dataset, data.phases[-1], data.seed).schedule.check(data.samples_seen + left)
        if found:
            found.load(engine)
            found.restore_rng(ranks)
            for state, now in engine.types.items():
                if (saved := found.manifest.state.get("types", {}).get(state)) != now:
                    recorder.warning(f"{found.path}: {state} was saved as {saved} and is {now} now: it was converted")
        return data

    data = ranks.together(load)
    ranks.together(lambda: folder.went_on(config, identity(config, dataset)), only_first=True)
    return step, data


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


def facts(config: Config, ranks: Ranks, dataset: Dataset, parameters: int) -> dict[str, Any]:
    """What run.json and the journal tell of the machine and the sizes."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor() or "CPU"
    return {
        "parameters": parameters,
        "world_size": ranks.world_size,
        "device": device,
        "host": platform.node(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "start_from": config.run.start_from,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "mlflow", "pyarrow", "sentencepiece")},
    }
