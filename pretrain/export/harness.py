"""Tasks of the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), answered by our models."""

import itertools
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from data_pipeline.errors import ConfigError, UserError
from model.batch import Batch
from model.generation.sampling import Sampling
from pretrain.export.use import open_trained
from pretrain.inference.continuation import Continuation, Settings
from pretrain.inference.text import check_text
from pretrain.inference.trained import Trained, check_next_token

MAX_TOKENS = 256
"""To generate, where a task does not say."""
RESAMPLINGS = 1000
"""For standard errors that have no formula."""
Pair = tuple[Any, list[int], list[int]]
"""What was asked, tokens that are given, tokens that follow."""
_ANCHORS = ("\n", ".", "(", "|")
"""Behind one of them a text begins with a piece of its own in almost every vocabulary."""
_ALONE = "continuations that would share a token with the end of their context, each encoded by itself"
_CUT = "texts longer than model.context, of which the last tokens were read only"
_UNKNOWN = "texts with characters that are not in the vocabulary: each counts as the unknown piece, whatever it is"
_NOTHING = "texts without a token to predict: they count as certain"


class DuetLM(TemplateLM):
    """Answers the harness's three questions.

    What a text begins with follows the token that ends a document, as at the start of a document in training.
    """

    def __init__(self, trained: Trained, batch: int | None = None) -> None:
        """`batch`: texts of a forward pass; as many as 8,192 tokens unless given.

        Raises:
            ConfigError: the model was not trained to continue a text.
        """
        super().__init__()
        check_next_token(trained.model.config, trained.objective)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._trained = trained
        self._model = trained.model.to(self._device)
        self._batch = batch or max(1, 8192 // self.max_length)
        self._noted: Counter[tuple[str, str]] = Counter()

    @property
    def max_length(self) -> int:
        """Tokens that a prediction can depend on."""
        return self._trained.model.config.context

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self._trained.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; nothing is added."""
        tokens: list[int] = self._trained.tokenizer.encode([string])[0].tolist()
        return tokens

    def warnings(self) -> list[str]:
        """What the figures of a task do not tell, of all that was asked so far."""
        return [f"{task}: {text}: {count}" for (task, text), count in sorted(self._noted.items())]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the continuation's log-probability, and whether greedy choice gives it.

        Raises:
            ConfigError: one of them is no text, or nothing of a continuation is left to predict.
        """
        pairs: list[Pair] = []
        for request in requests:
            given, follows, alone = self._encoded(*map(_text, request.args))
            if len(given) + len(follows) - 1 > self.max_length:
                self._note(request, _CUT)
            if self._trained.tokenizer.unk_id in follows:
                self._note(request, _UNKNOWN)
            if alone:
                self._note(request, _ALONE)
            pairs.append((request.args, given, follows))
        return self._loglikelihood_tokens(pairs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, every token once, in windows of the context.

        They do not overlap, as in validation, but for the last one: it is filled up with the tokens before it.

        Raises:
            ConfigError: one of them is no text.
        """
        windows: list[Pair] = []
        owners = []
        for number, request in enumerate(requests):
            text = _text(request.args[0])
            tokens = self.tok_encode(text)
            if text and not tokens:
                self._note(request, _NOTHING)
            if self._trained.tokenizer.unk_id in tokens:
                self._note(request, _UNKNOWN)
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for part in map(make_disjoint_window, parts):
                windows.append((None, *part))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (found, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += found
        return totals

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int], bool]:
        """Tokens that are given, tokens that follow, and whether these were encoded without those.

        As the harness has it, spaces at the end of a context are the continuation's. A token that would hold the end of
        the context, too, is none of the continuation: what follows spells the continuation, no more and no less, so
        that likelihoods behind one context compare.
        """
        kept = context.rstrip()
        asked = context[len(kept) :] + continuation
        given, whole = self.tok_encode(kept), self.tok_encode(kept + asked)
        alone = whole[: len(given)] != given
        follows = self._behind(given, asked, whole) if alone else whole[len(given) :]
        if not continuation or not follows:
            raise ConfigError(
                f"a task asks how likely {continuation!r} is after {context[-40:]!r}, and the tokenizer makes no token "
                "of it: nothing else would be as likely; give each choice a text"
            )
        return given or [self.prefix_token_id], follows, alone

    def _behind(self, given: list[int], text: str, whole: list[int]) -> list[int]:
        """Tokens of `text` alone, without the space that some tokenizers put before each text."""
        decode = self._trained.tokenizer.decode
        ways = [self.tok_encode(text)]
        for anchor in _ANCHORS:
            before, both = self.tok_encode(anchor), self.tok_encode(anchor + text)
            if both[: len(before)] == before:
                ways.append(both[len(before) :])
        return next((way for way in ways if decode([*given, *way]) == decode(whole)), ways[0])

    def _note(self, request: Instance, text: str) -> None:
        self._noted[request.task_name or "a task", text] += 1

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of each pair the log-probability of what follows, and whether it is what greedy choice gives."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        for numbers in _parts(order, self._batch):
            rows = []
            for number in numbers:
                _, given, follows = requests[number]
                if len(follows) > self.max_length:
                    raise ConfigError(
                        f"a task asks for the likelihood of {len(follows)} tokens at once, and the model has "
                        f"model.context={self.max_length}"
                    )
                rows.append(torch.tensor([*given, *follows][-self.max_length - 1 : -1], device=self._device))
            # What is behind the end of a row is seen by nothing before it.
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            vectors = self._model.hidden(ids, None, self._prompts(ids, rows, [requests[n][2] for n in numbers])).x
            for number, row, x in zip(numbers, rows, vectors, strict=True):
                labels = torch.tensor(requests[number][2], device=self._device)
                # The head one text at a time: logits of all would be large.
                logits = self._model.token_embed(x[None, len(row) - len(labels) : len(row)])[0].float()
                likelihood = logits.log_softmax(-1).gather(1, labels[:, None]).double().sum()
                found[number] = float(likelihood), bool((logits.argmax(-1) == labels).all())
        return found

    def _prompts(self, ids: Tensor, rows: list[Tensor], follows: list[list[int]]) -> Batch | None:
        """Where a model reads prompts apart: what is given of each row [B, T], before what follows."""
        if not self._model.config.reads_prompt:
            return None
        lengths = [len(row) - len(labels) + 1 for row, labels in zip(rows, follows, strict=True)]
        zero = torch.zeros(len(rows), dtype=torch.int64, device=ids.device)
        return Batch(ids, ids, zero, zero[0], 0, prefix_lengths=torch.tensor(lengths, device=ids.device))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text as its task asks, until one of the task's stop strings.

        Raises:
            ConfigError: a task asks for what there is not.
        """
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in alike.values():
            sampling, stops, tokens = _asked(dict(requests[numbers[0]].args[1]))
            for first in range(0, len(numbers), self._batch):
                part = numbers[first : first + self._batch]
                # A text's seed is its place among those alike: the batch makes no difference to what is drawn.
                settings = Settings(sampling, tokens, stops, seed=first)
                continuation = Continuation(self._trained, [_text(requests[n].args[0]) for n in part], settings)
                for number, text in zip(part, continuation.texts, strict=True):
                    if len(text.prompt_ids) > self.max_length:
                        self._note(requests[number], _CUT)
                    if self._trained.tokenizer.unk_id in text.prompt_ids:
                        self._note(requests[number], _UNKNOWN)
                for place, piece in continuation.pieces():
                    texts[part[place]] += piece
        return texts


def evaluate_tasks(
    path: Path, step: int | None, tasks: Sequence[str], changes: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Metrics of each task, by name; a name that ends in `_stderr` is the standard error of the one before.

    Args:
        path, step, changes: as `open_trained` has them.
        tasks: the harness's names, or YAML files of its kind.

    Raises:
        UserError: as `open_trained` does.
        ConfigError: no such task; its file or its data cannot be read; or it asks for what there is not.

    Says on standard error what a task's figures do not tell.
    """
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise ConfigError(f"--tasks {task}: no such file")
    model = DuetLM(open_trained(path, step, changes))
    # The harness's own tasks are many files: they are looked through only if one of them is asked for.
    manager = TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))
    loaded: list[Any] = []
    for task in tasks:
        try:
            found = manager.load([task])
        except Exception as error:  # whatever the libraries raise that read the task's data
            raise ConfigError(f"--tasks {task}: no such task or file, or it cannot be loaded: {error!r}") from error
        groups = found.get("groups", {})
        loaded += [groups[task]] if task in groups else found["tasks"].values()
    results = _evaluated(model, loaded, manager, ",".join(tasks))
    for text in model.warnings():
        print(f"warning: {text}", file=sys.stderr)
    return {
        task: {name.replace(",none", ""): value for name, value in found.items() if isinstance(value, float)}
        for task, found in results["results"].items()
    }


def _evaluated(model: DuetLM, tasks: list[Any], manager: TaskManager, names: str) -> Any:
    """The harness's results. What it raises of itself is about a task, and becomes a ConfigError."""
    try:
        return simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=RESAMPLINGS, log_samples=False)
    except UserError:
        raise
    except Exception as error:
        frames = itertools.islice(traceback.walk_tb(error.__traceback__), 1, None)
        if any(frame.f_code.co_filename == __file__ for frame, _ in frames):
            raise  # of our own answers
        raise ConfigError(f"--tasks {names}: the harness cannot evaluate it: {error!r}") from error


def _asked(keywords: dict[str, Any]) -> tuple[Sampling, tuple[str, ...], int]:
    """What a task's `generation_kwargs` mean: sampling, stop strings, tokens at most."""
    until = keywords.pop("until", None) or []
    tokens = keywords.pop("max_gen_toks", MAX_TOKENS)
    known: dict[str, Any] = {
        name: keywords.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in keywords
    }
    sampled = keywords.pop("do_sample", None)
    if keywords:
        raise ConfigError(
            f"a task's generation_kwargs ask for {', '.join(keywords)}; known are until, max_gen_toks, do_sample, "
            "temperature, top_k, top_p, min_p"
        )
    stops = tuple(map(_text, until if isinstance(until, list | tuple) else [until]))
    numbers = {name: value for name, value in known.items() if value is not None}
    for name, value in ({"max_gen_toks": tokens} | numbers).items():
        if isinstance(value, bool) or not isinstance(value, int if name in ("max_gen_toks", "top_k") else int | float):
            raise ConfigError(f"a task's generation_kwargs have {name}={value!r}, which is no number of that kind")
    if sampled is None:
        sampled = numbers.get("temperature", 0.0) > 0.0
    return Sampling(**numbers) if sampled else Sampling(temperature=0.0), stops, tokens


def _text(value: Any) -> str:
    """What a task gives as a text. Raises ConfigError if it is none."""
    if not isinstance(value, str):
        raise ConfigError(f"a task gives {value!r} where a text is wanted; write it as a string, such as {{{{x}}}}")
    return check_text(value, "a text of a task")


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    yield from (numbers[first : first + size] for first in range(0, len(numbers), size))
