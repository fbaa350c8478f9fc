"""The training run of one rank: everything is opened in `train`, and the loop below reads top to bottom."""

import os
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from data_pipeline.errors import RunError
from data_pipeline.files.atomic import disk_errors
from data_pipeline.files.filesystem import is_uri
from data_pipeline.files.mapped import explained, told
from data_pipeline.loading.loader import Loader, Reader
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.sample_plan import Plan, told_shares
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import Manifest
from model.architectures import registry
from pretrain import begin
from pretrain.checkpoint.retention import prune
from pretrain.checkpoint.saver import Saver
from pretrain.config.schedule import learning_rate
from pretrain.config.schema import Config
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.engine.profiling import Profile
from pretrain.evaluation.batches import Batches
from pretrain.evaluation.evaluate import evaluate, held_out, held_out_bytes
from pretrain.evaluation.probe import Probe
from pretrain.evaluation.sample import sample_text
from pretrain.health.monitor import Health
from pretrain.health.rollback import load_older, read_past
from pretrain.life import Life, Stopped
from pretrain.metric_names import (
    EPOCH,
    GRAD_NORM,
    LEARNING_RATE,
    SAMPLES_SEEN,
    SKIPPED,
    TOKENS_SEEN,
    VALIDATION,
    epoch_of,
)
from pretrain.run import journal
from pretrain.run.goodput import Goodput, earlier_goodput
from pretrain.run.job_records import FailureFile
from pretrain.run.lease import still_there
from pretrain.run.run_folder import RunFolder
from pretrain.run.signals import StopRequest
from pretrain.tracking.metrics import Meter
from pretrain.tracking.mlflow_state import State, state_path
from pretrain.tracking.recorder import Recorder
from pretrain.tracking.system_metrics import SystemSampler


@dataclass
class Session:
    """What the loop works with; the same on every rank but for the recorder, which writes on rank 0 only."""

    config: Config
    ranks: Ranks
    folder: RunFolder
    dataset: Dataset
    batches: Batches
    probe: Probe
    engine: Engine
    recorder: Recorder
    goodput: Goodput
    system: SystemSampler
    saver: Saver
    life: Life
    health: Health
    failure_file: FailureFile


def train(config: Config, ranks: Ranks, stop: StopRequest, started: float, failure_file: FailureFile) -> int:
    """Train to `train.steps`, from the newest checkpoint of the run folder when there is one.

    `started` is when the program began (`time.time()`), for the summary and the goodput.

    Returns:
        the request (`pretrain.run.signals`) that ended the run early, else 0.

    Raises:
        UserError: on every rank, with the same message.
    """
    folder = RunFolder(config.run_dir)
    config.micro_batches(ranks.world_size)
    with disk_errors(folder.path, RunError), still_there(folder.path), ExitStack() as stack:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        local_rank = int(os.environ["LOCAL_RANK"]) % local_ranks  # all are the first where nobody tells how many
        first_of_node = os.environ["LOCAL_RANK"] == "0"
        staged = os.environ.get("DUET_DATA")  # a copy on this node's disk
        source = config.data.model_copy(update={"path": staged}) if staged else config.data
        remote = is_uri(source.path)  # Then one rank reads the manifest for all.
        manifest = ranks.together(lambda: Manifest.load(source.path), only_first=True) if remote else None
        check = ranks.is_first if remote else first_of_node
        dataset = ranks.together(lambda: Dataset.of(source, check, manifest))
        lease = ranks.together(lambda: begin.own(folder, stack) if ranks.is_first else None)
        attempt = ranks.broadcast(lease.attempt if lease else None)
        # Ranks that read the same copy share the work.
        part, parts = (local_rank, local_ranks) if staged else (ranks.rank, ranks.world_size)
        ranks.together(lambda: begin.verify(dataset, part, parts, config.data.path))
        config = ranks.together(lambda: begin.claim(folder, config, dataset), only_first=True)
        if staged and config.data.packing == "best_fit":  # `claim` has packed the first node's copy
            ranks.together(lambda: begin.pack(config, dataset) if first_of_node else None)
        batches = ranks.together(lambda: Batches.of(config, dataset, ranks.device))
        torch.manual_seed(config.run.seed)
        model = registry.build(config.model)
        parameters = sum(p.numel() for p in model.parameters())
        engine = Engine(model, config, ranks)
        recorder = stack.enter_context(Recorder(config, folder, ranks, attempt))
        step, data = begin.restore(config, ranks, folder, dataset, engine, recorder)
        damaged: list[str] = []
        records = partial(journal.noting, journal.read(folder.journal), damaged)
        goodput = ranks.together(lambda: earlier_goodput(records(), step, started), only_first=True)
        past = ranks.together(lambda: read_past(journal.read(folder.journal), step, config.health), only_first=True)
        data = DataState.model_validate(past.data) if past.data else data
        facts = begin.facts(config, ranks, dataset, parameters) | {"started": started}
        recorder.start(step, facts, past.num_rollbacks)
        if shares := told_shares(dataset, config.data, data.phases[-1]):
            recorder.note(shares)
        if damaged:
            recorder.warning(journal.told_damaged(damaged))
        warn = recorder.warning if ranks.is_first else _warn_in_log
        system = SystemSampler(folder.logs, attempt, step, os.environ["LOCAL_RANK"] == "0", warn)
        saver = Saver(
            engine,
            folder.checkpoints,
            ranks,
            still_ours=lease.check if lease else lambda: None,
            prune=lambda step: prune(
                folder.checkpoints, config.train.keep_checkpoints, config.train.keep_every, folder.id, upto=step
            ),
            warn=recorder.warning,
            published=lambda step, path, seconds: life.published(step, path, seconds),
        )
        life = Life(folder.path, ranks, stop, lease, saver, recorder)
        health = Health(config, ranks, engine, recorder, folder.logs, past)
        probe = Probe(held_out(dataset, config), batches, compiled=config.engine.compile)
        session = Session(
            config,
            ranks,
            folder,
            dataset,
            batches,
            probe,
            engine,
            recorder,
            goodput,
            system,
            saver,
            life,
            health,
            failure_file,
        )
        stack.enter_context(told(lambda error: recorder.__exit__(type(error), error, None)))
        stack.enter_context(told(lambda error: failure_file.__exit__(type(error), error, None)))
        with explained(), system, saver, health:
            step, request = run_steps(session, step, data)
        life.ended(step, request)
        recorder.finish(step, request, time.time() - started, stop)
        ranks.part()
        return request


