"""Tokens a second with a cache, and with the whole window computed for each token, from 16 tokens to a full context.

And a token's time with a cache beside transformers' GPT-2 of the same shape, where that is installed, and beside
reading the weights once, without which there is no token. Exits with 1 when a target is missed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
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
HEADS = 4
WIDTHS = (128, 512)
"""Of decoders of 6 layers without masks."""
BESIDE_GPT_2, BESIDE_WEIGHTS = 2.0, 0.4
"""At least so fast as transformers' GPT-2, and as reading the weights once."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    rows = [measure(name, texts, options) for name, (texts, options) in CASES.items()]
    for width in WIDTHS:
        rows += beside(width)
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


def beside(width: int) -> list[dict[str, Any]]:
    """Of a decoder: CPU time a token beside that of reading its weights, in turn, so that caches are as cold; and the
    same texts beside GPT-2."""
    torch.manual_seed(0)
    shape = {"architecture": "decoder_only", "layers": 6, "width": width, "heads": HEADS}
    options = {**shape, "learned_dropout": {"enabled": False}}
    model = registry.build(configure(dict(vocab_size=4096, context=CONTEXT, **options))).eval()
    prompts = torch.randint(4096, (1, PROMPT))
    told = f"decoder only, 6 layers, width {width}, no masks"
    generation = Generation(model, list(prompts), Sampling(temperature=0.0))
    generation.step()
    tokens, reads = [], []
    for _ in range(CONTEXT - PROMPT - 1):
        tokens.append(cpu_ms(generation.step))
        reads.append(cpu_ms(lambda: read(model)))
    ours, floor = statistics.median(tokens), statistics.median(reads)
    name = f"{told}: reading the weights once ({floor:.2f} CPU ms) / a token ({ours:.2f} CPU ms)"
    rows = [{"name": name, "ratio": floor / ours, "target": BESIDE_WEIGHTS}]
    if find_spec("transformers"):
        theirs = gpt(width, prompts)
        pairs = [(cpu_ms(theirs), cpu_ms(lambda: cached(model, prompts))) for _ in range(2 * RUNS + 1)]
        one, other = (statistics.median(times) / (CONTEXT - PROMPT) for times in zip(*pairs, strict=True))
        name = f"{told}: a token of transformers' GPT-2 ({one:.2f} CPU ms) / ours ({other:.2f} CPU ms)"
        rows.append({"name": name, "ratio": statistics.median(a / b for a, b in pairs), "target": BESIDE_GPT_2})
    return rows


def cpu_ms(work: Callable[[], object]) -> float:
    since = time.process_time()
    work()
    return 1e3 * (time.process_time() - since)


@torch.no_grad()
def read(model: TokenModel) -> None:
    for parameter in model.parameters():
        parameter.sum()


def gpt(width: int, prompts: torch.Tensor) -> Callable[[], object]:
    """As many tokens of transformers' own greedy generation, with its cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    shape = GPT2Config(vocab_size=4096, n_positions=CONTEXT, n_embd=width, n_layer=6, n_head=HEADS, **ends)
    model = GPT2LMHeadModel(shape).eval()
    mask = torch.ones_like(prompts)
    return lambda: model.generate(prompts, attention_mask=mask, max_new_tokens=CONTEXT - PROMPT, do_sample=False)


if __name__ == "__main__":
    sys.exit(main())
