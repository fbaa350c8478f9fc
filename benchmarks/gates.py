"""How much faster a feed forward in gated blocks is than a dense one of the same size, and a whole model with it.

Eight blocks of which two are open (`top`), gates included; fp32 unless a row says otherwise; one thread, seconds of
processor time, both in turns. Rows without a target show where it does not pay. Exits with 1 when a target is missed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.architectures import registry
from model.architectures.registry import configure
from model.attention.cache import Cache
from model.config.transformer import TransformerConfig
from model.layers.layers import FeedForward
from model.layers.noise import sample_keys
from model.masks.block_gates import BlockFeedForward

LAYERS = 6
"""So many feed forwards one after the other, so that weights leave the caches as they would."""
DECODE = {256: None, 512: 1.6, 1024: 2.3}
BATCH = {256: None, 512: 1.8, 1024: 1.8}
"""At least, by width."""
TOKENS, PROMPT, NEW = 768, 64, 32
WHOLE = 1.4
GATES = {"kind": "top", "blocks": 8, "density": 0.25}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for width in DECODE for row in sublayers(width)] + [in_16_bits(512), in_16_bits(1024)] + whole(1024)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| dense / gated | ratio | at least |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.2f} | {row['target'] or '–'} |")
    return int(any(row["target"] and row["ratio"] < row["target"] for row in rows))


def sublayers(width: int) -> list[dict[str, Any]]:
    """One token, a batch without gradients, a batch in training."""
    config = configured(width, gated=True)
    dense = [FeedForward(config, 0.02) for _ in range(LAYERS)]
    gated = [BlockFeedForward(config, "dec_ff", 0, 0.02) for _ in range(LAYERS)]
    keys = sample_keys(0, torch.tensor(1), torch.arange(1))

    def forward(x: Tensor, keys: Tensor | None = None) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        return (
            lambda: torch.stack([ff(x) for ff in dense]).sum(),
            lambda: torch.stack([ff(x, keys)[0] for ff in gated]).sum(),
        )

    rows = []
    with torch.no_grad():
        for ff in gated:
            ff.cache = Cache(torch.zeros(1, dtype=torch.int64), 1)  # as in generation: nothing is told of the gates
        rows.append(row(f"one token, width {width}", *forward(torch.randn(1, 1, width)), DECODE[width]))
        batch = torch.randn(1, TOKENS, width)
        rows.append(row(f"{TOKENS} tokens, width {width}", *forward(batch), BATCH[width]))
    for ff in gated:
        del ff.cache
    one, other = forward(batch.requires_grad_(), keys)
    training = (lambda: one().backward()), (lambda: other().backward())
    rows.append(row(f"{TOKENS} tokens in training, width {width}", *training, BATCH[width]))
    return rows


def in_16_bits(width: int) -> dict[str, Any]:
    """Training on other tokens each time, alike among themselves: each block is opened by other numbers of them."""
    config = configured(width, gated=True)
    dense = nn.ModuleList(FeedForward(config, 0.02) for _ in range(LAYERS)).bfloat16()
    gated = nn.ModuleList(BlockFeedForward(config, "dec_ff", 0, 0.02) for _ in range(LAYERS)).bfloat16()
    keys = sample_keys(0, torch.tensor(1), torch.arange(1))

    def tokens() -> Tensor:
        return (torch.randn(1, TOKENS, width) + torch.randn(width)).bfloat16().requires_grad_()

    def train_dense() -> None:
        x = tokens()
        torch.stack([ff(x) for ff in dense]).sum().backward()

    def train_gated() -> None:
        x = tokens()
        torch.stack([ff(x, keys)[0] for ff in gated]).sum().backward()

    name = f"{TOKENS} tokens in training, others each time, bf16, width {width}"
    return row(name, train_dense, train_gated, BATCH[width])


def whole(width: int) -> list[dict[str, Any]]:
    """A decoder-only model: new tokens after a prompt, and the prompt alone."""
    dense, gated = (registry.build(configured(width, gated=gated)).eval() for gated in (False, True))
    prompt = torch.randint(4096, (1, PROMPT))

    def decode(model: nn.Module) -> Callable[[], object]:
        cache = Cache(torch.zeros(1, dtype=torch.int64), 2 * PROMPT)
        cache.logits(model, prompt)

        def more() -> None:
            cache.length = PROMPT
            for _ in range(NEW):
                cache.logits(model, prompt[:, :1])

        return more

    name = f"decoder-only model, {LAYERS} layers, width {width}"
    with torch.no_grad():
        return [
            row(f"{name}: {NEW} new tokens", decode(dense), decode(gated), WHOLE),
            row(f"{name}: a pass over 256 tokens", passing(dense), passing(gated), WHOLE),
        ]


def passing(model: nn.Module) -> Callable[[], object]:
    ids = torch.randint(4096, (2, 128))
    return lambda: Cache(torch.zeros(2, dtype=torch.int64), 128).logits(model, ids)


def configured(width: int, *, gated: bool) -> TransformerConfig:
    gates = {"block_gates": GATES} if gated else {}
    shape = {"width": width, "layers": LAYERS, "heads": width // 64, "context": 128, "vocab_size": 4096}
    off = {"learned_dropout": {"enabled": False}}
    found = configure({"architecture": "decoder_only", **shape, **off, **gates})
    assert isinstance(found, TransformerConfig)
    return found


def row(name: str, dense: Callable[[], object], gated: Callable[[], object], target: float | None) -> dict[str, Any]:
    """Medians of both in turns, for about three seconds."""
    times: tuple[list[float], list[float]] = ([], [])
    until = time.process_time() + 3.0
    while time.process_time() < until or len(times[0]) < 5:
        for work, taken in zip((dense, gated), times, strict=True):
            since = time.process_time()
            work()
            taken.append(time.process_time() - since)
    one, other = (1e3 * statistics.median(taken) for taken in times)
    return {"name": f"{name} ({one:.2f} ms / {other:.2f} ms)", "ratio": one / other, "target": target}


if __name__ == "__main__":
    sys.exit(main())
