"""How fast text becomes shards: `duet data build` beside sentencepiece alone and beside datatrove.

All read the same JSON Lines; both that build write token files. datatrove runs in an environment of its own, whose
interpreter DATATROVE_PYTHON names (`pip install datatrove==0.10.1 tokenizers==0.23.3 orjson`); without it the rows
beside datatrove are left out. Each way is a process that is started once and
builds a little first, so that no start is timed; then all ways build in turn, each time from nothing. Ratios are of CPU
seconds, which a busy machine disturbs less than the clock, of one thread on one CPU. Only the row by the clock has all
CPUs, and text that occurs more than once. With DUET_CORPORA, a folder of corpora, English novels are built as well,
whose documents are long. Exits with 1 when a target is missed.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import zstandard

from data_pipeline.config import DataConfig, TokenizerConfig
from data_pipeline.tokenize.tokenizer import train_tokenizer
from launch.commands.quickstart import collect

ROUNDS = 3
CLOCK_ROUNDS = 5
MEGABYTES = 16
VOCABULARY = 8192
COPIES = 4  # For the processes, which need some work; a unigram tokenizer remembers nothing.
NOVELS = "eltec/eng.train.jsonl.zst"
UNIT_BYTES = 2**23
NAMES = {"datatrove": "datatrove", **dict.fromkeys(("bpe alone", "unigram alone"), "sentencepiece alone, not written")}

SERVE = """
import json, os, resource, sys, time

def used():
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)

def serve(build):
    if sys.argv[1] == "one":
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    for line in sys.stdin:
        request = json.loads(line)
        cpu, wall = used(), time.perf_counter()
        build(**request)
        sys.__stdout__.write(json.dumps([used() - cpu, time.perf_counter() - wall]) + "\\n")
        sys.__stdout__.flush()
"""
OURS = (
    f"UNIT_BYTES = {UNIT_BYTES}"
    + """
from data_pipeline.ingest import sources; from data_pipeline.tokenize import tokenizer
from data_pipeline.building.api import build
from data_pipeline.config import DataConfig

def ours(config, processes):
    sources.UNIT_BYTES = UNIT_BYTES
    tokenizer._loaded.cache_clear()  # One that is kept remembers words.
    build(DataConfig.model_validate(config), processes=processes)

if __name__ == "__main__":
    serve(ours)
"""
)
DATATROVE = """
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

def datatrove(text, tokenizer, out, logs):
    writer = DocumentTokenizer(
        out, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", shuffle_documents=False
    )
    LocalPipelineExecutor([JsonlReader(text), writer], tasks=1, logging_dir=logs).run()

if __name__ == "__main__":
    serve(datatrove)
"""
ALONE = """
import pathlib
import sentencepiece

def alone(text, model):
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    for file in sorted(pathlib.Path(text).glob("*.jsonl")):
        with open(file) as lines:
            texts = [json.loads(line)["text"] for line in lines]
        processor.encode(texts, return_type="numpy", num_threads=1)

