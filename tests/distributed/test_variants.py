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
