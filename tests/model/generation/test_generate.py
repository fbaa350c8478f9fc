"""Generation: the window, texts side by side, the end."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from model.attention.cache import Cache
from model.generation.generate import Generation, generate
from model.generation.sampling import Sampling
from tests.model.generation.two_at_once import make_two_at_once
from tests.model.helpers import VARIANTS, VOCABULARY, build, open_masks, small, variant

MODEL = open_masks(build(small())).double().eval()
PROMPT = torch.tensor([3, 1, 4])
GREEDY = Sampling(temperature=0.0)


def anew(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Logits [V] after the last of the last 12 of ids [T], without a cache."""
    with torch.no_grad():
        return model(ids[None, -12:])[0, -1]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_takes_the_likeliest_token_of_the_last_context_tokens(name: str) -> None:
    model = open_masks(build(variant(name))).double().eval()
    ids = PROMPT
    for token in generate(model, PROMPT, GREEDY, max_new_tokens=20):
        logits = anew(model, ids)
        assert logits.max() - logits[token] < 1e-12
        ids = torch.cat([ids, torch.tensor([token])])
    assert len(ids) == 23


def test_each_token_is_read_once_until_the_window_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    logits = Cache.logits

    def counted(self: Cache, model: torch.nn.Module, ids: Tensor) -> Tensor:
        read.append(ids.shape[1])
        return logits(self, model, ids)

    monkeypatch.setattr(Cache, "logits", counted)
    list(generate(MODEL, PROMPT, GREEDY, max_new_tokens=13))
    assert read == [3, *[1] * 9, 12, 12, 12]
    read.clear()
    list(generate(MODEL, PROMPT.repeat(6), GREEDY, max_new_tokens=2))
    assert read == [12, 12]


def grown(prompts: list[Tensor], steps: int, seed: int, eos_id: int | None = None) -> list[list[int]]:
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    generation = Generation(MODEL, prompts, Sampling(), eos_id=eos_id, generators=generators)
    texts: list[list[int]] = [[] for _ in prompts]
    for _ in range(steps):
        for text, tokens in generation.step().items():
            texts[text] += tokens
    return texts


PROMPTS = [torch.arange(count) % VOCABULARY for count in (2, 9, 1, 15, 5)]


@pytest.mark.parametrize("eos_id", [None, 2])
def test_texts_side_by_side_are_what_each_is_alone(eos_id: int | None) -> None:
    """Through the moving window, and while texts end one after the other."""
    together = grown(PROMPTS, 20, seed=5, eos_id=eos_id)
    for number, prompt in enumerate(PROMPTS):
        assert together[number] == grown([prompt], 20, seed=5 + number, eos_id=eos_id)[0]
    assert (len({len(text) for text in together}) > 1) == (eos_id is not None)


def test_a_text_that_is_ended_grows_no_more_and_disturbs_no_other() -> None:
    whole = Generation(MODEL, PROMPTS, GREEDY)
    ended = Generation(MODEL, PROMPTS, GREEDY)
    for step in range(8):
        expected, found = whole.step(), ended.step()
        assert found == {text: tokens for text, tokens in expected.items() if step < 3 or text not in (1, 3)}
        if step == 2:
            ended.end(1)
            ended.end(3)
    for text in range(5):
        ended.end(text)
    assert ended.step() == {}


def test_the_generator_decides() -> None:
    def text(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(generate(MODEL, PROMPT, Sampling(), max_new_tokens=30, generator=generator))

    assert text(1) == text(1) != text(2)


def test_a_penalty_knows_all_that_the_text_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    draw = Sampling.draw

    def recorded(self: Sampling, logits: Tensor, present: Tensor, generators: Any) -> Tensor:
        seen.append(present)
        return draw(self, logits, present, generators)

    monkeypatch.setattr(Sampling, "draw", recorded)
    generation = Generation(MODEL, PROMPTS, Sampling(temperature=0.0, repetition_penalty=1.1))
    texts = [prompt.tolist() for prompt in PROMPTS]
    for _ in range(15):
        before = [set(text) for text in texts]
        for text, tokens in generation.step().items():
            texts[text] += tokens
        assert [set(row.nonzero().flatten().tolist()) for row in seen[-1]] == before


def test_the_end_token_ends_the_text_and_is_not_given_out() -> None:
    greedy = list(generate(MODEL, PROMPT, GREEDY, max_new_tokens=10))
    end = greedy[-1]
    found = list(generate(MODEL, PROMPT, GREEDY, max_new_tokens=10, eos_id=end))
    assert found == greedy[: greedy.index(end)]


def test_a_strategy_that_makes_several_tokens_makes_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(generate(MODEL, PROMPT, GREEDY, max_new_tokens=11))
    together = grown(PROMPTS, 20, seed=5, eos_id=2)
    with pytest.raises(ConfigError, match="decoding=two: parallel_encoder_decoder makes text by autoregressive"):
        Generation(MODEL, PROMPTS, GREEDY, decoding="two")
    make_two_at_once(MODEL.config, monkeypatch)
    assert list(generate(MODEL, PROMPT, GREEDY, max_new_tokens=11)) == whole
    assert grown(PROMPTS, 10, seed=5, eos_id=2) == together


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(MODEL, PROMPT[:0], GREEDY, max_new_tokens=1))
    with pytest.raises(ValueError, match="at least one token"):
        Generation(MODEL, [PROMPT, PROMPT[:0]], GREEDY)