serve(alone)
"""


class Way:
    """A process that builds as often as it is told to."""

    def __init__(
        self,
        folder: Path,
        python: str,
        program: str,
        request: dict[str, Any],
        small: dict[str, Any],
        *,
        cpus: Literal["one", "all"] = "one",
    ) -> None:
        """`request`: what it is to build, `small`: a little of the same kind; `folder`: its own, emptied each time."""
        folder.mkdir(exist_ok=True)
        file, self._log = folder.with_suffix(".py"), folder.with_suffix(".log")
        file.write_text(SERVE + program)
        one = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        path = "" if python != sys.executable else str(Path(__file__).resolve().parents[1])
        self._folder, self._request = folder, request
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [python, str(file), cpus],
                env=os.environ | one | {"PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._ask(small)

    def __enter__(self) -> "Way":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    def time(self) -> tuple[float, float]:
        """(CPU seconds, seconds by the clock) of building once."""
        return self._ask(self._request)

    def _ask(self, request: dict[str, Any]) -> tuple[float, float]:
        for path in self._folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(self._log.read_text()[-3000:])
        cpu, wall = json.loads(answer)
        return cpu, wall


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--text", type=Path, help="a .jsonl.zst to take the text from")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        rows = measure(Path(name), args.text, stack)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| claim | ratio | at least |\n|---|---|---|")
        for row in rows:
            target = f"{row['target']:.3g}" if row["target"] else "–"
            print(f"| {row['name']} | {row['ratio']:.2f} | {target} |")
    return int(any(row["target"] and row["ratio"] < row["target"] for row in rows))


def measure(folder: Path, text: Path | None, stack: ExitStack) -> list[dict[str, Any]]:
    texts = {"": list(take(texts_of(text) if text else python_texts(folder), MEGABYTES * 10**6))}
    if corpora := os.environ.get("DUET_CORPORA"):
        texts["novels: "] = list(take(texts_of(Path(corpora) / NOVELS), MEGABYTES * 10**6))
    ways: dict[str, Way] = {}
    for prefix, found in texts.items():
        for name, way in start(folder / (prefix[:-2] or "text"), found, ("unigram",) if prefix else ("unigram", "bpe")):
            ways[prefix + name] = stack.enter_context(way)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            seconds[name].append(way.time()[0])
    cpu = {name: statistics.median(found) for name, found in seconds.items()}
    sizes = {prefix: sum(len(text.encode()) for text in found) / 1e6 for prefix, found in texts.items()}

    def row(what: str, way: str, other: str, target: float | None, prefix: str = "") -> dict[str, Any]:
        size, seconds, beside = sizes[prefix], cpu[prefix + way], cpu[prefix + other]
        return {
            "name": f"{prefix}{what} ({size / seconds:.1f} MB per CPU-s) / {NAMES[other]} ({size / beside:.1f})",
            "ratio": beside / seconds,
            "target": target,
        }

    rows = [
        row("SentencePiece bpe", "bpe", "bpe alone", 1.8),
        row("SentencePiece unigram", "unigram", "unigram alone", 0.8),
    ]
    if corpora:
        rows.append(row("SentencePiece unigram", "unigram", "unigram alone", None, "novels: "))
    if datatrove():
        # 10, or nine tenths of what the library that makes the ids reaches alone: no pipeline around it is faster.
        unigram = min(10.0, 0.9 * cpu["datatrove"] / cpu["unigram alone"])
        rows += [
            row("same tokenizer", "same", "datatrove", 1.15),
            row("SentencePiece bpe", "bpe", "datatrove", 3.5),
            row("SentencePiece unigram", "unigram", "datatrove", unigram),
        ]
        if corpora:
            rows.append(row("SentencePiece unigram", "unigram", "datatrove", None, "novels: "))
    return [*rows, clock(folder / "text", texts[""], stack)]


def clock(folder: Path, texts: list[str], stack: ExitStack) -> dict[str, Any]:
    """The row by the clock."""
    write(folder / "large", texts, COPIES)
    ways = {
        count: stack.enter_context(ours(folder, f"{count}-processes", folder / "unigram.model", count, "large"))
        for count in (1, 2)
    }
    seconds: dict[int, list[float]] = {count: [] for count in ways}
    for _ in range(CLOCK_ROUNDS):
        for count, way in ways.items():
            seconds[count].append(way.time()[1])
    one, two = (statistics.median(found) for found in seconds.values())
    return {"name": "2 processes / 1 with 2 threads, by the clock", "ratio": one / two, "target": 1.0}


def datatrove() -> str | None:
    """The interpreter that has it."""
    return os.environ.get("DATATROVE_PYTHON")


def start(folder: Path, texts: list[str], kinds: Sequence[str]) -> Iterator[tuple[str, Way]]:
    """datatrove and the same tokenizer, and each kind of our own with and without us; each warm."""
    folder.mkdir()
    write(folder / "text", texts)
    write(folder / "small", [text[: 2**12] for text in texts[:40]])
    if python := datatrove():
        same = make_tokenizer(folder, texts)
        out = {"tokenizer": str(same), "out": str(folder / "peer" / "out"), "logs": str(folder / "peer" / "logs")}
        peer = [{"text": str(folder / name), **out} for name in ("text", "small")]
        yield "datatrove", Way(folder / "peer", python, DATATROVE, *peer)
        yield "same", ours(folder, "same", same)
    for kind in kinds:
        model = folder / f"{kind}.model"
        settings = TokenizerConfig.model_validate({"type": kind, "vocab_size": VOCABULARY})
        model.write_bytes(train_tokenizer(texts[::4], settings, seed=0))
        yield kind, ours(folder, kind, model)
        alone = [{"text": str(folder / text), "model": str(model)} for text in ("text", "small")]
        yield f"{kind} alone", Way(folder / f"{kind}-alone", sys.executable, ALONE, *alone)


def ours(folder: Path, name: str, model: Path, processes: int | None = None, text: str = "text") -> Way:
    """Builds with `model`, since training is not what is compared; with so many processes on all CPUs, or on one."""
    requests = []
    for what in (text, "small"):
        config = DataConfig.model_validate(
            {
                "path": str(folder / name),
                "sources": {"text": {"paths": [str(folder / what)]}},
                "tokenizer": {"model": str(model)},
                "split": {"rule": "hash", "fraction": 0.1},
            }
        )
        requests.append({"config": config.model_dump(), "processes": processes or 1})
    return Way(folder / name, sys.executable, OURS, *requests, cpus="all" if processes else "one")


def texts_of(file: Path) -> Iterator[str]:
    with open(file, "rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as unpacked:
        for line in io.TextIOWrapper(unpacked, encoding="utf-8"):
            yield json.loads(line)["text"]


def python_texts(folder: Path) -> Iterator[str]:
    """Python's documentation, then the source of its standard library."""
    collect(folder / "docs.jsonl.zst")
    yield from texts_of(folder / "docs.jsonl.zst")
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in file.parts and (text := file.read_bytes().decode(errors="replace")):
            yield text


def take(texts: Iterator[str], size: int) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        size -= len(text.encode())
        yield text


def write(folder: Path, texts: list[str], copies: int = 1) -> None:
    """Texts in two files of JSON Lines."""
    folder.mkdir()
    for number in range(2):
        with open(folder / f"{number}.jsonl", "w") as file:
            for _ in range(copies):
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts[number::2])


def make_tokenizer(folder: Path, texts: list[str]) -> Path:
    """A byte-level BPE, which both sides can use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(texts[::4], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


if __name__ == "__main__":
    sys.exit(main())
