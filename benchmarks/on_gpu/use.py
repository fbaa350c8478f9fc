"""What a run does beside its steps: a save, and texts."""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from model.architectures.token_model import TokenModel
from model.generation.generate import Generation
from model.generation.sampling import Sampling
from pretrain.checkpoint.saver import Saver
from pretrain.engine.distributed import join
from tests.gpu.setting import Row, Setting

from .making import batch_of, config_of, engine_of, model_of
from .timing import now, seconds


def save(setting: Setting) -> Iterator[Row]:
    """For how long training waits for a save of decoder-350m, and how long the save takes behind it."""
    told: list[Any] = []
    with join(timeout_minutes=2) as ranks, tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        config = config_of(setting, "decoder-350m")
        engine, batch = engine_of(config, ranks), batch_of(config, setting.device)
        step = seconds(lambda: engine.train_step([batch], 1e-4), setting)
        size = sum(v.numel() * v.element_size() for f in engine.owned_fragments() for v in f.states.values())
        nothing: Any = lambda *_: None  # noqa: E731
        calls = {
            "still_ours": nothing,
            "sync_journal": nothing,
            "prune": nothing,
            "warn": print,
            "published": told.append,
        }
        with Saver(engine, Path(folder), ranks, **calls) as saver:
            for number in range(1, 4):  # the first allocates the pinned memory
                saver.start(number, {})
                while len(told) < number:
                    engine.train_step([batch], 1e-4)
                    saver.poll(bool(ranks.largest(saver.writing)[0]))
    blocked, whole = (
        statistics.median(times) for times in zip(*((t.blocked, t.seconds) for t in told[1:]), strict=True)
    )
    note = f"{blocked:.3f} s for {size / 1e9:.2f} GB: {size / 1e9 / blocked:.1f} GB/s; {whole:.1f} s until it is there"
    yield Row("decoder-350m: a save blocks training, in steps", blocked / step, note=note)


def generation(setting: Setting) -> Iterator[Row]:
    """Tokens a second in bf16 with a cache, from a prompt of 128, by the number of texts side by side."""
    numbers = (1, 2) if setting.tiny else (1, 8, 64)
    for preset in ("decoder-760m", "parallel-760m"):
        fields = config_of(setting, preset).model.model_dump()
        model = model_of(fields, setting, trains=False)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        for number in numbers:
            speed = _written(model, number, setting)
            note = f"weights read at {speed / number * weights / 1e12:.2f} TB/s"
            yield Row(f"{preset}, {number} texts: tokens/s", speed, note=note)


def _written(model: TokenModel, number: int, setting: Setting) -> float:
    prompt, tokens = (8, 4) if setting.tiny else (128, 96)
    assert model.config.vocab_size is not None
    prompts = torch.randint(model.config.vocab_size, (number, prompt), device=setting.device)
    writing = Generation(model, list(prompts), Sampling(temperature=0.0))
    for _ in range(2):
        writing.step()
    since = now(setting)
    for _ in range(tokens):
        writing.step()
    return number * tokens / (now(setting) - since)
