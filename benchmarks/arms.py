"""What a training step of each arm of a study costs beside the plain parallel model's.

Forward and backward pass of one step's batch in turns, one thread, seconds of processor time (the clock where there is
CUDA); medians. Arms are those of docs/experiments/learned-dropout.yaml, section `core`. No target: the rows say what
the study's tokens a second, taken on a busy machine, cannot.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from model.architectures import registry
from model.batch import Batch
from model.costs.flops import training_flops_per_token
from pretrain.study.spec import load_study

STUDY = Path(__file__).resolve().parent.parent / "docs" / "experiments" / "learned-dropout.yaml"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 67
BASE = "parallel"
TURNS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    study = load_study(STUDY)
    models, flops = {}, {}
    for arm in study.arms("core"):
        config = study.runs([f"core/{arm}"])[0].config()
        shape = config.model.model_copy(update={"vocab_size": VOCABULARY})
        with torch.device(DEVICE):
            models[arm] = registry.build(shape)
        flops[arm] = training_flops_per_token(shape)
    ids = torch.randint(0, VOCABULARY, (config.global_batch, config.model.context + 1), device=DEVICE)
    samples = torch.arange(len(ids), device=DEVICE)
    batch = Batch(ids[:, :-1], ids[:, 1:], samples, torch.ones((), dtype=torch.int64, device=DEVICE), seed=0)
    seconds: dict[str, list[float]] = {arm: [] for arm in models}
    for turn in range(-3, TURNS):
        for arm, model in models.items():
            since = now()
            model(batch).loss.backward()
            model.zero_grad(set_to_none=True)
            if turn >= 0:
                seconds[arm].append(now() - since)
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    rows = [
        {
            "name": f"{arm} ({1000 * medians[arm]:.0f} ms a step) / {BASE}",
            "ratio": medians[arm] / medians[BASE],
            "flops": flops[arm] / flops[BASE],
            "target": None,
        }
        for arm in models
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    print("| medians | ratio | FLOPs | target |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['ratio']:.2f} | {row['flops']:.2f} | – |")
    return 0


def now() -> float:
    """Seconds; other work on the machine does not count on a CPU."""
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
