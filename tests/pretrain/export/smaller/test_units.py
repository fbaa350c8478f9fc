"""Heads and hidden units that are taken out: nothing changes where they gave nothing, and the least goes first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from model.architectures import registry
from model.architectures.registry import ARCHITECTURES
from pretrain.export.smaller.units import parts_of, watched, without
from pretrain.export.use import evaluate_run, open_trained
from pretrain.metric_names import VALIDATION
from pretrain.run.run_folder import RunFolder
from tests.model.helpers import batch_of, build, one_of, open_masks, variant
from tests.pretrain.export.smaller.test_gates import shrink
from tests.runs import SMALL

Ranks = Callable[..., list[Any]]
CONFIGS = {name: one_of(name) for name in ARCHITECTURES} | {
    "grouped": variant("modern_decoder"),
    "span": variant("span"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_what_gives_nothing_goes_first_and_changes_nothing(name: str) -> None:
    config = CONFIGS[name]
    model = open_masks(build(config)).double().eval()
    parts = parts_of(model, heads=not config.why_heads_stay, units=True)
    assert len(parts) >= 2
    nothing = {place: number % of.number for number, (place, of) in enumerate(parts.items())}
    for place, of in parts.items():
        of.reads.weight.unflatten(1, (of.number, of.size))[:, nothing[place]] = 0.0
    batch = batch_of(config)
    with watched(parts) as importance:
        before = model(batch)
    for place, found in importance.items():
        assert (found == 0).nonzero().tolist() == [[nothing[place]]], place
    several = {place: of for place, of in parts.items() if of.number > 1}
    kept = {place: importance[place].nonzero()[:, 0] for place in several}
    shape, weights = without(model, several, kept)
    smaller = registry.build(shape).double().eval()
    smaller.load_state_dict(weights)
    assert smaller.num_parameters() < model.num_parameters()
    torch.testing.assert_close(smaller(batch).by_token, before.by_token, rtol=0, atol=1e-12)


def test_a_run_becomes_smaller_and_trains_on(ranks: Ranks, run: Path, dataset: Path, tmp_path: Path) -> None:
    said = shrink(run, "--heads", "1", "--units", "0.25", "--to", tmp_path / "smaller")
    before = evaluate_run(run, None)[VALIDATION]
    assert f"validation loss: {before:.6f} before, " in said
    assert "dec_sa/00: 1 of 2 heads stay" in said
    assert "cross/00: 3 of 4 heads stay" in said
    assert "backbone.encoder.0.ff: 48 of 64 hidden units stay" in said
    for words in ("parameters: ", "weights: ", "tokens a second here, read: "):
        assert f"\n{words}" in said
    smaller = open_trained(tmp_path / "smaller").model
    assert smaller.num_parameters() < open_trained(run).model.num_parameters()
    begin = [str(tmp_path / "smaller" / "train.yaml"), *(key for key in SMALL if not key.startswith("model."))]
    begin += [f"run.start_from={tmp_path / 'smaller'}", f"data.path={dataset}", "train.steps=1"]
    ranks("tests.distributed.cases:train_run", 1, args=[*begin, f"run.dir={tmp_path / 'tuned'}"])
    assert RunFolder(tmp_path / "tuned").config().model == smaller.config
    for option, amount, reason in (
        ("--heads", "2", "2 would go of 2 heads; one at least has to go, and one to stay"),
        ("--units", "0.001", "0 would go of 64 hidden units"),
        ("--units", "many", "expected how many go of each"),
    ):
        with pytest.raises(ConfigError, match=reason):
            shrink(run, option, amount, "--to", tmp_path / "other")
    assert not (tmp_path / "other").exists()
