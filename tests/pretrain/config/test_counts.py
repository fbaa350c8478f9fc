"""Whole numbers with a letter behind them, in options and in every whole number of a configuration."""

import pytest

from data_pipeline.counts import number_of
from data_pipeline.errors import ConfigError
from pretrain.config.schema import load


@pytest.mark.parametrize(("text", "number"), [("10B", 10**10), ("1.5k", 1500), (" 7 ", 7), ("2T", 2 * 10**12)])
def test_numbers_as_people_write_them(text: str, number: int) -> None:
    assert number_of(text, "--tokens") == number


@pytest.mark.parametrize("text", ["", "ten", "-1", "0", "1e9", "5 G", "1.2345K"])
def test_other_numbers_are_errors(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--tokens .*: expected a number such as 5000, 300M"):
        number_of(text, "--tokens")


@pytest.mark.parametrize(
    ("key", "value", "number"),
    [
        ("batch.tokens", "1.024K", 1024),
        ("train.tokens", "2.048m", 2_048_000 // 8192),
        ("train.steps", "10K", 10_000),
        ("train.keep_every", "5K", 5000),
        ("data.shard_tokens", "1B", 10**9),
        ("data.tokenizer.sample_bytes", "1M", 10**6),
        ("model.vocab_size", "50K", 50_000),
    ],
)
def test_every_whole_number_of_a_configuration_takes_a_letter(key: str, value: str, number: int) -> None:
    config = load([f"{key}={value}"]).model_dump()
    for part in key.replace("train.tokens", "train.steps").split("."):
        config = config[part]
    assert config == number


def test_a_name_that_looks_like_a_number_stays_a_name() -> None:
    assert load(["run.name=10K", "data.sources.5M.paths=1K"]).data.sources["5M"].paths == ["1K"]
