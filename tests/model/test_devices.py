"""Nothing is made on the wrong device, in double precision, or as a copy of a weight in fp32: seen without a GPU.

Parameters, buffers and batch are fake tensors (shapes and types without numbers) of a device that is not there. To make
another tensor on the CPU and compute with both fails, as it would on a GPU.
"""

from collections.abc import Callable
from typing import Any

from tests.model.situations import SITUATIONS

RunRanks = Callable[..., list[Any]]
CASES = "tests.model.device_cases:"
AGAIN = {
    *("strided", "sinks_alone", "fixed_alternate", "bert_window", "bert_globals", "t5_strided", "t5_fixed"),
    *("feedback", "feedback_dropout", "entmax_fixed", "span_sinks", "dense", "random", "routing_window"),
    *("t5_entmax", "t5_span", "bert_entmax", "bert_linformer", "bert_routing", "bert_random", "bert_sinks"),
    *("routing_near", "fixed_heads", "feedback_window"),
}
"""Options that another one has, too."""


def test_a_step_makes_nothing_on_another_device_and_in_no_other_type(ranks: RunRanks) -> None:
    assert ranks(f"{CASES}steps", 1, names=[name for name in SITUATIONS if name not in AGAIN]) == [{}]


def test_the_check_catches_what_is_made_elsewhere_or_in_another_type(ranks: RunRanks) -> None:
    [[elsewhere, in_double, copied]] = ranks(f"{CASES}planted", 1)
    assert "same device" in elsewhere and "double precision" in in_double and "is copied to fp32" in copied
