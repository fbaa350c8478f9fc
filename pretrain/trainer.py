"""The training run of one rank: `begin` opens its parts, and the loop reads top to bottom."""

import time
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from data_pipeline.errors import RunError
from data_pipeline.files.atomic import disk_errors
from data_pipeline.files.mapped import explained, told
from data_pipeline.loading.loader import Loader, Reader
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.sample_plan import Plan
from pretrain import begin, status_line
from pretrain.config.schedule import learning_rate
from pretrain.config.schema import Config
from pretrain.engine.distributed import Ranks
from pretrain.engine.profiling import Profile
from pretrain.evaluation.evaluate import evaluate, held_out, held_out_bytes
from pretrain.evaluation.part import choose
from pretrain.evaluation.probe import Probe
from pretrain.evaluation.sample import sample_text
from pretrain.health.rollback import load_older
from pretrain.life import Stopped
from pretrain.metric_names import (
    EPOCH,
    GRAD_NORM,
    LEARNING_RATE,
    SAMPLES_SEEN,
    SKIPPED,
    TOKENS_SEEN,
    VALIDATION,
    VALIDATION_PART,
    epoch_of,
)
from pretrain.run import journal
from pretrain.run.goodput import earlier_goodput
from pretrain.run.job_records import FailureFile
from pretrain.run.lease import still_there
from pretrain.run.signals import StopRequest
from pretrain.tracking.console import log_traceback
from pretrain.tracking.mlflow_state import State, state_path


def train(config: Config, ranks: Ranks, stop: StopRequest, started: float, failure_file: FailureFile) -> int:
    """Train to `train.steps`, from the newest checkpoint of the run folder when there is one.

    `started` is when the program began (`time.time()`), for the summary and the goodput.

    Returns:
        the request (`pretrain.run.signals`) that ended the run early, else 0.

    Raises:
        UserError: on every rank, with the same message.
    """
    with disk_errors(config.run_dir, RunError), still_there(config.run_dir), ExitStack() as stack:
        with status_line.doing("opening data, model and run folder"):
            claim = begin.claim(config, ranks, stack)
            parts = begin.open_parts(claim, stop, started, stack)
        stack.enter_context(told(lambda error: failure_file.__exit__(type(error), error, None)))
        with explained(), status_line.doing("training"), parts.system, parts.saver, parts.health:
            loop = Loop(claim, parts, failure_file)
            request = loop.run()
        parts.life.ended(loop.step, request)
        parts.recorder.finish(loop.step, request, time.time() - started, stop)
        ranks.part()
        return request


