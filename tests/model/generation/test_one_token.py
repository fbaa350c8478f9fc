"""The straight way through a decoder gives what its modules give, bit for bit, and is taken where it may be."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures.token_model import TokenModel
from model.attention.cache import Cache
from model.generation.generate import Generation
from model.generation.one_token import OneToken
from model.generation.sampling import Sampling
from tests.model.helpers import VOCABULARY, build, small

PLAIN: dict[str, Any] = {"architecture": "decoder_only", "learned_dropout": {"enabled": False}}
FOLLOWED: dict[str, dict[str, Any]] = {
    "GPT": {"bias": True},
    "Llama": {"positions": "rotary", "ff": "swiglu", "norm": "rmsnorm", "kv_heads": 1},
    "sines, explicit": {"positions": "sinusoidal", "attention": "explicit"},
}
LEFT: dict[str, dict[str, Any]] = {
    "masks": {"learned_dropout": {"enabled": True}},
    "norms behind": {"norm_position": "post"},
    "a window": {"pattern": {"kind": "window", "window": 4}},
    "two streams": {"architecture": "parallel_encoder_decoder"},
}


def model_of(**options: Any) -> TokenModel:
    return build(small(**(PLAIN | options))).eval()


def read(model: TokenModel, padding: tuple[int, ...] = (0, 0, 0)) -> tuple[Cache, Tensor]:
    """A cache that holds five of twelve tokens, and those."""
    ids = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    cache = Cache(torch.tensor(padding), 12)
    cache.logits(model, ids[:, :5])
    return cache, ids


@pytest.mark.parametrize("name", FOLLOWED)
def test_it_is_bit_for_bit_what_the_modules_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = model_of(**FOLLOWED[name]), torch.tensor([2, 0])
    (cache, ids), (plain, _) = read(model), read(model)
    further = OneToken.of(model, cache)
    wanted = [plain.logits(model, column) for column in ids[:, 5:9].split(1, dim=1)]
    found = [further(ids[:, 5:6])]
    with monkeypatch.context() as patched:
        patched.setattr(TokenModel, "forward", None)  # after the first token no module is called
        found += [further(column) for column in ids[:, 6:9].split(1, dim=1)]
        cache.reorder(order)
        after = further(ids[order, 9:10])
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    plain.reorder(order)
    assert torch.equal(after, plain.logits(model, ids[order, 9:10]))
    assert cache.length == plain.length


@pytest.mark.parametrize("name", LEFT)
def test_what_it_does_not_follow_is_left_to_the_modules(name: str) -> None:
    model = model_of(**LEFT[name])
    assert not isinstance(OneToken.of(model, read(model)[0]), OneToken)


def test_neither_padding_nor_a_hook_is_passed_by() -> None:
    model = model_of()
    assert isinstance(OneToken.of(model, read(model)[0]), OneToken)
    assert not isinstance(OneToken.of(model, read(model, (0, 2, 0))[0]), OneToken)
    model.get_submodule("backbone.layers.1.ff").register_forward_hook(lambda *_: None)
    assert not isinstance(OneToken.of(model, read(model)[0]), OneToken)


def test_where_the_first_token_differs_the_modules_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    (cache, ids), (plain, _) = read(model), read(model)
    step = OneToken._step
    monkeypatch.setattr(OneToken, "_step", lambda self, ids: step(self, ids) * (1 + 1e-6))
    further = OneToken.of(model, cache)
    for column in ids[:, 5:].split(1, dim=1):
        assert torch.equal(further(column), plain.logits(model, column))


def test_a_text_beyond_the_context_is_read_anew() -> None:
    """Where a cache is left no step goes on with it."""
    model = model_of()
    generation = Generation(model, [torch.tensor([3, 1, 4])], Sampling(temperature=0.0))
    text = [3, 1, 4]
    for _ in range(20):
        with torch.no_grad():
            wanted = int(model(torch.tensor([text[-12:]]))[0, -1].argmax())
        [tokens] = generation.step().values()
        assert tokens == [wanted]
        text += tokens
