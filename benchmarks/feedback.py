"""What a feedback model costs beside a decoder-only of the same shape: a training step, and a token with a cache.

Its tokens come one after the other, in training, too, so a training step takes longer; a ratio is the decoder's time
over its own, and the target the least that was found acceptable. Exits with 1 when a target is missed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from model.architectures import registry
from model.architectures.registry import configure
from model.batch import Batch
from model.generation.generate import Generation
from model.generation.sampling import Sampling

TEXTS, RUNS = 12, 5
VOCABULARY = 65
SHAPE = {"layers": 4, "width": 128, "heads": 4, "vocab_size": VOCABULARY, "learned_dropout": {"enabled": False}}
ARCHITECTURES = "decoder_only", "feedback"
LENGTHS = 64, 256
TRAINING = {64: 0.15, 256: 0.1}
DECODING = {64: 0.35, 256: 0.35}
"""At least so fast as the decoder, by tokens of a text."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    rows = [training(length) for length in LENGTHS] + [decoding(length) for length in LENGTHS]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| decoder-only / feedback, medians | ratio | at least |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.2f} | {row['target']} |")
    return int(any(row["ratio"] < row["target"] for row in rows))


def training(length: int) -> dict[str, Any]:
    """Forward and backward pass over `TEXTS` texts of `length` tokens."""
    ids = torch.randint(VOCABULARY, (TEXTS, length), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, ids.roll(-1, 1), torch.arange(TEXTS), torch.tensor(0), 0)

    def step(model: Any) -> Callable[[], None]:
        def run() -> None:
            model(batch).loss.backward()
            model.zero_grad()

        return run

    return row(f"a training step, {TEXTS} texts of {length}", "s", 1, length, step, TRAINING[length])


def decoding(length: int) -> dict[str, Any]:
    """Tokens of one text, up to `length`."""

    def step(model: Any) -> Callable[[], None]:
        model.eval()

        def run() -> None:
            generation = Generation(model, [torch.zeros(1, dtype=torch.int64)], Sampling(temperature=0.0))
            for _ in range(length - 1):
                generation.step()

        return run

    return row(f"a token with a cache, text of {length}", "ms", 1e3 / (length - 1), length, step, DECODING[length])


def row(
    name: str, unit: str, times: float, length: int, step: Callable[[Any], Callable[[], None]], target: float
) -> dict[str, Any]:
    """Both models in turn; once before, which does not count."""
    runs, taken = {}, dict[str, list[float]]()
    for architecture in ARCHITECTURES:
        torch.manual_seed(0)
        runs[architecture] = step(registry.build(configure(SHAPE | {"architecture": architecture, "context": length})))
    for number in range(RUNS + 1):
        for architecture, run in runs.items():
            since = time.perf_counter()
            run()
            if number:
                taken.setdefault(architecture, []).append(time.perf_counter() - since)
    other, own = (statistics.median(taken[architecture]) * times for architecture in ARCHITECTURES)
    name = f"{name} ({other:.3g} / {own:.3g} {unit})"
    ratio = statistics.median(one / its for one, its in zip(*(taken[a] for a in ARCHITECTURES), strict=True))
    return {"name": name, "ratio": ratio, "target": target}


if __name__ == "__main__":
    sys.exit(main())
