"""The chunked loss: the numbers of the plain form, without ever holding all logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.batch import IGNORE
from model.layers import chunked_loss
from model.layers.chunked_loss import TokenLoss, token_loss
from model.layers.chunks import CHUNK_BYTES, chunk_tokens
from model.layers.noise import sample_keys
from tests.model.helpers import batch_of, build, configured, small

B, T, C, V = 2, 19, 6, 23
WEIGHTS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.3, 0.1)]


@pytest.fixture(params=[1, 7, 38, 1000])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a chunk: one, some with a rest, all, more than there are."""
    monkeypatch.setattr(chunked_loss, "chunk_tokens", lambda *_: request.param)
    return int(request.param)


def plain(x: Tensor, table: Tensor, labels: Tensor, smoothing: float, z_weight: float) -> TokenLoss:
    """All logits at once, by torch's own functions."""
    logits = (x @ table.T).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = labels.flatten()
    if not (flat != IGNORE).any():
        return TokenLoss(*[logits.sum() * 0.0] * 3)
    nll = functional.cross_entropy(logits, flat, ignore_index=IGNORE)
    smooth = functional.cross_entropy(logits, flat, ignore_index=IGNORE, label_smoothing=smoothing)
    z = logits.logsumexp(-1)[flat != IGNORE].square().mean()
    return TokenLoss(smooth + z_weight * z, nll, z)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    table = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 3:9] = IGNORE
    labels[1, -1] = IGNORE
    return x, table, labels


def with_gradients(loss: Callable[..., TokenLoss], dtype: torch.dtype, *weights: float) -> dict[str, Tensor]:
    """The three numbers, and the gradients of 0.7 times the loss."""
    x, table, labels = inputs(dtype)
    found = loss(x, table, labels, *weights)
    grad_x, grad_table = torch.autograd.grad(0.7 * found.loss, (x, table))
    numbers = {name: getattr(found, name) for name in ("loss", "cross_entropy", "z_loss")}
    return {**numbers, "grad_x": grad_x, "grad_table": grad_table}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest, relative to the largest element."""
    assert [t.dtype for t in found.values()] == [t.dtype for t in expected.values()]
    return max(
        float((found[name].detach() - expected[name].detach()).abs().max() / expected[name].detach().abs().max())
        for name in expected
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_it_is_the_plain_form(weights: tuple[float, float], dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    found, expected = (with_gradients(loss, dtype, *weights) for loss in (token_loss, plain))
    assert difference(found, expected) < tolerance


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((10_000, 50_257, 200), 323), ((10_000, 50_257, 768), 715), ((8192, 65, 128), 8192), ((3, 10**9, 2), 2)],
)
def test_chunks_are_equal_and_bounded(shape: tuple[int, int, int], tokens: int) -> None:
    """By 64 MiB of logits, or by the table's own size."""
    assert chunk_tokens(*shape) == tokens


def test_without_gradients_it_tells_of_each_label(chunk: int) -> None:
    x, table, labels = inputs(torch.float32)
    assert token_loss(x, table, labels, 0.1, 0.1).by_token is None
    with torch.no_grad():
        found = token_loss(x, table, labels, 0.1, 0.1)
    logits = (x @ table.T).detach().flatten(0, 1)
    expected = functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(found.by_token, expected.view_as(labels))


def test_the_comparison_notices_another_smoothing() -> None:
    found, expected = (
        with_gradients(token_loss, torch.float32, 0.1, 0.0),
        with_gradients(plain, torch.float32, 0.11, 0.0),
    )
    assert difference(found, expected) > 1e-4


def test_large_logits_are_no_danger(chunk: int) -> None:
    x, table, labels = inputs(torch.float32)
    found, expected = (loss(x * 1e3, table * 1e3, labels, 0.1, 0.0).loss for loss in (token_loss, plain))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_loss_of_nothing_is_zero_with_zero_gradient(chunk: int) -> None:
    x, table, labels = inputs(torch.float32)
    found = token_loss(x, table, torch.full_like(labels, IGNORE), 0.1, 0.1)
    found.loss.backward()
    assert all(value == 0 for value in found[:3])
    assert x.grad is not None
    assert table.grad is not None
    assert not x.grad.any()
    assert not table.grad.any()


def test_recomputed_it_is_the_same(chunk: int) -> None:
    def recomputing(*args: Any) -> TokenLoss:
        return TokenLoss(*checkpoint(token_loss, *args, use_reentrant=False))

    found, expected = (with_gradients(loss, torch.float64, 0.1, 0.1) for loss in (recomputing, token_loss))
    assert difference(found, expected) == 0.0


def test_it_compiles_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "chunk_tokens", lambda *_: 15)
    compiled = torch.compile(token_loss, backend="aot_eager", fullgraph=True)
    found, expected = (with_gradients(loss, torch.float64, 0.1, 0.1) for loss in (compiled, token_loss))
    assert difference(found, expected) < 1e-12


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def largest(run: Callable[[], TokenLoss]) -> int:
    with Largest() as mode:
        run().loss.backward()
    return mode.elements


def test_all_logits_are_never_held() -> None:
    """At the published vocabulary and the chunk that is really used: forward, backward, z-loss and smoothing."""
    vocabulary, width, length = 50_257, 4, 700
    x, table = torch.randn(1, length, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, length))
    held = 4 * largest(lambda: token_loss(x, table, labels, 0.1, 1e-4))
    assert held <= CHUNK_BYTES < 4 * length * vocabulary / 2
    assert largest(lambda: plain(x, table, labels, 0.1, 1e-4)) == length * vocabulary


def test_a_model_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(vocab_size=3001, learned_dropout={"enabled": False})
    monkeypatch.setattr(chunked_loss, "chunk_tokens", lambda *_: 5)
    model, batch = build(config), batch_of(config)
    table, all_logits = 3001 * config.width, batch.labels.numel() * 3001
    assert largest(lambda: model(batch)) == table < all_logits


@pytest.mark.parametrize("architecture", ["parallel_encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("tokens", [5, 1000])
def test_a_model_has_the_gradients_of_the_plain_form(
    architecture: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(architecture, label_smoothing=0.1, z_loss=0.01, learned_dropout={"enabled": False})
    monkeypatch.setattr(chunked_loss, "chunk_tokens", lambda *_: tokens)
    model, batch = build(config).double(), batch_of(config)
    output = model(batch)
    logits = model.predict(batch.input_ids, sample_keys(batch.seed, batch.step, batch.samples)).flatten(0, 1)
    smooth = functional.cross_entropy(logits, batch.labels.flatten(), label_smoothing=0.1)
    z = logits.logsumexp(-1).square().mean()
    parameters = list(model.parameters())
    found = torch.autograd.grad(output.loss, parameters)
    expected = torch.autograd.grad(smooth + 0.01 * z, parameters)
    torch.testing.assert_close(output.loss, smooth + 0.01 * z, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.metrics["z_loss"], z.detach(), rtol=1e-12, atol=0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_evaluation_is_the_bare_cross_entropy() -> None:
    config = small(label_smoothing=0.1, z_loss=0.01)
    model, batch = build(config).eval(), batch_of(config)
    output = model(batch)
    expected = functional.cross_entropy(model.logits(batch.input_ids).flatten(0, 1), batch.labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.loss == output.metrics["cross_entropy"]


@pytest.mark.parametrize("wrong", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0}])
def test_weights_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        configured(**wrong)
