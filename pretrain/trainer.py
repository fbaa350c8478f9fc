"""The training run of one rank: everything is opened in `train`, and the loop below reads top to bottom."""

import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from data_pipeline.atomic import disk_errors
from data_pipeline.dataset import Dataset
from data_pipeline.errors import RunError
from data_pipeline.loader import DataState, Loader
from data_pipeline.order import SampleOrder
from model import registry
from pretrain import checkpoint, journal
from pretrain.config import Config
from pretrain.dataset_identity import complete, identity
from pretrain.distributed import Ranks
from pretrain.engine import Engine
from pretrain.evaluate import evaluate, to_batch
from pretrain.goodput import Goodput, earlier_goodput
from pretrain.lease import Lease
from pretrain.metrics import Meter
from pretrain.profiling import Profile
from pretrain.recorder import Recorder
from pretrain.run import RunFolder
from pretrain.sample import sample_text
from pretrain.schedule import learning_rate
from pretrain.signals import StopRequest
from pretrain.system import SystemSampler

VERIFY_UP_TO_BYTES = 10 * 2**30
"""A dataset up to this size is hashed in full at a run's first start."""
MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class Session:
    """What the loop works with; the same on every rank but for the recorder, which writes on rank 0 only."""

    config: Config
    ranks: Ranks
    folder: RunFolder
    dataset: Dataset
    engine: Engine
    recorder: Recorder
    goodput: Goodput
    system: SystemSampler
    check_lease: Callable[[], None]
    stop: StopRequest


def train(config: Config, ranks: Ranks, stop: StopRequest, started: float) -> int:
    """Train to `train.steps`, from the newest checkpoint of the run folder when there is one.

    `started` is when the program began (`time.time()`), for the summary and the goodput.

    Returns:
        the signal that ended the run early, else 0.

    Raises:
        UserError: on every rank, with the same message.
    """
    folder = RunFolder(config.run_dir)
    config.micro_batches(ranks.world_size)
    with disk_errors(folder.path, RunError), ExitStack() as stack:
        dataset = ranks.together(lambda: Dataset.open(config.data.path))
        lost: list[bool] = []
        lease = ranks.together(lambda: _own(folder, lost, stack), only_first=True)
        config = ranks.together(lambda: _claim(folder, config, dataset), only_first=True)
        torch.manual_seed(config.run.seed)
        model = registry.build(config.model)
        parameters = sum(p.numel() for p in model.parameters())
        engine = Engine(model, config, ranks)
        recorder = stack.enter_context(Recorder(config, folder, ranks, lease))
        found = checkpoint.newest(folder.checkpoints, ranks, recorder.warning)
        data = _new_data_state(config, dataset)
        step = 0
        if found:
            ranks.together(lambda: found.load(engine))
            step, data = found.manifest.step, DataState.model_validate(found.manifest.state["data"])
        goodput = ranks.together(lambda: earlier_goodput(journal.read(folder.journal), step, started), only_first=True)
        recorder.start(step, _facts(config, ranks, dataset, parameters) | {"started": started})
        warn = recorder.warning if ranks.is_first else _warn_in_log
        system = SystemSampler(folder.logs, lease, step, os.environ["LOCAL_RANK"] == "0", warn)

        def check_lease() -> None:
            if lost:
                raise RunError(f"{folder.path}: taken over by another start; this one saves nothing more")

        session = Session(config, ranks, folder, dataset, engine, recorder, goodput, system, check_lease, stop)
        with system:
            step, signal = run_steps(session, step, data)
        recorder.finish(step, signal, time.time() - started)
        return signal


