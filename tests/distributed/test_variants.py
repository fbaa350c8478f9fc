"""The model's options under partitioned weights: modules with parameters of their own, shared or read directly."""

from collections.abc import Callable
from typing import Any

import pytest

Ranks = Callable[..., list[Any]]

NAMES = ["smoothed", "everywhere_embed", "l0", "encoder_loss_published", "dropout_modern", "entmax", "span", "mixture"]
NAMES += ["universal", "halting", "routing", "bert_linformer", "two_stream", "draft"]


def test_partitioned_weights_have_the_same_losses_as_one_rank(ranks: Ranks) -> None:
    [alone] = ranks("tests.distributed.variant_cases:losses_of", 1, stage=0, names=NAMES)
    for found in ranks("tests.distributed.variant_cases:losses_of", 2, stage=3, names=NAMES):
        for name in NAMES:
            assert found[name] == pytest.approx(alone[name], rel=1e-5), name


def test_centroids_are_the_same_to_the_last_bit_however_texts_are_dealt_to_ranks(ranks: Ranks) -> None:
    """Six texts at once or in parts, on one rank or two, in any order; a step that was skipped leaves nothing."""
    case = "tests.distributed.variant_cases:centroids_of"
    at_once, fewer = [[[0, 1, 2, 3, 4, 5]]], [[[0, 1, 2, 3, 4]]]
    parts = [[[5], [3, 1], [0, 4, 2]]], [[[0, 1, 2]], [[3, 4, 5]]], [[[5, 2], [0]], [[4], [3, 1]]]
    [expected] = ranks(case, 1, passes=at_once)
    for passes in parts:
        assert all(found == expected for found in ranks(case, len(passes), passes=passes))
    assert ranks(case, 1, passes=at_once, skipped=True) == [expected]
    assert ranks(case, 1, passes=fewer) != [expected]
