"""What a training step of ours costs beside the same step in a bare DeepSpeed loop and in a bare torch loop.

The trainer runs as it is, on one rank with ZeRO 1 in fp32. Whenever it asks for the next samples, both bare loops take
a step of theirs on the same tokens; so the three take turns, and what lies between two requests is a step of ours:
forward, backward, update, and all that the trainer does beside them. Exits with 1 when the target is missed.
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
from typing import Any

import numpy as np
import torch

from data_pipeline.storage.dataset import Dataset
from model.architectures import registry
from model.batch import Batch
from pretrain import trainer
from pretrain.config.dataset_identity import complete
from pretrain.config.schema import Config, load
from pretrain.engine.distributed import join
from pretrain.engine.engine import bootstrap
from pretrain.run.job_records import FailureFile
from pretrain.run.signals import StopRequest

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, PAIRS = 10, 200
TARGET = 1.05
MODEL = ["model.layers=3", "model.width=320", "model.heads=5", "model.context=64", "batch.tokens=128"]
"""10.6 M parameters."""
Step = Callable[[Batch], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        seconds = take_turns(Path(folder))
    rows = [
        compare(seconds, "a training step", "ours", "bare DeepSpeed", TARGET),
        compare(seconds, "a training step", "ours", "bare torch", None),
        compare(seconds, "a training step", "bare DeepSpeed", "bare torch", None),
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| medians | ratio | upper 95 % bound | at most |\n|---|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.3f} | {row['upper']:.3f} | {row['target'] or '–'} |")
    return int(any(row["target"] and row["upper"] > row["target"] for row in rows))


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


def take_turns(folder: Path) -> dict[str, list[float]]:
    """Seconds of each step of the three, as many of each as there are pairs."""
    source = f"data.sources.text.paths=[{ROOT / 'LICENSE'}]"
    build = ["data", "build", "data/characters", source, f"data.path={folder / 'data'}"]
    subprocess.run([sys.executable, "-P", "-m", "launch.cli", *build], check=True, stdout=subprocess.DEVNULL)
    config = load(
        [
            *MODEL,
            f"data.path={folder / 'data'}",
            f"run.dir={folder / 'run'}",
            "engine.precision=fp32",
            "tracking.mode=off",
            "train.sample_tokens=0",
            f"train.steps={WARM_UP + PAIRS + 1}",
            *(f"train.{what}_every={10 * PAIRS}" for what in ("eval", "checkpoint")),
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
                now = time.perf_counter()
                if handed_over is not None:
                    seconds["ours"].append(now - handed_over)
                samples = super().__next__()
                tokens, step = samples.tokens, len(seconds["ours"]) + 1
                batch = Batch(tokens[:, :-1], tokens[:, 1:], samples.positions, torch.tensor(step), config.run.seed)
                order = list(bare) if step % 2 else list(reversed(bare))
                for name in order:
                    since = time.perf_counter()
                    bare[name](batch)
                    seconds[name].append(time.perf_counter() - since)
                handed_over = time.perf_counter()
                return samples

        trainer.Loader = TakingTurns  # type: ignore[misc]
        signal = trainer.train(config, ranks, StopRequest(), time.time(), FailureFile(ranks.rank))
        assert not signal, f"stopped by signal {signal}"
    return {name: values[WARM_UP : WARM_UP + PAIRS] for name, values in seconds.items()}


def bare_torch(config: Config) -> Step:
    """A step as any loop in plain torch has it."""
    model = registry.build(config.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=config.optimizer.betas, weight_decay=0.1)

    def step(batch: Batch) -> None:
        model(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_deepspeed(config: Config) -> Step:
    """A step as DeepSpeed's own examples have it, with the same settings as ours."""
    import deepspeed  # quiet after `bootstrap`

    model = registry.build(config.model).train()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, betas=config.optimizer.betas, weight_decay=0.1),
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
