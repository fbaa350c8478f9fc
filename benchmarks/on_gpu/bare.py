"""A step of ours beside one of bare DeepSpeed and of bare torch."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from model.architectures import registry
from model.batch import Batch
from pretrain.config.schema import Config
from pretrain.engine.distributed import Ranks, join
from pretrain.engine.engine import bootstrap
from tests.gpu.setting import Row, Setting

from .making import batch_of, config_of, engine_of
from .timing import medians


def bare(setting: Setting) -> Iterator[Row]:
    """A step of ours beside one of bare DeepSpeed and of bare torch, in bf16, eager, in turns on the same tokens."""
    bootstrap()
    with join(timeout_minutes=2) as ranks:
        config = config_of(setting, "decoder-125m", most=8)
        engine, batch = engine_of(config, ranks), batch_of(config, setting.device)
        works: dict[str, Callable[[], object]] = {
            "ours": lambda: engine.train_step([batch], 1e-4),
            "bare DeepSpeed": _bare_deepspeed(config, ranks, batch),
            "bare torch": _bare_torch(config, ranks, batch),
        }
        took = medians(works, setting)
    for name, limit in (("bare DeepSpeed", 1.03), ("bare torch", 1.05)):
        note = f"{1e3 * took['ours']:.1f} ms / {1e3 * took[name]:.1f} ms"
        yield Row(f"a step of decoder-125m: ours / {name}", took["ours"] / took[name], setting.aim(limit), note=note)


def _bare_torch(config: Config, ranks: Ranks, batch: Batch) -> Callable[[], object]:
    """Weights in fp32, and autocast to bf16, as any loop has it."""
    with ranks.device:
        model = registry.build(config.model).train()
    fused = ranks.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused or None)

    def step() -> None:
        with torch.autocast(ranks.device.type, torch.bfloat16):
            loss = model(batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _bare_deepspeed(config: Config, ranks: Ranks, batch: Batch) -> Callable[[], object]:
    """As DeepSpeed's own examples have it, with the same settings as ours."""
    import deepspeed

    with ranks.device:
        model = registry.build(config.model).train()
    fused = ranks.device.type == "cuda"
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=fused or None),
        config={
            "train_micro_batch_size_per_gpu": len(batch.input_ids),
            "gradient_clipping": config.optimizer.clip,
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )

    def step() -> None:
        engine.backward(engine(batch).loss)
        engine.step()

    return step