class Loop:
    """The steps, and what is due between them. Every rank calls the same methods, so collectives keep their order."""

    def __init__(self, claim: begin.Claim, parts: begin.Parts, failure_file: FailureFile) -> None:
        """Begins to read; `failure_file` hears which step is being taken."""
        config, ranks = claim.config, claim.ranks
        self.step = parts.step
        """The last finished one."""
        self._data = parts.data
        self._claim, self._parts, self._failure_file = claim, parts, failure_file
        self._windows = held_out(claim.dataset, config)
        self._part = choose(self._windows, config.eval_windows, claim.dataset)
        self._probe = Probe(self._windows, claim.batches, compiled=config.engine.compile)
        self._plan = Plan(claim.dataset, parts.data.phases[-1], parts.data.seed)
        reader = Reader(
            self._plan,
            global_batch=config.global_batch,
            rank=ranks.reader,
            world_size=ranks.readers,
            start=parts.data.samples_seen,
            documents=claim.batches.objective.needs_documents,
        )
        self._loader = Loader(reader)
        steps = config.profile.steps if ranks.is_first else None
        self._profile = Profile(steps, claim.folder.path / "profile", ranks.device, parts.recorder.profile)

    def run(self) -> int:
        """Take all steps; or fewer, when the ranks agree on a request to stop, which is returned, else 0."""
        config, parts = self._claim.config.train, self._parts
        life, health, meter, saver = parts.life, parts.health, parts.meter, parts.saver
        life.begin(self.step)
        with self._loader, self._profile, self._failure_file:
            self._wait_for_data()
            life.agreed_request(saver)
            if owed := self._owes_validation():
                if (loss := self._validate()) is not None:
                    saver.validated(self.step, loss)
                owed = loss is None
                health.beat()
                meter.resume_clock()
            while self.step < config.steps and not life.request:
                self._take_step()
                life.agreed_request(saver)
                last = self.step == config.steps
                validate = last or self.step % config.eval_every == 0
                save = last or bool(life.request) or self.step == 1 or self.step % config.checkpoint_every == 0
                lines = []
                if validate or save or self.step % config.log_every == 0 or health.too_many_skipped:
                    lines = meter.flush()
                    health.record(lines)
                life.after_step(self.step, lines)
                if health.spike and self._roll_back():
                    continue
                if save:  # before the validation, which may take long
                    self._save()
                loss = self._validate() if validate else None
                owed = validate and loss is None
                if life.request and not save:  # it has come meanwhile
                    self._save()
                if loss is not None and (save or life.request):
                    saver.validated(self.step, loss)
                if validate or save:
                    health.beat()
                    meter.resume_clock()
            saver.join()
        return life.request if self.step < config.steps or owed else 0

    def _take_step(self) -> None:
        """One optimizer step; then wait for the data of the next."""
        config, parts, engine = self._claim.config, self._parts, self._parts.engine
        self.step += 1
        self._failure_file.at(self.step, self._data.samples_seen, config.global_batch)
        self._profile.before(self.step)
        engine.stopwatch.start()
        micro_batch, _ = config.micro_batches(self._claim.ranks.world_size)
        batches = self._claim.batches.of_step(next(self._loader), micro_batch, self.step, config.run.seed)
        engine.stopwatch.lap("data")
        lr = learning_rate(config, self.step * config.batch.tokens)
        metrics, grad_norm, applied = engine.train_step(batches, lr, parts.health.guard)
        self._data = self._data.after(config.global_batch, config.batch.tokens)
        self._profile.after(self.step)
        parts.health.after_step(self.step, batches, lr, applied)
        parts.system.step = self.step
        parts.meter.add(self.step, metrics, partial(self._progress, self._data, lr, grad_norm, applied))
        engine.stopwatch.start()
        self._wait_for_data()
        engine.stopwatch.lap("data")

    def _wait_for_data(self) -> None:
        """Before the ranks agree: one that waits for its data must not keep the others from stopping."""
        if self.step < self._claim.config.train.steps:
            self._loader.wait(lambda: self._parts.life.requested)

    def _progress(self, data: DataState, lr: float, grad_norm: Tensor, applied: bool) -> dict[str, Any]:
        """What is known of a step, after which the data stand there, beside the model's metrics."""
        epoch, of_sources = self._plan.epochs(data.samples_seen)
        return {
            TOKENS_SEEN: data.tokens_seen,
            SAMPLES_SEEN: data.samples_seen,
            EPOCH: epoch,
            **{epoch_of(name): value for name, value in of_sources.items()},
            LEARNING_RATE: lr,
            GRAD_NORM: grad_norm,
            **({} if applied else {SKIPPED: 1}),
        }

    def _owes_validation(self) -> bool:
        """Whether the one that was due at `step`, which this run has saved, was broken off."""
        config, folder, step = self._claim.config.train, self._claim.folder, self.step

        def missing() -> bool:
            due = step > 0 and (step == config.steps or step % config.eval_every == 0)
            if not due or step not in folder.saved_steps():
                return False
            return all(point.step != step for point in journal.series(journal.read(folder.journal)).get(VALIDATION, []))

        return self._claim.ranks.together(missing, only_first=True)

    def _validate(self) -> float | None:
        """Validate over the held-out text, or the part that `train.eval_tokens` allows, and write a sample.

        Returns:
            the loss in nats a token, of that part also where all is validated, so that checkpoints compare; None: it
            was broken off, since the run is to stop, and is owed.
        """
        claim, config, recorder, life = self._claim, self._claim.config, self._parts.recorder, self._parts.life
        model, whole = self._parts.engine.module, config.train.eval_whole_at_end and self.step == config.train.steps
        batch = max(1, 8192 // config.model.context)
        size = held_out_bytes(claim.dataset)

        def edge(done: int, total: int) -> None:
            life.check_in_validation(self._parts.saver, done / total)
            recorder.validating(self.step, done, total)

        try:
            given = (self._windows, size, batch, claim.ranks, claim.batches, edge)
            with status_line.doing("validating"):
                metrics = evaluate(model, *given, part=self._part, whole=whole)
        except Stopped:
            return None
        finally:
            life.after_validation()
        recorder.validation(self.step, metrics | self._probe.flips(model))
        if config.train.sample_tokens and config.objective.continues_text:
            try:
                recorder.sample(self.step, sample_text(model, claim.dataset, config, claim.ranks.device))
            except Exception as error:  # a text is no reason to lose what was learned
                log_traceback()
                recorder.warning(f"no sample was written after step {self.step}: {type(error).__name__}: {error}")
        return metrics.get(VALIDATION_PART, metrics[VALIDATION])

    def _save(self) -> None:
        """Begin to save. The checkpoint is there when `life` is told so."""
        claim, parts, state = self._claim, self._parts, dict[str, Any]()
        if claim.ranks.is_first:
            path, template = claim.folder.path, claim.dataset.manifest.chat_template
            tracked = State.load(path) if state_path(path).exists() else None
            state = {
                "data": self._data.model_dump(),
                "run": claim.folder.id,
                "tokenizer": claim.dataset.manifest.tokenizer.sha256,
                **({"chat_template": template} if template is not None else {}),
                "attempt": claim.attempt,
                "types": parts.engine.types,
                "config": claim.config.model_dump(mode="json"),
                "commit": parts.recorder.commit,
                "mlflow_run": tracked and tracked.run_id,
            }
        parts.saver.start(self.step, state)

    def _roll_back(self) -> bool:
        """Go back to an older checkpoint, and on with the data from where they stand.

        Returns:
            whether there is one; else training just goes on.

        Raises:
            RunError: the run was rolled back too often already.
        """
        claim, parts, path = self._claim, self._parts, self._claim.folder.journal
        parts.health.check_may_roll_back()
        parts.saver.join()
        back = claim.config.health.rollback_checkpoints
        older = load_older(claim.folder, back, parts.engine, claim.ranks, parts.recorder.warning)
        parts.health.rolled_back(self.step, older, self._data)
        if older is None:
            return False
        left = claim.ranks.together(lambda: earlier_goodput(journal.read(path), older, time.time()), only_first=True)
        parts.meter.rewind(left)
        self.step = older
        return True
