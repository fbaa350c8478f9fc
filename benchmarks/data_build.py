"""How fast text becomes shards: `duet data build` beside datatrove with the very same tokenizer.

Both read the same JSON Lines and write token files. datatrove runs in an environment of its own, whose interpreter
DATATROVE_PYTHON names (`pip install datatrove==0.10.1 tokenizers==0.23.3 orjson`); without it the peer is a plain loop:
the same tokenizer, numpy's tofile, nothing hashed, split or synced. Ratios are of CPU seconds, children included,
which a busy machine disturbs less than the clock. Exits with 1 when a target is missed.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.sources import UNIT_BYTES
from launch.python_docs import collect

ROUNDS = 3
COPIES = 16
VOCABULARY = 8192

OURS = """
import sys
from data_pipeline import sources
from data_pipeline.build import build
from data_pipeline.config import DataConfig
sources.UNIT_BYTES = int(sys.argv[3])
if __name__ == "__main__":
    build(DataConfig.model_validate_json(sys.argv[1]), processes=int(sys.argv[2]))
"""
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    folder, tokenizer, out, logs = sys.argv[1:5]
    LocalPipelineExecutor(
        [
            JsonlReader(folder),
            DocumentTokenizer(
                out, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", shuffle_documents=False
            ),
        ],
        tasks=1,
        logging_dir=logs,
    ).run()
"""
LOOP = """
import json, sys
import numpy as np
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
with open(sys.argv[1]) as lines, open(sys.argv[3], "wb") as out:
    for line in lines:
        np.array(tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids, np.uint16).tofile(out)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| claim | ratio | at least |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.2f} | {row['target']} |")
    return int(any(row["ratio"] < row["target"] for row in rows))


def measure(folder: Path) -> list[dict[str, Any]]:
    text = make_text(folder)
    made = make_tokenizer(folder, text)
    size = sum(len(json.loads(line)["text"].encode()) for line in lines_of(text))
    peer_name, peer = the_peer(folder, text, made)
    ways: dict[str, Callable[[], None]] = {"peer": peer}
    tokenizers: dict[str, dict[str, Any]] = {
        "same": {"model": str(made)},
        "unigram": {"type": "unigram", "vocab_size": VOCABULARY},
        "bpe": {"type": "bpe", "vocab_size": VOCABULARY},
    }
    for name, tokenizer in tokenizers.items():
        ways[name] = ours(folder / name, text, tokenizer, 1)
    for processes in (1, 2):  # Of units so small that there is work for both.
        ways[f"{processes} processes"] = ours(folder / f"{processes}", text, tokenizers["unigram"], processes, 2**21)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    cpu = {name: statistics.median(c for c, _ in found) for name, found in seconds.items()}
    wall = {name: statistics.median(w for _, w in found) for name, found in seconds.items()}
    mb = {name: size / 1e6 / value for name, value in cpu.items()}
    return [
        row(f"same tokenizer ({mb['same']:.1f} MB per CPU-s) / {peer_name} ({mb['peer']:.1f})", cpu, "same", 1.15),
        row(f"SentencePiece bpe ({mb['bpe']:.1f}) / {peer_name}, other tokens", cpu, "bpe", 3.5),
        row(f"SentencePiece unigram ({mb['unigram']:.1f}) / {peer_name}, other tokens", cpu, "unigram", 10),
        {
            "name": "2 processes / 1 with 2 threads, by the clock",
            "ratio": wall["1 processes"] / wall["2 processes"],
            "target": 1.0,
        },
    ]


def row(name: str, cpu: dict[str, float], ours: str, target: float) -> dict[str, Any]:
    return {"name": name, "ratio": cpu["peer"] / cpu[ours], "target": target}


def make_text(folder: Path) -> Path:
    """Python's documentation, several times over, in two files."""
    import zstandard

    collect(folder / "docs.jsonl.zst")
    with open(folder / "docs.jsonl.zst", "rb") as packed:
        lines = zstandard.ZstdDecompressor().stream_reader(packed).read().splitlines(keepends=True)
    (folder / "text").mkdir()
    for number in range(2):
        (folder / "text" / f"{number}.jsonl").write_bytes(b"".join(lines) * (COPIES // 2))
    return folder / "text"


def lines_of(text: Path) -> list[str]:
    return [line for file in sorted(text.glob("*.jsonl")) for line in file.read_text().splitlines()]


def make_tokenizer(folder: Path, text: Path) -> Path:
    """A byte-level BPE, which both sides can use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    texts = (json.loads(line)["text"] for line in lines_of(text)[:400])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def ours(
    out: Path, text: Path, tokenizer: dict[str, Any], processes: int, unit_bytes: int = UNIT_BYTES
) -> Callable[[], None]:
    """A build whose tokenizer is there already, since training is not what is compared."""
    config = DataConfig.model_validate(
        {
            "path": str(out),
            "sources": {"text": {"paths": [str(text)]}},
            "tokenizer": tokenizer,
            "split": {"rule": "hash", "fraction": 0.01},
        }
    )
    from data_pipeline.build import build_tokenizer

    build_tokenizer(config)

    def run() -> None:
        for name in ("manifest.json", "train", "validation", "_work"):
            path = out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        command([sys.executable, "-c", OURS, config.model_dump_json(), str(processes), str(unit_bytes)])

    return run


def the_peer(folder: Path, text: Path, tokenizer: Path) -> tuple[str, Callable[[], None]]:
    python = os.environ.get("DATATROVE_PYTHON")
    if python is None:
        program = [sys.executable, "-c", LOOP]

        def loop() -> None:
            for file in sorted(text.glob("*.jsonl")):
                command([*program, str(file), str(tokenizer), str(folder / f"{file.stem}.bin")])

        return "plain loop", loop

    def datatrove() -> None:
        for name in ("dt-out", "dt-logs"):
            shutil.rmtree(folder / name, ignore_errors=True)
        paths = [str(path) for path in (text, tokenizer, folder / "dt-out", folder / "dt-logs")]
        # The program's folder must not stand in the way of the environment's own modules.
        (folder / "peer.py").write_text(DATATROVE)
        command([python, str(folder / "peer.py"), *paths], PYTHONPATH="")

    return "datatrove", datatrove


def command(line: list[str], **environment: str) -> None:
    one = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(line, env=os.environ | one | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def timed(way: Callable[[], None]) -> tuple[float, float]:
    """(CPU seconds of the processes it starts, seconds by the clock)."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    way()
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended - began


if __name__ == "__main__":
    sys.exit(main())
