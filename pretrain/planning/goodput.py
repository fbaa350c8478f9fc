"""Goodput before a run: what interruptions will cost it, and how often to save. Free of torch.

The time between interruptions of a job is exponential with mean M. A run works for an interval τ, stands still for δ
while its state is copied, and goes on; the checkpoint counts s seconds later. An interruption costs the work since the
newest checkpoint that counts, and D until training goes on: it is noticed, the job is requeued, starts and loads.
Restarts are interrupted at the same rate, so their mean is M (exp(D/M) - 1) each. Of a start, the number of checkpoints
that come to count is geometric; with c = τ + δ this gives

    goodput = τ exp(-s/M) / ((exp(c/M) - 1) M exp(D/M))

which for s = 0 is Daly's (A higher order estimate of the optimum checkpoint interval, 2006, eq. 13). The best τ depends
on δ and M alone: it solves (1 - τ/M) exp(c/M) = 1, of which Young's (A first order approximation, 1974) sqrt(2 δ M) is
the first term.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from data_pipeline.errors import ConfigError
from pretrain.config.schema import Config
from pretrain.planning.costs import RunCosts

GPU_HOURS = 16_384 * 54 * 24 / 466
"""Between interruptions, published: 466 in 54 days of 16,384 GPUs (Llama 3, arXiv:2407.21783, section 3.3.4)."""
COPIED, STORED = 5e9, 1e9
"""Bytes a second of one GPU's share of a checkpoint: into host memory; to the file system and back. Assumed."""


@dataclass(frozen=True)
class Times:
    """Seconds around a save and an interruption."""

    save: float
    """Training stands still for each save."""
    store: float
    """From the end of that until the checkpoint counts."""
    load: float
    start: float = 60.0
    """From the job's start until its ranks load."""
    requeue: float = 120.0
    """From the end of the job's processes until its next start: Slurm's own wait, unless the site has changed it."""
    detect: float = 60.0
    """From the fault until all processes have ended: seconds after a crash, `engine.timeout_minutes` after a hang."""

    @property
    def down(self) -> float:
        """Seconds of a restart that nothing interrupts."""
        return self.detect + self.requeue + self.start + self.load


@dataclass(frozen=True)
class Expected:
    """What becomes of the time; the shares sum up to 1."""

    interval: float
    """Seconds of training between saves."""
    share: float
    """Of the time, that trains what counts."""
    saving: float
    lost: float
    """Trained, and trained again."""
    down: float
    by_second: dict[str, float]
    """How much `share` rises for each second that one of the times is shorter; as far as there is a second of it."""


@dataclass(frozen=True)
class Outlook:
    """The goodput of a run, and what it could be."""

    hours: float
    """Between interruptions."""
    times: Times
    own: Expected
    """At the configured interval."""
    best: Expected
    best_steps: int
    """The interval of the best, as `train.checkpoint_every`."""


def outlook(config: Config, found: RunCosts, gpus: int, hours: float | None, given: Mapping[str, float]) -> Outlook:
    """What to expect of a run.

    Args:
        found: its costs on `gpus`.
        hours: between interruptions; None: as published for so many GPUs.
        given: names of `Times`, where they are known.
    """
    hours = GPU_HOURS / gpus if hours is None else hours
    mean, step = hours * 3600, found.step_seconds
    taken = times(found.checkpoint_bytes, gpus, given)
    last = config.train.steps  # where it saves, too
    steps = max(1, min(round(best_interval(mean, taken.save) / step), last))
    own, best = (expected(mean, every * step, taken) for every in (min(config.train.checkpoint_every, last), steps))
    return Outlook(hours, taken, own, best, steps)


def times(checkpoint_bytes: float, gpus: int, given: Mapping[str, float]) -> Times:
    """Those that are given; of the others what the checkpoint's size and the assumptions above make of them."""
    own = checkpoint_bytes / gpus
    return replace(Times(own / COPIED, own / STORED, own / STORED), **given)


def parse_times(texts: list[str]) -> dict[str, float]:
    """Of `NAME=SECONDS`.

    Raises:
        ConfigError: another name, or no time.
    """
    names = [field.name for field in fields(Times)]
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if name not in names or not 0 <= seconds < math.inf:
            raise ConfigError(f"--time {text}: expected NAME=SECONDS, such as load=30; the names: {', '.join(names)}")
        found[name] = seconds
    return found


def best_interval(mean: float, save: float) -> float:
    """Seconds of training between saves that lose least time: τ of the module's second equation, by bisection.

    Args:
        mean: seconds between interruptions.
        save: seconds that training stands still for each.
    """
    low, high = 0.0, mean
    for _ in range(200):
        middle = (low + high) / 2
        # In logarithms, where exp would overflow: log(1 - τ/M) + (τ + δ)/M falls with τ, from δ/M.
        rest = math.log1p(-middle / mean) + (middle + save) / mean if middle < mean else -1.0
        low, high = (middle, high) if rest > 0 else (low, middle)
    return low


def expected(mean: float, interval: float, taken: Times) -> Expected:
    """The module's first equation.

    Args:
        mean: seconds between interruptions.
        interval: seconds of training between saves.
    """
    cycle, down = interval + taken.save, mean * _expm1(taken.down / mean)
    saves = math.exp(-taken.store / mean) / _expm1(cycle / mean)
    whole = mean + down
    share = saves * interval / whole

    def gain(name: str) -> float:
        second = min(1.0, getattr(taken, name))
        return _share(mean, interval, replace(taken, **{name: getattr(taken, name) - second})) - share

    return Expected(
        interval=interval,
        share=share,
        saving=saves * taken.save / whole,
        lost=(mean - saves * cycle) / whole,
        down=down / whole if whole < math.inf else 1.0,
        by_second={name: gain(name) for name in asdict(taken)},
    )


def _share(mean: float, interval: float, taken: Times) -> float:
    cycle = interval + taken.save
    return interval * math.exp(-(taken.store + taken.down) / mean) / (mean * _expm1(cycle / mean))


def _expm1(exponent: float) -> float:
    """Infinite where it is too large for a number: then nothing is ever saved."""
    return math.expm1(exponent) if exponent < 700 else math.inf
