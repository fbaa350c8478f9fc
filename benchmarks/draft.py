"""What a verified draft saves: time beside writing token by token, and quality against time over all ways to write.

Trains a small model on sources that have two right targets each: 8 symbols become 16 by one of two tables of phrases,
chosen by chance for the whole of a target, so its places depend on one another. A target is valid where it is of one
table. Exits with 1 when a target is missed.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.architectures import registry
from model.architectures.registry import configure
from model.batch import Batch
from model.generation.drafting import Drafting
from model.generation.sampling import Sampling
from model.generation.target import Passes
from model.generation.writing import Writing

SYMBOLS, SOURCE, EOS = 16, 8, 0
VOCABULARY, CONTEXT = 1 + 3 * SYMBOLS, 20
STEPS, ROWS, LR = 900, 64, 2e-3
SOURCES, TABLED, BLOCK = 1000, 200, 20
BESIDE_AR, BESIDE_ONE, SAME = 2.0, 3.0, 1.0
"""At least so much faster, and so large a share of the texts alike."""
GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling()
TABLES = torch.randint(SYMBOLS, (2, SYMBOLS, 2), generator=torch.Generator().manual_seed(5))
PHRASES = TABLES + 1 + SYMBOLS + SYMBOLS * torch.arange(2)[:, None, None]
"""[2, 16, 2]: of each table, what a symbol becomes; no token is of both."""


@dataclass
class Way:
    """A way to write, and what came of it."""

    name: str
    drafting: Drafting
    sampling: Sampling = GREEDY
    model: str = "drafts"


WAYS = [
    Way("`ar`", Drafting("ar")),
    Way("`verify`", Drafting("verify")),
    Way("`nar`", Drafting("nar")),
    Way("`nar`, 3 lengths", Drafting("nar", candidates=3)),
    *(Way(f"`mask_predict`, {passes} passes", Drafting("mask_predict", passes)) for passes in (2, 4, 8)),
    Way("`refine`", Drafting("refine"), model="refines"),
    Way("`ar`, sampled", Drafting("ar"), SAMPLED),
    Way("`verify`, sampled", Drafting("verify"), SAMPLED),
    Way("`nar`, sampled", Drafting("nar"), SAMPLED),
    *(Way(f"`mask_predict`, {n} passes, sampled", Drafting("mask_predict", n), SAMPLED) for n in (2, 4, 16)),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    models = {"drafts": trained(masking="mixed"), "refines": trained(masking="nat", refine=True)}
    sources = list(data(torch.Generator().manual_seed(9), SOURCES)[0])
    rows = beside(models["drafts"], sources)
    table = [tabled(models[way.model], way, sources[:TABLED]) for way in WAYS]
    if as_json:
        print(json.dumps({"rows": rows, "table": table}, indent=1))
    else:
        print("| claim | ratio | at least |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.2f} | {row['target']} |")
        print("\n| way | valid | time of `ar` | passes: drafts, writes |\n|---|---|---|---|")
        for line in table:
            share = line["ms"] / table[0]["ms"]
            print(
                f"| {line['name']} | {line['valid']:.3f} | {share:.2f} | {line['drafts']:.2f}, {line['writes']:.2f} |"
            )
    return int(any(row["ratio"] < row["target"] for row in rows))


def data(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Sources [B, 8] and one of the targets of each, [B, 16]."""
    source = torch.randint(SYMBOLS, (rows, SOURCE), generator=generator)
    table = torch.randint(2, (rows, 1), generator=generator)
    return source + 1, PHRASES[table, source].flatten(1)


def trained(**draft: Any) -> Any:
    """A model of 2 layers in the encoder and in the decoder, 1 that drafts, width 64."""
    torch.manual_seed(0)
    shape = {"layers": 2, "width": 64, "heads": 4, "cross_heads": 4, "context": CONTEXT, "vocab_size": VOCABULARY}
    options = {"architecture": "draft_and_verify", "learned_dropout": {"enabled": False}, "draft": draft}
    model: Any = registry.build(configure(shape | options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(1)
    end = torch.full((ROWS, 1), EOS)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, step / 40) * (1.0 - step / STEPS)
        source, target = data(generator, ROWS)
        read, labels = torch.cat([source, end], 1), torch.cat([target, end], 1)
        written = torch.cat([end, target], 1)
        numbers = torch.arange(ROWS) + ROWS * step
        output = model(Batch(read, labels, numbers, torch.tensor(step), 0, decoder_input_ids=written))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def write(
    model: Any, sources: list[Tensor], drafting: Drafting, sampling: Sampling = GREEDY, together: int = 1
) -> tuple[list[list[int]], list[Passes], float]:
    """Targets, passes and seconds, so many sources at a time."""
    texts, passes = [], []
    since = time.perf_counter()
    for first in range(0, len(sources), together):
        some = sources[first : first + together]
        writing = Writing(model, some, sampling, eos_id=EOS, drafting=drafting, continues=False)
        found: list[list[int]] = [[] for _ in some]
        while not all(map(writing.has_ended, range(len(some)))):
            for number, tokens in writing.step().items():
                found[number] += tokens
        texts += found
        passes += writing.passes
    return texts, passes, time.perf_counter() - since


def beside(model: Any, sources: list[Tensor]) -> list[dict[str, Any]]:
    """Token by token, verified, and verified side by side, in turn, in blocks."""
    times, same = [], 0
    for first in range(0, len(sources), BLOCK):
        block = sources[first : first + BLOCK]
        alone, _, slow = write(model, block, Drafting("ar"))
        verified, _, fast = write(model, block, Drafting("verify"))
        at_once, _, fastest = write(model, block, Drafting("verify"), together=BLOCK)
        times.append((slow, fast, fastest))
        same += sum(one == other == third for one, other, third in zip(alone, verified, at_once, strict=True))
    slow, fast, fastest = (statistics.median(column) / BLOCK * 1e3 for column in zip(*times, strict=True))
    return [
        {
            "name": f"a target token by token ({slow:.1f} ms) / verified ({fast:.1f} ms)",
            "ratio": statistics.median(one / other for one, other, _ in times),
            "target": BESIDE_AR,
        },
        {
            "name": f"one verified target ({fast:.1f} ms) / each of {BLOCK} side by side ({fastest:.1f} ms)",
            "ratio": statistics.median(one / other for _, one, other in times),
            "target": BESIDE_ONE,
        },
        {"name": f"share of {len(sources):,} targets alike", "ratio": same / len(sources), "target": SAME},
    ]


def tabled(model: Any, way: Way, sources: list[Tensor]) -> dict[str, Any]:
    torch.manual_seed(3)
    texts, passes, seconds = write(model, sources, way.drafting, way.sampling)
    return {
        "name": way.name,
        "valid": sum(map(valid, sources, texts)) / len(sources),
        "ms": seconds / len(sources) * 1e3,
        "drafts": statistics.mean(one.drafts for one in passes),
        "writes": statistics.mean(one.writes for one in passes),
    }


def valid(source: Tensor, text: list[int]) -> bool:
    """It is what one of the tables makes of the source."""
    return any(text == phrases[source - 1].flatten().tolist() for phrases in PHRASES)


if __name__ == "__main__":
    sys.exit(main())
