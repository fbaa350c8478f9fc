"""Tokens a second with a cache, and with the whole window computed for each token, from 16 tokens to a full context.

And a token's time with a cache beside transformers' GPT-2 of the same shape, where that is installed, and beside what
no token can do without: reading the weights once, and torch's calls. Exits with 1 when a target is missed.
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
from torch import Tensor, nn
from torch.nn import functional

from model.architectures import registry
from model.architectures.blocks import EncoderLayer
from model.architectures.registry import configure
from model.architectures.token_model import TokenModel
from model.attention.cache import Cache
from model.generation.generate import Generation
from model.generation.sampling import Sampling
from model.layers.layers import Linear

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
WIDTHS = {128: 0.6, 512: 0.7}
"""Of decoders of 6 layers without masks, and the share that they reach at least of the speed of torch's calls alone."""
BESIDE_GPT_2, BESIDE_WEIGHTS = 2.0, 0.4
"""At least so fast as transformers' GPT-2, and as reading the weights once."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    rows = [measure(name, texts, options) for name, (texts, options) in CASES.items()]
    for width, share in WIDTHS.items():
        rows += beside(width, share)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| medians | ratio | at least |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.2f} | {row['target']:.2f} |")
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


def beside(width: int, share: float) -> list[dict[str, Any]]:
    """Of a decoder: CPU time a token beside that of reading its weights and of its calls of torch alone, in turn, each
    after reading them, so that caches are as cold; and the same texts beside GPT-2."""
    torch.manual_seed(0)
    shape = {"architecture": "decoder_only", "layers": 6, "width": width, "heads": HEADS}
    options = {**shape, "learned_dropout": {"enabled": False}}
    model = registry.build(configure(dict(vocab_size=4096, context=CONTEXT, **options))).eval()
    prompts = torch.randint(4096, (1, PROMPT))
    told = f"decoder only, 6 layers, width {width}, no masks"
    generation = Generation(model, list(prompts), Sampling(temperature=0.0))
    generation.step()
    weights = list(model.parameters())
    reads: list[float] = []

    def after_reading(work: Callable[[], object]) -> float:
        reads.append(cpu_ms(lambda: read(weights)))
        return cpu_ms(work)

    works = [generation.step, *(calls(model, transposed) for transposed in (False, True))]
    times = [[after_reading(work) for work in works] for _ in range(CONTEXT - PROMPT - 1)]
    ours, *both = map(statistics.median, zip(*times, strict=True))
    floor, reading = min(both), statistics.median(reads)
    name = f"{told}: reading the weights once ({reading:.2f} CPU ms) / a token ({ours:.2f} CPU ms)"
    rows = [{"name": name, "ratio": reading / ours, "target": BESIDE_WEIGHTS}]
    name = f"{told}: its calls of torch alone ({floor:.2f} CPU ms) / a token ({ours:.2f} CPU ms)"
    rows.append({"name": name, "ratio": floor / ours, "target": share})
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
def read(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        weight.sum()


def calls(model: TokenModel, transposed: bool) -> Callable[[], object]:
    """The calls of torch that a token needs, and nothing between them, in the middle of the texts, without its table of
    positions; `transposed`: of weights that lie so in memory, as GPT-2's do."""
    width, length = model.config.width, (PROMPT + CONTEXT) // 2

    def laid(weight: Tensor) -> Tensor:
        return weight.detach().t().contiguous() if transposed else weight.detach().t()

    assert isinstance(model.final_norm, nn.LayerNorm)
    layers = [layer for layer in model.modules() if isinstance(layer, EncoderLayer)]
    maps = [[laid(part.weight) for part in layer.modules() if isinstance(part, Linear)] for layer in layers]
    kept = [torch.zeros(2, 1, HEADS, CONTEXT, width // HEADS) for _ in layers]
    head, column, norm = laid(model.token_embed.weight), torch.tensor([length]), model.final_norm.weight.detach()

    @torch.inference_mode()
    def token() -> Tensor:
        x = torch.zeros(1, width)
        for (qkv, out, up, down), (keys, values) in zip(maps, kept, strict=True):
            heads = torch.mm(torch.layer_norm(x, [width], norm), qkv).view(1, 3 * HEADS, 1, -1)
            query, key, value = torch.split_with_sizes(heads, [HEADS] * 3, 1)
            keys.index_copy_(2, column, key)
            values.index_copy_(2, column, value)
            seen = keys.narrow(2, 0, length + 1), values.narrow(2, 0, length + 1)
            x += torch.mm(functional.scaled_dot_product_attention(query, *seen).view(1, width), out)
            x += torch.mm(functional.gelu(torch.mm(torch.layer_norm(x, [width], norm), up)), down)
        return torch.mm(torch.layer_norm(x, [width], norm), head).argmax()

    return token


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
