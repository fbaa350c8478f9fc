"""What one decoder drafts and the other verifies is what the latter would have written alone."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from model.architectures.draft_and_verify.rollback import RollbackCache
from model.architectures.draft_and_verify.two_decoders import MakeDraft, ReadSource, WriteOn
from model.batch import IGNORE, Batch
from model.generation import writing as writing_module
from model.generation.drafting import Drafting
from model.generation.generate import generate
from model.generation.sampling import Sampling
from model.generation.target import Passes, Target
from model.generation.writing import Writing
from tests.model.helpers import VOCABULARY, build, open_masks, small

EOS = 0
STEPS = 120
GREEDY = Sampling(temperature=0.0)
_EVERYWHERE = ["enc_ff", "dec_ff", "enc_sa", "dec_sa", "cross", "embed", "draft_ff", "draft_sa", "draft_cross"]
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"learned_dropout": {"enabled": False}, "bias": True},
    "masks": {"learned_dropout": {"sites": _EVERYWHERE, "eval_rounding": "sample"}, "positions": "sinusoidal"},
    "one source": {"learned_dropout": {"source": "embed"}, "positions": "rotary", "kv_heads": 1, "cross_heads": 2},
    "shared": {"draft": {"share": True}, "norm_position": "post", "decoder_order": "cross_self_ff"},
    "window": {"pattern": {"kind": "window", "window": 2, "sinks": 1}, "attention": "explicit", "norm": "rmsnorm"},
    "strided": {"pattern": {"kind": "strided", "stride": 3, "merge": "alternate"}, "draft": {"layers": 3}},
    "spans": {"weights": {"kind": "adaptive_span", "span_init": 0.2, "ramp": 2}, "learned_dropout": {"enabled": False}},
    "entmax": {"weights": {"kind": "entmax", "alpha": 1.7}, "learned_dropout": {"enabled": False}},
    "synthesizer": {
        "scores": {"kind": "synthesizer", "parts": ["dot", "dense"]},
        "learned_dropout": {"enabled": False},
    },
    "linformer": {"scores": {"kind": "linformer", "slots": 4}, "learned_dropout": {"enabled": False}},
    "routing": {"scores": {"kind": "routing", "clusters": 2}, "learned_dropout": {"enabled": False}},
    "gates": {
        "block_gates": {"kind": "top", "blocks": 4, "density": 0.5},
        "learned_dropout": {"sites": ["draft_ff"], "eval_rounding": "none"},
    },
}


def model_of(seed: int = 0, **changes: Any) -> Any:
    model: Any = open_masks(build(small("draft_and_verify", **changes), seed)).double().eval()
    with torch.no_grad():
        for parameter_name, weights in model.named_parameters():  # else each token is the one before it
            if parameter_name.endswith(("out.weight", "down", "down.weight")):
                weights.mul_(40.0)
    return model


def sources(count: int, seed: int = 0, most: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def written(model: Any, prompts: Sequence[Tensor], drafting: Drafting, **options: Any) -> tuple[list[Any], Writing]:
    """All tokens of each target, and what made them."""
    given: dict[str, Any] = {"sampling": GREEDY, "continues": False} | options
    writing = Writing(model, prompts, eos_id=EOS, drafting=drafting, **given)
    found: dict[int, list[int]] = defaultdict(list)
    for _ in range(40):
        for number, tokens in writing.step().items():
            found[number] += tokens
    return [found[number] for number in range(len(prompts))], writing


@torch.no_grad()
def without_cache(model: Any, source: Tensor, most: int) -> list[int]:
    """The likeliest tokens, all of the text read again for each."""
    read, done = torch.cat([source, torch.tensor([EOS])])[: model.config.context][None], [EOS]
    zero = torch.zeros(1, dtype=torch.int64)
    while len(done) <= most and (done == [EOS] or done[-1] != EOS):
        ids = torch.tensor([done])
        done.append(
            int(model.predict(read, None, Batch(read, ids, zero, zero[0], 0, decoder_input_ids=ids))[0, -1].argmax())
        )
    return [token for token in done if token != EOS]


@pytest.mark.parametrize("name", MODELS)
def test_verified_drafts_are_what_would_be_written_without_them(name: str) -> None:
    """Of any weights."""
    prompts, told = sources(6), set[int]()
    for seed in range(2):
        model = model_of(seed, **MODELS[name])
        verified, writing = written(model, prompts, Drafting("verify"))
        alone, other = written(model, prompts, Drafting("ar"))
        assert verified == alone == [without_cache(model, prompt, 12) for prompt in prompts]
        told |= {token for text in alone for token in text}
        for text, mine, its in zip(verified, writing.passes, other.passes, strict=True):
            assert mine.writes == mine.drafts <= its.writes <= len(text) + 1
            assert its == Passes(1, 0, its.writes)
    assert len(told) > 5, "they write many tokens"


class Choices:
    """In the place of chance: goes through all that can be drawn, one way each time, and knows its probability."""

    def __init__(self) -> None:
        self._way: list[int] = []
        self._left: list[list[int]] = []

    def ways(self, write: Callable[[], object]) -> Iterator[tuple[object, float]]:
        while True:
            self._at, self._probability = 0, 1.0
            found = write()
            yield found, self._probability
            while self._left and not self._left[-1]:
                self._left.pop()
                self._way.pop()
            if not self._left:
                return
            self._way[-1] = self._left[-1].pop()

    def draw(self, target: object, probabilities: Tensor) -> int:
        if self._at == len(self._way):
            first, *others = probabilities.nonzero().flatten().tolist()
            self._way.append(first)
            self._left.append(others)
        token = self._way[self._at]
        self._probability *= float(probabilities[token])
        self._at += 1
        return token


@pytest.mark.parametrize(
    ("sampling", "share"), [(Sampling(temperature=0.7), False), (Sampling(1.3, 0.9, top_k=2, min_p=0.1), True)]
)
def test_sampled_texts_have_the_probabilities_that_they_have_without_drafts(
    sampling: Sampling, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way that chance can take, with its exact probability: three tokens, texts of up to three."""
    model = model_of(vocab_size=3, context=3, draft={"share": share}, learned_dropout={"enabled": False})
    found: dict[str, dict[Any, float]] = {}
    drafted = 0
    for way in ("ar", "verify"):
        choices = Choices()
        monkeypatch.setattr(Target, "draw", lambda target, p, own=choices: own.draw(target, p))
        found[way] = defaultdict(float)
        for text, probability in choices.ways(
            lambda way=way: written(model, [torch.tensor([2, 1])], Drafting(way), sampling=sampling)[0][0]  # type: ignore[misc]
        ):
            found[way][tuple(text)] += probability  # type: ignore[arg-type]
            drafted += way == "verify"
    assert sum(found["ar"].values()) == pytest.approx(1.0)
    assert drafted > 3 * len(found["ar"]) > 12
    assert found["verify"] == pytest.approx(found["ar"], abs=1e-6)


