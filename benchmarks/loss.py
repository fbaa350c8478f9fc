"""What the chunked loss costs beside the plain form, in time and in memory: head, cross entropy and their gradients.

The two take turns, on one thread (on the GPU where there is one); seconds of processor time on a CPU. Bytes are the
peak of what one forward and backward pass allocates. Exits with 1 when a target is missed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from model.layers.chunked_loss import token_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPEATS = 9
SHAPES = [(50_257, 200, 2_000), (50_257, 768, 1_024), (8_192, 256, 4_096), (65, 128, 8_192)]
"""Vocabulary, width, tokens. The first is a tenth of the published batch; the last has one chunk."""
TYPES = [torch.float32, torch.bfloat16]
TIME, BYTES = 1.1, 0.5
"""At most, where the head is large; the latter where its logits are more than four chunks."""
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(x, table).flatten(0, 1).float(), labels.flatten())


def chunked(x: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    return token_loss(x, table, labels, 0.0, 0.0).loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    rows = [row for shape in SHAPES for dtype in TYPES for row in compare(*shape, dtype)]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{DEVICE}\n\n| chunked / plain | ratio | at most |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.2f} | {row['target'] or '–'} |")
    return int(any(row["target"] and row["ratio"] > row["target"] for row in rows))


def compare(vocabulary: int, width: int, tokens: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Two rows: time and bytes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    table = (0.02 * torch.randn(vocabulary, width, generator=generator)).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens), generator=generator).to(DEVICE)
    ways: dict[str, Form] = {"chunked": chunked, "plain": plain}

    def run(way: Form) -> None:
        way(x, table, labels).backward()
        x.grad = table.grad = None

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, way in ways.items():
            since = now()
            run(way)
            if repeat:
                seconds[name].append(now() - since)
    ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    held = {name: peak_bytes(lambda way=way: run(way)) for name, way in ways.items()}  # type: ignore[misc]
    shape = f"V {vocabulary}, C {width}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
    large = vocabulary > 1_000
    return [
        {
            "name": f"time, {shape} ({ms['chunked']:.0f} ms / {ms['plain']:.0f} ms)",
            "ratio": ms["chunked"] / ms["plain"],
            "target": TIME if large else None,
        },
        {
            "name": f"bytes, {shape} ({held['chunked'] / 2**20:.0f} MiB / {held['plain'] / 2**20:.0f} MiB)",
            "ratio": held["chunked"] / held["plain"],
            "target": BYTES if large and 4 * vocabulary * tokens > 2**28 else None,
        },
    ]


def now() -> float:
    """Seconds; other work on the machine does not count on a CPU."""
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(run: Callable[[], None]) -> int:
    """The most that is allocated at a time, beyond what was there."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    held = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    sys.exit(main())
