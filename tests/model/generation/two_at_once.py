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
        second = super().step(ahead)
        tokens = torch.cat([first.tokens, second.tokens], dim=1)
        logits = torch.cat([first.logits, second.logits], dim=1)
        present = None
        if first.present is not None and second.present is not None:
            present = torch.cat([first.present, second.present], dim=1)
        return Drawn(texts.numbers, tokens, logits, present)


def make_two_at_once(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the usual strategy of this architecture."""
    monkeypatch.setitem(DECODINGS, "two", TwoAtOnce)
    monkeypatch.setattr(type(config), "traits", replace(config.traits, decodings=("two", "autoregressive")))
