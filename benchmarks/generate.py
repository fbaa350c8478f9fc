"""Tokens a second with a cache, and with the whole window computed for each token, from 16 tokens to a full context.

Exits with 1 when a target is missed.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from model.architectures import registry
from model.architectures.registry import configure
from model.architectures.token_model import TokenModel
from model.attention.cache import Cache
from model.generation.generate import Generation
from model.generation.sampling import Sampling

CONTEXT, PROMPT = 256, 16
TARGET = 2.0
RUNS = 3
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "parallel, 3 layers, width 128": (1, {}),
    "parallel, 3 layers, width 128, 8 texts": (8, {}),
    "parallel, 3 layers, width 256": (1, {"width": 256}),
    "parallel, 3 layers, width 128, no masks": (1, {"learned_dropout": {"enabled": False}}),
    "decoder only, 6 layers, width 128": (1, {"architecture": "decoder_only", "layers": 6}),
}
"""Texts side by side, and the model."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    rows = [measure(name, texts, options) for name, (texts, options) in CASES.items()]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| medians | ratio | at least |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.2f} | {row['target']} |")
    return int(any(row["ratio"] < row["target"] for row in rows))


def measure(name: str, texts: int, options: dict[str, Any]) -> dict[str, Any]:
    """Both ways in turn."""
    torch.manual_seed(0)
    model = registry.build(configure(dict(vocab_size=4096, context=CONTEXT, **options))).eval()
    prompts = torch.randint(4096, (texts, PROMPT))
    with_cache, anew = [], []
    for _ in range(RUNS):
        with_cache.append(cached(model, prompts))
        anew.append(recomputed(model, prompts))
    tokens = texts * (CONTEXT - PROMPT)
    fast, slow = (tokens / statistics.median(times) for times in (with_cache, anew))
    return {
        "name": f"{name}: cache ({fast:,.0f} tokens/s) / window ({slow:,.0f} tokens/s)",
        "ratio": fast / slow,
        "target": TARGET,
    }


def cached(model: TokenModel, prompts: torch.Tensor) -> float:
    since = time.perf_counter()
    generation = Generation(model, list(prompts), Sampling(temperature=0.0))
    for _ in range(CONTEXT - PROMPT):
        generation.step()
    return time.perf_counter() - since


def recomputed(model: TokenModel, prompts: torch.Tensor) -> float:
    """As beyond the context: a cache of its own for each token, and the head for the last position only."""
    since = time.perf_counter()
    ids, padding = prompts, torch.zeros(len(prompts), dtype=torch.int64)
    for _ in range(CONTEXT - PROMPT):
        ids = torch.cat([ids, Cache(padding, CONTEXT).logits(model, ids).argmax(-1)[:, None]], dim=1)
    return time.perf_counter() - since


if __name__ == "__main__":
    sys.exit(main())
