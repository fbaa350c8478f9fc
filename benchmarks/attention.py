"""What patterns save: windows and strides against plain causal attention and against a dense mask, and what a token
costs behind a long text. CPU seconds of one thread.

Exits with 1 when a target is missed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from model.architectures import registry
from model.architectures.decoder_only.spec import DecoderOnlyConfig
from model.attention import forms, weights
from model.attention.attention import SelfAttention
from model.attention.cache import Cache
from model.attention.forms import mask_of
from model.attention.rule import Rows
from model.attention.softmax import Softmax
from model.attention.visibility import Visible
from model.attention.weights import AdaptiveSpan
from model.config.scores_config import ScoresConfig

HEADS, CHANNELS = 4, 64
SHAPE: dict[str, Any] = {"width": HEADS * CHANNELS, "heads": HEADS, "layers": 2, "learned_dropout": {"enabled": False}}
TOKENS = 2048
"""Of a micro-batch: rows of T tokens; one row where T is more."""
RUNS = 7
WINDOW = 512
STEPS, TEXTS = 48, 4
"""Tokens that are read one by one, of so many texts side by side."""
ALL = 1 << 30
"""As a step in which keys are left out: none are."""


class Case(NamedTuple):
    """A ratio of medians."""

    name: str
    length: int
    pattern: dict[str, Any]
    against: str
    """What takes longer: `causal`, without a pattern, or `dense`, a mask T x T."""
    target: float
    backward: bool = True


CASES = [
    Case("window 64, T 2,048", 2048, {"kind": "window", "window": 64}, "causal", 2.5),
    Case("window 64, T 2,048", 2048, {"kind": "window", "window": 64}, "dense", 5.0),
    Case("window 64, T 2,048, forward", 2048, {"kind": "window", "window": 64}, "causal", 2.0, backward=False),
    Case("window 256, T 2,048", 2048, {"kind": "window", "window": 256}, "causal", 1.0),
    Case("window 256, T 2,048", 2048, {"kind": "window", "window": 256}, "dense", 2.0),
    Case("strided in turns, T 2,048", 2048, {"kind": "strided", "merge": "alternate"}, "dense", 5.0),
    Case("fixed in turns, T 2,048", 2048, {"kind": "fixed", "merge": "alternate"}, "dense", 3.0),
    Case("fixed, T 2,048", 2048, {"kind": "fixed"}, "dense", 2.0),
    Case("fixed, T 2,048", 2048, {"kind": "fixed"}, "causal", 1.0),
    Case("fixed, T 512", 512, {"kind": "fixed"}, "dense", 1.0),
    Case("strided, T 2,048", 2048, {"kind": "strided"}, "dense", 4.0),
    Case("strided, T 2,048", 2048, {"kind": "strided"}, "causal", 2.0),
    Case("strided, T 512", 512, {"kind": "strided"}, "dense", 1.3),
    Case("strided, T 256", 256, {"kind": "strided"}, "dense", 1.0),
    Case("strided by heads, T 2,048", 2048, {"kind": "strided", "merge": "heads"}, "dense", 3.0),
    Case("window 64, T 512", 512, {"kind": "window", "window": 64}, "causal", 1.0),
    Case("window 64, T 512", 512, {"kind": "window", "window": 64}, "dense", 1.0),
    Case("window 64 with 4 sinks, T 512", 512, {"kind": "window", "window": 64, "sinks": 4}, "dense", 1.0),
    Case("window 32, T 256", 256, {"kind": "window", "window": 32}, "causal", 1.0),
    Case("strided in turns, T 256", 256, {"kind": "strided", "merge": "alternate"}, "dense", 1.0),
    Case("strided in turns, T 512", 512, {"kind": "strided", "merge": "alternate"}, "dense", 1.5),
    Case("window 64, T 8,192", 8192, {"kind": "window", "window": 64}, "causal", 8.0),
    Case("window 512, T 8,192", 8192, {"kind": "window", "window": 512}, "causal", 2.0),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    rows = [measure(case) for case in CASES] + routing() + spans() + spans_read() + decoding()
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| medians | ratio | at least |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.2f} | {row['target']:.2f} |")
    return int(any(row["ratio"] < row["target"] for row in rows))


def measure(case: Case) -> dict[str, Any]:
    """Layers of the pattern, and as many of what it is held against, in turn."""
    torch.manual_seed(0)
    config = DecoderOnlyConfig.model_validate(SHAPE | {"context": case.length, "pattern": case.pattern})
    rows = Rows(torch.Size((max(1, TOKENS // case.length), case.length)), torch.device("cpu"))
    own = [mask_of(rows, patterns, in_blocks=False, dense=False) for patterns in config.patterns]
    other: list[forms.Mask] = [None if case.against == "causal" else rows.dense(p) for p in config.patterns]
    mixer = Softmax(config)
    given = [torch.randn(rows.shape[0], HEADS, case.length, CHANNELS, requires_grad=True) for _ in range(3)]
    fast: list[float] = []
    slow: list[float] = []
    for _ in range(RUNS):
        for times, masks in ((fast, own), (slow, other)):
            times.append(sum(seconds(lambda: attend(mixer, given, mask, case.backward)) for mask in masks))  # noqa: B023
    taken = " and ".join(dict.fromkeys(type(mask).__name__.lower().replace("tensor", "dense") for mask in own))
    both = statistics.median(slow), statistics.median(fast)
    return {
        "name": f"{case.name} ({taken}, {1e3 * both[1]:.1f} ms) / {case.against} ({1e3 * both[0]:.1f} ms)",
        "ratio": both[0] / both[1],
        "target": case.target,
    }


def routing() -> list[dict[str, Any]]:
    """Texts that are sorted by cluster against the same tokens by a dense mask, in turn; maps and all."""
    rows = []
    for length, target in ((512, 1.0), (TOKENS, 4.0)):
        torch.manual_seed(0)
        scores = {"kind": "routing", "cluster_window": round(length**0.5)}
        config = DecoderOnlyConfig.model_validate(SHAPE | {"context": length, "scores": scores})
        attention = SelfAttention(config, "dec_sa/00", std=0.02)
        x = torch.randn(TOKENS // length, length, SHAPE["width"], requires_grad=True)
        keys = torch.zeros(len(x), dtype=torch.int64)
        run = partial(through, attention, x, keys)
        fast, slow = in_turn(run, ScoresConfig, "sorts", (lambda *_: True, lambda *_: False))
        name = f"routing, T {length:,}: dense ({1e3 * slow:.1f} ms) / sorted ({1e3 * fast:.1f} ms)"
        rows.append({"name": name, "ratio": slow / fast, "target": target})
    return rows


def spans() -> list[dict[str, Any]]:
    """Texts of which no head sees more than so many tokens: all keys are scored, or those in reach, in turn.

    At least three quarters of what the products allow: blocks of as many queries see two blocks of keys.
    """
    rows = []
    for length, reach in ((512, 64), (512, 128), (TOKENS, 64), (TOKENS, 512)):
        torch.manual_seed(0)
        options = {"kind": "adaptive_span", "ramp": 32, "span_init": (reach - 32) / length}
        mixer = AdaptiveSpan(
            DecoderOnlyConfig.model_validate(SHAPE | {"context": length, "weights": options}), HEADS, ""
        )
        given = [torch.randn(TOKENS // length, HEADS, length, CHANNELS, requires_grad=True) for _ in range(3)]
        fast, slow = in_turn(partial(attend, mixer, given, None, True), weights, "TRIM", (weights.TRIM, ALL))
        name = f"spans of {reach}, T {length:,}: all keys ({1e3 * slow:.1f} ms) / in reach ({1e3 * fast:.1f} ms)"
        rows.append({"name": name, "ratio": slow / fast, "target": 0.75 * length / (2 * reach)})
    return rows


def spans_read() -> list[dict[str, Any]]:
    """A token behind 4,096 others, of which no head sees more than 64."""
    end = 8 * WINDOW
    step = reader({"weights": {"kind": "adaptive_span", "span_init": 31 / (end + STEPS)}}, end)
    fast, slow = in_turn(step, weights, "TRIM", (weights.TRIM, ALL), runs=STEPS // 2)
    name = f"spans of 64, a token behind {end:,}: all keys ({1e3 * slow:.2f} ms) / in reach ({1e3 * fast:.2f} ms)"
    return [{"name": name, "ratio": slow / fast, "target": 1.5}]


def in_turn(
    run: Callable[[], None], owner: Any, name: str, values: tuple[Any, Any], runs: int = RUNS
) -> tuple[float, float]:
    """Median seconds with each of two values of a name."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for value, found in zip(values, times, strict=True):
            with patch.object(owner, name, value):
                found.append(seconds(run))
    return statistics.median(times[0]), statistics.median(times[1])


