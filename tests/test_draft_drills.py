"""What a model that drafts learns from pairs, by all ways to write: lengths, targets of two modes, and real text.

The numbers are in docs/results.md; `pytest -m drill -s tests/test_draft_drills.py` prints them.
"""

import json
import random
import re
import string
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import zstandard
from sacrebleu.metrics import CHRF

from model.architectures.draft_and_verify.two_decoders import ReadSource
from model.generation.drafting import Drafting
from model.generation.sampling import Sampling
from model.generation.target import Passes
from pretrain.export.use import open_trained
from pretrain.inference.continuation import Continuation, Settings
from pretrain.inference.trained import Trained
from tests.corpora import corpora
from tests.runs import duet

pytestmark = pytest.mark.drill

SEEDS = (1, 2, 3)
GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling()
WAYS = {
    "ar": Drafting("ar"),
    "verify": Drafting("verify"),
    "nar": Drafting("nar"),
    "nar of 3 lengths": Drafting("nar", candidates=3),
    **{f"mask_predict {n}": Drafting("mask_predict", n) for n in (2, 4, 10)},
}
REFINES = ("model.draft.refine=true", "model.draft.masking=nat")


class Written(NamedTuple):
    """By one way, for all sources, one after the other."""

    texts: list[str]
    writes: float
    drafts: float
    seconds: float
    """Of this process's own time, for each source."""


def learned(folder: Path, pairs: list[tuple[str, str]], seed: int, *args: str) -> Trained:
    """A model that was trained on pairs of texts, one token a character."""
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"text": s, "target": t}) + "\n" for s, t in pairs))
    data = [f"data.sources.pairs.paths=[{folder / 'pairs.jsonl'}]", "data.sources.pairs.target_key=target"]
    data += ["data.tokenizer.type=char", "data.split.rule=hash", "data.split.fraction=0.02", f"data.path={folder}/data"]
    model = ["model.architecture=draft_and_verify", "model.learned_dropout.enabled=false", "data.objective=pairs"]
    model += ["model.cross_heads=4", "schedule.warmup_steps=50", "engine.precision=fp32", "tracking.mode=off"]
    model += ["train.sample_tokens=0", "train.eval_every=100000", f"run.seed={seed}", f"run.dir={folder / 'run'}"]
    for command in (["data", "build", *data], ["train", *data, *model, *args]):
        done = duet(*command, timeout=7200)
        assert done.returncode == 0, done.stderr
    return open_trained(folder / "run")


def write(trained: Trained, sources: list[str], drafting: Drafting, sampling: Sampling = GREEDY) -> Written:
    texts, passes, since = list[str](), Passes(), time.process_time()
    for number, source in enumerate(sources):
        continuation = Continuation(trained, [source], Settings(sampling, 10_000, seed=number, drafting=drafting))
        for _ in continuation.pieces():
            pass
        assert continuation.passes is not None
        texts += [text.continuation for text in continuation.texts]
        passes += continuation.passes[0]
    count, seconds = len(sources), time.process_time() - since
    return Written(texts, passes.writes / count, passes.drafts / count, seconds / count)


def told(what: str, seed: int, **numbers: Any) -> None:
    print(json.dumps({"drill": what, "seed": seed} | numbers))


@pytest.mark.parametrize("seed", SEEDS)
def test_lengths_of_doubled_letters_are_known(tmp_path: Path, seed: int) -> None:
    chance = random.Random(7)
    words = ["".join(chance.choices("abcdefghijkl", k=chance.randint(1, 11))) for _ in range(20_000)]
    pairs = [(word, "".join(letter * 2 for letter in word)) for word in words]
    shape = ["model.layers=2", "model.width=64", "model.context=24", "batch.tokens=1536", "train.steps=600"]
    trained = learned(tmp_path, pairs, seed, *shape, "optimizer.lr=2e-3")
    new = ["".join(chance.choices("abcdefghijkl", k=chance.randint(1, 11))) for _ in range(300)]
    model: Any = trained.model
    right = 0
    for ids, word in zip(trained.tokenizer.encode(new), new, strict=True):
        source = torch.tensor([[*ids.tolist(), trained.tokenizer.eos_id]])
        with torch.no_grad():
            [memory] = model(ReadSource(source, [source.shape[1]]))
        right += 1 + int(memory.lengths.argmax()) == 2 * len(word) + 1
    wanted = ["".join(letter * 2 for letter in word) for word in new]
    found = {name: write(trained, new, WAYS[name]) for name in ("ar", "verify", "nar")}
    exact = {name: sum(map(str.__eq__, its.texts, wanted)) / len(new) for name, its in found.items()}
    told("doubling", seed, lengths=right / len(new), writes=found["verify"].writes, **exact)
    assert found["verify"].texts == found["ar"].texts
    assert right >= 0.99 * len(new)