def run_steps(session: Session, step: int, data: DataState) -> tuple[int, int]:
    """The training loop. Returns the last finished step and the request that ended it early, else 0."""
    config, ranks, engine, recorder = session.config, session.ranks, session.engine, session.recorder
    health, life, failure_file = session.health, session.life, session.failure_file
    micro_batch, _ = config.micro_batches(ranks.world_size)
    plan = Plan(session.dataset, data.phases[-1], data.seed)
    reader = Reader(
        plan,
        global_batch=config.global_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start=data.samples_seen,
        documents=session.batches.objective.needs_documents,
    )
    loader = Loader(reader)
    meter = Meter(config, engine, ranks, session.goodput, restarts=recorder.attempt - 1)
    profile_steps = config.profile.steps if ranks.is_first else None
    profile = Profile(profile_steps, session.folder.path / "profile", ranks.device, recorder.profile)
    life.begin(step)
    with loader, profile, failure_file:
        if step < config.train.steps:
            loader.wait(lambda: life.requested)
        request = life.agreed_request()
        if owed := owes_validation(session, step):
            owed = validation(session, step) is None
            request = life.request
            health.beat()
            meter.resume_clock()
        while step < config.train.steps and not request:
            step += 1
            failure_file.at(step, data.samples_seen, config.global_batch)
            profile.before(step)
            engine.stopwatch.start()
            samples = next(loader)
            batches = session.batches.of_step(samples, micro_batch, step, config.run.seed)
            engine.stopwatch.lap("data")
            lr = learning_rate(config, step * config.batch.tokens)
            metrics, grad_norm, applied = engine.train_step(batches, lr)
            data = data.after(config.global_batch, config.batch.tokens)
            profile.after(step)
            health.after_step(step, batches, lr, applied)
            session.system.step = step
            epoch, of_sources = plan.epochs(data.samples_seen)
            known: dict[str, Any] = {
                TOKENS_SEEN: data.tokens_seen,
                SAMPLES_SEEN: data.samples_seen,
                EPOCH: epoch,
                **{epoch_of(name): value for name, value in of_sources.items()},
                LEARNING_RATE: lr,
                GRAD_NORM: grad_norm,
            }
            if not applied:
                known[SKIPPED] = 1
            meter.add(step, metrics, known)
            last = step == config.train.steps
            if not last:  # before the ranks agree: one that waits for data must not keep the others from stopping
                engine.stopwatch.start()
                loader.wait(lambda: life.requested)
                engine.stopwatch.lap("data")

            request = life.agreed_request()
            validate = last or step % config.train.eval_every == 0
            save = last or bool(request) or step == 1 or step % config.train.checkpoint_every == 0
            lines = []
            if validate or save or step % config.train.log_every == 0 or health.too_many_skipped:
                lines = meter.flush()
                health.record(lines)
            life.after_step(step, lines)
            if health.spike and (older := roll_back(session, step, data)) is not None:
                step = older
                meter.resume_clock()
                continue
            loss = validation(session, step) if validate else None
            owed = validate and loss is None
            request = life.request  # it may have come meanwhile
            if save or request:
                save_checkpoint(session, step, data, loss)
            if validate or save:
                health.beat()
                meter.resume_clock()
        session.saver.join()
    return step, request if step < config.train.steps or owed else 0


