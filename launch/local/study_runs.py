"""The runs of a study on this machine: several at a time, each a `duet train` of its own. Free of torch."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from data_pipeline.errors import ConfigError, RunError, UserError
from data_pipeline.files.atomic import disk_errors, write_json
from data_pipeline.storage.manifest import Manifest
from model.config.mask_config import EVAL_ROUNDINGS
from model.costs.flops import training_flops_per_token
from model.costs.totals import num_parameters
from pretrain.config.dataset_identity import Built, complete, identity
from pretrain.config.schema import Config, load
from pretrain.run.run_folder import RunFolder
from pretrain.run.run_listing import run_state, tail
from pretrain.study.results import ROUNDINGS, has_diverged
from pretrain.study.spec import Counted, Study, StudyRun

LOOK_SECONDS = 1.0


def is_done(run: StudyRun, *, diverged: bool = False) -> bool:
    """Whether it was trained to its end, and evaluated; with `diverged` also whether it has diverged.

    Raises:
        RunError: its folder holds a run of other settings, or of another dataset.
        DataError: there is no dataset.
    """
    folder = RunFolder(run.path)
    if not folder.run_file.is_file() or not folder.has_trained():
        return False
    config, dataset = _complete(run.config())
    try:
        folder.check(config, identity(config, dataset))
    except RunError as error:
        way_on = "in a study: the old values, another `name` in its file, or without this folder it is trained anew"
        raise RunError(f"{error}\n{way_on}") from error
    if diverged and has_diverged(tail(folder.journal)):
        return True
    evaluated = not config.model.dropout_sites or (run.path / ROUNDINGS).is_file()
    return run_state(run.path).state == "finished" and evaluated


def check_data(runs: list[StudyRun]) -> None:
    """Raises DataError: where a run is to read its dataset, there is none."""
    for path in dict.fromkeys(run.config().data.path for run in runs):
        Manifest.load(path)


def check_equal(study: Study, section: str) -> Iterator[str]:
    """A line on each thing that was to be equal in a section.

    Raises:
        ConfigError: it is not.
        DataError: there is no dataset.
    """
    for equal in study.sections[section].equal:
        places = {arm: arm if "/" in arm else f"{section}/{arm}" for arm in equal.arms}
        counts = {arm: count(_complete(study.runs([places[arm]])[0].config())[0], equal.what) for arm in places}
        low, high = min(counts.values()), max(counts.values())
        said = f"{equal.what}: " + ", ".join(f"{arm} {number:,.4g}" for arm, number in counts.items())
        if high > low * (1 + equal.within):
            raise ConfigError(f"sections.{section}.equal: {said}; they are to be within {equal.within:.0%}")
        yield f"{section}: {said}, within {high / low - 1:.2%}"


def count(config: Config, what: Counted) -> float:
    """Parameters of the model, or FLOPs of the whole training."""
    if what == "parameters":
        return num_parameters(config.model)
    return training_flops_per_token(config.model, config.objective.of_pairs) * config.batch.tokens * config.train.steps


def _complete(config: Config) -> tuple[Config, Built]:
    dataset = Built(Manifest.load(config.data.path))
    return complete(config, dataset), dataset


@dataclass
class Running:
    """Runs under way, at most `jobs` at a time."""

    runs: list[StudyRun]
    """Still to be started."""
    jobs: int
    ranks: int
    say: Callable[[str], None]
    diverged: bool = False
    """One that diverges is done, and has not failed."""
    failed: list[StudyRun] = field(default_factory=list)
    _active: dict[subprocess.Popen[bytes], tuple[StudyRun, float]] = field(default_factory=dict)
    _interrupts: int = 0

    def work(self) -> None:
        """Until all are done, or after Ctrl-C those under way have saved."""
        steps = {run.place: run.config().train.steps for run in self.runs}
        total, done, since = sum(steps.values()), 0, time.monotonic()
        with self._signals():
            while self._active or (self.runs and not self._interrupts):
                while self.runs and len(self._active) < self.jobs and not self._interrupts:
                    self._start(self.runs.pop(0))
                for process in [process for process in self._active if process.poll() is not None]:
                    run, started = self._active.pop(process)
                    done += steps[run.place]
                    left = (time.monotonic() - since) * (total / done - 1)
                    self._ended(run, process.returncode, time.monotonic() - started, left)
                time.sleep(LOOK_SECONDS)

    def _start(self, run: StudyRun) -> None:
        logs = run.path / "logs"
        threads = max(1, len(os.sched_getaffinity(0)) // (self.jobs * self.ranks))
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        command = [sys.executable, "-P", "-m", "launch.local.study_runs", str(self.ranks), *run.args]
        try:
            logs.mkdir(parents=True, exist_ok=True)
            with open(logs / "terminal.log", "ab") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        except OSError as error:  # those that train are not to be left alone
            self.failed.append(run)
            self.say(f"{run.place}: not begun: {error}")
            return
        self._active[process] = run, time.monotonic()
        self.say(f"{run.place}: begins; its words are in {logs / 'terminal.log'}")

    def _ended(self, run: StudyRun, code: int, seconds: float, left: float) -> None:
        if code == 0 and is_done(run):
            self.say(f"{run.place}: done in {seconds:.0f} s; {len(self.runs)} to begin, {left / 60:.0f} min left")
        elif self.diverged and is_done(run, diverged=True):
            self.say(f"{run.place}: diverged after {seconds:.0f} s; its loss counts as infinite")
        elif self._interrupts:
            self.say(f"{run.place}: stopped; the same command goes on with it")
        else:
            self.failed.append(run)
            self.say(f"{run.place}: failed with code {code}; see {run.path / 'logs' / 'terminal.log'}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def forward(number: int, frame: FrameType | None) -> None:
            self._interrupts += 1
            self.say("stopping: each run saves at the end of its step (again: end without saving)")
            for process in self._active:
                if process.poll() is None:
                    process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train_and_evaluate(args: list[str], ranks: int) -> int:
    """One run; of masks, its validation under every rounding, too. Returns the exit code."""
    from launch.local.local_ranks import run_ranks

    config = load(args)
    code = run_ranks(args, ranks, config.run_dir / "logs")
    if code or run_state(config.run_dir).state != "finished" or not config.model.dropout_sites:
        return code
    from pretrain.export.use import evaluate_run

    found = {kind: evaluate_run(config.run_dir, None, kind) for kind in EVAL_ROUNDINGS}
    with disk_errors(config.run_dir / ROUNDINGS, RunError):
        write_json(config.run_dir / ROUNDINGS, found)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(train_and_evaluate(sys.argv[2:], int(sys.argv[1])))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
