"""What ranks do in `test_gates.py`: a model with block gates, whose multipliers are buffers."""

from pathlib import Path
from typing import Any

from model.masks import block_gates
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.config.schema import Config, load
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.run.checkpoint_folder import step_path
from tests.distributed.buffer_cases import skip
from tests.distributed.cases import VOCABULARY, make_engine, save, train_steps

SAVED = 2
GATES = ["model.block_gates.blocks=4", "model.learned_dropout.enabled=false"]
KINDS = {
    "top": ["model.block_gates.kind=top"],
    "cosine": ["model.block_gates.kind=cosine", "model.block_gates.dual_rate=1", "model.block_gates.shift_init=1.2"],
}


def config_of(kind: str, engine: list[str]) -> Config:
    """One micro-batch a step on two ranks, two on one."""
    model = ["model.layers=2", "model.width=16", "model.heads=2", "model.context=8", f"model.vocab_size={VOCABULARY}"]
    keys = [*model, "model.architecture=decoder_only", *GATES, *KINDS[kind], *(f"engine.{key}" for key in engine)]
    precision = [] if any(key.startswith("precision") for key in engine) else ["engine.precision=fp32"]
    return load([*keys, *precision, "batch.tokens=32", "batch.micro_batch=2"])


def follow(ranks: Ranks, engine: list[str], root: str, source: str = "") -> dict[str, Any]:
    """Of each kind: four steps, with a checkpoint after two; or the last two from `source`'s checkpoint.

    Open blocks alone are computed where training may.
    """
    block_gates.pays = lambda *sizes, **options: True
    found = {}
    for kind in KINDS:
        config = config_of(kind, engine)
        made = make_engine(ranks, config)
        folder = Path(root) / f"{kind}-{source or f'ranks-{ranks.world_size}'}"
        losses = []
        if source:
            Checkpoint(step_path(folder, SAVED)).load(made)
        else:
            losses = train_steps(made, ranks, config, 1, SAVED)
            save(made, folder, SAVED, ranks)
        saved = _multipliers(made)
        losses += train_steps(made, ranks, config, SAVED + 1, 2 * SAVED)
        types = sorted({str(value.dtype) for value in made.buffers.tensors.values()})
        found[kind] = {"losses": losses, "saved": saved, "last": _multipliers(made), "types": types}
    return found


def skipped(ranks: Ranks, stage: int) -> dict[str, Any]:
    """A step that is applied, one that is not, and its replay."""
    return skip(ranks, stage, "fp32", config_of("cosine", [f"zero_stage={stage}"]))


def _multipliers(engine: Engine) -> dict[str, float]:
    return {name: float(value) for name, value in engine.buffers.tensors.items()}
