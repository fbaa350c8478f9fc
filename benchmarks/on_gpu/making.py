"""Models, engines and batches that are timed: of a real size on a GPU, tiny in a rehearsal."""

import gc
from dataclasses import replace
from typing import Any

import torch

from model.architectures import registry
from model.architectures.registry import configure
from model.architectures.token_model import TokenModel
from model.batch import Batch
from pretrain.config.schema import Config, load
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.engine.layer_transforms import compile_layers
from pretrain.finetune.lora import adapt
from pretrain.planning.memory import memory
from tests.gpu.setting import Row, Setting

OFF = {"learned_dropout": {"enabled": False}}
SEQUENCE = 2048
MOST_SEQUENCES = 16
FILLED = 0.85
"""Of the memory that is free, by the planner's count."""


def config_of(setting: Setting, preset: str, most: int = MOST_SEQUENCES) -> Config:
    """In bf16 at ZeRO 1, with as many sequences as fit by the planner's count; tiny: of the same kind, and small."""
    words = [f"model/{preset}", "model.vocab_size=50304", "engine.zero_stage=1", "engine.precision=bf16"]
    if setting.tiny:
        words += ["model.layers=1", "model.width=32", "model.heads=2", "model.context=64", "model.vocab_size=256"]
        return load([*words, "batch.tokens=128", "batch.micro_batch=2"])
    gc.collect()
    torch.cuda.empty_cache()
    room = FILLED * torch.cuda.mem_get_info()[0]  # DeepSpeed's engines hold on to themselves
    number = most
    while True:
        config = load([*words, f"batch.tokens={number * SEQUENCE}", f"batch.micro_batch={number}"])
        if number == 1 or memory(config, 1).total <= room:
            return config
        number //= 2


def engine_of(config: Config, ranks: Ranks) -> Engine:
    """Its weights are made on the device, which is quicker by far."""
    torch.manual_seed(0)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with ranks.device:
        model = registry.build(config.model)
        if config.finetune.kind == "lora":
            adapt(model, config.finetune, seed=0)
    return Engine(model, config, ranks)


def batch_of(config: Config, device: str, step: int = 1) -> Batch:
    assert config.model.vocab_size is not None
    number = config.batch.tokens // config.model.context
    ids = torch.randint(config.model.vocab_size, (number, config.model.context + 1), device=device)
    return Batch(ids[:, :-1], ids[:, 1:], torch.arange(number, device=device), torch.tensor(step, device=device), 0)


def model_of(fields: dict[str, Any], setting: Setting, *, compiled: bool = False, trains: bool = True) -> TokenModel:
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = registry.build(configure(dict(fields))).to(torch.bfloat16)
    if compiled:
        compile_layers(model)
    return model.train(trains)


def rows_of(model: TokenModel, number: int, device: str) -> Batch:
    """Rows of random tokens; of a model that reads them in a random order, each in an order of its own."""
    config = model.config
    assert config.vocab_size is not None
    inputs, targets = config.lengths
    ids = torch.randint(config.vocab_size, (number, inputs + 1), device=device)
    samples, step = torch.arange(number, device=device), torch.tensor(1500, device=device)
    batch = Batch(ids[:, :-1], ids[:, -targets:], samples, step, 0)
    if config.architecture != "two_stream":
        return batch
    order = torch.rand(ids.shape, device=device).argsort(1)
    return replace(batch, position_ids=order[:, :-1], query_positions=order[:, -targets:])


def step_of(model: TokenModel, batch: Batch) -> None:
    model(batch).loss.backward()
    model.zero_grad(set_to_none=True)


def allocated(setting: Setting) -> int:
    """Bytes that are in tensors now, of which none will go by itself; a CPU does not tell."""
    gc.collect()
    return 0 if setting.tiny else torch.cuda.memory_allocated()


def beside_planner(name: str, config: Config, peak: int) -> Row:
    """The planner's count of a step beside the allocator's peak, in bytes, less what was there before the engine."""
    counted = memory(config, 1).total
    sizes = f"counted {counted / 2**30:.1f} GiB, measured {peak / 2**30:.1f} GiB"
    return Row(f"{name}: the planner's count is off by", abs(counted / peak - 1), 0.1, note=sizes)
