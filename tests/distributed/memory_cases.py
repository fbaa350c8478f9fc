"""What a rank's memory grows by in a step; started through the fixture `ranks`."""

import ctypes
import gc
import os
from pathlib import Path

import torch

from model.batch import Batch
from model.gpus import GPUS
from pretrain.config.schema import Config, load
from pretrain.engine.distributed import Ranks
from pretrain.planning.costs import costs
from pretrain.planning.memory import memory
from tests.distributed.cases import make_engine, save, small_config

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's mallopt: what is freed goes back to the system, so that resident memory is what is in use."""


def growth(ranks: Ranks, args: list[str]) -> tuple[float, float, str]:
    """Counted bytes, and measured ones: the highest resident memory (VmHWM) of a warm step, less what is resident
    before the model is built; and the moment that was counted for.

    A small engine of the same kind has made a step before, so that libraries are loaded and their buffers made.
    """
    os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**16)  # so that the engine leaves it
    libc = ctypes.CDLL(None)
    for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, 2**16), (_TRIM_THRESHOLD, 2**16)):
        assert libc.mallopt(option, value)
    config = load(args)
    warm = small_config(config.engine.zero_stage, config.engine.precision)
    make_engine(ranks, warm).train_step([batch_of(warm, 2)] * warm.micro_batches(ranks.world_size)[1], lr=1e-4)
    gc.collect()
    libc.malloc_trim(0)
    before = _resident("VmRSS")
    engine = make_engine(ranks, config)
    micro_batch, accumulation = config.micro_batches(ranks.world_size)
    for step in (1, 2):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        engine.train_step([batch_of(config, micro_batch, step) for _ in range(accumulation)], lr=1e-4)
    counted = memory(config, ranks.world_size, device="cpu")
    return counted.total, _resident("VmHWM") - before, counted.moment


def checkpoint_bytes(ranks: Ranks, root: str, args: list[str]) -> tuple[int, float]:
    """Of a real checkpoint, and counted."""
    config = load(args)
    save(make_engine(ranks, config), Path(root), 1, ranks)
    found = sum(file.stat().st_size for file in Path(root).rglob("*") if file.is_file())
    return found, costs(config, ranks.world_size, GPUS["h100"], 0.4).checkpoint_bytes


def batch_of(config: Config, rows: int, step: int = 1, device: torch.device | str = "cpu") -> Batch:
    """A micro-batch of random tokens."""
    model = config.model
    inputs, targets = model.lengths
    assert model.vocab_size is not None
    ids = torch.randint(0, model.vocab_size, (rows, inputs), device=device)
    labels = torch.randint(0, model.vocab_size, (rows, targets), device=device)
    written = labels.clone() if model.architecture == "encoder_decoder" else None
    return Batch(
        ids, labels, torch.arange(rows, device=device), torch.tensor(step, device=device), 1, decoder_input_ids=written
    )


def _resident(key: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024
