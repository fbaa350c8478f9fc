"""Whole numbers as people write them."""

import pytest

from data_pipeline.counts import MOST, count, number_of
from data_pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "number"),
    [("5000", 5000), ("32K", 32_000), ("1.5b", 1_500_000_000), ("10T", 10**13), (" 2M ", 2_000_000), (str(MOST), MOST)],
)
def test_what_is_meant(text: str, number: int) -> None:
    assert number_of(text, "--tokens") == number


@pytest.mark.parametrize(
    "text", ["", "K", "0", "0K", "-1", "1e3", "1.5", "5\u212a", "٣", "٣K", str(MOST + 1), "9" * 5000, "9999T"]
)
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--tokens .*expected a number such as 5000"):
        number_of(text, "--tokens")
    assert not count(text)
