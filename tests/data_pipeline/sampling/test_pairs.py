"""Datasets of pairs: each comes back whole, whatever the ranks; what does not fit is said."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.inspection.locate import locate
from data_pipeline.loading.loader import Reader
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.pair_windows import PairWindows
from data_pipeline.sampling.sample_plan import Plan, go_on
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import Manifest
from launch.commands.data_plan import locate_lines
from model.architectures import registry
from pretrain import begin
from pretrain.config.schema import load
from pretrain.evaluation.batches import Batches
from pretrain.objectives.objective import IGNORE
from pretrain.objectives.pairs import joined
from pretrain.run.journal import read
from pretrain.run.run_folder import RunFolder
from tests.data_pipeline.conftest import config
from tests.data_pipeline.inspection.test_commands import duet_data
from tests.model.helpers import configured
from tests.objectives import objective
from tests.runs import SMALL

CPU = torch.device("cpu")
CONTEXT = 24
SEED = 5
CHARACTERS = {"type": "char", "vocab_size": 64}
TARGETED = {"text_key": "de", "target_key": "en"}


def texts(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs whose target is the source backwards, in capitals, after a line of its own; some are long."""
    rng = np.random.default_rng(seed)
    sources = ["".join(rng.choice(list("abcdefgh \n"), 1 + int(rng.exponential(18)))) for _ in range(count)]
    return [(f"x{source}", f"Y\n{source[::-1].upper()}") for source in sources]