def test_a_cache_that_was_cut_is_as_one_that_never_was_longer() -> None:
    model = model_of(**MODELS["masks"])
    [memory] = model(ReadSource(torch.tensor([[3, 1, 4]]), [3]))
    found = []
    for tokens in ([EOS, 5, 7, 9], [EOS, 5, 11]):
        cache = RollbackCache(1, 12, torch.device("cpu"))

        def write(ids: list[int], cache: RollbackCache = cache) -> Tensor:
            asked = WriteOn(memory.writing, torch.tensor([ids]), cache, [0], [len(ids)], torch.arange(len(ids)))
            logits: Tensor = model(asked)
            return logits

        with torch.no_grad():
            for token in tokens:
                write([token])
            cache.truncate(0, 2)
            found.append(write([8, 2]))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="13 tokens do not fit a cache of 12"):
        write([1] * 9)


@torch.no_grad()
def test_places_are_filled_in_at_once_or_the_certain_ones_first() -> None:
    model = model_of(**MODELS["plain"])
    prompt = torch.tensor([3, 1, 4, EOS])
    [memory] = model(ReadSource(prompt[None], [4]))
    length = 1 + int(memory.lengths.argmax())
    ids, hidden = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, length).bool()
    logits, _ = model(MakeDraft(memory.drafting, ids, hidden, torch.arange(length)))
    [at_once], writing = written(model, [prompt], Drafting("nar"))
    expected = logits.argmax(-1).tolist()
    assert at_once == expected[: expected.index(EOS) if EOS in expected else length]
    assert written(model, [prompt], Drafting("mask_predict", 1))[0] == [at_once]
    assert writing.passes == [Passes(1, 1, 0)]
    _, writing = written(model, [prompt], Drafting("mask_predict", 3))
    assert writing.passes == [Passes(1, min(3, length), 0)]
    tried = memory.lengths.topk(4).indices.tolist()
    _, writing = written(model, [prompt], Drafting("nar", candidates=4))
    assert len(set(tried)) == 4 and writing.passes == [Passes(1, 4, 4)]


