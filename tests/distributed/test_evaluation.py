"""Validation by source: the same on any ranks, and what one gets who looks at each label by itself."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from model.batch import IGNORE
from pretrain.evaluation.batches import Batches
from pretrain.evaluation.part import choose, shares
from tests.distributed.evaluation_cases import opened
from tests.runs import SMALL

Ranks = Callable[..., list[Any]]
LETTERS = {"wide": "abcdefgh", "tiny": "0123", "middle": "ABCDEF", "last": "αβγ"}
"""What each source is written with: a token tells where it is from."""
SIZES = {"wide": 6000, "tiny": 60, "middle": 1500, "last": 90}
"""Characters, of which a tenth is held out. A window has 16: `tiny` fills none, and of `last` there is but a part."""
ENCODER_DECODER = "model.architecture=encoder_decoder"
RUNS = {
    "causal": [],
    "packed": ["data.packing=best_fit", "model.document_mask=true"],
    "prefix": ["data.objective=prefix"],
    "masked": ["data.objective=masked", "model.architecture=encoder_only"],
    "spans": ["data.objective=span_corruption", ENCODER_DECODER],
    "pairs": ["data.objective=pairs", ENCODER_DECODER],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Arguments of the runs: their dataset is one of texts, or of pairs."""
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("sources")
    tokenizer = {"type": "char", "user_defined_symbols": ["<mask>"], "sentinels": 4}
    for kind in ("texts", "pairs"):
        sources: dict[str, Any] = {}
        for name, letters in LETTERS.items():
            text = "".join(rng.choice(list(letters), SIZES[name]))
            parts = [text[first : first + 30] for first in range(0, len(text), 30)]
            lines = [{"text": part, "target": part[:9]} for part in parts]
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            sources[name] = {"paths": [str(path)], **({"target_key": "target"} if kind == "pairs" else {})}
        split = {"rule": "tail" if kind == "texts" else "hash", "fraction": 0.1 if kind == "texts" else 0.4}
        settings = {"path": str(folder / kind), "sources": sources, "tokenizer": tokenizer, "split": split}
        build(DataConfig.model_validate(settings | {"shard_tokens": 1024}))
    return {
        name: [*SMALL, f"data.path={folder / ('pairs' if name == 'pairs' else 'texts')}", *more]
        for name, more in RUNS.items()
    }


