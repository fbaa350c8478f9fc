"""What the tests of the data pipeline share: real text, and datasets built from it."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
from data_pipeline.files.filesystem import resolve
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from tests.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]

PEAK = """
import atexit, re, threading, time
seen = []
def watch():
    while True:
        seen.append(int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
atexit.register(lambda: print(max(seen)))
"""
"""Prints the most memory that is not a mapped file, in KiB: the maps of files are the kernel's to drop,
and its getrusage begins with the peak of the process that forked this one."""


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


@pytest.fixture(scope="session")
def store() -> Iterator[Callable[[str], str]]:
    """A real S3 server on this machine; gives the URI of a key."""
    pytest.importorskip("moto", reason="moto's server is not installed")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/corpus", method="PUT")).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, "the server did not start"
                time.sleep(0.02)
        options = f"endpoint_override=http%3A%2F%2F127.0.0.1%3A{port}&region=us-east-1"
        yield lambda key: f"s3://corpus/{key}?{options}"
    server.terminate()
    server.wait()


def put(uri: str, content: bytes) -> None:
    filesystem, path = resolve(uri)
    with filesystem.open_output_stream(path, compression=None) as file:
        file.write(content)
