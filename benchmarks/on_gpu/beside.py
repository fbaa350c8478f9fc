"""Steps of other ways to train, beside the plain one of a decoder."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from model.costs.flops import training_flops_per_token
from pretrain.engine.distributed import join
from pretrain.planning.costs import changed
from tests.gpu.setting import Row, Setting

from .making import (
    OFF,
    SEQUENCE,
    allocated,
    batch_of,
    beside_planner,
    config_of,
    engine_of,
    model_of,
    rows_of,
    step_of,
)
from .timing import medians

LORA = {"finetune.kind": "lora", "run.start_from": "elsewhere"}
TRAINED: dict[str, dict[str, Any]] = {
    "all": {},
    "adapters": LORA,
    "adapters of qkv": LORA | {"finetune.targets": ["qkv"]},
}


def adapters(setting: Setting) -> Iterator[Row]:
    """Fine-tuning decoder-350m with adapters of rank 8, beside all linear maps or one kind, and training all of it:
    a step of the engine, in turns on the same tokens; the allocator's peak in it."""
    works: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int] = {}
    with join(timeout_minutes=2) as ranks:
        plain = config_of(setting, "decoder-350m", most=8)
        batch = batch_of(plain, setting.device)
        name = f"decoder-350m, {len(batch.input_ids)} sequences of {plain.model.context:,}"
        for kind, changes in TRAINED.items():
            config, before = changed(plain, changes), allocated(setting)
            works[kind] = partial(engine_of(config, ranks).train_step, [batch], 1e-4)
            works[kind]()
            if not setting.tiny:
                torch.cuda.reset_peak_memory_stats()  # the first step has loaded what libraries need
                works[kind]()
                peaks[kind] = torch.cuda.max_memory_allocated() - before
                yield beside_planner(f"{name}, trained: {kind}", config, peaks[kind])
        took = medians(works, setting)
    speed = {kind: f"{plain.batch.tokens / seconds:,.0f}" for kind, seconds in took.items()}
    for kind in [kind for kind in TRAINED if kind != "all"]:
        note = f"{speed[kind]} tokens/s / {speed['all']}"
        yield Row(f"{name}: steps of {kind} in the time of one of all", took["all"] / took[kind], note=note)
        if peaks:
            note = f"{peaks[kind] / 2**30:.1f} GiB / {peaks['all'] / 2**30:.1f} GiB"
            yield Row(f"{name}: memory of {kind} / of all", peaks[kind] / peaks["all"], note=note)


def two_stream(setting: Setting) -> Iterator[Row]:
    """A training step of XLNet's two streams, whose queries ask for a sixth of the tokens, beside a decoder's as large,
    in bf16; eager, compiled."""
    shape: dict[str, Any] = {"layers": 1, "width": 32, "heads": 2, "context": 64, "vocab_size": 256, **OFF}
    if not setting.tiny:
        shape |= {"layers": 4, "width": 1024, "heads": 16, "context": SEQUENCE, "vocab_size": 32768}
    for way in ("eager",) if setting.tiny else ("eager", "compiled"):
        works: dict[str, Callable[[], object]] = {}
        flops: dict[str, float] = {}
        for kind in ("decoder_only", "two_stream"):
            model = model_of(shape | {"architecture": kind}, setting, compiled=way == "compiled")
            works[kind] = partial(step_of, model, rows_of(model, 2 if setting.tiny else 8, setting.device))
            flops[kind] = training_flops_per_token(model.config)
        took = medians(works, setting)
        note = f"{1e3 * took['two_stream']:.1f} ms / {1e3 * took['decoder_only']:.1f} ms"
        note += f"; by FLOPs {flops['two_stream'] / flops['decoder_only']:.2f}"
        yield Row(
            f"a step of two_stream / of decoder_only, {way}", took["two_stream"] / took["decoder_only"], note=note
        )