def write(folder: Path) -> dict[str, Any]:
    lines = [json.dumps({"id": i, "de": s, "en": t}) for i, (s, t) in enumerate(texts(500, 0))]
    halves = [json.dumps({"de": "", "en": "a"}), json.dumps({"de": "a", "en": ""})]
    (folder / "a.jsonl").write_text("\n".join([*lines, *halves]) + "\n")
    de, en = zip(*texts(200, 1), strict=True)
    pq.write_table(pa.table({"en": pa.array(en).dictionary_encode(), "de": de}), folder / "b.parquet")
    return {name: {"paths": [str(folder / file)], **TARGETED} for name, file in (("a", "a.jsonl"), ("b", "b.parquet"))}


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two sources, many record batches of few tokens: pairs cross their edges, and those of shards."""
    folder = tmp_path_factory.mktemp("pairs")
    build(
        config(
            folder / "dataset",
            sources=write(folder),
            tokenizer={"type": "char", "vocab_size": 64},
            split={"rule": "hash", "fraction": 0.1},
            shard_tokens=1024,
            shuffle=True,
        )
    )
    return Dataset.open(folder / "dataset")


def wanted(**data: Any) -> DataConfig:
    return DataConfig.model_validate({"path": "d", "objective": "pairs", **data})


def whole(dataset: Dataset, windows: PairWindows, index: int) -> tuple[str, str]:
    decode = dataset.tokenizer().decode
    source, target = (text for _, text in windows.origin(index).documents)
    assert source[-1] == target[-1] == dataset.manifest.tokenizer.eos_id
    return decode(source), decode(target)


def test_every_pair_comes_back_and_halves_are_dropped(paired: Dataset) -> None:
    paired.verify()
    facts = paired.manifest
    assert facts.pairs and len(facts.shards_of("train")) > 10
    assert facts.sources[0].dropped == {"empty": 2}
    for name, expected in (("a", texts(500, 0)), ("b", texts(200, 1))):
        windows = PairWindows.of(paired, "train", CONTEXT, name)
        train = [whole(paired, windows, index) for index in range(len(windows))]
        assert len(train) == facts.sources[name == "b"].split_documents["train"]
        assert train != [pair for pair in expected if pair in train]  # shuffled
        assert set(train) <= set(expected)
        rows = windows.read(np.arange(len(windows)))
        for index, row in enumerate(rows):
            for (_, text), half in zip(windows.origin(index).documents, np.split(row, 2), strict=True):
                length = min(len(text), CONTEXT)
                assert half.tolist() == [*text[:length].tolist(), *[-1] * (CONTEXT - length)]
        lengths = [np.concatenate(part) for part in zip(*windows.lengths(), strict=True)]
        for side, found in enumerate(lengths):
            assert found.tolist() == [len(windows.origin(i).documents[side][1]) for i in range(len(windows))]
    held_out = PairWindows.of(paired, "validation", CONTEXT)
    both = [
        whole(paired, windows, index)
        for windows in (held_out, *(PairWindows.of(paired, "train", CONTEXT, name) for name in "ab"))
        for index in range(len(windows))
    ]
    assert sorted(both) == sorted(texts(500, 0) + texts(200, 1))


def test_the_shards_of_a_range_hold_its_pairs(paired: Dataset) -> None:
    windows = PairWindows.of(paired, "train", CONTEXT, "a")
    paths = [shard.path for shard in paired.shards_of("train", "a")]
    assert len(paths) > 4
    at = [paths.index(windows.origin(index).shard) for index in range(len(windows))]
    rng = np.random.default_rng(SEED)
    for first, end in np.sort(rng.integers(0, len(windows) + 1, (50, 2))).tolist():
        if first < end:
            found = [paths.index(shard.path) for shard in windows.shards_of(first, end)]
            assert set(at[first:end]) <= set(found), "none is left out"
            assert found[0] == at[first], "none before"
            assert found[-1] <= at[end - 1] + 1, "one behind, where a pair may run on"


def test_a_long_pair_is_cut_nowhere_but_at_the_context(tmp_path: Path) -> None:
    source, target = "ab cd ef\n" * 160_000, "gh ij\n" * 200_000  # above 1 MiB: tokenized in pieces
    for name, pairs in (("train", [("a", "b"), (source, target)]), ("held", [("face", "big")])):
        lines = (json.dumps({"de": s, "en": t}) + "\n" for s, t in pairs)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    split = {"rule": "given", "files": [str(tmp_path / "held.jsonl")], **TARGETED}
    sources = {"a": {"paths": [str(tmp_path / "train.jsonl")], **TARGETED}}
    build(config(tmp_path / "d", sources=sources, tokenizer={"type": "char"}, split=split))
    dataset = Dataset.open(tmp_path / "d")
    windows = PairWindows.of(dataset, "train", CONTEXT)
    assert [whole(dataset, windows, index) for index in range(len(windows))] == [("a", "b"), (source, target)]
    held_out = PairWindows.of(dataset, "validation", CONTEXT)
    assert [whole(dataset, held_out, index) for index in range(len(held_out))] == [("face", "big")]


def test_any_ranks_read_the_same_pairs_and_go_on(paired: Dataset) -> None:
    config_of = wanted(weights={"a": 2, "b": 1}, order="block")
    state = go_on(DataState(fingerprint=paired.manifest.fingerprint, seed=SEED), paired, config_of, CONTEXT)
    assert state.phases[0].packing == "pairs"
    plan = Plan(paired, state.phases[0], SEED)
    source, index = plan.at(np.arange(36))
    names = list(plan.windows)
    reference = [
        plan.windows[names[k]].read(np.array([i]))[0].tolist()
        for k, i in zip(source.tolist(), index.tolist(), strict=True)
    ]
    start = 0
    for batch, world in ((12, 1), (12, 3), (6, 2), (6, 6)):
        found: dict[int, list[int]] = {}
        for rank in range(world):
            step = next(iter(Reader(plan, global_batch=batch, rank=rank, world_size=world, start=start)))
            found |= dict(zip(step.positions.tolist(), step.tokens.tolist(), strict=True))
        assert [found[p] for p in range(start, start + batch)] == reference[start : start + batch]
        start += batch
    state = state.after(36, 0)
    changed = go_on(state, paired, wanted(weights={"a": 2, "b": 1}, order="block", phase=2), 2 * CONTEXT)
    assert changed.phases[1].base_counts == {"a": 24, "b": 12}  # the same pairs, whatever the context
    assert changed.phases[1].unit == 2 * CONTEXT
    for passage in locate(plan, np.arange(5)):
        assert len(dict(passage.origin.documents)) == 1


@settings(max_examples=100)
@given(context=st.integers(2, 12), sizes=st.lists(st.tuples(st.integers(1, 15), st.integers(1, 15)), min_size=1))
def test_a_decoder_alone_reads_source_and_target_on_end(context: int, sizes: list[tuple[int, int]]) -> None:
    rows = np.full((len(sizes), 2 * context), -1, np.int64)
    for row, (source, target) in enumerate(sizes):
        rows[row, : min(source, context)] = 100 + np.arange(min(source, context))
        rows[row, context : context + min(target, context)] = 200 + np.arange(min(target, context))
    inputs, labels, prefixes, padding = joined(rows).values()
    for row, (source, target) in enumerate(sizes):
        source, target = min(source, context), min(target, context)
        kept = labels[row][labels[row] != IGNORE].tolist()
        assert inputs[row, : prefixes[row]].tolist() == list(range(100, 100 + prefixes[row]))
        assert kept == list(range(200, 200 + len(kept))) and kept  # all of the target is to be told, and no source
        assert labels[row, prefixes[row] - 1] == 200
        if source + target <= context + 1:
            assert (prefixes[row], len(kept)) == (source, target)
            assert padding[row].tolist() == [place >= source + target for place in range(context)]
        else:
            assert prefixes[row] + len(kept) == context + 1
            assert not padding[row].any()


def test_padding_makes_no_difference_to_two_sequences(paired: Dataset) -> None:
    model_config = configured(
        architecture="encoder_decoder", layers=2, width=16, heads=2, context=CONTEXT, positions="rotary", vocab_size=64
    )
    torch.manual_seed(0)
    model = registry.build(model_config).eval()
    made = Batches(CPU, objective("pairs", CONTEXT, paired.tokenizer(), two_sequences=True))
    windows = PairWindows.of(paired, "validation", CONTEXT)
    batch = made.of_validation(windows, np.arange(8))
    assert batch.segment_ids is not None and batch.decoder_input_ids is not None
    assert (batch.decoder_input_ids[:, 0] == paired.manifest.tokenizer.eos_id).all()
    assert not made.objective.predicts_every_token and not made.objective.needs_documents
    padded = 0
    for row in range(8):
        source, target = (text[:CONTEXT] for _, text in windows.origin(row).documents)
        padded += len(source) < CONTEXT
        alone = replace(
            batch,
            input_ids=torch.from_numpy(source.astype(np.int64))[None],
            labels=torch.from_numpy(target.astype(np.int64))[None],
            decoder_input_ids=batch.decoder_input_ids[row : row + 1, : len(target)],
            samples=batch.samples[row : row + 1],
            segment_ids=None,
            padding=None,
        )
        one = replace(batch, **{key: getattr(batch, key)[row : row + 1] for key in FIELDS})
        torch.testing.assert_close(model(alone).loss, model(one).loss, rtol=1e-4, atol=1e-5)
    assert padded
    nothing = made.of_validation(windows, np.empty(0, np.int64))
    assert (nothing.labels == IGNORE).all() and model(nothing).loss.isfinite()


FIELDS = ("input_ids", "labels", "decoder_input_ids", "samples", "segment_ids")


def test_the_commands_tell_of_pairs(paired: Dataset) -> None:
    args = [f"data.path={paired.path}", f"model.context={CONTEXT}", "batch.tokens=240", "data.objective=pairs"]
    lengths = np.concatenate(
        [np.stack(part) for part in PairWindows.of(paired, "train", CONTEXT, "a").lengths()], axis=1
    )
    planned = duet_data("plan", *args)
    long = int((lengths.sum(axis=0) > CONTEXT + 1).sum())
    assert f"{lengths.shape[1]:,} pairs, {long:,} of them longer than the context" in planned and long
    planned = duet_data("plan", *args, "model.architecture=encoder_decoder", "model.learned_dropout.enabled=false")
    cut = (lengths > CONTEXT).sum(axis=1).tolist()
    assert f"{cut[0]:,} sources and {cut[1]:,} targets of them" in planned
    shown = duet_data("inspect", str(paired.path), "--samples", "1")
    assert "pairs of source and target" in shown and "\n⟶ Y" in shown
    located = list(locate_lines(args, None, 2, text=True))
    assert sum("sample " in line for line in located) >= 10 and any(": 'Y\\n" in line for line in located)
    duet_data("verify", str(paired.path))


@pytest.mark.parametrize(
    ("settings_of", "message"),
    [
        ({"split": {"rule": "tail"}}, "a pair would be torn"),
        ({"split": {"rule": "given", "files": ["x"]}}, r"split\.target_key is not set"),
        ({"sources": {"a": {"paths": ["x"], **TARGETED}, "b": {"paths": ["x"]}}}, r"sources\.b\.target_key is not set"),
    ],
)
def test_settings_that_tear_pairs_are_refused(settings_of: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate({"sources": {"a": {"paths": ["x"], **TARGETED}}, **settings_of})


def test_files_without_pairs_are_named(tmp_path: Path, jsonl: Callable[[str, list[str]], Path]) -> None:
    (tmp_path / "a.txt").write_text("text")
    for file, message in (
        (tmp_path / "a.txt", "a.txt is plain text, which holds no pairs"),
        (jsonl("a.jsonl", ["one"]), r"line 1 has no key 'de'; its keys: 'text'.*target_key"),
    ):
        split = {"rule": "hash", "fraction": 0.5}
        with pytest.raises(DataError, match=message):
            build(config(tmp_path / "d", sources={"a": {"paths": [str(file)], **TARGETED}}, split=split))


def test_objective_and_dataset_must_fit(paired: Dataset, mixed: Dataset, tmp_path: Path) -> None:
    for dataset, name, message in (
        (paired, "causal", "holds pairs of source and target, which data.objective=causal is not for"),
        (mixed, "pairs", "data.objective=pairs needs pairs of source and target, and .* holds text"),
    ):
        args = [f"data.path={dataset.path}", f"data.objective={name}"]
        with pytest.raises(DataError, match=message):
            Batches.of(load(args), dataset, CPU)
        with pytest.raises(DataError, match=message):
            duet_data("plan", *args)
        with pytest.raises(DataError, match=message):
            begin._tie(RunFolder(tmp_path / "run"), load(args), dataset)
        assert not (tmp_path / "run").exists()
    for args, message in (
        (["model/encoder-tiny", "data.objective=pairs"], "does not fit model.architecture=encoder_only"),
        (["data.objective=pairs", "data.packing=best_fit"], "objective=pairs takes a window as one text"),
        (["data.objective=pairs", "model.document_mask=true"], "one pair in a row"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(args)
    content = json.loads((paired.path / "manifest.json").read_text())
    assert Manifest.model_validate(content).pairs


def test_a_run_learns_from_pairs(ranks: Any, paired: Dataset, tmp_path: Path) -> None:
    args = [*SMALL, f"data.path={paired.path}", "data.objective=pairs", f"run.dir={tmp_path / 'run'}", "train.steps=3"]
    args += ["model.architecture=encoder_decoder", "model.learned_dropout.enabled=false", "model.cross_heads=2"]
    args.remove("model.learned_dropout.entropy.start_step=0")
    ranks("tests.distributed.cases:train_run", 2, args=args)
    records = [record.metrics for record in read(tmp_path / "run" / "metrics.jsonl")]
    losses = [metrics["loss/train"] for metrics in records if "loss/train" in metrics]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    [validated] = [metrics for metrics in records if "loss/val" in metrics]
    assert math.isfinite(validated["loss/val"])


def test_tasks_are_told_apart_by_a_prefix(tmp_path: Path) -> None:
    """It stands before each source; a text falls on one side in all tasks, and another prefix is another dataset."""
    asked = [(f"a{number}", f"b{number}") for number in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"de": s, "en": t}) + "\n" for s, t in asked))
    file = {"paths": [str(tmp_path / "a.jsonl")], **TARGETED}
    sources = {name: {**file, "prefix": f"{name}: "} for name in ("up", "down")}
    made = config(tmp_path / "dataset", sources=sources, split={"rule": "hash", "fraction": 0.2}, tokenizer=CHARACTERS)
    build(made)
    dataset = Dataset.open(tmp_path / "dataset")
    tokenizer, held_out = dataset.tokenizer(), {}
    for name in sources:
        windows = PairWindows.of(dataset, "validation", CONTEXT, name)
        rows = windows.read(np.arange(len(windows))).reshape(len(windows), 2, CONTEXT)
        pairs = [tuple(tokenizer.decode(text[text >= 0]) for text in row) for row in rows]
        held_out[name] = {(source.removeprefix(f"{name}: "), target) for source, target in pairs}
        assert all(source.startswith(f"{name}: a") for source, _ in pairs)
    assert held_out["up"] == held_out["down"] < set(asked)
    sources["up"]["prefix"] = "higher: "
    with pytest.raises(DataError, match=r"sources\.up\.prefix: up: +there, higher: +here"):
        build(config(tmp_path / "dataset", sources=sources, split=made.split, tokenizer=CHARACTERS))
    given = {"rule": "given", "files": file["paths"], **TARGETED}
    with pytest.raises(DataError, match=r"sources\.up\.prefix names a task.*: set data\.split\.prefix"):
        build(config(tmp_path / "given", sources=sources, split=given, tokenizer=CHARACTERS))
    for prefix in ("", "down: "):
        of = tmp_path / f"given{prefix[:2]}"
        build(config(of, sources=sources, split=given | {"prefix": prefix}, tokenizer=CHARACTERS))
        dataset = Dataset.open(of)
        first = PairWindows.of(dataset, "validation", CONTEXT, None).read(np.arange(1)).reshape(2, CONTEXT)[0]
        assert dataset.tokenizer().decode(first[first >= 0]) == f"{prefix}a0"
    for key, more in (("sources.a", "sources.a.paths=[a]"), ("split", "split.files=[a]")):
        with pytest.raises(ConfigError, match="no target_key"):
            load([f"data.{key}.prefix=x", f"data.{more}", f"data.split.rule={'given' if key == 'split' else 'hash'}"])