@pytest.mark.parametrize("seed", SEEDS)
def test_targets_of_two_modes_are_of_one(tmp_path: Path, seed: int) -> None:
    """8 letters become 16 by one of two tables, by chance; a text with letters of both is of neither."""
    chance = random.Random(5)
    letters = (string.ascii_uppercase[:16], string.digits + "!?#$%&")
    tables = [{c: "".join(chance.choices(some, k=2)) for c in string.ascii_lowercase[:16]} for some in letters]

    def drawn() -> str:
        return "".join(chance.choices(string.ascii_lowercase[:16], k=8))

    pairs = []
    for word in (drawn() for _ in range(30_000)):
        table = chance.choice(tables)
        pairs.append((word, "".join(table[c] for c in word)))
    shape = ["model.layers=2", "model.width=64", "model.context=20", "batch.tokens=1280", "train.steps=450"]
    trained = learned(tmp_path, pairs, seed, *shape, "optimizer.lr=2e-3")
    new = [drawn() for _ in range(200)]

    def share(written: Written) -> float:
        rows = zip(new, written.texts, strict=True)
        return sum(any(text == "".join(t[c] for c in word) for t in tables) for word, text in rows) / len(new)

    found = {name: write(trained, new, drafting) for name, drafting in WAYS.items()}
    sampled = {f"{name} sampled": write(trained, new, WAYS[name], SAMPLED) for name in ("ar", "verify", "nar")}
    valid = {name: share(written) for name, written in (found | sampled).items()}
    told("two modes", seed, writes=found["verify"].writes, **valid)
    assert found["verify"].texts == found["ar"].texts
    assert found["verify"].writes < 17 / 2
    assert valid["nar sampled"] < 0.1 < 0.9 < min(valid["mask_predict 10"], valid["verify"])


def sentences(file: str) -> list[str]:
    """Short ones of the English novels, each once, in any order."""
    found = set[str]()
    with zstandard.open(corpora(f"eltec/{file}"), "rt", encoding="utf-8") as chapters:
        for chapter in chapters:
            found |= set(re.findall(r"(?<=[.!?] )[A-Z][A-Za-z ,;:'\"-]{2,21}[.!?]", json.loads(chapter)["text"]))
    return random.Random(0).sample(sorted(found), len(found))


@pytest.mark.parametrize("seed", SEEDS)
def test_case_and_punctuation_of_real_sentences_are_restored(tmp_path: Path, seed: int) -> None:
    """Small letters and spaces become the sentence; 200 sentences of other novels, that no novel trained on has."""
    known = sentences("eng.train.jsonl.zst")
    wanted = [sentence for sentence in sentences("eng.valid.jsonl.zst") if sentence not in set(known)][:200]

    def stripped(sentence: str) -> str:
        return "".join(c for c in sentence.lower() if c.isalpha() or c == " ")

    shape = ["model.layers=2", "model.width=64", "model.context=26", "batch.tokens=1664", "train.steps=800"]
    pairs, args = [(stripped(sentence), sentence) for sentence in known], [*shape, "optimizer.lr=3e-3"]
    drafts = learned(tmp_path / "drafts", pairs, seed, *args)
    refines = learned(tmp_path / "refines", pairs, seed, *args, *REFINES)
    sources = [stripped(sentence) for sentence in wanted]
    found = {name: write(drafts, sources, drafting) for name, drafting in WAYS.items()}
    found["refine"] = write(refines, sources, Drafting("refine"))
    chrf = {name: CHRF().corpus_score(its.texts, [wanted]).score for name, its in found.items()}
    untouched = CHRF().corpus_score(sources, [wanted]).score
    told("sentences", seed, chrf_of_sources=untouched)
    for name, its in found.items():
        right = sum(map(str.__eq__, its.texts, wanted)) / len(wanted)
        share = its.seconds / found["ar"].seconds
        told(name, seed, chrf=chrf[name], right=right, time=share, drafts=its.drafts, writes=its.writes)
    assert found["verify"].texts == found["ar"].texts
    assert min(chrf["verify"], chrf["refine"]) > chrf["nar of 3 lengths"] > chrf["nar"] > untouched
