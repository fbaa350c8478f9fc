"""The two streams computed together: the numbers and the weights of the plain form."""

from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from model.architectures.pair import Pair
from model.architectures.token_model import LanguageModel
from model.batch import ModelOutput
from model.config.model_config import ModelConfig
from pretrain.config.schema import load
from pretrain.engine.layer_transforms import checkpoint_activations
from tests.model.helpers import VARIANTS, batch_of, build, open_masks, variant

OPTIONS = [
    name
    for name, changes in VARIANTS.items()
    if changes.get("topology") != "serial" and changes.get("architecture") != "decoder_only"
]
assert {"everywhere_embed", "dropout", "l0", "modern", "cross_first", "layer_input", "next_position"} <= set(OPTIONS)


def both(name: str, dtype: torch.dtype, **changes: Any) -> list[LanguageModel]:
    """Plain and batched, of the same weights."""
    shape = {"layers": 3, **changes}
    forms = [variant(name, **shape, streams=streams) for streams in ("plain", "batched")]
    # Wide masks have angles of hundreds, whose cosines have lost digits.
    return [open_masks(build(config), std=0.05).to(dtype) for config in forms]


def pairs(model: LanguageModel) -> list[Pair]:
    return [module for module in model.modules() if isinstance(module, Pair)]


def results(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Metrics in training, the gradient of each parameter, and logits in evaluation."""
    batch = batch_of(model.config, step=5000)
    output: ModelOutput = model.train()(batch)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.metrics | gradients | {"logits": model.eval().logits(batch.input_ids).detach()}


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest, relative to the largest element of each tensor."""
    assert list(found) == list(expected)
    return max(
        float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for name, value in expected.items()
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_they_are_the_plain_form(name: str, bias: bool) -> None:
    plain, batched = both(name, torch.float64, bias=bias)
    assert difference(results(batched), results(plain)) < 1e-12


@pytest.mark.parametrize("name", ["unrounded", "dropout_modern", "l0", "next_position"])
def test_they_are_the_plain_form_in_fp32(name: str) -> None:
    changes = {"learned_dropout": {"rounding": "none", "eval_rounding": "none"}} if name == "next_position" else {}
    plain, batched = both(name, torch.float32, **changes)
    assert 0 < difference(results(batched), results(plain)) < 1e-5


def test_the_comparison_notices_exchanged_streams() -> None:
    plain, batched = both("unrounded", torch.float64)
    encoder, decoder = pairs(batched)[0]._layers
    encoder.ff, decoder.ff = decoder.ff, encoder.ff
    assert difference({"logits": results(batched)["logits"]}, {"logits": results(plain)["logits"]}) > 1e-3


def test_a_state_dict_goes_both_ways() -> None:
    plain, batched = both("everywhere", torch.float64)
    other = build(batched.config, seed=7).double()
    assert list(plain.state_dict()) == list(batched.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in batched.named_parameters()]
    other.load_state_dict(plain.state_dict())
    assert difference(results(other), results(plain)) < 1e-12


@pytest.mark.parametrize("name", ["batched", "batched_layer_input"])
def test_recomputed_pairs_give_the_same_and_keep_less(name: str) -> None:
    def kept_bytes(model: LanguageModel) -> int:
        kept: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if (where := tensor.untyped_storage().data_ptr()) not in own:
                kept[where] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(batch_of(model.config))  # kept alive: its storages count once
        return sum(kept.values()) if output.loss.requires_grad else 0

    once, again = (open_masks(build(variant(name, layers=6))).double() for _ in range(2))
    checkpoint_activations(again)
    assert 0 < kept_bytes(again) < 0.5 * kept_bytes(once)
    assert difference(results(again), results(once)) == 0.0


def test_pairs_are_compiled_without_a_graph_break() -> None:
    eager, compiled = (open_masks(build(variant("batched", layers=2))).double() for _ in range(2))
    for pair in pairs(compiled):
        pair.compile(backend="aot_eager", fullgraph=True)
    assert difference(results(compiled), results(eager)) < 1e-12


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"topology": "serial"}, "begins where the encoder ends"),
        ({"layers": 1}, "no two layers are independent"),
        ({"architecture": "decoder_only"}, "no second stream"),
    ],
)
def test_what_cannot_be_batched_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelConfig(streams="batched", **changes)


def test_stage_3_is_refused() -> None:
    assert load(["model.streams=batched", "engine.zero_stage=2"]).model.streams == "batched"
    with pytest.raises(ConfigError, match=r"model.streams=batched reads the weights of two layers at once"):
        load(["model.streams=batched", "engine.zero_stage=3"])
