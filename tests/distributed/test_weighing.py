"""What is learned and what is told of it do not depend on how a batch is split: into micro-batches, over ranks."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
from tests.runs import ROOT, SMALL

Ranks = Callable[..., list[Any]]
Found = dict[str, float]
CASE = "tests.distributed.weighing_cases:learn"
MASKED = ["data.objective=masked", "model.architecture=encoder_only"]
TWO_SEQUENCES = ["model.architecture=encoder_decoder", "model.learned_dropout.sites=[enc_ff,dec_ff,dec_sa,cross,embed]"]
DRAFTS = ["model.architecture=draft_and_verify", "model.learned_dropout.enabled=false"]
PACKED = "data.packing=best_fit"
WINDOW = ["model.pattern.kind=window", "model.pattern.window=4", "model.pattern.sinks=1"]
TURNS = ["model.pattern.kind=strided", "model.pattern.stride=2", "model.pattern.merge=alternate", "model.layers=2"]
RUNS = {
    "causal": ["model.encoder_loss.kind=mse", "model.z_loss=0.01", "model.label_smoothing=0.1", "model.dropout=0.1"],
    "boundaries": ["data.mask_boundaries=true", "model.architecture=decoder_only", "model.z_loss=0.01"],
    "packed": [PACKED, *TURNS, "model.encoder_loss.kind=mse", "engine.activation_checkpointing=true"],
    "documents": [PACKED, *WINDOW, "model.document_mask=true", "model.encoder_loss.kind=log_cosine"],
    "prefix": ["data.objective=prefix", "model.learned_dropout.enabled=false", "model.l0.enabled=true"],
    "masked": [*MASKED, "model.label_smoothing=0.1"],
    "masked packed": [*MASKED, PACKED, "model.learned_dropout.sites=[enc_ff,enc_sa,embed]"],
    "spans": ["data.objective=span_corruption", *TWO_SEQUENCES],
    "pairs": ["data.objective=pairs", *TWO_SEQUENCES, "model.z_loss=0.01"],
    "drafts of pairs": ["data.objective=pairs", *DRAFTS],
    "drafts": ["data.objective=continuation", *DRAFTS, "model.draft.masking=glat", "model.draft.share=true"],
    "joined pairs": ["data.objective=pairs", "model.encoder_loss.kind=cosine", "model.learned_dropout.source=embed"],
}
STAGES, WORLDS, MICRO_BATCHES = (0, 1, 2, 3), (1, 2, 3), (1, 2, 4)
SABOTAGES = {
    "weights": ["boundaries", "documents", "prefix", "masked", "pairs"],
    "tokens": ["packed", "pairs", "joined pairs"],
    "moments": ["causal", "documents"],
}
"""By what is left out, the runs that must show it."""
EVERY_WAY = list(product(STAGES, WORLDS, MICRO_BATCHES))


def some_ways(first: int) -> list[tuple[int, int, int]]:
    """One for each stage; each world and micro-batch is among them, and over several `first` each pair of values is."""
    return [
        (stage, WORLDS[(stage + first) % 3], MICRO_BATCHES[(stage + (first + 2 * (stage // 3)) // 3 + 2 * first) % 3])
        for stage in STAGES
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Arguments of the runs: short documents and long ones, or pairs whose targets have a word or many."""
    folder = uneven_texts(tmp_path_factory.mktemp("uneven"))
    paths = {name: folder / ("pairs" if "pairs" in name else "texts") for name in RUNS}
    return {name: [*SMALL, "batch.tokens=384", f"data.path={paths[name]}", *RUNS[name]] for name in RUNS}


def uneven_texts(folder: Path) -> Path:
    """Datasets `texts` and `pairs` in a folder."""
    rng = np.random.default_rng(3)
    tokenizer = {"type": "char", "user_defined_symbols": ["<mask>"], "sentinels": 4}
    for kind, key in (("texts", {}), ("pairs", {"target_key": "target"})):
        lengths = rng.choice([2, 3, 5, 14], 1200)
        words = ["".join(rng.choice(list("abcdefgh"), length)) for length in lengths]
        lines = [{"text": word, "target": rng.choice(["a", "abcdefghabcde"])} for word in words]
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sources = {"one": {"paths": [str(path)], **key}}
        split = {"rule": "tail" if kind == "texts" else "hash", "fraction": 0.05}
        settings = {"path": str(folder / kind), "sources": sources, "tokenizer": tokenizer, "split": split}
        build(DataConfig.model_validate(settings))
    return folder


