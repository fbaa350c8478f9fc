"""Whole numbers as people write them: 5000, 32K, 300M, 1.5B, 10T. K is a thousand."""

import re
from fractions import Fraction

from data_pipeline.errors import ConfigError

FORMS = "a number such as 5000, 300M, 1.5B or 10T"
PATTERN = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,16})?)([KMBTkmbt])")
_PLAIN = re.compile(r"[0-9]{1,16}")
MOST = 2**53
"""No number of tokens is greater, and each is exact as a float."""
_SIZES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def number_of(text: str, option: str) -> int:
    """What an option was given: 5000, 300M, 1.5B. Raises ConfigError for what is no whole number above 0."""
    number = int(text) if _PLAIN.fullmatch(text.strip()) else count(text)
    if not number or number > MOST:
        raise ConfigError(f"{option} {text}: expected {FORMS}")
    return number


def count(text: str) -> int | None:
    """The number that a text with one of the four letters, small or large, means; None when it is no such text, or no
    whole number."""
    if not (match := PATTERN.fullmatch(text.strip())):
        return None
    number = Fraction(match[1]) * _SIZES[match[2].upper()]
    return int(number) if number.denominator == 1 and number <= MOST else None
