"""`duet data plan` and `duet data locate`: what a run will read, and what a step of it read."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import DataError, RunError
from launch.completion import complete_configs, complete_runs

if TYPE_CHECKING:
    from data_pipeline.sampling.pair_windows import PairWindows
    from data_pipeline.sampling.phases import Phase
    from data_pipeline.storage.dataset import Dataset
    from pretrain.config.schema import Config

_SHOWN_CHARACTERS = 80


def plan(
    config: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG… KEY=VALUE…",
            help="As for a run.",
            autocompletion=complete_configs,
        ),
    ],
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens to train on, such as 10B; those of the run unless given.")
    ] = None,
) -> None:
    """Say how often each source would be read by a run, before it starts; with data.packing, pack it ahead of the run.

    Example: `duet data plan data/python-docs run/quickstart --tokens 100M`
    """
    from data_pipeline.counts import number_of
    from pretrain.config.schema import load

    for line in plan_lines(load(config), None if tokens is None else number_of(tokens, "--tokens")):
        typer.echo(line)


def locate(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG… KEY=VALUE…",
            help="As for a run.",
            autocompletion=complete_configs,
        ),
    ] = None,
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, from 1.")] = 1,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="The folder of a run, instead of CONFIG.", autocompletion=complete_runs),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Show how each document begins.")] = False,
) -> None:
    """Say which documents a training step reads, or read: sample, source, window, shard, tokens, documents.

    Example: `duet data locate data/python-docs run/quickstart --step 100 --text`
    """
    for line in locate_lines(config or [], run, step, text):
        typer.echo(line)


def plan_lines(config: "Config", tokens: int | None) -> Iterator[str]:
    """How often a run reads each source. Raises DataError when the dataset cannot be read as `config` says."""
    from data_pipeline.sampling.label_windows import LabelWindows
    from data_pipeline.sampling.packed_windows import PackedWindows
    from data_pipeline.sampling.pair_windows import PairWindows
    from data_pipeline.sampling.sample_plan import Plan, told_cut, told_shares, wanted_phase
    from data_pipeline.storage.dataset import Dataset

    context = config.model.context
    wanted = config.train.steps * config.batch.tokens if tokens is None else tokens
    dataset = Dataset.of(config.data)
    config.objective.check(dataset)
    _pack(dataset, config.data.packing, context)
    phase = wanted_phase(dataset, config.data, context)
    plan = Plan(dataset, phase, config.run.seed)
    samples = plan.schedule.extend(-(-wanted // context))
    counts, period = plan.schedule.counts(samples), sum(phase.weights.values())
    yield f"{samples * context:,} tokens: {samples:,} samples of {context}, {samples / config.global_batch:,.0f} steps"
    if shares := told_shares(dataset, config.data, phase):
        yield shares
    for name, windows in plan.windows.items():
        padding = f", {windows.padding:.2%} padding" if isinstance(windows, PackedWindows) else ""
        cap = f", at most {phase.caps[name] / len(windows):.2f}" if name in phase.caps else ""
        yield (
            f"{name:<16} weight {phase.weights[name] / period:7.2%}  {len(windows) * context:>16,} tokens an epoch  "
            f"{counts[name] * context:>16,} tokens read  {counts[name] / len(windows):10.2f} epochs{cap}{padding}"
        )
    for name, windows in plan.windows.items():
        if isinstance(windows, LabelWindows):
            long = sum(int((texts > context).sum()) for texts, _ in windows.lengths())
            yield f"{name:<16} {len(windows):,} texts, {long:,} of them longer than the context: cut"
        elif isinstance(windows, PairWindows):
            yield f"{name:<16} {_cut_pairs(windows, config.model.traits.two_sequences)}"
    yield from told_cut(dataset, phase)
    for name in phase.base_counts:
        if name not in phase.weights:
            yield f"{name:<16} not read"
    for position, left_out in plan.schedule.dropped(samples):
        yield f"from sample {position:,} (step {position // config.global_batch + 1:,}) without {', '.join(left_out)}"
    if samples * context < wanted:
        yield (
            f"the data end {wanted - samples * context:,} tokens early, at sample {samples:,} (step "
            f"{samples // config.global_batch + 1:,}): a source's repeat is used up; data.exhausted=drop goes on"
        )


def locate_lines(args: list[str], run: Path | None, step: int, text: bool) -> Iterator[str]:
    """The samples of a step, of a run or of the run that `args` describe.

    Raises:
        DataError: both or neither are given, or there is no such step.
        RunError: the run has not trained the step.
    """
    import numpy as np

    from data_pipeline.inspection.locate import locate as passages
    from data_pipeline.sampling.sample_plan import Plan, wanted_phase
    from data_pipeline.storage.dataset import Dataset
    from pretrain.config.schema import load

    if (run is None) == (not args):
        raise DataError("name either a run with --run RUN, or its configuration, such as data.path=… batch.tokens=…")
    config = load(args) if run is None else _config_of(run)
    if run is not None:
        _check_trained(run, step, config)
    dataset = Dataset.of(config.data)
    positions = np.arange((step - 1) * config.global_batch, step * config.global_batch)
    phase = _phase_of(run, int(positions[0])) if run is not None else None
    context, packing = (phase or config.model).context, (phase or config.data).packing
    _pack(dataset, packing, context)
    if phase is None:
        phase = wanted_phase(dataset, config.data, config.model.context)
    plan = Plan(dataset, phase, config.run.seed)
    tokenizer = dataset.tokenizer() if text else None
    yield f"step {step}: samples {positions[0]} to {positions[-1]}, windows of {plan.context} tokens"
    for position, passage in zip(positions.tolist(), passages(plan, positions), strict=True):
        origin = passage.origin
        yield (
            f"sample {position}  {passage.source}  window {passage.window}  {origin.shard} from token "
            f"{origin.offset}  documents {_numbers(list(dict(origin.documents)))}"
        )
        if tokenizer is not None:
            for number, tokens in origin.documents:
                yield f"    {number}: {tokenizer.decode(dataset.manifest.plain(tokens))[:_SHOWN_CHARACTERS]!r}"


def _cut_pairs(pairs: "PairWindows", two_sequences: bool) -> str:
    """How many pairs a context cuts; reads all of them."""
    sources = targets = long = 0
    for source, target in pairs.lengths():
        sources += int((source > pairs.context).sum())
        targets += int((target > pairs.context).sum())
        long += int((source + target > pairs.context + 1).sum())
    if two_sequences:
        return f"{len(pairs):,} pairs, {sources:,} sources and {targets:,} targets of them longer than the context: cut"
    return f"{len(pairs):,} pairs, {long:,} of them longer than the context: cut"


def _numbers(documents: list[int]) -> str:
    """Numbers of documents: as a range where they follow each other."""
    first, last = documents[0], documents[-1]
    if len(documents) > 1 and last - first == len(documents) - 1:
        return f"{first} to {last}"
    return ", ".join(map(str, documents))


def _pack(dataset: "Dataset", packing: str, context: int) -> None:
    """Computes the plan of packed windows where one is wanted and not there."""
    from data_pipeline.sampling.packing_plan import prepare
    from launch.progress import progress_line

    if packing == "best_fit":
        with progress_line() as progress:
            prepare(dataset, context, progress)


def _config_of(run: Path) -> "Config":
    from pretrain.run.run_folder import RunFolder

    return RunFolder(run).config()


def _check_trained(run: Path, step: int, config: "Config") -> None:
    """Raises RunError for a step that the run did not come to: what it will read may change until then."""
    from pretrain.run.run_listing import run_state, saved_steps

    newest = max([run_state(run).step or 0, *saved_steps(run)])
    if step <= newest:
        return
    told = f"{run}: step {step} was not trained: "
    if step > config.train.steps:
        raise RunError(f"{told}the run has {config.train.steps} steps, and stands at {newest}")
    read = shlex.join(["duet", "data", "locate", str(run / "config.yaml"), "--step", str(step)])
    raise RunError(f"{told}it stands at {newest}; what it would read: {read}")


def _phase_of(run: Path, position: int) -> "Phase | None":
    """The phase that a run was in at a position, as its newest checkpoint tells; None where it tells of none."""
    from pretrain.checkpoint.checkpoint import Checkpoint
    from pretrain.run.checkpoint_folder import complete
    from pretrain.run.run_folder import RunFolder

    folder = RunFolder(run)
    found = complete(folder.checkpoints)
    state = Checkpoint(found[0]).data_state(folder.config().run.seed) if found else None
    return state.phase_at(position) if state and state.phases else None
