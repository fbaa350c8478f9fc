"""What is read at each position of a run: source and window as pure functions of the position."""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.kinds import kind_of, open_windows
from data_pipeline.sampling.mixture import integer_weights
from data_pipeline.sampling.packed_windows import PackedWindows
from data_pipeline.sampling.packing_plan import rule_of
from data_pipeline.sampling.phases import Phase, Schedule
from data_pipeline.sampling.shuffle import SampleOrder
from data_pipeline.storage.dataset import BLOCK_SHARDS, Dataset
from data_pipeline.storage.manifest import ShardFacts


def wanted_phase(dataset: Dataset, config: DataConfig, context: int, recorded: bool = True) -> Phase:
    """How `config` wants samples to be drawn from `dataset`, as a first phase.

    Weights are `data.weights`, else those of `data.sources`, else those of the configuration that the dataset was
    built with (unless not `recorded`); without any, sources weigh what they have of windows, and all come to the end
    of an epoch together.

    Raises DataError for a weight of a source that is not there, or that cannot be used, and when windows are to be
    packed and `packing_plan.prepare` was not called.
    """
    sources = dataset.sources()
    kind = kind_of(dataset, config)
    if kind in ("pairs", "labels"):
        windows = {name: source.split_documents["train"] for name, source in sources.items()}
    elif kind == "best_fit":
        windows = {name: len(PackedWindows.of(dataset, "train", context, name)) for name in sources}
    else:
        windows = {name: max(0, source.tokens["train"] - 1) // context for name, source in sources.items()}
    repeats = dict(dataset.manifest.repeats) if recorded else {}
    repeats |= {name: source.repeat for name, source in config.sources.items() if source.repeat is not None}
    caps = {name: int(windows[name] * repeat) for name, repeat in repeats.items() if name in windows}
    given = given_weights(config, windows) or (dataset.manifest.weights if recorded else None)
    if given:
        weights = integer_weights({name: given.get(name, 0) for name in windows})
    else:  # where there is none, Windows refuses with advice
        weights = integer_weights(windows if any(windows.values()) else dict.fromkeys(windows, 1))
    return Phase(
        base_counts=dict.fromkeys(sources, 0),
        weights=weights,
        caps={name: cap for name, cap in caps.items() if name in weights},
        exhausted=config.exhausted,
        context=context,
        unit=context,
        order=config.order,
        packing=kind,
        streams={
            name: dataset.stream_fingerprint(name) + (f" {rule_of(dataset)} {context}" if kind == "best_fit" else "")
            for name in sources
        },
    )


def given_weights(config: DataConfig, sources: Collection[str]) -> Mapping[str, float]:
    """The weights that a configuration gives; nothing if it leaves them to the dataset.

    Raises DataError for a weight of a source that is not there, and where some have one and others none.
    """
    given: Mapping[str, float] = config.weights
    if not given and set(sources) <= set(config.sources):
        given = {name: weight for name in sources if (weight := config.sources[name].weight) is not None}
        if given and (missing := [name for name in sources if name not in given]):
            raise DataError(
                f"data.sources.{missing[0]} has no weight, though {next(iter(given))} has: give all, or none"
            )
    if unknown := [name for name in given if name not in sources]:
        raise DataError(f"data.weights.{unknown[0]}: no such source in {config.path}; it has {', '.join(sources)}")
    return given


def told_shares(dataset: Dataset, config: DataConfig, phase: Phase) -> str | None:
    """A line that says what share of the samples is read from each source, and why; None if there is only one."""
    if len(phase.streams) < 2:
        return None
    total, recorded = sum(phase.weights.values()), dataset.manifest.weights
    shares = ", ".join(f"{name} {phase.weights.get(name, 0) / total:.1%}" for name in phase.streams)
    if given_weights(config, phase.streams):
        why = "as the configuration says"
    elif recorded and phase.weights == integer_weights({name: recorded.get(name, 0) for name in phase.streams}):
        why = "as the configuration that the dataset was built with says"
    elif recorded:
        why = "as this run began; the dataset was built with other weights: data.weights"
    else:
        why = "by their size, since the dataset was built without weights; data.weights gives others"
    return f"samples by source: {shares} ({why})"


def told_cut(dataset: Dataset, phase: Phase) -> Iterator[str]:
    """A line for each source of which conversations are longer than a window: what becomes of them."""
    for name in phase.weights if dataset.manifest.chat_template is not None else ():
        facts = PackedWindows.of(dataset, "train", phase.context, name).facts
        if longer := facts.cut + facts.left_out:
            yield (
                f"{name}: {longer:,} of {facts.documents:,} are longer than {phase.context + 1} tokens: "
                f"conversations end with their last whole turn of the assistant's, {facts.left_out:,} without one are "
                "left out"
            )


class Plan:
    """The samples of one phase: source and window as a pure function of the position, the same on all ranks."""

    def __init__(self, dataset: Dataset, phase: Phase, seed: int) -> None:
        """Raises DataError when a source has too few tokens for one window, or is not what it was."""
        dataset.check_order(phase.order)
        self._dataset = dataset
        self.schedule = Schedule(phase, seed)
        self.context = phase.context
        self.windows = {
            name: open_windows(dataset, phase.packing, "train", phase.context, name) for name in phase.weights
        }
        self._parts = phase.unit // phase.context
        in_block = BLOCK_SHARDS * dataset.manifest.shard_tokens
        self._orders = []
        for name, windows in self.windows.items():
            tokens = phase.unit if phase.packing == "plain" else max(1, windows.num_tokens // len(windows))
            block = max(1, in_block // tokens) if phase.order == "block" else None
            units = max(1, len(windows) // self._parts)
            self._orders.append(SampleOrder(phase.streams[name], seed, units, block))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the source and window in it at each sample position: int64 [n] to int64 [n], int64 [n].

        Raises DataError for positions behind the end of the data.
        """
        source, count = self.schedule.at(positions)
        window = np.empty_like(positions)
        for k in np.unique(source).tolist():
            rows = source == k
            units, part = np.divmod(count[rows], self._parts)
            window[rows] = self._orders[k].windows(units) * self._parts + part
        return source, window

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of the source, and the place of the sample in it as its windows tell it, at each position: int64 [n]
        three times."""
        source, window = self.at(positions)
        batch, offset = np.empty_like(window), np.empty_like(window)
        for k, windows in enumerate(self.windows.values()):
            rows = source == k
            batch[rows], offset[rows] = windows.places(window[rows])
        return source, batch, offset

    def prefetch(self, position: int) -> None:
        """Has a remote dataset fetch what is read from `position` on: the shards of the blocks that are being read,
        then those of the next ones."""
        if not self._dataset.is_remote:
            return
        counts = self.schedule.counts(position)
        units = [counts[name] // self._parts for name in self.windows]
        shards: dict[str, ShardFacts] = {}
        for _ in range(2):
            for k, windows in enumerate(self.windows.values()):
                assert not isinstance(windows, PackedWindows)  # see `wanted_phase`
                first, end, units[k] = self._orders[k].block(units[k])
                shards |= {shard.path: shard for shard in windows.shards_of(first * self._parts, end * self._parts)}
        self._dataset.prefetch(list(shards.values()))

    def epochs(self, position: int) -> tuple[float, dict[str, float]]:
        """How often the data have been read before `position`: all of them, and each source where several are mixed."""
        counts = self.schedule.counts(position)
        lengths = {name: len(windows) for name, windows in self.windows.items()}
        each = {name: counts[name] / length for name, length in lengths.items()} if len(lengths) > 1 else {}
        return sum(counts[name] for name in lengths) / sum(lengths.values()), each


def go_on(state: DataState, dataset: Dataset, config: DataConfig, context: int) -> DataState:
    """The state from which a run goes on with `dataset` as `config` wants, in a new phase if `config.phase` says so.

    Raises DataError when what is to be read changed otherwise; names what differs.
    """
    wanted = wanted_phase(dataset, config, context)
    if len(state.phases) == config.phase and state.phases[-1].changes(wanted):
        # A run from before datasets recorded their weights goes on with those it had.
        former = wanted_phase(dataset, config, context, recorded=False)
        wanted = wanted if state.phases[-1].changes(former) else former
    return state.entered(wanted, dataset.manifest.fingerprint, config.phase)
