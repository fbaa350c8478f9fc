"""What a training step of ours costs beside the same step in a bare DeepSpeed loop and in a bare torch loop.

Once with few tokens a step, and, with compiled layers in all three, with more. The trainer runs as it is, on one rank
with ZeRO 1 in fp32, for each size in a process of its own. Whenever it asks for the next samples, both bare loops take
a step of theirs on the same tokens; so the three take turns, and what lies between two requests is a step of ours:
forward, backward, update, and all that the trainer does beside them. Times are of the process's CPU, since other work
on the machine takes the clock's, and nothing in a step of one rank waits. Exits with 1 when the target is missed.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_pipeline.storage.dataset import Dataset
from model.architectures import registry
from model.architectures.token_model import TokenModel
from model.batch import Batch
from pretrain import trainer
from pretrain.config.dataset_identity import complete
from pretrain.config.schema import Config, load
from pretrain.engine.distributed import join
from pretrain.engine.engine import bootstrap
from pretrain.engine.layer_transforms import compile_layers
from pretrain.engine.optim import parameter_groups
from pretrain.run.job_records import FailureFile
from pretrain.run.signals import StopRequest

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 10
SMALL = ("model.layers=2", "model.width=128", "model.heads=4", "model.context=128")
"""1.2 M parameters."""
Step = Callable[[Batch], None]


class Case(NamedTuple):
    """A size. Targets are of ours beside bare DeepSpeed and beside bare torch."""

    model: tuple[str, ...]
    pairs: int
    compiled: bool
    targets: tuple[float, float | None]


CASES = {
    # 10.6 M parameters
    128: Case(("model.layers=3", "model.width=320", "model.heads=5", "model.context=64"), 200, False, (1.05, None)),
    2048: Case(SMALL, 100, True, (1.01, 1.05)),
    8192: Case(SMALL, 30, True, (1.01, 1.05)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--tokens", type=int, choices=CASES, help="a step of this size only, in this process")
    args = parser.parse_args()
    as_json = args.json
    if args.tokens:
        rows = measure(args.tokens)
    else:
        again = [sys.executable, __file__, "--json", "--tokens"]
        done = [subprocess.run([*again, str(tokens)], stdout=subprocess.PIPE).stdout for tokens in CASES]
        rows = [row for found in done for row in json.loads(found)]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| medians | ratio | upper 95 % bound | at most |\n|---|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.3f} | {row['upper']:.3f} | {row['target'] or '–'} |")
    return int(any(row["target"] and row["upper"] > row["target"] for row in rows))


def measure(tokens: int) -> list[dict[str, Any]]:
    """The rows of a size."""
    case = CASES[tokens]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        seconds = take_turns(Path(folder), tokens, case)
    what = f"a step of {tokens:,} tokens" + (", compiled" if case.compiled else "")
    return [
        compare(seconds, what, "ours", "bare DeepSpeed", case.targets[0]),
        compare(seconds, what, "ours", "bare torch", case.targets[1]),
        compare(seconds, what, "bare DeepSpeed", "bare torch", None),
    ]


def compare(seconds: dict[str, list[float]], what: str, one: str, other: str, target: float | None) -> dict[str, Any]:
    """The median of the ratios of neighbouring steps, and the upper end of its 95 % bootstrap interval."""
    ratios = np.array(seconds[one]) / np.array(seconds[other])
    again = np.random.default_rng(0).choice(ratios, size=(10_000, len(ratios)))
    times = {name: 1e3 * statistics.median(seconds[name]) for name in (one, other)}
    return {
        "name": f"{what}: {one} ({times[one]:.1f} ms) / {other} ({times[other]:.1f} ms)",
        "ratio": float(np.median(ratios)),
        "upper": float(np.quantile(np.median(again, axis=1), 0.975)),
        "target": target,
        "pairs": len(ratios),
    }


def take_turns(folder: Path, tokens: int, case: Case) -> dict[str, list[float]]:
    """CPU seconds of each step of the three, as many of each as there are pairs."""
    source = f"data.sources.text.paths=[{ROOT / 'LICENSE'}]"
    build = ["data", "build", "data/characters", source, f"data.path={folder / 'data'}"]
    subprocess.run([sys.executable, "-P", "-m", "launch.cli", *build], check=True, stdout=subprocess.DEVNULL)
    config = load(
        [
            *case.model,
            f"batch.tokens={tokens}",
            f"engine.compile={str(case.compiled).lower()}",
            f"data.path={folder / 'data'}",
            f"run.dir={folder / 'run'}",
            "engine.precision=fp32",
            "tracking.mode=off",
            "train.sample_tokens=0",
            f"train.steps={WARM_UP + case.pairs + 1}",
            *(f"train.{what}_every={10 * case.pairs}" for what in ("eval", "checkpoint")),
        ]
    )
    torch.set_num_threads(1)  # threads that wait for each other measure the other work on the machine
    torch.manual_seed(0)
    bootstrap()
    with join(config.engine.timeout_minutes) as ranks:
        complete_config = complete(config, Dataset.open(config.data.path))
        bare = {"bare DeepSpeed": bare_deepspeed(complete_config), "bare torch": bare_torch(complete_config)}
        seconds: dict[str, list[float]] = {"ours": [], **{name: [] for name in bare}}
        handed_over: float | None = None

        class TakingTurns(trainer.Loader):
            def __next__(self) -> Any:
                nonlocal handed_over
                now = time.process_time()
                if handed_over is not None:
                    seconds["ours"].append(now - handed_over)
                samples = super().__next__()
                ids, step = samples.tokens, len(seconds["ours"]) + 1
                batch = Batch(ids[:, :-1], ids[:, 1:], samples.positions, torch.tensor(step), config.run.seed)
                order = list(bare) if step % 2 else list(reversed(bare))
                for name in order:
                    since = time.process_time()
                    bare[name](batch)
                    seconds[name].append(time.process_time() - since)
                handed_over = time.process_time()
                return samples

        trainer.Loader = TakingTurns  # type: ignore[misc]
        signal = trainer.train(config, ranks, StopRequest(), time.time(), FailureFile(ranks.rank))
        assert not signal, f"stopped by signal {signal}"
    return {name: values[WARM_UP : WARM_UP + case.pairs] for name, values in seconds.items()}


def built(config: Config) -> TokenModel:
    model = registry.build(config.model).train()
    if config.engine.compile:
        compile_layers(model)
    return model


def bare_torch(config: Config) -> Step:
    """A step as any loop in plain torch has it."""
    model = built(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=config.optimizer.betas, weight_decay=0.1)

    def step(batch: Batch) -> None:
        model(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_deepspeed(config: Config) -> Step:
    """A step as DeepSpeed's own examples have it, with the same settings as ours, groups of parameters included."""
    import deepspeed  # quiet after `bootstrap`

    model = built(config)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(parameter_groups(model, config.optimizer), lr=1e-4, betas=config.optimizer.betas),
        config={
            "train_micro_batch_size_per_gpu": config.global_batch,
            "gradient_clipping": config.optimizer.clip,
            "zero_optimization": {"stage": 1},
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )

    def step(batch: Batch) -> None:
        engine.backward(engine(batch).loss)
        engine.step()

    return step


if __name__ == "__main__":
    sys.exit(main())