def run_steps(session: Session, step: int, data: DataState) -> tuple[int, int]:
    """The training loop. Returns the last finished step and the signal that ended it early, else 0."""
    config, ranks, engine, recorder = session.config, session.ranks, session.engine, session.recorder
    micro_batch, _ = config.micro_batches(ranks.world_size)
    windows = session.dataset.windows("train", config.model.context)
    order = SampleOrder(data.fingerprint, data.seed, len(windows))
    loader = Loader(
        windows,
        order,
        global_batch=config.global_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start=data.samples_seen,
    )
    meter = Meter(config, engine, ranks, session.goodput, restarts=recorder.attempt - 1)
    profile_steps = config.profile.steps if ranks.is_first else None
    profile = Profile(profile_steps, session.folder.path / "profile", ranks.device, recorder.profile)
    skipped = 0
    signal = ranks.any(session.stop.signal)
    with loader, profile:
        while step < config.train.steps and not signal:
            step += 1
            profile.before(step)
            engine.stopwatch.start()
            samples = next(loader)
            batches = [
                to_batch(tokens, positions, step, config.run.seed, ranks.device)
                for tokens, positions in zip(
                    samples.tokens.split(micro_batch), samples.positions.split(micro_batch), strict=True
                )
            ]
            engine.stopwatch.lap("data")
            lr = learning_rate(config, step)
            metrics, grad_norm, applied = engine.train_step(batches, lr)
            data = data.after(config.global_batch, config.batch.tokens)
            skipped = 0 if applied else skipped + 1
            profile.after(step)
            session.system.step = step
            known = {
                "data/tokens_seen": data.tokens_seen,
                "data/samples_seen": data.samples_seen,
                "data/epoch": data.samples_seen / len(windows),
                "optim/lr": lr,
                "optim/grad_norm": grad_norm,
            }
            if not applied:
                known["optim/skipped"] = 1
            meter.add(step, metrics, known)
            if skipped == MAX_SKIPPED_IN_A_ROW:
                recorder.steps(meter.flush())
                raise RunError(
                    f"the gradients were not finite {skipped} steps in a row, up to step {step}: the run has diverged; "
                    "start again from an earlier checkpoint with a lower optimizer.lr"
                )

            signal = ranks.any(session.stop.signal)
            last = step == config.train.steps
            validate = last or step % config.train.eval_every == 0
            save = last or bool(signal) or step % config.train.checkpoint_every == 0
            if validate or save or step % config.train.log_every == 0:
                recorder.steps(meter.flush())
            if validate and (last or not signal):
                validation(session, step)
            if save:
                save_checkpoint(session, step, data)
            if validate or save:
                meter.resume_clock()
    return step, signal


def validation(session: Session, step: int) -> None:
    """Validate over all held-out text and write a sample; a collective."""
    config, dataset = session.config, session.dataset
    windows = dataset.windows("validation", config.model.context, partial=True)
    batch = max(1, 8192 // config.model.context)
    text_bytes = dataset.manifest.splits["validation"].bytes
    session.recorder.validation(step, evaluate(session.engine.module, windows, text_bytes, batch, session.ranks))
    if config.train.sample_tokens:
        session.recorder.sample(step, sample_text(session.engine.module, dataset, config, session.ranks.device))


def save_checkpoint(session: Session, step: int, data: DataState) -> None:
    """Save with all ranks, then let old checkpoints go; a collective."""
    state: dict[str, Any] = {
        "data": data.model_dump(),
        "tokenizer": session.dataset.manifest.tokenizer.sha256,
        "attempt": session.recorder.attempt,
    }
    since = time.perf_counter()
    path = checkpoint.save(session.engine, session.folder.checkpoints, step, state, session.ranks, session.check_lease)
    session.recorder.checkpoint(step, path, seconds=time.perf_counter() - since)
    if session.ranks.is_first:
        checkpoint.prune(session.folder.checkpoints, session.config.train.keep_checkpoints)


def _warn_in_log(text: str) -> None:
    """The recorder is silent on this rank."""
    print(f"warning: {text}", file=sys.stderr)


def _own(folder: RunFolder, lost: list[bool], stack: ExitStack) -> int:
    folder.path.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(Lease.acquire(folder.path, on_lost=lambda: lost.append(True))).attempt


def _claim(folder: RunFolder, config: Config, dataset: Dataset) -> Config:
    """Complete the configuration by the dataset's vocabulary and tie the run folder to both."""
    config = complete(config, dataset)
    first = not folder.run_file.exists()
    if first and sum(shard.bytes for shard in dataset.manifest.shards) <= VERIFY_UP_TO_BYTES:
        dataset.verify()
    folder.claim(config, identity(dataset))
    return config


def _new_data_state(config: Config, dataset: Dataset) -> DataState:
    return DataState(fingerprint=dataset.manifest.fingerprint, seed=config.run.seed, samples_seen=0, tokens_seen=0)


def _facts(config: Config, ranks: Ranks, dataset: Dataset, parameters: int) -> dict[str, Any]:
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor() or "CPU"
    return {
        "parameters": parameters,
        "world_size": ranks.world_size,
        "device": device,
        "host": platform.node(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "mlflow", "pyarrow", "sentencepiece")},
    }
