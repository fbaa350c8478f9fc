"""Duet from Python: `import duet_pretrain as duet`, then what stands here.

Errors that a user can mend are `data_pipeline.errors.UserError`. torch and pyarrow are imported when they are needed.
"""

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_pipeline.errors import ConfigError, RunError
from data_pipeline.ingest.splits import Split

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.storage.dataset import Dataset
    from pretrain.inference.trained import Trained

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class OpenDataset:
    """A built dataset: its documents, and the windows of tokens that a model is trained on."""

    def __init__(self, dataset: "Dataset") -> None:
        self.dataset = dataset
        self.tokenizer = dataset.tokenizer()
        """`encode(texts)` and `decode(ids)`."""

    @property
    def sources(self) -> list[str]:
        """Names of the sources that there is text of to train on."""
        return list(self.dataset.sources())

    def num_tokens(self, split: Split = "train", source: str | None = None) -> int:
        """Of one source or of all, tokens that end documents included."""
        return sum(shard.tokens for shard in self.dataset.shards_of(split, source))

    def documents(self, split: Split = "train", source: str | None = None) -> Iterator[np.ndarray]:
        """Each document's ids [tokens], without the token that ends it, in the order they are stored."""
        from data_pipeline.inspection.statistics import documents

        for parts in documents(self.dataset, split, source):
            yield self.dataset.manifest.plain(np.concatenate(parts))[:-1]

    def texts(self, split: Split = "train", source: str | None = None) -> Iterator[str]:
        """Each document's text; that of a tokenizer that normalises is the normalised one."""
        return map(self.tokenizer.decode, self.documents(split, source))

    def windows(self, context: int, split: Split = "train", source: str | None = None) -> Iterator[np.ndarray]:
        """Ids int64 [context + 1], in the order they are stored: `window[:-1]` is read, `window[1:]` predicted.

        Raises:
            DataError: there is too little text for one.
        """
        from data_pipeline.sampling.windows import Windows

        windows = Windows.of(self.dataset, split, context, source=source)
        plain = self.dataset.manifest.plain
        return (plain(windows.read(np.array([number]))[0]) for number in range(len(windows)))


class LoadedModel:
    """A trained model, on the GPU if there is one, in fp32 and evaluation."""

    def __init__(self, trained: "Trained") -> None:
        import torch

        self.module = trained.model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        """A torch module: of ids [B, T] it gives logits [B, T, V]."""
        self.tokenizer = trained.tokenizer
        self.run, self.step = trained.run, trained.step
        self._trained = trained

    def generate(
        self,
        prompts: Sequence[str],
        tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stops: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """What follows each prompt, as `duet generate` gives it; prompt number n draws from `seed` + n.

        Args:
            prompts: as many as fit into memory at once.
            tokens: at most, for each.
            temperature: 0 takes the likeliest token each time.

        Raises:
            ConfigError: the model was not trained to continue a text, or an option is out of its range.
        """
        from model.generation.sampling import Sampling
        from pretrain.inference.continuation import Continuation, Settings

        if isinstance(prompts, str):
            raise ConfigError(f"prompts is a list of texts; for one of them give [{prompts!r}]")
        if tokens < 0 or not 0 <= seed < 2**63:
            raise ConfigError(f"tokens={tokens}, seed={seed}: expected tokens of 0 or more, and a seed below 2^63")
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
        continuation = Continuation(self._trained, prompts, Settings(sampling, tokens, tuple(stops), seed))
        for _ in continuation.pieces():
            pass
        return [text.continuation for text in continuation.texts]

    def logits(self, text: str) -> "Tensor":
        """[tokens of `text`, V]: of what follows each of its tokens.

        Raises:
            ConfigError: `text` is empty, or longer than the model's context.
        """
        import torch

        [ids] = self.tokenizer.encode([text])
        context = self.module.config.context
        if not 0 < len(ids) <= context:
            raise ConfigError(f"the text has {len(ids)} tokens; the model reads 1 to {context} at once")
        with torch.inference_mode():
            found: Tensor = self.module(
                torch.tensor(ids[None], dtype=torch.long, device=next(self.module.parameters()).device)
            )
        return found[0]


def build(*config: str, overwrite: bool = False, processes: int = 1) -> OpenDataset:
    """`duet data build`: the dataset of these presets, files and overrides, which is left alone if it is there.

    With more `processes` a script does what it does under `if __name__ == "__main__":`, since each of them imports it.

    Raises:
        UserError: as the command does.
    """
    from data_pipeline.building.api import build as build_dataset
    from pretrain.config.schema import load as load_config

    data = load_config(list(config)).data
    build_dataset(data, overwrite=overwrite, processes=processes)
    return open_dataset(data.path)


def open_dataset(path: str | Path) -> OpenDataset:
    """A dataset, by its folder or URI.

    Raises:
        DataError: there is none, or it is damaged.
    """
    from data_pipeline.storage.dataset import Dataset

    return OpenDataset(Dataset.open(path))


def train(*config: str, ranks: int = 1, verbose: bool = False) -> Path:
    """`duet train` in processes of their own: presets, files and overrides, such as `"train.steps=100"`.

    Goes on where the run folder stands. Call it from the main thread: Ctrl-C has the run save and stop.

    Returns:
        the run folder, for `journal` and `load`.

    Raises:
        ConfigError: a mistake in the configuration.
        RunError: the run failed, or was stopped before its end.
    """
    from launch.local.local_ranks import run_ranks
    from pretrain.config.schema import load as load_config

    if ranks < 1:
        raise ConfigError(f"ranks={ranks}: expected 1 or more")
    loaded = load_config(list(config))
    loaded.micro_batches(ranks)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        code = run_ranks(list(config), ranks, loaded.run_dir / "logs", verbose=verbose)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code:
        raise RunError(f"{loaded.run_dir}: the training ended with code {code}; {loaded.run_dir / 'logs'} says why")
    return loaded.run_dir


def load(path: str | Path, step: int | None = None) -> LoadedModel:
    """A model of a run folder (its newest checkpoint, or that of `step`), of a checkpoint or of an export.

    Raises:
        UserError: there is none, it is damaged, or its tokenizer is not to be had.
    """
    from pretrain.export.use import open_trained

    return LoadedModel(open_trained(Path(path), step))


def journal(run: str | Path, kind: Literal["train", "validation"] = "train") -> dict[str, np.ndarray]:
    """A run's metrics as columns by the names of docs/tracking.md, a row a step that has any of that kind.

    `step` is int64, the others float64, with nan where a step has none. Without what a rollback or a resumed attempt
    superseded; of very long runs an even selection of 4,000 steps. `pandas.DataFrame(journal(run))` makes a data frame.

    Raises:
        ConfigError: no such kind.
        RunError: no run folder, or nothing in its journal.
    """
    from pretrain.metric_names import LOSS, VALIDATION
    from pretrain.run.run_summary import load as load_run

    if kind not in ("train", "validation"):
        raise ConfigError(f"kind={kind!r}: expected 'train' or 'validation'")
    points = load_run(Path(run)).points
    steps = [point.step for point in points.get(LOSS if kind == "train" else VALIDATION, [])]
    rows = {step: row for row, step in enumerate(steps)}
    columns = {"step": np.array(steps, np.int64)}
    for name, found in points.items():
        column = np.full(len(steps), np.nan)
        for point in found:
            if point.step in rows:
                column[rows[point.step]] = point.value
        if not np.isnan(column).all():
            columns[name] = column
    return columns