@torch.no_grad()
def test_the_likeliest_of_several_lengths_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(**MODELS["plain"])
    for prompt in sources(2):
        [taken], _ = written(model, [prompt], Drafting("nar", candidates=12))
        ids = torch.cat([prompt, torch.tensor([EOS])])[:12]
        scores = {}
        for length in range(1, 13):
            own = (torch.arange(12) == length - 1).double()
            with monkeypatch.context() as patch:
                patch.setattr(model.backbone, "lengths", lambda read, padding, own=own: own[None])
                [text], _ = written(model, [prompt], Drafting("nar"))
            text = [*text, EOS][:12]
            read = torch.tensor([[EOS, *text[:-1]]])
            zero = torch.zeros(1, dtype=torch.int64)
            batch = Batch(ids[None], read, zero, zero[0], 0, decoder_input_ids=read)
            nats = model.predict(ids[None], None, batch)[0].float().log_softmax(-1)
            own = nats.gather(-1, torch.tensor(text)[:, None])
            scores[tuple(token for token in text if token != EOS)] = float(own.sum())
        assert tuple(taken) == max(scores, key=lambda text: scores[text])


@pytest.mark.parametrize(
    ("name", "drafting", "sampling", "continues"),
    [
        ("masks", Drafting("verify"), Sampling(1.5, 0.9), False),
        ("strided", Drafting("verify"), Sampling(1.5, 0.9), True),
        ("spans", Drafting("nar", candidates=3), GREEDY, False),
        ("one source", Drafting("mask_predict", 4), Sampling(repetition_penalty=1.3), False),
        ("refine", Drafting("refine"), Sampling(), True),
    ],
)
def test_texts_side_by_side_are_as_each_alone_and_share_their_passes(
    name: str, drafting: Drafting, sampling: Sampling, continues: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing_module, "MOST", 4)
    refines = {"draft": {"refine": True, "masking": "nat"}, "learned_dropout": {"enabled": False}}
    model = model_of(2, **MODELS.get(name, refines))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    prompts, found, counts = sources(6), [], []
    for sides in (1, 6):
        together: list[Any] = []
        for first in range(0, 6, sides):
            some = slice(first, first + sides)
            chances = [torch.Generator().manual_seed(number) for number in range(6)[some]]
            texts, writing = written(
                model, prompts[some], drafting, sampling=sampling, continues=continues, generators=chances
            )
            together += zip(texts, writing.passes, strict=True)
        found.append(together)
        counts.append(len(calls))
    assert found[0] == found[1] and len({len(text) for text, _ in found[0]}) > 1 - continues
    assert counts[1] - counts[0] < 0.75 * counts[0]


