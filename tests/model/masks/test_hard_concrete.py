"""Hard-concrete gates: how often they are open, and that their penalty closes them."""

import math

import pytest
import torch

from model.batch import Batch
from model.config.mask_config import L0Config
from model.layers.noise import sample_keys
from model.masks.hard_concrete import HardConcreteGates
from model.masks.telemetry import told
from tests.model.helpers import batch_of, build, small, without_dropout

KEYS = sample_keys(0, torch.tensor(1), torch.arange(4000))


def gates(**l0: float) -> HardConcreteGates:
    config = small(learned_dropout=without_dropout(), l0={"enabled": True, **l0})
    return HardConcreteGates(config, "dec_ff", 0)


@pytest.mark.parametrize("open_init", [0.1, 0.5, 0.9])
def test_a_gate_is_open_as_often_as_its_penalty_says(open_init: float) -> None:
    module = gates(open_init=open_init)
    z, statistics = module(torch.ones(4000, 1, 16), KEYS)
    found = statistics["dec_ff/00"]
    assert found["l0"].item() == pytest.approx(open_init, abs=1e-6)
    assert found["density"].item() == pytest.approx(open_init, abs=5 * (0.25 / 64_000) ** 0.5)
    assert (z == 0).any()
    assert (z == 1).any()
    assert ((z > 0) & (z < 1)).any()


def test_a_gate_stands_for_a_channel_of_a_whole_sequence() -> None:
    z = gates(open_init=0.5)(torch.ones(7, 12, 16), KEYS[:7])[0]
    assert torch.equal(z, z[:, :1].expand(7, 12, 16))
    assert not torch.equal(z[0], z[1])


def test_evaluation_is_the_formula() -> None:
    module = gates()
    values = torch.linspace(-4, 4, 16)
    with torch.no_grad():
        module.log_alpha.copy_(values)
    expected = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in values.tolist()]
    z, statistics = module(torch.ones(1, 3, 16), None)
    assert z[0, 2].tolist() == pytest.approx(expected, abs=1e-6)
    assert told({"kept/dec_ff/00": statistics["dec_ff/00"]["kept"]})["always_off"].item() == sum(
        e == 0 for e in expected
    )


def test_the_penalty_and_its_gradient_are_finite_far_out() -> None:
    module = gates()
    with torch.no_grad():
        module.log_alpha.copy_(torch.linspace(-200, 200, 16))
    z, statistics = module(torch.ones(4000, 1, 16), KEYS)
    (z.sum() + statistics["dec_ff/00"]["l0"]).backward()
    assert z.isfinite().all()
    assert module.log_alpha.grad is not None
    assert module.log_alpha.grad.isfinite().all()


def test_a_large_penalty_closes_all_gates() -> None:
    config = small(learned_dropout=without_dropout(), l0=L0Config(enabled=True, weight=10.0, open_init=0.5))
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batch = batch_of(config)
    for step in range(1, 61):
        output = model(Batch(batch.input_ids, batch.labels, batch.samples, torch.tensor(step), batch.seed))
        torch.testing.assert_close(output.loss, output.metrics["cross_entropy"] + 10 * output.metrics["l0"])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.metrics["l0"] < 0.1
    evaluated = model.eval()(batch)
    assert evaluated.metrics["density"] == 0
    assert told(evaluated.metrics)["always_off/enc_ff/00"] == 16
    assert evaluated.loss == evaluated.metrics["cross_entropy"]
