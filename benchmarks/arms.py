"""What a training step of each arm of a study costs beside the plain parallel model's.

Forward and backward pass of one step's batch in turns, one thread, seconds of processor time (the clock where there is
CUDA); medians. Arms are those of docs/experiments/learned-dropout.yaml, section `core`, and the recommended masks with
`source=low_rank`. No target: the rows say what the study's tokens a second, taken on a busy machine, cannot.
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
from model.config.model_config import ModelConfig
from model.config.transformer import TransformerConfig
from model.costs.flops import training_flops_per_token
from pretrain.engine.hardware import keep_freed_memory
from pretrain.study.spec import load_study

STUDY = Path(__file__).resolve().parent.parent / "docs" / "experiments" / "learned-dropout.yaml"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 67
BASE = "parallel"
MASKS = "ld-recommended"
TURNS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    if DEVICE == "cpu":
        keep_freed_memory(torch.device("cpu"))  # as the engine does
    models, flops = {}, {}
    shapes, rows_of_step = arms()
    for arm, shape in shapes.items():
        with torch.device(DEVICE):
            models[arm] = registry.build(shape)
        flops[arm] = training_flops_per_token(shape)
    ids = torch.randint(0, VOCABULARY, (rows_of_step, shape.context + 1), device=DEVICE)
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


def arms() -> tuple[dict[str, ModelConfig], int]:
    """The model of each arm, and how many sequences a step has."""
    study = load_study(STUDY)
    configs = {arm: study.runs([f"core/{arm}"])[0].config() for arm in study.arms("core")}
    shapes = {arm: config.model.model_copy(update={"vocab_size": VOCABULARY}) for arm, config in configs.items()}
    recommended = shapes[MASKS]
    assert isinstance(recommended, TransformerConfig)
    low_rank = recommended.learned_dropout.model_copy(update={"source": "low_rank"})
    shapes[f"{MASKS}, low rank"] = recommended.model_copy(update={"learned_dropout": low_rank})
    return shapes, configs[MASKS].global_batch


def now() -> float:
    """Seconds; other work on the machine does not count on a CPU."""
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