def owes_validation(session: Session, step: int) -> bool:
    """Whether the one that was due at `step`, which this run has saved, was broken off; a collective."""
    config, folder = session.config.train, session.folder

    def missing() -> bool:
        due = step > 0 and (step == config.steps or step % config.eval_every == 0)
        if not due or step not in folder.saved_steps():
            return False
        return all(point.step != step for point in journal.series(journal.read(folder.journal)).get(VALIDATION, []))

    return session.ranks.together(missing, only_first=True)


def validation(session: Session, step: int) -> float | None:
    """Validate over all held-out text and write a sample; a collective.

    Returns:
        the loss in nats a token; None: it was broken off, since the run is to stop, and is owed.
    """
    config, dataset = session.config, session.dataset
    windows = held_out(dataset, config)
    batch = max(1, 8192 // config.model.context)
    size, edge = held_out_bytes(dataset), session.life.check_in_validation
    try:
        metrics = evaluate(session.engine.module, windows, size, batch, session.ranks, session.batches, edge)
    except Stopped:
        return None
    session.recorder.validation(step, metrics | session.probe.flips(session.engine.module))
    if config.train.sample_tokens and config.objective.continues_text:
        try:
            session.recorder.sample(step, sample_text(session.engine.module, dataset, config, session.ranks.device))
        except Exception as error:  # a text is no reason to lose what was learned
            traceback.print_exc()
            session.recorder.warning(f"no sample was written after step {step}: {type(error).__name__}: {error}")
    return metrics[VALIDATION]


def save_checkpoint(session: Session, step: int, data: DataState, validation_loss: float | None) -> None:
    """Begin to save with all ranks; a collective. The checkpoint is there when the recorder is told so."""
    state: dict[str, Any] = {}
    if session.ranks.is_first:
        state = {
            "data": data.model_dump(),
            "run": session.folder.id,
            "tokenizer": session.dataset.manifest.tokenizer.sha256,
            "attempt": session.recorder.attempt,
            "types": session.engine.types,
            "config": session.config.model_dump(mode="json"),
            "commit": session.recorder.commit,
            "mlflow_run": _mlflow_run(session.folder),
        }
    session.life.saving(step)
    session.saver.start(step, state, validation_loss)


def _mlflow_run(folder: RunFolder) -> str | None:
    """Id of the run in MLflow, if it is there already."""
    state = State.load(folder.path) if state_path(folder.path).exists() else None
    return state.run_id if state else None


def roll_back(session: Session, step: int, data: DataState) -> int | None:
    """Go back to an older checkpoint and on with the data from `data`; a collective.

    Returns:
        the checkpoint's step; None when there is none and training just goes on.

    Raises:
        RunError: the run was rolled back too often already.
    """
    ranks, health, back = session.ranks, session.health, session.config.health.rollback_checkpoints
    health.check_may_roll_back()
    session.saver.join()
    older = load_older(session.folder, back, session.engine, ranks, session.recorder.warning)
    health.rolled_back(step, older, data)
    if older is not None:
        goodput, path = session.goodput, session.folder.journal
        left = ranks.together(lambda: earlier_goodput(journal.read(path), older, goodput.started), only_first=True)
        goodput.productive = left.productive
    return older


def _warn_in_log(text: str) -> None:
    """The recorder is silent on this rank."""
    print(f"warning: {text}", file=sys.stderr)
