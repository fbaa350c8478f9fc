"""Where the penalties drive a mask value, told before the run. Free of torch.

L1 pulls m to 0; entropy pushes m away from its peak to either side. Together they make two basins, and where the
mask starts decides between them (docs/model.md B5).
"""

import math

from model.config.mask_config import LearnedDropoutConfig

_GRID = 1000
_ANGLE_PER_LEARNING_RATE = {"attention": 4.0, "embed": 4.0, "low_rank": 3.0, "elementwise": 0.25}
"""How far the mean angle moves a step under AdamW, by source: measured over the first 150 steps of `tiny`'s shape."""


def _penalty(m: float, config: LearnedDropoutConfig) -> float:
    """Weighted L1 plus entropy of one mask value, at full weights."""

    def shannon(x: float) -> float:
        return -x * math.log2(x) if x > 0.0 else 0.0

    l1 = {"linear": m, "squared": m * m / 2}[config.l1.kind]
    entropy = {"shannon": shannon(m), "complement": shannon(1 - m), "binary": shannon(m) + shannon(1 - m)}
    return config.l1.weight * l1 + config.entropy.weight * entropy[config.entropy.kind]


def peak(config: LearnedDropoutConfig) -> float | None:
    """The mask value below which both penalties together drive to 0 and above which they drive up.

    For linear L1 of weight a and Shannon entropy of weight h it is exp(a ln2 / h - 1), and there is none from
    a = h / ln2 on: the sum then only rises with m. Found on a grid of 1/1000.
    """
    values = [_penalty(i / _GRID, config) for i in range(_GRID + 1)]
    return next((i / _GRID for i in range(_GRID) if values[i + 1] < values[i]), None)


def warnings_for(config: LearnedDropoutConfig, learning_rate: float = 1e-3) -> list[str]:
    """Penalties that will not do what they are there for, one sentence each; empty when all is well.

    Args:
        learning_rate: the run's peak; says how far L1 can move the masks before the entropy comes.
    """
    entropy, l1 = config.entropy, config.l1
    if not config.enabled or not entropy.weight:
        return []
    top, start = peak(config), 0.5 * math.cos(config.shift_init) + 0.5
    if top is None:
        return [
            f"learned_dropout: l1.weight {l1.weight} outweighs entropy.weight {entropy.weight} everywhere: an open "
            f"mask is no minimum and every mask drifts to 0 from its start at m = {start:.2f}; lower l1.weight"
        ]
    facts = f"masks start at m = {start:.2f}, and the penalties push every mask above m_peak = {top:.2f} open"
    if start <= top:
        return []
    if entropy.start_step + entropy.ramp_steps == 0:
        return [f"learned_dropout: {facts} from step 0: learned dropout stays inert; start the entropy later"]
    alone = max(0, entropy.start_step + entropy.ramp_steps - l1.start_step) if l1.weight else 0
    reach = alone * learning_rate * _ANGLE_PER_LEARNING_RATE[config.source]
    needed = math.acos(2 * top - 1) - config.shift_init
    if reach < needed:
        return [
            f"learned_dropout: {facts}; L1 has {alone} steps before the entropy is at full weight and moves the angle "
            f"by about {reach:.2f} rad in them at learning rate {learning_rate}, {needed:.2f} are needed; start the "
            "entropy later"
        ]
    return []
