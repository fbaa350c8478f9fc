"""The loss between the running mean of the embedded tokens and the encoder's output."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures.parallel_encoder_decoder.encoder_loss import EncoderLoss
from model.batch import Batch
from model.masks.telemetry import told
from tests.model.helpers import VOCABULARY, build, small, without_dropout

KINDS = ("mse", "cosine", "log_cosine")


def module(**options: Any) -> EncoderLoss:
    return EncoderLoss(small(encoder_loss=options))


def by_hand(embedded: Tensor, output: Tensor, kind: str, norm: str, output_norm: bool) -> float:
    def normed(x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()

    distances = []
    for b in range(embedded.shape[0]):
        rows = [normed(row) if norm == "embedding" else row for row in embedded[b]]
        for t in range(embedded.shape[1]):
            a = torch.stack(rows[: t + 1]).mean(dim=0)
            a = normed(a) if norm == "average" else a
            z = normed(output[b, t]) if output_norm else output[b, t]
            likeness = (a @ z / a.norm() / z.norm() + 1) / 2
            distances.append(
                {"mse": (a - z).square().mean(), "cosine": 1 - likeness, "log_cosine": -likeness.log()}[kind]
            )
    return torch.stack(distances).mean().item()


@pytest.mark.parametrize("norm", ["none", "embedding", "average"])
@pytest.mark.parametrize("output_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_formula(kind: str, norm: str, output_norm: bool) -> None:
    embedded, output = torch.randn(2, 2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = module(kind=kind, embedding_norm=norm, output_norm=output_norm)(embedded, output)["encoder_loss"]
    assert found.item() == pytest.approx(by_hand(embedded, output, kind, norm, output_norm), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach", ["none", "embedding", "encoder_output"])
def test_the_detached_side_gets_no_gradient(detach: str, kind: str) -> None:
    embedded, output = (torch.randn(2, 6, 16, requires_grad=True) for _ in range(2))
    loss = module(kind=kind, detach=detach, affine=True)
    loss(embedded, output)["encoder_loss"].backward()
    assert (embedded.grad is None) == (detach == "embedding")
    assert (output.grad is None) == (detach == "encoder_output")
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


def test_parameters_only_where_they_are_trained() -> None:
    assert [*module(kind="mse").parameters()] == []
    assert sum(p.numel() for p in module(kind="mse", affine=True).parameters()) == 4 * 16
    assert sum(p.numel() for p in module(kind="mse", affine=True, embedding_norm="none").parameters()) == 2 * 16
    assert build(small()).get_submodule("backbone").encoder_loss is None


def test_normed_mse_is_twice_the_cosine_distance() -> None:
    embedded, output = torch.randn(2, 3, 6, 16)
    mse, cosine = (module(kind=kind)(embedded, output)["encoder_loss"] for kind in ("mse", "cosine"))
    torch.testing.assert_close(mse, 4 * cosine, rtol=1e-4, atol=1e-5)  # 1 - cos is twice our cosine loss


def test_log_cosine_of_opposites_is_finite() -> None:
    x = torch.randn(1, 1, 16).requires_grad_()
    value = module(kind="log_cosine", detach="none")(x, -x)["encoder_loss"]
    value.backward()
    assert value.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_mean_runs_in_fp32_under_bf16() -> None:
    """Late means are averages of many: a running sum in bf16 would be off by percents."""
    embedded = (torch.randn(1, 512, 16, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()
    output = torch.zeros(1, 512, 16).bfloat16()
    found = module(kind="mse", embedding_norm="none", output_norm=False)(embedded, output)["encoder_loss"]
    count = torch.arange(1, 513, dtype=torch.float64)[:, None]
    expected = (embedded.double().cumsum(1) / count).square().mean()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def trained(steps: int, lr: float, **options: Any) -> dict[str, float]:
    """Metrics after some steps on text with structure: each token is a function of the last, with noise."""
    config = small(width=32, heads=4, context=16, learned_dropout=without_dropout(), encoder_loss=options)
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        ids = torch.randint(0, VOCABULARY, (8, 17), generator=generator)
        for t in range(1, 17):
            follows = torch.rand(8, generator=generator) < 0.8
            ids[:, t] = torch.where(follows, (3 * ids[:, t - 1] + 1) % VOCABULARY, ids[:, t])
        output = model(Batch(ids[:, :-1], ids[:, 1:], torch.arange(8), torch.tensor(step), seed=0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return {name: value.item() for name, value in told(output.metrics).items()}


def stds(metrics: dict[str, float]) -> tuple[float, float]:
    return metrics["encoder_loss_embedding_std"], metrics["encoder_loss_output_std"]


PUBLISHED: dict[str, Any] = {"kind": "mse", "embedding_norm": "embedding", "affine": True}


def test_it_does_not_shrink_under_a_weight_that_collapses_the_published_one() -> None:
    assert max(stds(trained(120, lr=1e-2, weight=20.0, **PUBLISHED))) < 0.3
    assert min(stds(trained(120, lr=1e-2, weight=20.0, kind="mse"))) > 0.3


@pytest.mark.drill
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_steps_do_not_shrink_it(kind: str) -> None:
    assert min(stds(trained(1000, lr=3e-3, kind=kind))) > 0.3


@pytest.mark.drill
def test_a_thousand_steps_collapse_the_published_one() -> None:
    assert max(stds(trained(1000, lr=3e-3, **PUBLISHED))) < 0.3
