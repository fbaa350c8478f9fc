"""The learning rate as a pure function of the tokens seen."""

import math

from pretrain.config.schema import Config


def learning_rate(config: Config, tokens: int) -> float:
    """Learning rate of the optimizer step that ends at `tokens` tokens of the run: step n of n · `batch.tokens`.

    Linear warm-up to `optimizer.lr` at step `warmup_steps`, then by `schedule.kind`:

    - `constant`;
    - `cosine`: half a cosine to `final_lr` at the last step (Loshchilov & Hutter 2017, without restarts);
    - `linear`: a line to `final_lr` at the last step;
    - `inverse_sqrt`: the peak · sqrt(warmup_steps / step) (Vaswani et al. 2017, section 5.3);
    - `wsd`: constant, then over the last `cooldown` steps down to `final_lr` (Hu et al. 2024, arXiv:2404.06395), by
      1 - sqrt(x) (Hägele et al. 2024, arXiv:2405.18392) or 1 - x.
    """
    peak, schedule = config.optimizer.lr, config.schedule
    step = tokens / config.batch.tokens  # exact: the quotient is a whole number
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "inverse_sqrt":
        return peak * math.sqrt(max(1, schedule.warmup_steps) / step)
    start = decay_start(config)
    if start is None or step <= start:
        return peak
    progress = (step - start) / max(1, config.train.steps - start)
    if schedule.kind == "cosine":
        return schedule.final_lr + 0.5 * (peak - schedule.final_lr) * (1 + math.cos(math.pi * progress))
    if schedule.kind == "wsd" and schedule.cooldown_shape == "1-sqrt":
        progress = math.sqrt(progress)
    return schedule.final_lr + (peak - schedule.final_lr) * (1 - progress)


def decay_start(config: Config) -> int | None:
    """The step after which the learning rate depends on `train.steps`; None if it never does."""
    schedule = config.schedule
    if schedule.kind in ("cosine", "linear"):
        return schedule.warmup_steps
    return config.train.steps - schedule.cooldown if schedule.cooldown else None
