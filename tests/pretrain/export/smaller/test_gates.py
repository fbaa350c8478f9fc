"""A run with block gates, from its journal to a smaller model that predicts as well."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.errors import CheckpointError, ConfigError
from launch.cli import app
from model.masks.block_gates import block_gates
from model.masks.hard_concrete import HardConcreteGates
from model.masks.learned_dropout import LearnedDropout
from pretrain.export.smaller.gates import watched, without_closed
from pretrain.export.use import evaluate_run, open_trained
from pretrain.metric_names import DENSITY, FLIPS, MULTIPLIER, VALIDATION, of_validation
from pretrain.run import journal
from pretrain.run.run_folder import RunFolder
from tests.model.helpers import batch_of, build, open_masks, variant
from tests.runs import SMALL

Ranks = Callable[..., list[Any]]
SITES = ("enc_ff/00", "dec_ff/00")
GATES = ["kind=cosine", "shift_init=1.7", "std=0.03", "dual_rate=0.1", "train_sparse_after=1"]


@pytest.fixture(scope="module")
def gated(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated") / "run"
    gates = [f"model.block_gates.{key}" for key in GATES]
    keys = [*SMALL, *gates, "model.learned_dropout.enabled=false", "train.steps=3", "train.eval_every=2"]
    ranks("tests.distributed.cases:train_run", 1, args=[*keys, f"data.path={dataset}", f"run.dir={folder}"])
    return folder


def shrink(*words: object) -> str:
    done = CliRunner().invoke(app, ["checkpoint", "shrink", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_journal_has_density_and_multiplier_by_site_and_layer(gated: Path) -> None:
    found = journal.series(journal.read(RunFolder(gated).journal))
    for site in SITES:
        assert len(found[DENSITY.of(site)]) == len(found[MULTIPLIER.of(site)]) == 3
    assert 0 < found[MULTIPLIER][-1].value == found[MULTIPLIER][-1].value
    assert found[of_validation("density")][-1].value < 0.3
    assert FLIPS in found


def test_blocks_that_no_held_out_token_opens_go_and_the_loss_stays(gated: Path, run: Path, tmp_path: Path) -> None:
    said = shrink(gated, "--gates", "--to", tmp_path / "smaller")
    before = evaluate_run(gated, None)[VALIDATION]
    assert f"validation loss: {before:.6f} before, {before:.6f} after" in said
    whole, smaller = open_trained(gated).model, open_trained(tmp_path / "smaller").model
    counts = {ff.name: ff.blocks for ff in block_gates(smaller)}
    assert set(counts) == set(SITES)
    assert 1 < min(counts.values()) < 8, counts
    assert all(f"{name}: {count} of 8 blocks stay" in said for name, count in counts.items())
    assert smaller.num_parameters() < whole.num_parameters()
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(smaller.logits(ids), whole.logits(ids), rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="smaller: is there already"):
        shrink(gated, "--gates", "--to", tmp_path / "smaller")
    with pytest.raises(CheckpointError, match=r"every block and every channel is used by some token"):
        shrink(run, "--gates", "--to", tmp_path / "other")
    with pytest.raises(ConfigError, match="say what goes: --gates"):
        shrink(gated, "--to", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["l0", "everywhere_elementwise", "everywhere_embed", "parallel", "encoder_loss"])
def test_channels_that_a_mask_always_closes_go(name: str) -> None:
    """Exact where no other channel's mask reads them; with the default, or a map of low rank, another model."""
    config = variant(name, bias=True)
    model, places = open_masks(build(config)).double().eval(), ["dec_ff/00", "enc_ff/01"]
    for mask in (module for module in model.modules() if getattr(module, "name", "") in places):
        if isinstance(mask, HardConcreteGates):
            mask.log_alpha.fill_(1.0)
            mask.log_alpha[2:7] = -9.0
        elif isinstance(mask, LearnedDropout):
            mask.shift[2:7] = torch.pi
            rows = {"elementwise": "scale", "low_rank": "up.weight"}.get(mask.config.source, "qkv.weight")
            mask.get_parameter(rows)[-16:][2:7] = 0.0
    batch = batch_of(config)
    with watched(model) as used:
        before = model(batch)
    blocks, channels = used.kept(config)
    assert [len(channels[place]) for place in places] == [11, 11]
    shape, weights = without_closed(model, blocks, channels)
    smaller = build(shape).double().eval()
    smaller.load_state_dict(weights)
    assert model.num_parameters() - smaller.num_parameters() == sum(16 - len(kept) for kept in channels.values()) * 65
    difference = (smaller(batch).by_token - before.by_token).abs().max()
    assert (difference > 1e-6) if name in ("parallel", "encoder_loss") else (difference < 1e-12)
