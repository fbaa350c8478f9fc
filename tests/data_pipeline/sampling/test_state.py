from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Reader
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.phases import Phase, Schedule
from data_pipeline.sampling.sample_plan import Plan, go_on
from data_pipeline.sampling.shuffle import SampleOrder
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset

SEED = 3
CONTEXT = 32
FORMAT_1 = Path(__file__).parents[1] / "format1"


def settings_of(**data: Any) -> DataConfig:
    return DataConfig.model_validate({"path": "d", **data})


def fresh(dataset: Dataset) -> DataState:
    return DataState(fingerprint=dataset.manifest.fingerprint, seed=SEED)


def ids_of(plan: Plan, positions: np.ndarray) -> list[tuple[str, int]]:
    names = list(plan.windows)
    return [(names[k], index) for k, index in zip(*(found.tolist() for found in plan.at(positions)), strict=True)]


def in_turn(phase: Phase, weights: dict[str, int], counts: dict[str, int], samples: int) -> list[str]:
    """The sources of a phase's samples one by one, as Tijdeman wrote his rule down: in fractions, with no table."""
    period, names = sum(weights.values()), list(weights)
    slack = Fraction(1, max(1, 2 * len(names) - 2)) if len(names) > 1 else Fraction(0)
    given_here, turns = dict.fromkeys(names, 0), []
    for slot in range(1, samples + 1):
        # Every period begins anew, as the table does.
        behind = {name: Fraction(weights[name] * slot, period) - given_here[name] for name in names}
        due = {
            name: ((given_here[name] + 1 - slack) * period // weights[name], names.index(name))
            for name in names
            if behind[name] >= slack
        }
        turns.append(min(due, key=due.__getitem__))
        given_here[turns[-1]] += 1
    return turns


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_run_of_kills_and_changes_reads_the_reference_order(
    mixed: Dataset, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """World size and batch change at every start, kills throw back to a saved state, phases change the weights.

    What was kept is compared with an order worked out from nothing but weights, counts and each source's permutation.
    """
    monkeypatch.setattr("data_pipeline.loading.loader._PLANNED_SAMPLES", data.draw(st.sampled_from([1, 30, 4096])))
    names = ["large", "middle", "small"]
    lengths = {name: len(Windows.of(mixed, "train", CONTEXT, source=name)) for name in names}
    orders = {name: SampleOrder(mixed.stream_fingerprint(name), SEED, lengths[name]) for name in names}
    state, wanted, phase = fresh(mixed), settings_of(weights={"large": 1}), 1
    kept: list[tuple[str, int]] = []
    reference: list[tuple[str, int]] = []
    counts = dict.fromkeys(names, 0)
    for _ in range(data.draw(st.integers(1, 6), label="starts")):
        if state.samples_seen and data.draw(st.booleans(), label="new phase"):
            weights = {n: data.draw(st.integers(0, 5), label=n) for n in names}
            if any(weights.values()):
                phase, wanted = len(state.phases) + 1, settings_of(weights=weights, phase=len(state.phases) + 1)
        state = DataState.model_validate_json(state.model_dump_json())
        state = go_on(state, mixed, wanted, CONTEXT)
        assert len(state.phases) == phase
        plan = Plan(mixed, state.phases[-1], state.seed)
        global_batch = data.draw(st.sampled_from([1, 4, 6, 12, 24]), label="batch")
        world = data.draw(st.sampled_from([w for w in (1, 2, 3, 4, 8) if global_batch % w == 0]), label="world")
        steps, saved = data.draw(st.integers(1, 6), label="steps"), data.draw(st.integers(1, 6), label="saved")
        readers = [
            iter(Reader(plan, global_batch=global_batch, rank=r, world_size=world, start=state.samples_seen))
            for r in range(world)
        ]
        now, read = state, []
        for step in range(1, steps + 1):
            positions = np.sort(np.concatenate([next(reader).positions.numpy() for reader in readers]))
            assert positions.tolist() == list(range(now.samples_seen, now.samples_seen + global_batch))
            read += ids_of(plan, positions)
            now = now.after(global_batch, global_batch * CONTEXT)
            if step == saved:
                state, kept, read = now, kept + read, []  # and what is read from here on is lost with the kill
        if steps < saved:
            continue
        weights = state.phases[-1].weights
        turns = in_turn(state.phases[-1], weights, counts, state.samples_seen - state.phases[-1].start)
        for name in turns[len(reference) - state.phases[-1].start :]:
            reference.append((name, int(orders[name].windows(np.array([counts[name]]))[0])))
            counts[name] += 1
    assert kept == reference
    for name in names:  # whatever the phases: every epoch of a source is complete before the next begins
        mine = [index for source, index in kept if source == name]
        for epoch in range(0, len(mine), lengths[name]):
            part = mine[epoch : epoch + lengths[name]]
            assert len(set(part)) == len(part)


def test_states_of_format_1_go_on_in_the_order_they_had() -> None:
    """Pinned: the tokens that the code of format 1 read at these positions of these datasets."""
    for name in ("one", "two"):
        dataset = Dataset.open(FORMAT_1 / name)
        old = {
            "format": 1,
            "fingerprint": dataset.manifest.fingerprint,
            "seed": 7,
            "samples_seen": 90,
            "tokens_seen": 9,
        }
        state = go_on(DataState.model_validate(old), dataset, settings_of(sources={}), 16)
        assert (state.format, state.samples_seen, state.tokens_seen, len(state.phases)) == (2, 90, 9, 1)
        plan = Plan(dataset, state.phases[0], state.seed)
        windows = Windows.of(dataset, "train", 16)
        before = SampleOrder(dataset.manifest.fingerprint, 7, len(windows)).windows(np.arange(90, 190))
        assert plan.at(np.arange(90, 190))[1].tolist() == before.tolist()
        step = next(iter(Reader(plan, global_batch=100, rank=0, world_size=1, start=90)))
        assert step.positions.tolist() == list(range(90, 190))
        assert np.array_equal(step.tokens.numpy(), windows.read(before))
        with pytest.raises(DataError, match="began with an older version of duet.*one stream in global order"):
            go_on(DataState.model_validate(old), dataset, settings_of(order="block"), 16)
        with pytest.raises(DataError, match="the dataset changed"):
            go_on(DataState.model_validate(old | {"fingerprint": "x" * 64}), dataset, settings_of(), 16)


def test_changes_are_named_and_need_a_declared_phase(mixed: Dataset) -> None:
    state = go_on(fresh(mixed), mixed, settings_of(weights={"large": 3, "small": 1}), CONTEXT).after(100, 3200)
    assert go_on(state, mixed, settings_of(weights={"large": 6, "small": 2}), CONTEXT) == state
    for data, message in (
        ({"weights": {"large": 1}}, r"weight of large: 3/4, now 1/1; weight of small: 1/4, now nothing"),
        ({"weights": {"large": 3, "small": 1}, "order": "block"}, r"data\.order: global, now block"),
    ):
        expected = rf"in phase 1 of its data, at sample 100, .*{message}\..*data\.phase=2$"
        with pytest.raises(DataError, match=expected):
            go_on(state, mixed, settings_of(**data), CONTEXT)
        with pytest.raises(DataError, match=expected):
            go_on(state, mixed, settings_of(**data, phase=3), CONTEXT)
        changed = go_on(state, mixed, settings_of(**data, phase=2), CONTEXT)
        assert [phase.start for phase in changed.phases] == [0, 100]
        assert changed.phases[1].base_counts == {"large": 75, "middle": 0, "small": 25}
        assert go_on(changed, mixed, settings_of(**data, phase=2), CONTEXT) == changed
    with pytest.raises(DataError, match=r"data\.phase=3 is neither its number nor the next one's"):
        go_on(state, mixed, settings_of(weights={"large": 3, "small": 1}, phase=3), CONTEXT)
    with pytest.raises(DataError, match=r"in phase 1 .* data\.phase=2 is not its number"):
        go_on(fresh(mixed), mixed, settings_of(phase=2), CONTEXT)
    assert len(state.model_dump_json()) < 1024


def with_sources(dataset: Dataset, fingerprint: str, **streams: str) -> Dataset:
    """The dataset as if it had been built with these sources only: name = the source whose tokens it has."""
    facts = {source.name: source for source in dataset.manifest.sources}
    shards = [
        replace(shard, source=name)
        for name, stream in streams.items()
        for shard in dataset.manifest.shards
        if shard.source == stream
    ]
    sources = [facts[stream].model_copy(update={"name": name}) for name, stream in streams.items()]
    update = {"sources": sources, "shards": shards, "fingerprint": fingerprint}
    return Dataset(dataset.path, dataset.manifest.model_copy(update=update))


def test_data_that_join_go_on_where_the_others_stand(mixed: Dataset) -> None:
    """A source that stays keeps its place; one that is new, or was rebuilt, begins at its start."""
    first = with_sources(mixed, "1" * 64, a="large", b="middle")
    second = with_sources(mixed, "2" * 64, a="large", b="small", new="middle")
    equal = {"weights": {"a": 1, "b": 1}}
    state = go_on(fresh(first), first, settings_of(**equal), CONTEXT).after(60, 1)
    expected = r"dataset: 1{12}, now 2{12}; tokens of b: \w+, now \w+; tokens of new: nothing, now \w+\."
    with pytest.raises(DataError, match=expected):
        go_on(state, second, settings_of(**equal), CONTEXT)
    state = go_on(state, second, settings_of(weights={"a": 1, "b": 1, "new": 1}, phase=2), CONTEXT)
    assert state.phases[1].base_counts == {"a": 30, "b": 0, "new": 0}
    assert state.fingerprint == second.manifest.fingerprint
    plan = Plan(second, state.phases[1], SEED)
    order = SampleOrder(first.stream_fingerprint("a"), SEED, len(Windows.of(first, "train", CONTEXT, source="a")))
    here = [index for name, index in ids_of(plan, np.arange(60, 120)) if name == "a"]
    assert here == order.windows(np.arange(30, 50)).tolist()
    with pytest.raises(DataError, match=r"dataset: 1{12}, now 3{12}\. Restore"):  # the same training tokens
        go_on(
            go_on(fresh(first), first, settings_of(**equal), CONTEXT).after(8, 1),
            with_sources(mixed, "3" * 64, a="large", b="middle"),
            settings_of(**equal),
            CONTEXT,
        )


@pytest.mark.parametrize("exhausted", ["stop", "drop"])
def test_repeats_end_the_data_or_drop_the_source(mixed: Dataset, exhausted: str) -> None:
    weights = {"large": 1, "middle": 2, "small": 1}
    repeats = {"large": None, "middle": 1.0, "small": 2.5}
    sources = {name: {"paths": ["x"], "repeat": repeat} for name, repeat in repeats.items()}
    data = settings_of(sources=sources, weights=weights, exhausted=exhausted)
    state = go_on(fresh(mixed), mixed, data, CONTEXT)
    plan = Plan(mixed, state.phases[0], SEED)
    caps = {name: int((repeats[name] or 10**6) * len(plan.windows[name])) for name in weights}
    # One by one, by brute force.
    counts, active = dict.fromkeys(weights, 0), dict(weights)
    turns: list[str] = []
    while len(turns) < 3000:
        run = in_turn(state.phases[0], active, counts, 3000)
        for name in run:
            if counts[name] == caps[name]:
                break
            counts[name] += 1
            turns.append(name)
        else:
            break
        if exhausted == "stop":
            break
        active = {name: weight for name, weight in active.items() if counts[name] < caps[name]}
    turns = turns[:3000]
    names = list(weights)
    if exhausted == "stop":
        assert plan.schedule.extend(10**6) == plan.schedule.end == len(turns)
        with pytest.raises(DataError, match=rf"end at sample {len(turns)} .*middle {caps['middle']}\. Train fewer"):
            plan.at(np.arange(len(turns) + 1))
    else:
        assert plan.schedule.extend(10**6) == 10**6
        assert counts["small"] == caps["small"]
    source, _ = plan.at(np.arange(len(turns)))
    assert [names[k] for k in source] == turns
    assert plan.schedule.counts(len(turns)) == {name: turns.count(name) for name in names}


def test_samples_can_be_skipped(mixed: Dataset) -> None:
    """After a spike of the loss: what was skipped counts as seen, and everything behind stays where it was."""
    state = go_on(fresh(mixed), mixed, settings_of(), CONTEXT).after(48, 48 * CONTEXT)
    skipped = state.after(240, 0)
    assert (skipped.samples_seen, skipped.tokens_seen) == (288, 48 * CONTEXT)
    plan = Plan(mixed, skipped.phases[-1], SEED)
    step = next(iter(Reader(plan, global_batch=24, rank=0, world_size=1, start=skipped.samples_seen)))
    assert sorted(step.positions.tolist()) == list(range(288, 312))


def test_a_context_that_divides_the_former_goes_on_exactly(mixed: Dataset) -> None:
    data = {"weights": {"large": 2, "small": 1}}
    state = go_on(fresh(mixed), mixed, settings_of(**data), 64).after(30, 1)
    halved = go_on(state, mixed, settings_of(**data, phase=2), 16)
    assert halved.phases[1].base_counts == {"large": 80, "middle": 0, "small": 40}
    before = ids_of(Plan(mixed, state.phases[0], SEED), np.arange(30))
    lengths = {name: len(Windows.of(mixed, "train", 64, source=name)) for name in ("large", "small")}
    after = Plan(mixed, halved.phases[1], SEED)
    samples = 3 * (4 * lengths["large"] - 80) // 2
    for name in ("large",):  # the rest of its epoch: each token once, and none that was read before
        rest = [index for source, index in ids_of(after, np.arange(30, 30 + samples)) if source == name]
        seen = {4 * index + part for source, index in before if source == name for part in range(4)}
        assert seen | set(rest) == set(range(4 * lengths[name]))
        assert len(rest) + len(seen) == 4 * lengths[name]
    with pytest.raises(DataError, match=r"context 48 does not divide 64, .* source large .* after 20 samples"):
        go_on(state, mixed, settings_of(**data, phase=2), 48)


def test_a_schedule_starts_as_quickly_anywhere() -> None:
    phase = Phase(
        base_counts={"a": 0, "b": 0}, weights={"a": 7, "b": 3}, context=8, unit=8, streams={"a": "1", "b": "2"}
    )
    schedule = Schedule(phase, 0)
    counts = schedule.counts(10**15)
    assert counts == {"a": 7 * 10**14, "b": 3 * 10**14}
    source, count = schedule.at(np.arange(10**15, 10**15 + 10))
    assert np.bincount(source).tolist() == [7, 3]
    assert set(count[source == 0].tolist()) == set(range(7 * 10**14, 7 * 10**14 + 7))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weights": {"gone": 1}}, r"data\.weights\.gone: no such source in d; it has large, middle, small"),
        ({"weights": {"large": 0}}, "0 sources have a weight above 0"),
    ],
)
def test_weights_that_fit_no_source_are_errors(mixed: Dataset, data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        go_on(fresh(mixed), mixed, settings_of(**data), CONTEXT)


def test_without_weights_all_sources_end_an_epoch_together(mixed: Dataset) -> None:
    state = go_on(fresh(mixed), mixed, settings_of(), CONTEXT)
    plan = Plan(mixed, state.phases[0], SEED)
    total = sum(map(len, plan.windows.values()))
    epoch, of_sources = plan.epochs(total)
    assert epoch == 1
    assert of_sources.keys() == plan.windows.keys()
    assert all(0.97 < value < 1.03 for value in of_sources.values())
