"""Tasks that need steps: pointers to be followed so many times, and the parity of all bits so far (docs/results.md).

`python -m tests.test_recurrence_tasks` prints the tables.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures.recurrence import Recurrence
from model.batch import IGNORE, Batch
from tests.model.helpers import build, configured, without_dropout

NODES, HOPS = 6, 3
STEPS = 2500
LATE = {"weight": 0.01, "start_step": STEPS // 2, "ramp_steps": STEPS // 5}
LATER = {"weight": 0.01, "start_step": 7 * STEPS // 5, "ramp_steps": 2 * STEPS // 5}
EARLY = {"weight": 0.01, "start_step": 0, "ramp_steps": 0}
ARMS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "four layers": {"layers": 4},
    "one layer, four times": {"recurrence": {"steps": 4}},
    "one layer, up to six times, penalty late": {"recurrence": {"steps": 6, "halt": True, "ponder": LATE}},
    "the same, penalty and bias as published": {
        "recurrence": {"steps": 6, "halt": True, "halt_bias": 1, "ponder": EARLY}
    },
    "one layer, four times, twice the updates": {"recurrence": {"steps": 4}},
    "one layer, up to six times, twice the updates": {"recurrence": {"steps": 6, "halt": True, "ponder": LATER}},
}


def pointers(count: int, generator: torch.Generator, hops: int | None = None) -> tuple[Tensor, Tensor]:
    """f(0) … f(5), a, h, and at h the label f(f(…(a))), h times."""
    targets = torch.rand(count, NODES, generator=generator).argsort(1)
    start = torch.randint(NODES, (count,), generator=generator)
    times = torch.randint(1, HOPS + 1, (count,), generator=generator)
    times = times if hops is None else torch.full_like(times, hops)
    found = start
    for hop in range(HOPS):
        found = torch.where(hop < times, targets.gather(1, found[:, None])[:, 0], found)
    ids = torch.cat([targets, start[:, None], NODES + times[:, None] - 1], 1)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -1] = found
    return ids, labels


def parity(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """16 bits, and at each the parity of all up to there."""
    bits = torch.randint(2, (count, 16), generator=generator)
    return bits, bits.cumsum(1) % 2


def learn(
    config: Any, task: Any, steps: int, lr: float, rows: int, std: float, seed: int, order: Any = lambda batch, _: batch
) -> Any:
    """Matrices start at `std`: at 0.02 so small a model takes ten times as long to begin."""
    torch.manual_seed(seed)
    model, generator = build(config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "halting" not in name and "step_embed" not in name:
            parameter.data.mul_(std / 0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 100) * (1 - 0.9 * step / steps)
        ids, labels = task(rows, generator)
        batch = Batch(ids, labels, torch.arange(rows), torch.tensor(step), seed)
        loss = model(order(batch, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def chase(arm: str, seed: int) -> tuple[list[float], list[float]]:
    """Of each number of hops: the share that is right, and the steps at the place where it is asked."""
    shape = {"layers": 1, "width": 64, "heads": 4, "context": NODES + 2, "vocab_size": NODES + HOPS}
    options = {"architecture": "decoder_only", "learned_dropout": without_dropout()} | shape | ARMS[arm]
    with torch.enable_grad():
        updates = STEPS * (1 + arm.endswith("twice the updates"))
        model = learn(configured(**options), pointers, updates, 2e-3, 64, 0.125, seed)
    taken: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Recurrence) and module.halting is not None:
            module.register_forward_hook(lambda _, inputs, found: taken.append(found.taken[:, -1].mean()))
    right = []
    for hops in range(1, HOPS + 1):
        ids, labels = pointers(1000, torch.Generator().manual_seed(99 + hops), hops)
        right.append(float((model(ids)[:, -1].argmax(-1) == labels[:, -1]).float().mean()))
    return right, [float(steps) for steps in taken]


@torch.no_grad()
def parities(architecture: str, layers: int, steps: int, seed: int) -> tuple[float, float]:
    """The share of bits that is right, and of last ones."""
    shape = {"layers": layers, "width": 32, "heads": 2, "context": 16, "vocab_size": 2}
    config = configured(architecture=architecture, learned_dropout=without_dropout(), **shape)
    with torch.enable_grad():
        model = learn(config, parity, steps, 3e-3, 32, 0.15, seed)
    bits, labels = parity(1000, torch.Generator().manual_seed(99))
    right = (model(bits).argmax(-1) == labels).float()
    return float(right.mean()), float(right[:, -1].mean())


@pytest.mark.drill
def test_a_layer_that_is_applied_often_follows_pointers_and_takes_more_steps_for_more_hops() -> None:
    right, steps = chase("one layer, up to six times, penalty late", 0)
    assert min(right[:2]) > 0.9
    assert max(chase("one layer", 0)[0][1:]) < 0.6
    assert steps == sorted(steps)


@pytest.mark.drill
def test_one_feedback_layer_learns_the_parity_that_layers_side_by_side_do_not() -> None:
    assert parities("feedback", 1, 400, 0)[1] > 0.98
    assert parities("decoder_only", 2, 400, 0)[1] < 0.7


def main() -> None:
    """All rows, three seeds."""
    torch.set_num_threads(1)
    for seed in (0, 1, 2):
        for architecture, layers in (("feedback", 1), ("feedback", 2), ("decoder_only", 2), ("decoder_only", 4)):
            print(architecture, layers, seed, parities(architecture, layers, 400, seed), flush=True)
        for arm in ARMS:
            print(arm, seed, chase(arm, seed), flush=True)


if __name__ == "__main__":
    main()
