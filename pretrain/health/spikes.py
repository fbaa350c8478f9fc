"""Loss spikes: values far above the recent ones, by a robust z-score."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

MAD_TO_SIGMA = 1.4826
"""The median absolute deviation of normal values times this is their standard deviation."""
LEAST_SIGMA = 0.005
"""Of the median: on a plateau the deviation can be next to nothing, and each ripple would be a spike."""


class StepLoss(NamedTuple):
    """A step's cross entropy (nats a token, mean over the ranks), and whether its update was applied."""

    step: int
    loss: float
    applied: bool


class Spike(NamedTuple):
    """A step whose loss was `z` robust standard deviations above the `median` of the steps before."""

    step: int
    loss: float
    z: float
    median: float


class Spikes:
    """Judges the losses of each window of logging against those of the last `window` applied steps before it.

    z = (loss - median) / (1.4826 · MAD), MAD the median absolute deviation: unlike mean and standard deviation, both
    stay put when a few of the values are spikes themselves (Iglewicz and Hoaglin, How to Detect and Handle Outliers,
    1993). The measure moves between windows of logging only, and follows from the journal alone, so it is the same on
    every rank and after a restart.
    """

    def __init__(self, threshold: float, window: int) -> None:
        """`threshold`: the z of a spike."""
        self.limit = math.inf
        """A loss above it is a spike; infinite until there are `window` losses."""
        self._threshold = threshold
        self._losses: deque[tuple[int, float]] = deque(maxlen=window)
        self._median, self._sigma = 0.0, 1.0

    def judge(self, steps: Iterable[StepLoss]) -> list[Spike]:
        """The spikes among these steps, which then become part of the measure."""
        steps = [step for step in steps if math.isfinite(step.loss)]
        found = [
            Spike(step.step, step.loss, (step.loss - self._median) / self._sigma, self._median)
            for step in steps
            if step.loss > self.limit
        ]
        self._losses.extend((step.step, step.loss) for step in steps if step.applied)
        if len(self._losses) == self._losses.maxlen:
            losses = [loss for _, loss in self._losses]
            self._median = median(losses)
            deviation = MAD_TO_SIGMA * median(abs(loss - self._median) for loss in losses)
            self._sigma = max(deviation, LEAST_SIGMA * abs(self._median), 1e-12)
            self.limit = self._median + self._threshold * self._sigma
        return found

    def rewind(self, step: int) -> None:
        """Forget the losses after `step`; the limit stays until there are `window` of them again."""
        kept = [(at, loss) for at, loss in self._losses if at <= step]
        self._losses.clear()
        self._losses.extend(kept)
