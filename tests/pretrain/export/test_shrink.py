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
from pretrain.export.use import evaluate_run, open_trained
from pretrain.metric_names import DENSITY, FLIPS, MULTIPLIER, VALIDATION, of_validation
from pretrain.run import journal
from pretrain.run.run_folder import RunFolder
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
    with pytest.raises(ConfigError, match=r"trained without model.block_gates"):
        shrink(run, "--gates", "--to", tmp_path / "other")
    with pytest.raises(ConfigError, match="say what to remove: --gates"):
        shrink(gated, "--to", tmp_path / "other")
    assert not (tmp_path / "other").exists()
