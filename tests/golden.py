"""Golden loss curves: the first 50 steps of each small preset, in fp32 on one rank, on the licence's characters.

After a change that is meant to alter them: `python -m tests.golden`, and the commit says why. After one that is meant
to alter nothing: `python -m tests.golden --against REV [PRESET…]` trains each preset at that commit, too, on this
machine, and compares losses and what is saved with `==`.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from data_pipeline.loading.loader import StepSamples
from data_pipeline.sampling.shuffle import SampleOrder
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from model.architectures import registry
from pretrain.config.dataset_identity import complete
from pretrain.config.layers import presets
from pretrain.config.schema import Config, load
from pretrain.engine.distributed import Ranks, join
from pretrain.engine.engine import Engine
from pretrain.evaluation.batches import Batches
from tests import warm
from tests.runs import CHARACTERS, MARKED, ROOT, build_dataset
from tests.versions import compare

FOLDER = ROOT / "tests" / "golden"
STEPS = 50
WARM_UP_STEPS = 10
"""Without them the first steps make much of little: processors that round differently were up to 0.005 apart."""
SEQUENCES = 1
MOST_PARAMETERS = 3_000_000
"""Larger models take more than a few seconds for 50 steps."""


def golden_file(preset: str) -> Path:
    """Where a preset's curve is kept."""
    return FOLDER / f"{preset.removeprefix('model/')}.json"


def data_of(preset: str) -> str:
    """The preset of data that a model can learn from."""
    return MARKED if load([preset]).data.objective in ("masked", "span_corruption") else CHARACTERS


def options_of(preset: str) -> list[str]:
    """Small batches in fp32."""
    context = load([preset]).model.context
    return [
        f"batch.tokens={SEQUENCES * context}",
        "engine.precision=fp32",
        "engine.zero_stage=1",
        "optimizer.lr=1e-3",
    ]


def config_of(preset: str, dataset: Path) -> Config:
    """The preset's model on the dataset's characters."""
    return complete(load([preset, f"data.path={dataset}", *options_of(preset)]), Dataset.open(str(dataset)))


def small_presets(dataset: Path) -> list[str]:
    """Presets of models that are small enough."""
    names = []
    for preset in presets():
        if preset.startswith("model/"):
            with torch.device("meta"):
                model = registry.build(config_of(preset, dataset).model)
            if sum(p.numel() for p in model.parameters()) <= MOST_PARAMETERS:
                names.append(preset)
    return names


def curve(ranks: Ranks, preset: str, dataset: str, seed: int | None = None, steps: int = STEPS) -> list[float]:
    """Cross entropy of each step, in nats per token; `seed` is that of the first weights, the preset's unless given."""
    config = config_of(preset, Path(dataset))
    opened = Dataset.open(dataset)
    windows, batches = Windows.of(opened, "train", config.model.context), Batches.of(config, opened, ranks.device)
    order = SampleOrder("golden", config.run.seed, len(windows))
    torch.manual_seed(config.run.seed if seed is None else seed)
    engine = Engine(registry.build(config.model), config, ranks)
    losses = []
    for step in range(1, steps + 1):
        positions = torch.arange((step - 1) * SEQUENCES, step * SEQUENCES)
        tokens = torch.from_numpy(windows.read(order.windows(positions.numpy())))
        made = batches.of_step(StepSamples(positions, tokens, None), SEQUENCES, step, config.run.seed)
        metrics, _, _ = engine.train_step(made, lr=1e-3 * min(1, step / WARM_UP_STEPS))
        losses.append(round(float(metrics[0]["cross_entropy"]), 5))
    return losses


def against(revision: str, presets: list[str]) -> bool:
    """Whether whole runs of the presets, all unless given, are bit for bit those of a commit."""
    run = ["tracking.mode=off", f"train.steps={STEPS}", f"schedule.warmup_steps={WARM_UP_STEPS}", "train.log_every=1"]
    run += [f"train.checkpoint_every={STEPS}", "train.sample_tokens=0"]
    chosen = [f"model/{preset.removeprefix('model/')}" for preset in presets]
    if not chosen:
        chosen = sorted(f"model/{file.stem}" for file in FOLDER.glob("*.json"))
    options = {preset: [*options_of(preset), *run] for preset in chosen}
    return compare(revision, chosen, options, {preset: data_of(preset) for preset in chosen})


def write_all() -> None:
    """Write all curves anew."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        datasets = {name: build_dataset(name, Path(folder) / Path(name).name) for name in (CHARACTERS, MARKED)}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        FOLDER.mkdir(exist_ok=True)
        with join(timeout_minutes=2) as ranks:
            for preset in small_presets(datasets[CHARACTERS]):
                losses = curve(ranks, preset, str(datasets[data_of(preset)]))
                golden_file(preset).write_text(json.dumps(losses) + "\n")
                print(f"{preset}: {losses[0]} → {losses[-1]}", flush=True)


def main() -> int:
    """Curves, or a comparison: 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", metavar="REV", help="compare with this commit instead of writing")
    parser.add_argument("presets", nargs="*", help="with --against: these only")
    given = parser.parse_args()
    if given.presets and not given.against:
        parser.error("curves are written of all presets")
    with warm.session():
        if given.against:
            return 0 if against(given.against, given.presets) else 1
        write_all()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # an orderly exit aborts now and then in gloo's threads
