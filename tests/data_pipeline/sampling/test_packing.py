"""Packed windows: nothing is lost, nothing cut without need, and all that holds of plain windows holds of them."""

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.inspection.locate import locate
from data_pipeline.inspection.statistics import documents
from data_pipeline.loading.loader import Reader
from data_pipeline.sampling import packing_plan
from data_pipeline.sampling.best_fit import pack
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.packed_windows import PackedWindows
from data_pipeline.sampling.packing_plan import PackingPlan, prepare, prepared
from data_pipeline.sampling.sample_plan import Plan, go_on, wanted_phase
from data_pipeline.sampling.shuffle import SampleOrder
from data_pipeline.storage.dataset import Dataset
from launch.commands.data_plan import locate_lines
from pretrain.config.schema import load
from pretrain.objectives.documents import sequences
from pretrain.run.journal import read
from tests.data_pipeline.conftest import config
from tests.data_pipeline.inspection.test_commands import duet_data
from tests.runs import SMALL

CONTEXT = 64
SEED = 3


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two sources of documents of a few characters to a few windows; several shards."""
    folder = tmp_path_factory.mktemp("stories")
    rng = np.random.default_rng(0)
    for name, count in (("large", 1200), ("small", 300)):
        lengths = np.minimum(400, 1 + rng.lognormal(3.0, 1.2, count)).astype(int)
        texts = ("".join(rng.choice(list("abcdefgh "), length)) for length in lengths)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = {name: {"paths": [str(folder / f"{name}.jsonl")]} for name in ("large", "small")}
    split, tokenizer = {"rule": "hash", "fraction": 0.05}, {"type": "char", "vocab_size": 64}
    build(config(folder / "dataset", sources=sources, split=split, tokenizer=tokenizer, shard_tokens=4096))
    return Dataset.open(folder / "dataset")


@pytest.fixture(scope="module")
def packed(stories: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same, packed in stretches of a few record batches."""
    folder = tmp_path_factory.mktemp("packed") / "dataset"
    shutil.copytree(stories.path, folder)
    dataset = Dataset.open(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_plan, "_STRETCH_SLICES", 500)
        patch.setattr(packing_plan, "_BATCH_WINDOWS", 50)
        prepare(dataset, CONTEXT)
    return dataset


def settings_of(**data: Any) -> DataConfig:
    return DataConfig.model_validate({"path": "d", "packing": "best_fit", **data})


