"""Probes of every state of runs, beside models that were not trained, and likenesses of states."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.token_stream import TokenStream
from model.architectures import registry
from model.architectures.token_model import TokenModel
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.config.schema import Config
from pretrain.engine.caches import own_caches
from pretrain.evaluation.batches import Batches
from pretrain.export.portable import is_export
from pretrain.export.use import opened_dataset
from pretrain.inference.trained import check_next_token, find_checkpoint, read_model
from pretrain.probing.features import NOT_ASKED, QUESTIONS, answers, common_tokens
from pretrain.probing.findings import Answer, Findings, Probed, Question
from pretrain.probing.linear import Score, entropy, likeness, probe
from pretrain.probing.states import LayerState, states
from pretrain.probing.text import Chosen, choose

COMPARED = 4096
"""Tokens at most that likenesses are of."""
_DIGITS = 4

Progress = Callable[[str], object]


class _Opened(NamedTuple):
    """A run whose newest checkpoint is there and whole."""

    checkpoint: Checkpoint
    config: Config
    dataset: Dataset


class _Asked(NamedTuple):
    """What is asked of the tokens of some windows."""

    windows: Windows
    chosen: Chosen
    questions: dict[str, Question]
    classes: dict[str, tuple[Tensor, Tensor]]
    """By question, of all tokens to train on and to test on, int64 [n]."""


def examine(runs: Sequence[Path], tokens: int, seed: int, progress: Progress = lambda text: None) -> Findings:
    """Probe every state of the newest checkpoints of `runs`, and compare each state with each.

    Args:
        tokens: of held-out text, two thirds of them to train on.
        seed: of the models that were not trained, which are probed beside them.
        progress: told what comes next.

    Raises:
        ConfigError: a model does not predict the next token of one text, or the runs are of different datasets or
            contexts, or one is given twice.
        DataError: there is too little held-out text.
    """
    own_caches()
    opened = [_open(run) for run in runs]
    names = _names(opened)
    asked = _asked(opened[0], tokens)
    found: list[Probed] = []
    compared: list[Tensor] = []
    for name, run in zip(names, opened, strict=True):
        progress(f"{name}: {run.config.model.architecture}, trained")
        trained = dict(_probed(run, read_model(run.checkpoint, run.config), asked, compared))
        progress(f"{name}: the same shape, not trained")
        torch.manual_seed(seed)
        random = dict(_probed(run, registry.build(run.config.model).eval(), asked, []))
        found += [
            Probed(run=name, stream=state.stream, depth=state.depth, trained=told, random=random[state])
            for state, told in trained.items()
        ]
    progress("likeness")
    context = asked.windows.context
    return Findings(
        dataset=opened[0].dataset.manifest.fingerprint,
        context=context,
        tokens=(asked.chosen.train.size * context, asked.chosen.test.size * context),
        apart=asked.chosen.apart,
        seed=seed,
        questions=asked.questions,
        states=found,
        likeness=_likenesses(compared),
    )


def apart(names: Sequence[str]) -> list[str]:
    """Names without the words at either end that all have in common: `a-b-seed-1` and `a-c-seed-1` are `b` and `c`."""
    words = [name.split("-") for name in names]
    while len(names) > 1 and all(len(of_name) > 1 for of_name in words) and len({tuple(w[:1]) for w in words}) == 1:
        words = [of_name[1:] for of_name in words]
    while len(names) > 1 and all(len(of_name) > 1 for of_name in words) and len({tuple(w[-1:]) for w in words}) == 1:
        words = [of_name[:-1] for of_name in words]
    return ["-".join(of_name) for of_name in words]


def _open(path: Path) -> _Opened:
    if is_export(path):
        raise ConfigError(f"{path} is an export, and does not say where its held-out text lies; name the run folder")
    checkpoint, config = find_checkpoint(path)
    check_next_token(config.model, config.data.objective)
    in_order = config.objective.in_order or config.objective
    if in_order.name != "causal":
        raise ConfigError(
            f"{path} was trained with data.objective={config.data.objective}; what its streams know is asked of models "
            "of plain text, in its own order"
        )
    return _Opened(checkpoint, config, opened_dataset(checkpoint, config))


def _names(opened: Sequence[_Opened]) -> list[str]:
    """What the runs are called. Raises ConfigError where they cannot be told apart, or not be asked the same."""
    names = [run.config.run.name for run in opened]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two of the runs are called {', '.join(twice)}: they could not be told apart")
    for what, values in (
        ("datasets", {run.dataset.manifest.fingerprint[:12] for run in opened}),
        ("contexts", {str(run.config.model.context) for run in opened}),
    ):
        if len(values) > 1:
            raise ConfigError(
                f"the runs have different {what} ({', '.join(sorted(values))}), and all are asked about the same "
                "tokens: probe them apart"
            )
    return apart(names)


def _asked(run: _Opened, tokens: int) -> _Asked:
    """Of a question with one answer only there is nothing to ask."""
    windows = Windows(TokenStream(run.dataset, "validation"), run.config.model.context)
    chosen = choose(windows, tokens)
    train, test = windows.read(chosen.train), windows.read(chosen.test)
    common, tokenizer = common_tokens(train), run.dataset.tokenizer()
    of_train, of_test = (answers(part, common, tokenizer) for part in (train, test))
    asked = _Asked(windows, chosen, {}, {})
    for name in QUESTIONS:
        known, others = (part[name][part[name] != NOT_ASKED] for part in (of_train, of_test))
        if not len(others) or len(np.unique(known)) < 2:
            continue
        classes = int(max(known.max(), others.max())) + 1
        asked.classes[name] = torch.from_numpy(of_train[name].ravel()), torch.from_numpy(of_test[name].ravel())
        asked.questions[name] = Question(
            classes=classes,
            asked=(len(known), len(others)),
            majority=round(float((others == np.bincount(known).argmax()).mean()), _DIGITS),
            entropy=round(entropy(torch.from_numpy(known), torch.from_numpy(others), classes), _DIGITS),
        )
    return asked


def _probed(
    run: _Opened, model: TokenModel, asked: _Asked, compared: list[Tensor]
) -> Iterator[tuple[LayerState, dict[str, Answer]]]:
    """Every state of a model; of those to test on, the first COMPARED are added to `compared`."""
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    batches = Batches.of(run.config, run.dataset, model.token_embed.weight.device)
    train, test = (_vectors(model, asked.windows, part, batches) for part in (asked.chosen.train, asked.chosen.test))
    for state in train:
        compared.append(test[state][:COMPARED])
        told = {}
        for name, (of_train, of_test) in asked.classes.items():
            pairs = _asked_of(train[state], of_train), _asked_of(test[state], of_test)
            told[name] = _answer(probe(*pairs, asked.questions[name].classes))
        yield state, told


def _asked_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    kept = y != NOT_ASKED
    return x[kept.to(x.device)], y[kept].to(x.device)


def _vectors(model: TokenModel, windows: Windows, numbers: np.ndarray, batches: Batches) -> dict[LayerState, Tensor]:
    """Of the tokens of these windows, [n T, C] at each state."""
    size = max(1, 8192 // windows.context)
    parts: dict[LayerState, list[Tensor]] = {}
    for begin in range(0, len(numbers), size):
        batch = (batches.in_order or batches).of_validation(windows, numbers[begin : begin + size])
        for state, x in states(model, batch).items():
            parts.setdefault(state, []).append(x.flatten(0, 1))
    return {state: torch.cat(part) for state, part in parts.items()}


def _answer(told: Score) -> Answer:
    return Answer(accuracy=round(told.accuracy, _DIGITS), bits=round(told.bits, _DIGITS))


def _likenesses(vectors: list[Tensor]) -> list[list[float]]:
    table = np.eye(len(vectors))
    for row in range(len(vectors)):
        for column in range(row):
            table[row, column] = table[column, row] = likeness(vectors[row], vectors[column])
    return [[round(float(value), _DIGITS) for value in row] for row in table]