@pytest.fixture(scope="module")
def found(ranks: Ranks, runs: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """What one rank finds, by run."""
    [results] = ranks("tests.distributed.evaluation_cases:validate", 1, runs=list(runs.values()))
    return dict(zip(runs, results, strict=True))


def by_letters(dataset: Dataset, rows: np.ndarray, follow: bool) -> np.ndarray:
    """Number of the source of each token in windows, -1 where none is.

    End-of-text is of the document that it ends; where rows `follow` each other that may be in the row before.
    """
    tokenizer, names = dataset.tokenizer(), list(LETTERS)
    source = np.full(dataset.manifest.tokenizer.vocab_size, -1)
    for number, name in enumerate(names):
        for letter in LETTERS[name]:
            source[tokenizer.encode([letter])[0]] = number
    which = np.where(rows < 0, -1, source[rows])
    for row, column in np.argwhere(rows == tokenizer.eos_id):
        assert column or follow
        which[row, column] = which[row, column - 1] if column else which[row - 1, -1]
    assert ((which >= 0) == (rows >= 0)).all()
    return which


def expected(args: list[str], number: int | None = None) -> tuple[dict[str, float], dict[str, int]]:
    """Loss, and labels, of each source, in so many windows or in all: a forward pass for each, in which the labels of
    the others do not count."""
    config, dataset, windows, model = opened(args)
    assert [*windows.sources] == list(LETTERS)
    numbers = np.arange(len(windows))
    which = by_letters(dataset, windows.read(numbers), isinstance(windows, Windows))
    assert np.array_equal(windows.sources_of(numbers)[which >= 0], which[which >= 0])
    if part := choose(windows, number, dataset):
        numbers, which = part.windows, which[part.windows]
        assert len(numbers) == number
    batch = Batches.of(config, dataset, torch.device("cpu")).of_validation(windows, numbers)
    objective = config.data.objective
    if objective in ("pairs", "span_corruption"):
        which = np.repeat(which[:, :1], batch.labels.shape[1], axis=1)
    else:
        which = which[:, :-1] if objective == "masked" else which[:, 1:]
    losses, counts = {}, {}
    for source, name in enumerate(LETTERS):
        labels = batch.labels.masked_fill(torch.from_numpy(which != source), IGNORE)
        if count := int((labels != IGNORE).sum()):
            with torch.no_grad():
                losses[name] = float(model(replace(batch, labels=labels)).loss)
            counts[name] = count
    assert sum(counts.values()) == int((batch.labels != IGNORE).sum())
    return losses, counts


def check(found: dict[str, float], losses: dict[str, float], counts: dict[str, int]) -> None:
    """Every source's loss is its labels', and the total their mean."""
    parts = {name.removeprefix("loss/val/"): loss for name, loss in found.items() if name.startswith("loss/val/")}
    assert parts == pytest.approx(losses, rel=1e-6)
    mean = sum(losses[name] * count for name, count in counts.items()) / sum(counts.values())
    assert found["loss/val"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_a_sources_loss_is_that_of_its_labels_and_the_total_their_mean(
    runs: dict[str, list[str]], found: dict[str, dict[str, float]], name: str
) -> None:
    losses, counts = expected(runs[name])
    if name not in ("spans", "masked"):  # these have few labels
        assert losses.keys() == LETTERS.keys()
    assert max(losses.values()) - min(losses.values()) > 0.01
    check(found[name], losses, counts)


def test_bits_per_byte_of_the_sources_make_up_those_of_the_text(
    runs: dict[str, list[str]], found: dict[str, dict[str, float]]
) -> None:
    _, dataset, _, _ = opened(runs["causal"])
    size = {source.name: source.split_bytes["validation"] for source in dataset.manifest.sources}
    assert size["tiny"] == 6 and size["last"] == 2 * 9
    losses, counts = expected(runs["causal"])
    bits = {name: found["causal"][f"loss/val_bits_per_byte/{name}"] for name in LETTERS}
    assert bits == pytest.approx(
        {name: losses[name] * counts[name] / math.log(2) / size[name] for name in LETTERS}, rel=1e-6
    )
    whole = sum(bits[name] * size[name] for name in LETTERS) / dataset.manifest.splits["validation"].bytes
    assert found["causal"]["loss/val_bits_per_byte"] == pytest.approx(whole, rel=1e-6)
    assert not any("bits" in name for run in found if run != "causal" for name in found[run])


def test_two_ranks_find_the_same_of_every_source(
    ranks: Ranks, runs: dict[str, list[str]], found: dict[str, dict[str, float]]
) -> None:
    [results, others] = ranks("tests.distributed.evaluation_cases:validate", 2, runs=list(runs.values()))
    assert results == others
    for name, metrics in zip(runs, results, strict=True):
        assert metrics == pytest.approx(found[name], abs=1e-6), name


def test_three_ranks_with_uneven_shares_of_windows_and_of_the_model_do_too(
    ranks: Ranks, runs: dict[str, list[str]], found: dict[str, dict[str, float]]
) -> None:
    partitioned = [*runs["causal"], "engine.zero_stage=3", "batch.tokens=192"]
    results = ranks("tests.distributed.evaluation_cases:validate", 3, runs=[partitioned, runs["packed"]])
    assert results == [results[0]] * 3
    for name, metrics in zip(("causal", "packed"), results[0], strict=True):
        assert metrics == pytest.approx(found[name], abs=1e-6), name


def test_the_proof_fails_for_a_mean_in_which_ranks_count_alike(ranks: Ranks, runs: dict[str, list[str]]) -> None:
    args = runs["causal"]
    [[metrics], _] = ranks("tests.distributed.evaluation_cases:validate", 2, runs=[args], unweighted=True)
    with pytest.raises(AssertionError):
        check(metrics, *expected(args))


def test_a_part_is_the_same_windows_of_every_source_and_is_told_of_beside_the_whole(
    ranks: Ranks, runs: dict[str, list[str]], found: dict[str, dict[str, float]]
) -> None:
    kinds, number = ["causal", "packed", "masked", "pairs"], 9
    case, given = "tests.distributed.evaluation_cases:validate", [runs[kind] for kind in kinds]
    [parts] = ranks(case, 1, runs=given, number=number, whole=False)
    [others, _] = ranks(case, 2, runs=given, number=number, whole=False)
    [wholes, _] = ranks(case, 2, runs=given, number=number)
    for kind, part, other, whole in zip(kinds, parts, others, wholes, strict=True):
        losses, counts = expected(runs[kind], number)
        check(part, losses, counts)
        assert other == pytest.approx(part, abs=1e-6)
        assert whole.pop("loss/val_part") == pytest.approx(part["loss/val"], abs=1e-6)
        assert whole == pytest.approx(found[kind], abs=1e-6)
        if kind in ("causal", "pairs"):
            assert losses.keys() == LETTERS.keys(), "also of those that are small"
        if kind == "causal":
            _, dataset, _, _ = opened(runs[kind])
            tokens = {source.name: source.tokens["validation"] for source in dataset.manifest.sources}
            size = {s.name: s.split_bytes["validation"] * counts[s.name] for s in dataset.manifest.sources}
            bits = sum(losses[name] * counts[name] for name in LETTERS) / math.log(2)
            mean = bits / sum(size[name] / tokens[name] for name in LETTERS)
            assert part["loss/val_bits_per_byte"] == pytest.approx(mean, rel=2 / sum(tokens.values()))


def test_shares_are_in_proportion_and_leave_nobody_out() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        sizes = rng.integers(0, 50, rng.integers(1, 8))
        number = int(rng.integers(0, sizes.sum() + 1))
        given = shares(sizes, number) if sizes.sum() else sizes
        filled = np.count_nonzero(sizes)
        assert given.sum() == (number if sizes.sum() else 0) and (given <= sizes).all() and (given >= 0).all()
        if number >= filled:
            assert np.count_nonzero(given) == filled
        if sizes.sum():
            assert (np.abs(given - number * sizes / sizes.sum()) <= max(1, filled)).all()
