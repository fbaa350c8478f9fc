"""What is told of a text is what the pass over it did: gates, attention, probabilities."""

from math import e, log
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.attention.attention import CausalAttention
from model.generation.generate import Generation
from model.generation.inspection import inspect, score
from model.generation.sampling import Sampling
from tests.model.helpers import VARIANTS, batch_of, build, open_masks, small, variant


def expected_attentions(config: Any) -> list[str]:
    alone = config.architecture in ("decoder_only", "two_stream")
    encoders = 0 if alone else config.num_encoder_layers * config.recurrence.steps
    encoder = [f"enc_sa/{layer:02d}" for layer in range(encoders)]
    decoder = [f"dec_sa/{layer:02d}" for layer in range(config.depth)]
    cross = [] if alone else [f"cross/{layer:02d}" for layer in range(config.depth)]
    return sorted([*encoder, *decoder, *cross])


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_times_values_are_what_attention_gave(name: str) -> None:
    """In fp32, where the pass takes torch's own kernels: rotary, grouped, both streams at a time."""
    model = open_masks(build(variant(name))).eval()
    ids = batch_of(model.config).input_ids[0]
    calls: list[tuple[Tensor, Tensor]] = []

    def remember(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls.append((inputs[2], output))

    for module in model.modules():
        if isinstance(module, CausalAttention) and module.name:
            module.register_forward_hook(remember)
    weights: dict[str, Tensor] = {}
    inspect(model, ids, weights.__setitem__)
    assert sorted(weights) == expected_attentions(model.config)
    for found, (value, output) in zip(weights.values(), calls, strict=True):
        heads, length = found.shape[0], len(ids)
        assert found.shape == (heads, length, length)
        assert not found.triu(1).any(), "no token sees a later one"
        torch.testing.assert_close(found.sum(-1), torch.ones(heads, length))
        value, output = value[:, :length], output[:, -length:]  # without what only asks, and with it alone
        value = value[0].view(length, -1, output.shape[2] // heads).transpose(0, 1)
        value = value.repeat_interleave(heads // len(value), dim=0)
        again = (found @ value).transpose(0, 1).flatten(1)
        torch.testing.assert_close(again, output[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_densities_and_states_are_those_of_a_plain_pass(name: str) -> None:
    model = open_masks(build(variant(name))).double().eval()
    ids = batch_of(model.config).input_ids[:1]
    with torch.no_grad():
        plain = model.hidden(ids, None)
    found = inspect(model, ids[0])
    torch.testing.assert_close(found.states, plain.x[0], rtol=0, atol=1e-12)
    steps = variant(name).recurrence.steps
    assert len(found.density) == len(plain.statistics) * (1 if "embed" in str(found.density) else steps)
    for mask, told in plain.statistics.items():
        site, layer = mask.split("/")
        of_steps = [found.density[f"{site}/{int(layer) + n * model.config.layers:02d}"] for n in range(steps)]
        assert of_steps[0].shape == (ids.shape[1],)
        if "two_stream" in name:  # whose mean is that of both streams
            continue
        torch.testing.assert_close(torch.stack(of_steps).mean(), told["density"])
    if "everywhere" in name:
        assert any(density.unique().numel() > 3 for density in found.density.values()), "tokens differ"


def test_looking_leaves_nothing_behind() -> None:
    model = open_masks(build(small())).eval()
    ids = torch.arange(12)

    def fail(place: str, weights: Tensor) -> None:
        raise RuntimeError(place)

    with pytest.raises(RuntimeError, match="enc_sa/00"):
        inspect(model, ids, fail)
    assert not any(module._forward_hooks for module in model.modules())
    assert inspect(model, ids[:3]).states.shape == (3, 16)


def test_scores_are_those_of_the_softmax() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 5.0]])
    found = score(logits, torch.tensor([2, 0]), 2)
    assert found.log_probability.tolist() == pytest.approx([1 - log(1 + e + e * e), -log(3)])
    assert found.rank.tolist() == [2, 1]
    assert found.likeliest[0].tolist() == [1, 2]
    assert found.likeliest_log_probability[0, 1] == found.log_probability[0]
    assert score(logits, torch.tensor([2, 0]), 9).likeliest.shape == (2, 3)


def test_what_was_drawn_from_is_told() -> None:
    """With a cache and in a moved window alike, up to rounding of fp64 sums."""
    model = open_masks(build(small())).double().eval()
    prompts = [torch.tensor([3, 1, 4]), torch.tensor([2])]
    generation = Generation(model, prompts, Sampling(temperature=0.0, repetition_penalty=1.1))
    assert not generation.drawn
    texts = [prompt.tolist() for prompt in prompts]
    for step in range(14):
        if step == 5:
            generation.end(0)
        found = generation.step()
        [drawn] = generation.drawn
        assert drawn is not None
        assert dict(zip(drawn.numbers, drawn.tokens.tolist(), strict=True)) == found
        for row, text in enumerate(drawn.numbers):
            if len(texts[text]) <= model.config.context:
                again = model.token_embed(inspect(model, torch.tensor(texts[text])).states[-1:])
                torch.testing.assert_close(drawn.logits[row], again, rtol=0, atol=1e-12)
            assert drawn.present is not None
            assert set(drawn.present[row, 0].nonzero().flatten().tolist()) == set(texts[text])
            texts[text] += found[text]
