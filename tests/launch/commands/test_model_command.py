"""`duet model`: the numbers that the tests of formulas hold, told."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError
from data_pipeline.storage.manifest import Manifest
from launch.cli import app
from model.architectures import registry
from model.costs.totals import parameters_by_part
from tests.model.helpers import VARIANTS, variant

PUBLISHED = ["model/published", "model.vocab_size=50257"]


def told(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["model", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_parameters_of_the_published_model() -> None:
    found = json.loads(told("params", *PUBLISHED, "--json"))
    assert found["total"] == 15_738_600
    assert found["without_position_table"] == 15_698_400
    assert found["parts"] == {
        "token table": 50_257 * 200,
        "position table": 201 * 200,
        "norms": (5 * 6 + 1) * 200,
        "decoder input": 200**2,
        "encoder: attention": 5 * 4 * 200**2,
        "encoder: feed forward": 5 * 8 * 200**2,
        "decoder: attention": 5 * 4 * 200**2,
        "decoder: cross attention": 5 * 4 * 200**2,
        "decoder: feed forward": 5 * 8 * 200**2,
        "encoder loss": 4 * 200,
    }
    lines = told("params", *PUBLISHED).splitlines()
    assert lines[0].split() == ["total", "15,738,600"]
    assert lines[2].split() == ["token", "table", "10,051,400", "63.86%"]


def test_flops_of_the_published_model() -> None:
    """94.1 and 7.2 MFLOP a token in training: matrices, and attention."""
    found = json.loads(told("flops", *PUBLISHED, "--json"))
    assert found["training"] == 3 * found["forward"] == 6 * (140 * 200**2 + 200**2 + 50_257 * 200) + 36 * 5 * 200 * 200
    assert sum(found["parts"].values()) == found["forward"]
    assert told("flops", *PUBLISHED).splitlines()[1].split() == ["training", f"{found['training']:,.0f}"]


def test_the_largest_model_is_counted_without_memory() -> None:
    found = json.loads(told("params", "model/gpt-3-175b", "model.vocab_size=50257", "--json"))
    assert found["total"] == 174_604_259_328


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_are_the_whole(name: str) -> None:
    config = variant(name, layers=3)
    parts = parameters_by_part(config)
    with torch.device("meta"):
        assert sum(parts.values()) == registry.build(config).num_parameters()
    masks = config.num_masks(config.dropout_sites) + config.num_masks(config.l0_sites)
    assert ("masks" in parts) == bool(masks)
    assert ("position table" in parts) == (config.positions == "learned")


@pytest.mark.parametrize("command", ["params", "flops"])
def test_the_vocabulary_is_that_of_the_dataset_or_there_is_nothing_to_count(command: str, dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is not set"):
        told(command, "model/published")
    size = Manifest.load(str(dataset)).tokenizer.vocab_size
    known = told(command, "model/published", f"model.vocab_size={size}")
    assert told(command, "model/published", f"data.path={dataset}") == known
