"""BatchNorm: statistics of what counts, in training of the micro-batch and in evaluation of what was trained on."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from model.architectures.token_model import TokenModel
from model.batch import IGNORE, Batch
from model.layers.batch_norm import MOMENTUM, BatchNorm
from pretrain.config.schema import Config
from tests.model.helpers import VOCABULARY, batch_of, build, small, variant


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def trained(name: str) -> tuple[TokenModel, Batch]:
    """In evaluation, its running statistics those of three batches."""
    config = variant(name)
    model = build(config)
    for seed in (1, 2, 3):
        model(batch_of(config, seed=seed))
    return model.eval(), batch_of(config, sequences=4, seed=4)


def test_it_is_torchs_over_rows_and_positions() -> None:
    """Output, gradients and, once the first ten count no more than others, running statistics."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = BatchNorm(6, bias=True).double(), nn.BatchNorm1d(6, momentum=None).double()
    for norm in (ours, theirs):
        assert norm.bias is not None
        nn.init.uniform_(norm.weight, generator=generator.manual_seed(1))
        nn.init.uniform_(norm.bias, generator=generator)
    for number in range(1, 15):
        if number == 10:
            theirs.momentum = MOMENTUM
        x, y = (2 + torch.randn(3, 5, 6, generator=generator.manual_seed(number)).double() for _ in range(2))
        x, y = x.requires_grad_(), y.requires_grad_()
        found, expected = ours(x, True), theirs(y.flatten(0, 1)).view(3, 5, 6)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for output in (found, expected):
            output.square().mul(torch.arange(6)).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-10)
        torch.testing.assert_close(buffers(ours), buffers(theirs), rtol=0, atol=1e-7)
    torch.testing.assert_close(ours(x, False), theirs.eval()(x.flatten(0, 1)).view(3, 5, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["bert_batchnorm", "bert_batchnorm_post", "t5_batchnorm"])
def test_padding_does_not_enter_the_statistics(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with tokens behind the end of the text, in training: as if they ended there, whatever the tokens are."""
    config = variant(name)
    batch = batch_of(config)
    segments = torch.zeros_like(batch.input_ids).index_fill(1, torch.arange(9, 12), -1)
    short = replace(batch, input_ids=batch.input_ids[:, :9])
    padded = replace(batch, segment_ids=segments, padding=segments < 0)
    if batch.decoder_input_ids is None:  # else the labels are of another sequence
        short = replace(short, labels=batch.labels[:, :9])
        padded = replace(padded, labels=batch.labels.index_fill(1, torch.arange(9, 12), IGNORE))
    others = replace(padded, input_ids=batch.input_ids.index_fill(1, torch.arange(9, 12), 3))

    def seen(shown: Batch) -> list[Tensor]:
        model = build(config).double()
        return [model(shown).metrics["cross_entropy"], *buffers(model).values()]

    for found in (seen(padded), seen(others)):
        torch.testing.assert_close(found, seen(short), rtol=0, atol=1e-12)
    of_batch = BatchNorm._of_batch
    monkeypatch.setattr(BatchNorm, "_of_batch", lambda norm, x, padding: of_batch(norm, x, None))
    assert abs(seen(padded)[0] - seen(short)[0]) > 1e-6, "the check would notice"


@pytest.mark.parametrize("name", ["bert_batchnorm", "bert_batchnorm_post", "t5_batchnorm"])
def test_evaluation_is_of_each_row_alone_and_leaves_the_statistics(name: str) -> None:
    model, batch = trained(name)
    before = buffers(model)
    assert {int(value) for key, value in before.items() if key.endswith("tracked")} == {3}
    with torch.no_grad():
        together = model.predict(batch.input_ids, None, batch)
        for row in range(4):
            one = slice(row, row + 1)
            written = batch.decoder_input_ids
            alone = replace(
                batch, input_ids=batch.input_ids[one], decoder_input_ids=None if written is None else written[one]
            )
            torch.testing.assert_close(model.predict(alone.input_ids, None, alone)[0], together[row], rtol=0, atol=1e-5)
    model(batch)
    assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())


@pytest.mark.parametrize("counted", [0, 1])
def test_a_micro_batch_of_one_token_or_none_leaves_finite_statistics(counted: int) -> None:
    norm = BatchNorm(6, bias=False)
    padding = torch.arange(5)[None] >= counted
    assert norm(torch.randn(1, 5, 6), True, padding).isfinite().all()
    assert all(value.isfinite().all() for value in buffers(norm).values())


def test_what_was_learned_in_training_is_there_in_evaluation() -> None:
    config = small("encoder_only", norm="batchnorm", width=32, heads=4, learned_dropout={"enabled": False})
    model, batch = build(config), batch_of(config, sequences=8)
    hidden = torch.zeros_like(batch.labels, dtype=torch.bool)
    hidden[:, [3, 8]] = True
    labels = torch.where(hidden, batch.input_ids, IGNORE)
    batch = replace(batch, input_ids=batch.input_ids.masked_fill(hidden, 0), labels=labels)
    before = model.eval()(batch).loss
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    assert before > 2.5
    assert model.eval()(batch).loss < 0.1


def test_statistics_are_fp32_under_bf16() -> None:
    norm = BatchNorm(8, bias=False)
    norm.weight.data = norm.weight.data.bfloat16()
    x = (100 + torch.randn(64, 128, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    out = norm(x, True)
    assert out.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    expected = x.double().flatten(0, 1)
    torch.testing.assert_close(norm.running_mean.double(), expected.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), expected.var(0), rtol=1e-4, atol=0)


def test_a_causal_model_is_refused_because_it_would_see_the_future() -> None:
    with pytest.raises(ValidationError, match="would see the tokens it is to predict"):
        small("decoder_only", norm="batchnorm")
    model = build(small("decoder_only", learned_dropout={"enabled": False})).double()
    ids = batch_of(model.config).input_ids
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCABULARY
    keys = torch.zeros(3, dtype=torch.int64)

    def leak() -> float:
        one, other = (model.predict(x, keys) for x in (ids, changed))
        return (one - other)[:, :-1].abs().max().item()

    assert leak() == 0.0
    model.final_norm = BatchNorm(16, bias=False).double()
    assert leak() > 1e-6


def test_only_encoders_have_it() -> None:
    for name, where in {
        "bert_batchnorm": {"backbone.layers.0.attention_norm", "backbone.layers.1.ff_norm", "final_norm"},
        "bert_batchnorm_post": {"backbone.layers.0.attention_norm", "backbone.layers.1.ff_norm"},
        "t5_batchnorm": {"backbone.encoder.0.attention_norm", "backbone.encoder.1.ff_norm"},
    }.items():
        found = {path for path, module in build(variant(name)).named_modules() if isinstance(module, BatchNorm)}
        assert where <= found
        assert not [path for path in found if path.startswith("decoder")]
        assert build(variant(name)).num_parameters() == build(variant(name, norm="layernorm")).num_parameters()


def test_layers_are_not_computed_twice() -> None:
    model = {"architecture": "encoder_only", "norm": "batchnorm"}
    with pytest.raises(ValidationError, match="into its running statistics twice"):
        Config.model_validate(
            {"data": {"objective": "masked"}, "model": model, "engine": {"activation_checkpointing": True}}
        )