def test_a_model_that_knows_its_targets_needs_few_passes() -> None:
    """Each token of a source twice, of 16 sources that are learned by heart; the drill has any."""
    prompts = sources(16, seed=5, most=5)
    read, labels = torch.full((16, 6), EOS), torch.full((16, 11), IGNORE)
    padding = torch.ones(16, 6, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        read[row, : len(prompt)] = prompt
        padding[row, : len(prompt) + 1] = False
        labels[row, : 2 * len(prompt) + 1] = torch.cat([prompt.repeat_interleave(2), torch.tensor([EOS])])
    start = torch.full((16, 1), EOS)
    batch = Batch(
        read,
        labels,
        torch.arange(16),
        torch.tensor(0),
        0,
        padding=padding,
        segment_ids=-padding.int(),
        decoder_input_ids=torch.cat([start, labels[:, :-1].clamp(min=0)], 1),
    )
    model: Any = build(small("draft_and_verify", width=32, heads=4, cross_heads=4, learned_dropout={"enabled": False}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        output = model(replace(batch, step=torch.tensor(step)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    model.eval()
    texts, writing = written(model, prompts, Drafting("verify"))
    assert texts == [prompt.repeat_interleave(2).tolist() for prompt in prompts]
    assert texts == written(model, prompts, Drafting("ar"))[0]
    tokens = sum(len(text) + 1 for text in texts)
    assert sum(passes.writes for passes in writing.passes) < tokens / 2
    writing = Writing(model, prompts, GREEDY, eos_id=EOS, continues=False)
    writing.step()
    for drawn in writing.drawn:
        assert drawn.drafts is not None
        kept = [own == its for own, its in zip(drawn.tokens[0].tolist(), drawn.drafts[0].tolist(), strict=True)]
        assert all(kept[:-1]), "what differs was corrected, and is the last of its step"


def test_a_text_goes_on_by_chunks_that_read_what_is_there() -> None:
    model = model_of(3, draft={"chunk": 4}, learned_dropout={"enabled": False})
    prompt = torch.tensor([3, 1, 4])
    [verified], _ = written(model, [prompt], Drafting("verify"), continues=True)
    [alone], _ = written(model, [prompt], Drafting("ar"), continues=True)
    assert len(alone) > 12 and verified[: len(alone)] == alone[: len(verified)]
    text = prompt.tolist()
    for _ in range(3):
        read = torch.tensor([*text])[-12:]
        zero, done = torch.zeros(1, dtype=torch.int64), [EOS]
        for _ in range(4):
            ids = torch.tensor([done])
            batch = Batch(read[None], ids, zero, zero[0], 0, decoder_input_ids=ids)
            done.append(int(model.predict(read[None], None, batch)[0, -1].argmax()))
        text += done[1:]
    assert text[3:] == alone[:12]
    assert list(generate(model, prompt, GREEDY, max_new_tokens=9, eos_id=EOS)) == alone[:9]


@torch.no_grad()
def test_refined_texts_are_written_with_the_draft_in_view() -> None:
    model = model_of(1, draft={"refine": True, "masking": "nat"}, learned_dropout={"enabled": False})
    for prompt in sources(4):
        [found], writing = written(model, [prompt], Drafting("refine"))
        ids, done = torch.cat([prompt, torch.tensor([EOS])])[:12][None], [EOS]
        length = 1 + int(model(ReadSource(ids, [ids.shape[1]]))[0].lengths.argmax())
        zero = torch.zeros(1, dtype=torch.int64)
        while len(done) <= 12 and (done == [EOS] or done[-1] != EOS):
            # Labels only say how long the draft is, and so what is read by as many places as it has.
            batch = Batch(ids, torch.ones(1, length, dtype=torch.int64), zero, zero[0], 0)
            batch = replace(batch, decoder_input_ids=torch.tensor([done]))
            done.append(int(model.predict(ids, None, batch)[0, -1].argmax()))
        assert found == [token for token in done if token != EOS]
        assert writing.passes[0].drafts == 1


@pytest.mark.parametrize(
    ("draft", "drafting", "message"),
    [
        ({}, Drafting("greedy"), "decode=greedy: draft_and_verify writes by verify, ar, nar"),
        ({}, Drafting("refine"), "trained with draft.refine=true; take verify"),
        ({"refine": True, "masking": "nat"}, Drafting("verify"), "reads the draft's vectors.*take refine, nar"),
        ({"refine": True, "masking": "nat"}, Drafting("nar", candidates=2), "judged by a decoder that does not read"),
        ({}, Drafting("verify", candidates=2), "lengths are tried by nar and mask_predict"),
        ({}, Drafting("mask_predict", iterations=0), "iterations=0; it is 1 or more"),
    ],
)
def test_ways_that_a_model_does_not_write_in_are_refused(draft: Any, drafting: Drafting, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        written(model_of(draft=draft), [torch.tensor([1])], drafting)
