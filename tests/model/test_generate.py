"""Generation: the window, the draw, the end."""

import pytest
import torch

from model.generate import generate
from tests.model.helpers import VOCABULARY, build, open_masks, small

MODEL = open_masks(build(small())).eval()
PROMPT = torch.tensor([3, 1, 4])


def test_greedy_takes_the_likeliest_token_of_the_last_context_tokens() -> None:
    ids = PROMPT
    for token in generate(MODEL, PROMPT, max_new_tokens=20, temperature=0.0):
        assert token == MODEL.logits(ids[None, -12:])[0, -1].argmax()
        ids = torch.cat([ids, torch.tensor([token])])
    assert len(ids) == 23


def test_the_generator_decides() -> None:
    def text(seed: int) -> list[int]:
        return list(generate(MODEL, PROMPT, max_new_tokens=30, generator=torch.Generator().manual_seed(seed)))

    assert text(1) == text(1) != text(2)


def test_top_k_draws_only_from_the_likeliest() -> None:
    likeliest = MODEL.logits(PROMPT[None])[0, -1].topk(3).indices.tolist()
    generator = torch.Generator().manual_seed(0)
    drawn = {
        next(generate(MODEL, PROMPT, max_new_tokens=1, temperature=5.0, top_k=3, generator=generator))
        for _ in range(60)
    }
    assert drawn == set(likeliest)


def test_more_than_the_vocabulary_is_all_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    assert len(list(generate(MODEL, PROMPT, max_new_tokens=5, top_k=VOCABULARY + 5, generator=generator))) == 5


def test_the_end_token_ends_the_text_and_is_not_given_out() -> None:
    greedy = list(generate(MODEL, PROMPT, max_new_tokens=10, temperature=0.0))
    end = greedy[-1]
    found = list(generate(MODEL, PROMPT, max_new_tokens=10, temperature=0.0, eos_id=end))
    assert found == greedy[: greedy.index(end)]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(MODEL, PROMPT[:0], max_new_tokens=1))
