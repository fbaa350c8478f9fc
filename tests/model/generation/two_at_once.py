"""A decoding strategy that gives several tokens a step: what comes of it is what single steps give."""

import copy
from dataclasses import replace

import pytest
import torch

from model.config.model_config import ModelConfig
from model.generation.autoregressive import Autoregressive
from model.generation.decoding import DECODINGS
from model.generation.texts import Drawn, Texts


class TwoAtOnce(Autoregressive):
    """Two steps in one."""

    def step(self, texts: Texts) -> Drawn:
        first = super().step(texts)
        ahead = copy.copy(texts)
        ahead.add(first.tokens)
        columns = zip(first[1:4], super().step(ahead)[1:4], strict=True)  # no drafts
        return Drawn(texts.numbers, *(torch.cat(pair, dim=1) for pair in columns))


def make_two_at_once(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the usual strategy of this architecture."""
    monkeypatch.setitem(DECODINGS, "two", TwoAtOnce)
    monkeypatch.setattr(type(config), "traits", replace(config.traits, decodings=("two", "autoregressive")))
