"""Objectives without a run."""

from typing import Any

from data_pipeline.tokenize.tokenizer import Tokenizer
from pretrain.objectives.objective import Objective, Setting
from pretrain.objectives.registry import objective_of


def objective(name: str = "causal", context: int = 16, tokenizer: Tokenizer | None = None, **setting: Any) -> Objective:
    """The one of this name; `tokenizer` where it needs pieces, else a setting's own defaults."""

    def given() -> Tokenizer:
        assert tokenizer is not None
        return tokenizer

    return objective_of(name)(Setting(context, given, **setting))