def one_by_one(lengths: list[int], width: int) -> list[int]:
    """Rooms that are left by best-fit decreasing, as it is written down: a slice after the other."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(width - length)
    return rooms


@settings(max_examples=300)
@given(context=st.integers(1, 20), lengths=st.lists(st.integers(1, 70), max_size=60), gap=st.integers(0, 5))
def test_every_token_is_predicted_once_in_windows_as_best_fit_fills_them(
    context: int, lengths: list[int], gap: int
) -> None:
    """`gap`: the documents need not follow each other."""
    width = context + 1
    starts = np.cumsum([0, *(length + gap for length in lengths)])[:-1].astype(np.int64)
    bounds, begins, tokens = pack(starts, np.array(lengths, np.int64), context)
    assert (np.diff(bounds) >= 1).all()
    rooms = [width - int(tokens[a:b].sum()) for a, b in itertools.pairwise(bounds)]
    assert min(rooms, default=0) >= 0

    slices = Counter(zip(begins.tolist(), tokens.tolist(), strict=True))
    predicted: Counter[int] = Counter()
    seen: set[int] = set()
    for (begin, length), times in slices.items():
        predicted.update(dict.fromkeys(range(begin + 1, begin + length), times))
        seen |= set(range(begin, begin + length))
    wanted = {place for s, n in zip(starts.tolist(), lengths, strict=True) for place in range(s + 1, s + n)}
    assert predicted == Counter(wanted)
    assert seen == wanted | set(starts.tolist())
    for start, length in zip(starts.tolist(), lengths, strict=True):
        if length <= width:
            assert slices[start, length] == 1

    assert Counter(rooms) == Counter(one_by_one(tokens.tolist(), width))
    if lengths:  # of two windows that are half empty, the later one would have gone into the earlier
        assert sum(2 * room > width for room in rooms) <= 1
        assert len(rooms) <= max(1, math.ceil(2 * int(tokens.sum()) / width))
    longest = [int(begins[a]) for a in bounds[:-1]]
    assert longest == sorted(longest)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_windows_hold_the_documents_of_the_shards(packed: Dataset, split: Any) -> None:
    cut = 0
    for source in packed.sources() if split == "train" else [None]:
        windows = PackedWindows.of(packed, split, CONTEXT, source)
        rows = windows.read(np.arange(len(windows)))
        batches, offsets = windows.places(np.arange(len(windows)))
        starts = windows.document_starts(batches.tolist(), offsets.tolist(), range(len(windows)))
        assert (np.diff(starts) > 0).all()
        found: Counter[bytes] = Counter()
        for row, tokens in enumerate(rows):
            begins = starts[starts // (CONTEXT + 1) == row] % (CONTEXT + 1)
            parts = np.split(tokens, begins)
            if (tokens < 0).any():  # padding is one part, the last
                assert (parts.pop() == -1).all()
            assert all((part >= 0).all() for part in parts)
            found.update(part.tobytes() for part in parts)
        wanted: Counter[bytes] = Counter()
        for document in documents(packed, split, source):
            whole = np.concatenate(document).astype(np.int64)
            cut += len(whole) > CONTEXT + 1
            while len(whole) > CONTEXT + 1:
                wanted[whole[: CONTEXT + 1].tobytes()] += 1
                whole = whole[CONTEXT:]
            wanted[whole.tobytes()] += 1
        assert found == wanted
        assert windows.padding == pytest.approx((rows[:, :-1] < 0).mean())
        assert len(list((packed.path / "packing").glob("*.arrow"))) == 3
    assert cut


def test_packing_wastes_little_of_many_short_documents() -> None:
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.lognormal(np.log(542), 1.0, 50_000)).astype(np.int64)
    bounds, _, tokens = pack(np.cumsum(lengths) - lengths, lengths, 2048)
    assert (np.diff(bounds) > 0).all()
    assert tokens.sum() / ((len(bounds) - 1) * 2049) > 0.999


def test_a_plan_is_the_same_file_whoever_computes_it(packed: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed.path / "packing"
    files = {file: file.read_bytes() for file in sorted(folder.glob("*.arrow"))}
    monkeypatch.setattr(packing_plan, "_STRETCH_SLICES", 500)
    monkeypatch.setattr(packing_plan, "_BATCH_WINDOWS", 50)
    first = next(iter(files))
    first.unlink()
    assert not prepared(packed, CONTEXT)
    with pytest.raises(DataError, match=r"is not packed for model.context=64: `duet data plan`"):
        for source in packed.sources():
            PackedWindows.of(packed, "train", CONTEXT, source)
        PackedWindows.of(packed, "validation", CONTEXT)

    def replace(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # killed, or refused, at its last step: nothing is there
        patch.setattr("os.replace", replace)
        with pytest.raises(DataError, match="the disk is full"):
            prepare(packed, CONTEXT)
    assert sorted(folder.glob("*.arrow")) == [file for file in files if file != first]
    told: list[tuple[str, int, int]] = []
    prepare(packed, CONTEXT, lambda *now: told.append(now))
    assert told[-1][0] == "pack" and told[-1][1] == told[-1][2] > 0
    assert {file: file.read_bytes() for file in sorted(folder.glob("*.arrow"))} == files
    assert prepared(packed, CONTEXT) and not list(folder.glob("*.tmp"))


def test_damaged_plans_are_told_from_sound_ones(packed: Dataset, tmp_path: Path) -> None:
    fingerprint = packed.stream_fingerprint("large")
    original = packing_plan.plan_path(packed.path, fingerprint, CONTEXT).read_bytes()
    path = packing_plan.plan_path(tmp_path, fingerprint, CONTEXT)
    path.parent.mkdir()
    reference = PackedWindows.of(packed, "train", CONTEXT, "large")
    wanted = [[place.tolist() for place in reference._plan.batch(n)] for n in range(3)]
    for at in np.random.default_rng(0).integers(0, len(original), 150).tolist():
        path.write_bytes(original[:at] + bytes([original[at] ^ 4]) + original[at + 1 :])
        try:
            plan = PackingPlan.of_stream(tmp_path, fingerprint, CONTEXT)
            plan.check()
        except DataError as error:
            assert str(path) in str(error) and "remove the file, and it is computed again" in str(error)
        else:  # a bit of padding, or of what is not read
            assert [[place.tolist() for place in plan.batch(n)] for n in range(3)] == wanted
    path.write_bytes(original[: len(original) // 2])
    with pytest.raises(DataError, match="damaged header or footer"):
        PackingPlan.of_stream(tmp_path, fingerprint, CONTEXT)
    other = packing_plan.plan_path(packed.path, packed.stream_fingerprint("small"), CONTEXT)
    shutil.copy(other, path)
    with pytest.raises(DataError, match="plan of something else"):
        PackingPlan.of_stream(tmp_path, fingerprint, CONTEXT)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_ranks_read_the_reference_order(packed: Dataset, data: st.DataObject) -> None:
    """Starts with other ranks, batches and orders go on where the last ended."""
    order = data.draw(st.sampled_from(["global", "block"]))
    config = settings_of(weights={"large": 3, "small": 1}, order=order)
    state = DataState(fingerprint=packed.manifest.fingerprint, seed=SEED)
    rows: list[np.ndarray] = []
    for _ in range(data.draw(st.integers(1, 3))):
        state = go_on(DataState.model_validate_json(state.model_dump_json()), packed, config, CONTEXT)
        plan = Plan(packed, state.phases[-1], SEED)
        batch, world = data.draw(st.sampled_from([(12, 1), (12, 2), (6, 3), (8, 8)]))
        readers = [
            iter(Reader(plan, global_batch=batch, rank=r, world_size=world, start=state.samples_seen, documents=True))
            for r in range(world)
        ]
        for _ in range(data.draw(st.integers(1, 5))):
            steps = [next(reader) for reader in readers]
            by_position = dict(
                zip(
                    np.concatenate([step.positions.numpy() for step in steps]).tolist(),
                    np.concatenate([step.tokens.numpy() for step in steps]),
                    strict=True,
                )
            )
            assert sorted(by_position) == list(range(state.samples_seen, state.samples_seen + batch))
            rows += [by_position[position] for position in sorted(by_position)]
            state = state.after(batch, 0)
            for step in steps:
                assert step.document_starts is not None
                segments, _ = sequences(step.document_starts, len(step.tokens), CONTEXT)
                hole = step.tokens.numpy()[:, :-1] < 0
                for row in np.flatnonzero(hole.any(axis=1)):  # padding has a segment of its own
                    assert len(set(segments[row, hole[row]])) == 1
                    assert not set(segments[row, hole[row]]) & set(segments[row, ~hole[row]])
    source, index = plan.at(np.arange(len(rows)))
    windows = list(plan.windows.values())
    for k, i, tokens in zip(source.tolist(), index.tolist(), rows, strict=True):
        assert np.array_equal(windows[k].read(np.array([i]))[0], tokens)
    if order == "global":
        phase = state.phases[0]
        for name, of_source in plan.windows.items():
            mine = index[source == list(plan.windows).index(name)]
            wanted = SampleOrder(phase.streams[name], SEED, len(of_source)).windows(np.arange(len(mine)))
            assert np.array_equal(mine, wanted)


def test_packing_otherwise_is_a_phase_of_its_own(packed: Dataset) -> None:
    fresh = DataState(fingerprint=packed.manifest.fingerprint, seed=SEED)
    plain = DataConfig(path="d")
    state = go_on(fresh, packed, plain, CONTEXT).after(50, 0)
    with pytest.raises(DataError, match=r"data\.packing: plain, now best_fit.*data\.phase=2"):
        go_on(state, packed, settings_of(), CONTEXT)
    state = go_on(state, packed, settings_of(phase=2), CONTEXT)
    assert state.phases[1].base_counts == dict.fromkeys(packed.sources(), 0)
    state = state.after(50, 0)
    with pytest.raises(DataError, match=r"data\.packing: best_fit, now plain"):
        go_on(state, packed, DataConfig(path="d", phase=2), CONTEXT)
    prepare(packed, 32)
    with pytest.raises(DataError, match=r"context: 64, now 32"):
        go_on(state, packed, settings_of(phase=2), 32)
    halved = go_on(state, packed, settings_of(phase=3), 32)
    assert halved.phases[2].unit == 32
    assert halved.phases[2].base_counts == dict.fromkeys(packed.sources(), 0)
    for file in (packed.path / "packing").glob("*-32-*"):
        file.unlink()


def test_samples_are_traced_to_the_very_documents(packed: Dataset) -> None:
    plan = Plan(packed, wanted_phase(packed, settings_of(), CONTEXT), 0)
    texts = {name: [np.concatenate(rows) for rows in documents(packed, "train", name)] for name in plan.windows}
    shards = {facts.path: packed.shard(facts) for facts in packed.manifest.shards}
    several = 0
    for passage in locate(plan, np.arange(40)):
        several += len(passage.origin.documents) > 1
        for number, tokens in passage.origin.documents:
            whole = texts[passage.source][number].tolist()
            assert any(whole[at : at + len(tokens)] == tokens.tolist() for at in range(len(whole)))
            assert len(tokens) == len(whole) or len(whole) > CONTEXT + 1
        shard = shards[passage.origin.shard]
        flat = np.concatenate([shard.tokens(batch) for batch in range(shard.num_batches)])
        first = passage.origin.documents[0][1]
        assert np.array_equal(flat[passage.origin.offset :][: len(first)], first[: len(flat) - passage.origin.offset])
    assert several


def test_the_commands_tell_of_packing(packed: Dataset) -> None:
    args = [f"data.path={packed.path}", f"model.context={CONTEXT}", "batch.tokens=512", "data.packing=best_fit"]
    planned = duet_data("plan", *args, "--tokens", "64K").splitlines()
    plan = PackedWindows.of(packed, "train", CONTEXT, "small")
    line = next(line for line in planned if line.startswith("small"))
    assert f"{len(plan) * CONTEXT:,} tokens an epoch" in line and f"{plan.padding:.2%} padding" in line
    assert f"small: context {CONTEXT}: {len(plan)} windows, {plan.padding:.2%}" in duet_data(
        "inspect", str(packed.path), "--samples", "0"
    )
    assert "sample 16" in duet_data("locate", *args, "--step", "3", "--text")
    file = packing_plan.plan_path(packed.path, packed.stream_fingerprint("small"), CONTEXT)
    original = file.read_bytes()
    at = original.index(plan._plan.batch(0).starts[1:4].tobytes())
    file.write_bytes(original[:at] + b"\1" + original[at + 1 :])
    with pytest.raises(DataError, match="batch 0 does not match its hash; remove the file"):
        duet_data("verify", str(packed.path))
    file.write_bytes(original)
    duet_data("verify", str(packed.path))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["data.objective=prefix", "data.packing=best_fit"], "takes a window as one text"),
        (["model/encoder-decoder-tiny", "data.packing=best_fit"], "objective=span_corruption takes a window as one"),
        (["model/encoder-tiny", "data.mask_boundaries=true"], "label after a document's end"),
    ],
)
def test_objectives_that_packing_does_not_suit_are_refused(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(args)


def test_a_run_trains_on_packed_windows(ranks: Any, stories: Dataset, tmp_path: Path) -> None:
    shutil.copytree(stories.path, tmp_path / "data")
    args = [*SMALL, f"data.path={tmp_path / 'data'}", "data.packing=best_fit", "schedule.kind=constant"]
    args += ["train.eval_every=100", "data.weights={large: 1}"]

    args += [f"run.dir={tmp_path / 'run'}", "model.document_mask=true", "batch.micro_batch=4"]
    ranks("tests.distributed.cases:train_run", 2, args=[*args, "train.steps=3"])
    records = [record.metrics for record in read(tmp_path / "run" / "metrics.jsonl")]
    last = [metrics for metrics in records if "data/samples_seen" in metrics][-1]
    dataset = Dataset.open(tmp_path / "data")
    assert last["data/epoch"] == 24 / len(PackedWindows.of(dataset, "train", 16, "large"))
    assert all(math.isfinite(metrics["loss/train"]) for metrics in records if "loss/train" in metrics)
    assert list(locate_lines([], tmp_path / "run", 3, text=False))[1].startswith("sample 16  large  window ")
    validated = [metrics for metrics in records if "loss/val" in metrics][-1]
    assert validated["loss/val"] > 0
    assert "loss/val_bits_per_byte" not in validated