def through(attention: SelfAttention, x: Tensor, keys: Tensor) -> None:
    """Forward and backward."""
    attention(x, keys).sum().backward()


def attend(mixer: Softmax, given: list[Tensor], mask: forms.Mask, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        found = mixer(*given, None, Visible(mask=mask))
    if backward:
        found.backward(torch.ones_like(found))
        for x in given:
            x.grad = None


def decoding() -> list[dict[str, Any]]:
    """Time a token behind a window's text and behind one eight times as long, with a window and without, in turn."""
    ends = WINDOW, 8 * WINDOW
    times: dict[tuple[str, int], list[float]] = {}
    caches: dict[tuple[str, int], Callable[[], None]] = {}
    for kind in ("window", "full"):
        pattern = {"pattern": {"kind": "window", "window": WINDOW}} if kind == "window" else {}
        for end in ends:
            caches[kind, end] = reader(pattern, end)
    for _ in range(STEPS):
        for key, step in caches.items():
            times.setdefault(key, []).append(seconds(step))
    medians = {key: statistics.median(found) for key, found in times.items()}
    rows = []
    for kind, target in (("window", 1 / 1.15), ("full", 1.5)):
        short, long = (medians[kind, end] for end in ends)
        ratio = short / long if kind == "window" else long / short
        called = (
            "window 512: a token behind 512 / behind 4,096" if kind == "window" else "full: behind 4,096 / behind 512"
        )
        rows.append({"name": f"{called} ({1e3 * short:.2f} and {1e3 * long:.2f} ms)", "ratio": ratio, "target": target})
    return rows


def reader(options: dict[str, Any], end: int) -> Callable[[], None]:
    """Reads a token more of a text that has `end` already."""
    torch.manual_seed(0)
    options = {"vocab_size": 512, "context": end + STEPS, "positions": "rotary", **options}
    model = registry.build(DecoderOnlyConfig.model_validate(SHAPE | options)).eval()
    ids = torch.randint(512, (TEXTS, end + STEPS))
    cache = Cache(torch.zeros(TEXTS, dtype=torch.int64), end + STEPS)
    for part in ids[:, :end].split(WINDOW, dim=1):
        cache.logits(model, part)

    def step() -> None:
        cache.logits(model, ids[:, cache.length : cache.length + 1])

    return step


def seconds(run: Callable[[], None]) -> float:
    since = time.process_time()
    run()
    return time.process_time() - since


if __name__ == "__main__":
    sys.exit(main())
