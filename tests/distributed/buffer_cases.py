"""What ranks do in `test_buffers.py`: a model with BatchNorm, whose running statistics are buffers."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.batch import Batch, ModelOutput
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.config.schema import Config, load
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.run.checkpoint_folder import step_path
from tests.distributed.cases import VOCABULARY, digest, make_engine, save, train_steps

STAGES = (0, 1, 3)
SAVED, LAST = 2, 4


def config_of(stage: int, precision: str = "fp32") -> Config:
    """One micro-batch a step on two ranks, two on one."""
    model = ["model.layers=1", "model.width=16", "model.heads=2", "model.context=8", f"model.vocab_size={VOCABULARY}"]
    kind = ["model.architecture=encoder_only", "model.norm=batchnorm", "data.objective=masked"]
    engine = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    return load([*model, *kind, *engine, "batch.tokens=32", "batch.micro_batch=2"])


def state(engine: Engine, ranks: Ranks) -> dict[str, Any]:
    """All that a checkpoint holds: hashes of parameters and moments, this rank's buffers, what evaluation gives."""
    engine.module.eval()
    with torch.no_grad():
        logits = engine.module(torch.arange(16).view(2, 8))
    buffers = {name: buffer.tolist() for name, buffer in engine.buffers.tensors.items()}
    return {"digest": digest(engine, ranks), "buffers": buffers, "logits": logits.float().tolist()}


def save_at_each_stage(ranks: Ranks, root: str) -> dict[str, Any]:
    """Train to LAST without a break, and save on the way: by source, `<stage>-<ranks>`."""
    results = {}
    for stage in STAGES:
        config = config_of(stage)
        engine = make_engine(ranks, config)
        source = f"{stage}-{ranks.world_size}"
        train_steps(engine, ranks, config, 1, SAVED)
        save(engine, Path(root) / source, SAVED, ranks)
        saved = state(engine, ranks)
        losses = train_steps(engine, ranks, config, SAVED + 1, LAST)
        results[source] = {"saved": saved, "losses": losses, "final": state(engine, ranks)}
    return results


def load_at_each_stage(ranks: Ranks, root: str, stages: list[int], sabotage: bool = False) -> dict[str, Any]:
    """Each source into a new engine of each of `stages`; on the source's own stage and number of ranks on to LAST."""
    if sabotage:
        Checkpoint.buffers = lambda self: {  # type: ignore[method-assign]
            name: torch.zeros(shape) for name, shape in self.manifest.buffers.items()
        }
    results = {}
    for stage in stages:
        config = config_of(stage)
        engine = make_engine(ranks, config, seed=99)
        for source in sorted(Path(root).iterdir()):
            same = source.name == f"{stage}-{ranks.world_size}"
            Checkpoint(step_path(source, SAVED)).load(engine)
            result: dict[str, Any] = {"loaded": state(engine, ranks)}
            if same:
                result |= {
                    "losses": train_steps(engine, ranks, config, SAVED + 1, LAST),
                    "final": state(engine, ranks),
                }
            results[f"{source.name} to {stage}-{ranks.world_size}"] = result
    return results


def skip(ranks: Ranks, stage: int, precision: str, config: Config | None = None) -> dict[str, Any]:
    """A step, then one that rank 0's loss makes all skip, and its replay."""
    config = config or config_of(stage, precision)
    engine = make_engine(ranks, config)
    rows = torch.randint(VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(7))
    mine = rows[ranks.rank :: ranks.world_size]
    batches = [Batch(mine[:, :-1], mine[:, 1:], torch.arange(2), torch.tensor(1), seed=5)]
    tables = engine.module.token_embed.weight, engine.module.position_embed.weight
    statistics = stage < 3 and config.model.norm == "batchnorm"
    embedded = tables[0][rows[:, :-1]].double() + tables[1].double() if statistics else None
    expected = None if embedded is None else embedded.mean(dim=(0, 1))
    seen: list[dict[str, Tensor]] = []

    def look() -> None:
        seen.append({name: buffer.clone() for name, buffer in engine.buffers.tensors.items()})

    def poison(module: Any, inputs: Any, output: ModelOutput) -> ModelOutput:
        return output._replace(loss=output.loss * (math.nan if ranks.is_first else 1.0))

    applied = [engine.train_step(batches, 1e-2)[2]]
    look()
    handle = engine.module.register_forward_hook(poison)
    applied.append(engine.train_step(batches, 1e-2)[2])
    look()
    engine.replay(batches, 1e-2)
    handle.remove()
    look()
    found = seen[0].get("backbone.layers.0.attention_norm.running_mean", torch.zeros(()))
    return {
        "applied": applied,
        "kept": [all(torch.equal(value, seen[0][name]) for name, value in later.items()) for later in seen[1:]],
        "types": sorted({str(value.dtype) for value in seen[0].values()}),
        "buffers": {name: value.tolist() for name, value in seen[0].items()},
        "off": None if expected is None else float((found - expected).abs().max() / expected.abs().max()),
    }


def export(ranks: Ranks, root: str) -> dict[str, Any]:
    """DeepSpeed's own tool reads the buffers, too."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    config = config_of(1)
    engine = make_engine(ranks, config)
    train_steps(engine, ranks, config, 1, 1)
    engine.export_deepspeed(Path(root))
    found = get_fp32_state_dict_from_zero_checkpoint(root)
    return {name: torch.equal(found[name], buffer) for name, buffer in engine.buffers.tensors.items()}
