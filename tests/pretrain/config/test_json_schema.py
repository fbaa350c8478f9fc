"""The JSON schema that editors read: what we ship fits it, what we refuse does not, and each key says what it means."""

import json
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf

from model.architectures.registry import ARCHITECTURES
from pretrain.config.json_schema import _sections, json_schema
from pretrain.config.layers import presets
from pretrain.config.schema import Config, dump, load
from tests.runs import ROOT

SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)


def test_the_shipped_one_is_up_to_date() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == SCHEMA, (
        "run: python docs/make_config_reference.py"
    )


@pytest.mark.parametrize("name", presets())
def test_every_preset_fits_it_and_names_it(name: str) -> None:
    file = ROOT / "configs" / f"{name}.yaml"
    text = file.read_text()
    named = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / named).resolve() == ROOT / "configs" / "schema.json"
    VALIDATOR.validate(OmegaConf.to_container(OmegaConf.create(text)))


@pytest.mark.parametrize(
    "architecture", ["parallel_encoder_decoder", "decoder_only", "encoder_decoder", "encoder_only"]
)
def test_a_whole_configuration_fits_it(architecture: str) -> None:
    objective = "masked" if architecture == "encoder_only" else "causal"
    if architecture == "encoder_decoder":
        objective = "span_corruption"
    config = load([f"model.architecture={architecture}", f"data.objective={objective}", "data.sources.a.paths=[x]"])
    VALIDATOR.validate(yaml.safe_load(dump(config)))


@pytest.mark.parametrize(
    ("layer", "fits"),
    [
        ({"train": {"steps": "10K"}, "data": {"sources": {"a": {"paths": "text", "weight": 2}}}}, True),
        ({"model": {"architecture": "mine.py:Mine", "anything": 1}}, True),
        ({"optimizer": {"betas": [0.9, 0.95]}}, True),
        ({"train": {"step": 10}}, False),
        ({"train": {"steps": "ten"}}, False),
        ({"train": {"steps": 0}}, False),
        ({"optimizer": {"betas": 0.9}}, False),
        ({"model": {"layres": 2}}, False),
        ({"model": {"architecture": "decoder_only", "layres": 2}}, False),
        ({"engine": {"precision": "fp8"}}, False),
    ],
)
def test_it_knows_right_from_wrong(layer: dict[str, Any], fits: bool) -> None:
    assert VALIDATOR.is_valid(layer) == fits


def test_every_key_says_what_it_means() -> None:
    for name, part in SCHEMA["$defs"].items():
        for key, field in part.get("properties", {}).items():
            assert "description" in field or "$ref" in field, f"{name}.{key}"
        assert part.get("description"), name


def test_no_section_reads_its_descriptions_when_it_is_imported() -> None:
    """Each start would wait for it; `describe` does so where somebody asks."""
    sections = [inner for outer in (Config, *ARCHITECTURES.values()) for inner in _sections(outer)]
    assert sections and not [kind for kind in sections if kind.model_config.get("use_attribute_docstrings")]
