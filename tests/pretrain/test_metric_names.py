"""One registry of metrics: nothing else spells a name, and each is told in the documents."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.metric_names import COLUMNS, LOSS, OF_MODEL, REGISTRY, Metric, epoch_of, of_model

ROOT = Path(__file__).resolve().parents[2]
REGISTRY_FILE = ROOT / "pretrain" / "metric_names.py"
SPELT = re.compile(
    r"(loss|penalty|gate|ponder|optim|time|system|health)/[a-z_]+(/|$)|data/(epoch|tokens_seen|samples_seen)"
)


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """The strings of a file, but for its docstrings."""
    tree = ast.parse(file.read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.lineno, node.value


@pytest.mark.parametrize("package", ["data_pipeline", "model", "pretrain", "launch"])
def test_nothing_else_spells_the_name_of_a_metric(package: str) -> None:
    files = [file for file in (ROOT / package).rglob("*.py") if file != REGISTRY_FILE]
    found = [f"{file.name}:{line}: {text}" for file in files for line, text in texts(file) if SPELT.match(text)]
    assert found == []


def test_a_name_that_is_spelt_is_noticed() -> None:
    assert {text for _, text in texts(REGISTRY_FILE) if SPELT.match(text)} >= {str(LOSS)}


@pytest.mark.parametrize("metric", REGISTRY.values(), ids=str)
def test_each_metric_is_told_in_the_documents(metric: Metric) -> None:
    text = (ROOT / "docs" / "tracking.md").read_text() + (ROOT / "docs" / "health.md").read_text()
    assert f"`{metric}`" in text


def test_names_are_what_journals_hold() -> None:
    """Those of today's journals stay: a reader of old runs and new ones looks for the same."""
    assert of_model("cross_entropy") == LOSS == "loss/train"
    assert of_model("density") == "gate/density"
    assert of_model("density/enc_ff/00") == "gate/density/enc_ff/00"
    assert of_model("ponder_share/2") == "ponder/share/2"
    assert of_model("mask_slope") == "gate/mask_slope"
    assert epoch_of("web") == "data/epoch_web"
    assert set(OF_MODEL.values()) <= set(REGISTRY.values())
    assert [metric for metric, _ in COLUMNS][:2] == ["loss/total", "loss/train"]
