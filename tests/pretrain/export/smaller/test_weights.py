"""Weights of fewer bits, and zeros among them: what is lost, what reads them, and that nothing else changes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.errors import ConfigError
from model.layers.int8 import in_int8, maps_of, restored
from pretrain.export.smaller.magnitude import two_of_four, without_smallest
from pretrain.export.use import evaluate_run, open_trained
from pretrain.finetune.base import _of_export
from pretrain.metric_names import VALIDATION
from tests.pretrain.export.smaller.test_gates import shrink
from tests.pretrain.export.test_elsewhere import from_folder

IDS = torch.arange(1, 13)[None]


def test_a_weight_in_int8_is_within_half_a_scale() -> None:
    weights = {"a.weight": torch.randn(5, 9), "a.bias": torch.randn(5), "b.weight": torch.randn(3, 2)}
    weights["a.weight"][2] = 0.0
    kept = in_int8(weights, ["a"])
    assert maps_of(kept) == ["a"]
    again = restored(kept)
    assert again.keys() == weights.keys()
    assert torch.equal(again["b.weight"], weights["b.weight"])
    assert ((again["a.weight"] - weights["a.weight"]).abs() <= kept["a.scale"][:, None] / 2 * (1 + 1e-5)).all()


@torch.no_grad()
def test_int8_quarters_the_file_and_is_read_by_all_that_reads_exports(run: Path, tmp_path: Path) -> None:
    said = shrink(run, "--dtype", "int8", "--to", tmp_path / "int8")
    before = evaluate_run(run, None)[VALIDATION]
    assert f"validation loss: {before:.6f} before, " in said
    whole, read = open_trained(run).model, _of_export(tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    maps = maps_of(tensors)
    assert len(maps) == 12
    assert not any("dropout" in name for name in maps), "those of masks stay"
    for name, weight in whole.state_dict().items():
        rounded = name.removesuffix(".weight") in maps
        assert not torch.equal(read[name], weight) if rounded else torch.equal(read[name], weight)
        torch.testing.assert_close(read[name], weight, rtol=0, atol=float(weight.abs().max()) / 250)
    whole.load_state_dict(read)
    theirs, tokenizer = from_folder(tmp_path / "int8")
    assert torch.equal(theirs(IDS).logits, whole(IDS)), "transformers reads the weights into fp32"
    for part in (theirs, tokenizer):
        part.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(from_folder(tmp_path / "again")[0](IDS).logits, whole(IDS), rtol=0, atol=0)
    assert torch.equal(open_trained(tmp_path / "int8").model(IDS), whole(IDS))


def test_bf16_is_measured_as_transformers_runs_it(run: Path, tmp_path: Path) -> None:
    said = shrink(run, "--dtype", "bf16", "--to", tmp_path / "half")
    assert "bf16: all is computed in bf16" in said
    [weights] = [line for line in said.splitlines() if line.startswith("weights: ")]
    assert {values.dtype for values in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    sizes = [float(word) for word in weights.replace(",", "").split() if word[0].isdigit()]
    assert sizes[1] == pytest.approx(sizes[0] / 2, abs=0.01)


def test_the_smallest_weights_are_worth_less_than_others(run: Path, tmp_path: Path) -> None:
    said = shrink(run, "--magnitude").splitlines()
    assert [line.split()[7] for line in said] == ["none", "20%", "40%", "60%", "80%", "2:4"]
    losses = [float(line.split()[-1]) for line in said]
    assert f"{evaluate_run(run, None)[VALIDATION]:.6f}" == said[0].split()[-1]
    assert len(set(losses)) == 6
    with pytest.raises(ConfigError, match="--magnitude writes nothing"):
        shrink(run, "--magnitude", "--to", tmp_path / "other")
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5, 9.0], [0.1, -0.4, 0.3, -0.2, 0.0]])
    assert two_of_four(weight).tolist() == [[3.0, 0.0, 2.0, 0.0, 9.0], [0.0, weight[1, 1], weight[1, 2], 0.0, 0.0]]
    assert (without_smallest(weight, 0.5) != 0).tolist() == [[True, True, True, True, True], [False] * 5]