def compare(
    ranks: Ranks, runs: dict[str, list[str]], ways: Mapping[str, Sequence[tuple[int, ...]]], **more: Any
) -> dict[str, tuple[float, str]]:
    """Of each run the largest difference between two of its ways, relative to the value or to 1, and of what.

    A way: stage, ranks, micro-batch, and how many ranks share each sequence, one unless given.
    """
    found: dict[str, list[Found]] = {name: [] for name in ways}
    keys = ("engine.zero_stage", "world", "batch.micro_batch", "engine.sequence_parallel")
    for world in sorted({way[1] for wanted in ways.values() for way in wanted}):
        args = [
            (name, [*runs[name], *(f"{key}={value}" for key, value in zip(keys, way, strict=False) if key != "world")])
            for name, wanted in ways.items()
            for way in wanted
            if way[1] == world
        ]
        results = ranks(CASE, world, runs=[its for _, its in args], timeout=1800, **more)
        assert results == [results[0]] * world, "ranks tell the same"
        for (name, _), result in zip(args, results[0], strict=True):
            found[name].append(result)
    return {name: worst(results) for name, results in found.items()}


def worst(results: list[Found]) -> tuple[float, str]:
    """The largest difference of a number from that of the first, relative to the number or to 1."""
    first = results[0]
    assert all(result.keys() == first.keys() for result in results)
    assert all(math.isfinite(value) for result in results for value in result.values())
    return max((abs(r[name] - first[name]) / max(1.0, abs(first[name])), name) for r in results for name in first)


def worse(found: dict[str, tuple[float, str]], than: float = 1e-6) -> dict[str, tuple[float, str]]:
    """Those that differ by more."""
    return {name: difference for name, difference in found.items() if difference[0] > than}


def test_the_chosen_ways_hold_each_pair_of_values() -> None:
    ways = [(number, *way) for number in range(len(RUNS)) for way in some_ways(number)]
    values = (range(len(RUNS)), STAGES, WORLDS, MICRO_BATCHES)
    for one, other in combinations(range(len(values)), 2):
        assert {(way[one], way[other]) for way in ways} == set(product(values[one], values[other]))


def test_each_objective_is_learned_alike_in_some_ways(ranks: Ranks, runs: dict[str, list[str]]) -> None:
    assert not worse(compare(ranks, runs, {name: some_ways(number) for number, name in enumerate(RUNS)}))


@pytest.mark.drill
@pytest.mark.parametrize("name", RUNS)
def test_each_objective_is_learned_alike_in_every_way(ranks: Ranks, runs: dict[str, list[str]], name: str) -> None:
    assert not worse(compare(ranks, runs, {name: EVERY_WAY}))


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_the_proof_fails_for_means_of_means(ranks: Ranks, runs: dict[str, list[str]], sabotage: str) -> None:
    """Plain causal windows have means of equally many labels, so only what is no mean at all tells there."""
    ways = {name: [(1, 1, 4), (1, 2, 2)] for name in SABOTAGES[sabotage]}
    found = compare(ranks, runs, ways, sabotage=sabotage)
    assert worse(found, than=1e-4).keys() == ways.keys(), found


def test_an_encoder_with_batchnorm_is_exempt(ranks: Ranks, runs: dict[str, list[str]]) -> None:
    """Its statistics are of the micro-batch; the documents say so."""
    args = {"masked": [*runs["masked"], "model.norm=batchnorm"]}
    assert worse(compare(ranks, args, {"masked": [(1, 1, 4), (1, 1, 2)]}), than=1e-4)
    for document in ("training.md", "model.md"):
        assert "BatchNorm" in (ROOT / "docs" / document).read_text()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_rank_without_labels_adds_nothing_and_a_step_without_any_learns_nothing(ranks: Ranks, stage: int) -> None:
    [one, two] = ranks("tests.distributed.weighing_cases:without_labels", 2, stage=stage)
    assert one == two
    assert one["half"] == pytest.approx(one["alone"], rel=1e-6)
    assert one["none"] == [0.0, 0.0, 0.0]
