"""What the tests of the data pipeline share: real text, and datasets built from it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import build
from data_pipeline.config import DataConfig
from data_pipeline.dataset import Dataset, Windows

REPOSITORY = Path(__file__).resolve().parents[2]


def prose(words: int, seed: int = 0) -> str:
    """Seeded text with the shape of prose: a few hundred words, lines, a little beyond ASCII."""
    rng = np.random.default_rng(seed)
    vocabulary = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, 9))) for _ in range(300)]
    vocabulary += ["naïve", "—", "漢字", "\t", "😀"]
    ends = np.where(rng.random(words) < 0.08, "\n", " ")
    return "".join(vocabulary[i] + end for i, end in zip(rng.zipf(1.3, words) % len(vocabulary), ends, strict=True))


def config(folder: Path, *files: Path, **settings: object) -> DataConfig:
    """A small configuration: tail split, 400 pieces."""
    defaults: dict[str, object] = {
        "path": str(folder),
        "sources": {"text": {"paths": [str(file) for file in files]}},
        "tokenizer": {"vocab_size": 400, "character_coverage": 0.999},
        "split": {"rule": "tail", "fraction": 0.1},
    }
    return DataConfig.model_validate({**defaults, **settings})


def stream(windows: Windows) -> np.ndarray:
    """All tokens of a split, from `partial` windows."""
    rows = windows.read(np.arange(len(windows)))
    flat = np.concatenate([rows[:, :-1].ravel(), rows[-1:, -1]])
    return flat[flat >= 0]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by relative name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A dataset of several shards, whose windows cross their edges."""
    file = tmp_path / "text.txt"
    file.write_text(prose(6000), newline="")
    build(config(tmp_path / "dataset", file, shard_tokens=4096))
    return Dataset.open(tmp_path / "dataset")


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three sources of different sizes, some of several documents and shards."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, (name, words) in enumerate({"large": 9000, "middle": 4000, "small": 1500}.items()):
        (folder / name).mkdir()
        texts = prose(words, seed=number).splitlines(keepends=True)
        for part in range(0, len(texts), 60):
            (folder / name / f"{part:04d}.txt").write_text("".join(texts[part : part + 60]), newline="")
    settings = {"sources": {name: {"paths": [str(folder / name)]} for name in ("large", "middle", "small")}}
    build(config(folder / "dataset", shard_tokens=4096, **settings))
    return Dataset.open(folder / "dataset")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, list[str]], Path]:
    """Writes documents as a JSONL file."""
    import json

    def write(name: str, texts: list[str]) -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    return write
