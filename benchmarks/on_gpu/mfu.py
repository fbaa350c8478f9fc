"""MFU: what share of its peak a GPU does for a step of the engine."""

from collections.abc import Iterator
from functools import partial

import torch

from model.costs.flops import training_flops_per_token
from model.gpus import peak_flops
from pretrain.engine.distributed import Ranks, join
from pretrain.engine.layer_transforms import compile_layers
from tests.gpu.setting import Row, Setting, each

from .making import allocated, batch_of, beside_planner, config_of, engine_of
from .timing import seconds

AIM = 0.5
"""MFU, at 760M and 1.3B."""


def mfu(setting: Setting, size: str) -> Iterator[Row]:
    """Decoder-only and parallel model of a size: a step of the engine, eager, then compiled."""
    kinds = ("decoder", "parallel")
    with join(timeout_minutes=2) as ranks:
        yield from each({f"{kind}-{size}": partial(_mfu, setting, ranks, f"{kind}-{size}") for kind in kinds})


mfu_760m = partial(mfu, size="760m")
mfu_1b3 = partial(mfu, size="1b3")
mfu_350m = partial(mfu, size="350m")
mfu_125m = partial(mfu, size="125m")


def _mfu(setting: Setting, ranks: Ranks, preset: str) -> Iterator[Row]:
    config = config_of(setting, preset)
    before = allocated(setting)
    engine = engine_of(config, ranks)
    batch = batch_of(config, setting.device)
    tokens = config.batch.tokens
    name = f"{preset}, {tokens // config.model.context} sequences of {config.model.context:,}"
    for way in ("eager", "compiled"):
        if way == "compiled":
            compile_layers(engine.module)
        took = seconds(lambda: engine.train_step([batch], 1e-4), setting)
        told = f"{tokens / took:,.0f} tokens/s, {1e3 * took:.1f} ms a step"
        aimed = way == "compiled" and preset.endswith(("760m", "1b3"))
        share = training_flops_per_token(config.model) * tokens / took / _peak(setting)
        yield Row(f"{name}, {way}: MFU", share, setting.aim(AIM) if aimed else None, at_least=True, note=told)
        if way == "eager" and not setting.tiny:
            yield beside_planner(name, config, torch.cuda.max_memory_allocated() - before)


def _peak(setting: Setting) -> float:
    """Dense bf16 FLOP/s; a rehearsal's is made up."""
    if setting.tiny:
        return 1e12
    name = torch.cuda.get_device_name()
    peak = peak_flops(name)
    assert peak is not None, f"model/gpus.py does not know the peak of {name}"
    return peak
