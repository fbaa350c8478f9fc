"""Tasks of the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), answered by our models."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data_pipeline.errors import ConfigError
from model.sampling import Sampling
from pretrain.continuation import Continuation, Settings
from pretrain.trained import Trained
from pretrain.use import open_trained

MAX_TOKENS = 256
"""To generate, where a task does not say."""
RESAMPLINGS = 1000
"""For standard errors that have no formula."""
Pair = tuple[Any, list[int], list[int]]
"""What was asked, tokens that are given, tokens that follow."""


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
        trained.check_continues()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._trained = trained
        self._model = trained.model.to(self._device)
        self._batch = batch or max(1, 8192 // self.max_length)

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

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, every token once, in windows of the context.

        They do not overlap, as in validation, but for the last one: it is filled up with the tokens before it.
        """
        windows: list[Pair] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for part in map(make_disjoint_window, parts):
                windows.append((None, *part))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (found, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += found
        return totals

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
            vectors = self._model.hidden(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), None).x
            for number, row, x in zip(numbers, rows, vectors, strict=True):
                labels = torch.tensor(requests[number][2], device=self._device)
                # The head one text at a time: logits of all would be large.
                logits = self._model.token_embed(x[None, len(row) - len(labels) : len(row)])[0].float()
                likelihood = logits.log_softmax(-1).gather(1, labels[:, None]).double().sum()
                found[number] = float(likelihood), bool((logits.argmax(-1) == labels).all())
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text as its task asks, until one of the task's stop strings.

        Raises:
            ConfigError: a task asks for what there is not.
        """
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for asked, numbers in alike.items():
            sampling, stops, tokens = _asked(json.loads(asked))
            for part in _parts(numbers, self._batch):
                prompts = [requests[number].args[0] for number in part]
                settings = Settings(sampling, tokens, tuple(stops), seed=part[0])
                for place, piece in Continuation(self._trained, prompts, settings).pieces():
                    texts[part[place]] += piece
        return texts


def evaluate_tasks(path: Path, step: int | None, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics of each task, by name; a name that ends in `_stderr` is the standard error of the one before.

    Args:
        path, step: as `open_trained` has them.
        tasks: the harness's names, or YAML files of its kind.

    Raises:
        UserError: as `open_trained` does.
        ConfigError: no such task; its file or its data cannot be read; or it asks for what there is not.
    """
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise ConfigError(f"--tasks {task}: no such file")
    model = DuetLM(open_trained(path, step))
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
    results = simple_evaluate(model, tasks=loaded, task_manager=manager, bootstrap_iters=RESAMPLINGS, log_samples=False)
    return {
        task: {name.replace(",none", ""): value for name, value in found.items() if isinstance(value, float)}
        for task, found in results["results"].items()
    }


def _asked(keywords: dict[str, Any]) -> tuple[Sampling, list[str], int]:
    """What a task's `generation_kwargs` mean: sampling, stop strings, tokens at most."""
    until = keywords.pop("until", [])
    tokens = keywords.pop("max_gen_toks", MAX_TOKENS)
    sampled = keywords.pop("do_sample", keywords.get("temperature", 0.0) > 0.0)
    known: dict[str, Any] = {
        name: keywords.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in keywords
    }
    if keywords:
        raise ConfigError(
            f"a task's generation_kwargs ask for {', '.join(keywords)}; known are until, max_gen_toks, do_sample, "
            "temperature, top_k, top_p, min_p"
        )
    sampling = Sampling(**known) if sampled else Sampling(temperature=0.0)
    return sampling, [until] if isinstance(until, str) else until, tokens


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    yield from (numbers[first : first + size] for first in range(0, len(numbers), size))
