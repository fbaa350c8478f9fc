"""Plain over batched streams: seconds of one layer after the other by those of a layer of each stream at a time.

Above 1 the batched form is faster. Forward pass and training step (forward and backward) of three layers a stream
without masks, sequences of 256 tokens at most, vocabulary 64; medians of runs in turns. On a CPU one thread, seconds
of processor time, up to width 512 and 8k tokens; the rest of the grid runs where there is CUDA. No target: the default
is the plain form, and the rows say where the other would be the better choice.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from model.architectures import registry
from model.architectures.token_model import LanguageModel
from model.batch import Batch
from model.config.mask_config import LearnedDropoutConfig
from model.config.model_config import ModelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS, TOKENS = (64, 128, 256, 512, 1024, 2048), (16, 64, 512, 2048, 8192, 65536)
MOST = (2048, 65536) if DEVICE == "cuda" else (512, 8192)
LAYERS, CONTEXT, VOCABULARY = 3, 256, 64
SECONDS = 2.0
"""For a cell; at least three turns and at most 41."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    rows = [row for width in WIDTHS for tokens in TOKENS for row in measure(width, tokens)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    for what in ("forward", "training"):
        print(f"\n{DEVICE}, {what}: plain / batched\n\n| C | " + " | ".join(f"{n} tokens" for n in TOKENS) + " |")
        print("|---" * (len(TOKENS) + 1) + "|")
        for width in WIDTHS:
            cells = [row["ratio"] for row in rows if (row["what"], row["width"]) == (what, width)]
            print(f"| {width} | " + " | ".join("not measured" if c is None else f"{c:.2f}" for c in cells) + " |")
    return 0


def measure(width: int, tokens: int) -> list[dict[str, Any]]:
    """A row for the forward pass and one for training."""
    row: dict[str, Any] = {"width": width, "tokens": tokens, "layers": LAYERS, "device": DEVICE, "target": None}
    found: dict[str, float | None] = dict.fromkeys(("forward", "training"))
    if width <= MOST[0] and tokens <= MOST[1]:
        models = {streams: build(streams, width) for streams in ("plain", "batched")}
        length = min(tokens, CONTEXT)
        ids = torch.randint(0, VOCABULARY, (tokens // length, length + 1), device=DEVICE)
        samples = torch.arange(len(ids), device=DEVICE)
        batch = Batch(ids[:, :-1], ids[:, 1:], samples, torch.ones((), dtype=torch.int64, device=DEVICE), seed=0)
        found = {what: ratio(models, batch, what == "training") for what in found}
        print(f"C {width}, {tokens} tokens: {found}", file=sys.stderr, flush=True)
    return [
        {"name": f"{what}, C {width}, {tokens} tokens", "what": what, "ratio": r} | row for what, r in found.items()
    ]


def build(streams: Any, width: int) -> LanguageModel:
    config = ModelConfig(
        streams=streams,
        layers=LAYERS,
        width=width,
        heads=width // 64,
        context=CONTEXT,
        vocab_size=VOCABULARY,
        learned_dropout=LearnedDropoutConfig(enabled=False),
    )
    with torch.device(DEVICE):
        model = registry.build(config)
    return model.bfloat16() if DEVICE == "cuda" else model


def ratio(models: dict[str, LanguageModel], batch: Batch, training: bool) -> float:
    """Median seconds of the plain form over those of the batched one."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    turn, began = -1, time.perf_counter()  # a turn to warm up
    while turn < 3 or (turn < 41 and time.perf_counter() - began < SECONDS):
        for name, model in models.items():
            since = now()
            if training:
                model(batch).loss.backward()
                model.zero_grad(set_to_none=True)
            else:
                with torch.no_grad():
                    model(batch)
            if turn >= 0:
                seconds[name].append(now() - since)
        turn += 1
    return statistics.median(seconds["plain"]) / statistics.median(seconds["batched"])


def now() -> float:
    """Seconds; other work on the machine does not count on a CPU."""
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
