"""The learning rate as a pure function of the step."""

import math

from pretrain.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step`, from 1.

    Linear warm-up to `optimizer.lr` at step `warmup_steps`; then constant, or half a cosine down to
    `schedule.final_lr` at the last step (Loshchilov & Hutter 2017, without restarts).
    """
    peak, schedule = config.optimizer.lr, config.schedule
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    progress = (step - schedule.warmup_steps) / max(1, config.train.steps - schedule.warmup_steps)
    return schedule.final_lr + 0.5 * (peak - schedule.final_lr) * (1 + math.cos(math.pi * progress))
