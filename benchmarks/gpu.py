"""How fast it is on one GPU: the part b of `python -m tests.gpu`, which runs each of these in a process of its own.

By itself, `python benchmarks/gpu.py [--json]` has that run all of them, for at most 20 minutes. Without a GPU nothing
is measured. Exits with 1 when a target is missed.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from model.architectures import registry  # noqa: E402
from model.architectures.registry import configure  # noqa: E402
from model.architectures.token_model import TokenModel  # noqa: E402
from model.attention.forms import Gathered  # noqa: E402
from model.attention.rule import Rows  # noqa: E402
from model.attention.softmax import Softmax  # noqa: E402
from model.attention.visibility import Visible  # noqa: E402
from model.batch import Batch  # noqa: E402
from model.config.pattern_config import FULL, Pattern  # noqa: E402
from model.costs.flops import training_flops_per_token  # noqa: E402
from model.generation.generate import Generation  # noqa: E402
from model.generation.sampling import Sampling  # noqa: E402
from model.gpus import peak_flops  # noqa: E402
from model.layers.block_forms import all_blocks, open_blocks  # noqa: E402
from model.layers.block_sizes import pays  # noqa: E402
from model.masks.block_gates import BlockFeedForward  # noqa: E402
from pretrain.checkpoint.saver import Saver  # noqa: E402
from pretrain.config.schema import Config, load  # noqa: E402
from pretrain.engine.distributed import Ranks, join  # noqa: E402
from pretrain.engine.engine import Engine, bootstrap  # noqa: E402
from pretrain.engine.layer_transforms import compile_layers  # noqa: E402
from pretrain.planning.memory import memory  # noqa: E402
from tests.gpu.setting import Row, Setting, each  # noqa: E402

MINUTES = 20
OFF = {"learned_dropout": {"enabled": False}}
SEQUENCE = 2048
MOST_SEQUENCES = 16
FILLED = 0.85
"""Of the memory that is free, by the planner's count."""
AIM = 0.5
"""MFU, at 760M and 1.3B."""
SECONDS = 3.0
"""For which a step is timed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    if not torch.cuda.is_available():
        print("no GPU that torch could use is here: nothing was measured", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "tests.gpu", "--only", "b", "--minutes", str(MINUTES), "--out", folder]
        code = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=sys.stderr).returncode
        parts = json.loads(Path(folder, "results.json").read_text()).values()
        rows = [row for part in parts for row in part["rows"]]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| | value | target |\n|---|---|---|")
        for row in rows:
            kind = "at least" if row["at_least"] else "at most"
            target = "–" if row["limit"] is None else f"{kind} {row['limit']:.3g}"
            print(f"| {row['name']} ({row['note']}) | {row['value']:.4g} | {target} |")
    return code


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
    config = _config(setting, preset)
    before = torch.cuda.memory_allocated() if not setting.tiny else 0
    engine = _engine(config, ranks)
    batch = _batch(config, setting.device)
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
            counted, measured = memory(config, 1).total, torch.cuda.max_memory_allocated() - before
            sizes = f"counted {counted / 2**30:.1f} GiB, measured {measured / 2**30:.1f} GiB"
            yield Row(f"{name}: the planner's count is off by", abs(counted / measured - 1), 0.1, note=sizes)


def _config(setting: Setting, preset: str, most: int = MOST_SEQUENCES) -> Config:
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


def _engine(config: Config, ranks: Ranks) -> Engine:
    """Its weights are made on the device, which is quicker by far."""
    torch.manual_seed(0)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with ranks.device:
        model = registry.build(config.model)
    return Engine(model, config, ranks)


def _batch(config: Config, device: str, step: int = 1) -> Batch:
    assert config.model.vocab_size is not None
    number = config.batch.tokens // config.model.context
    ids = torch.randint(config.model.vocab_size, (number, config.model.context + 1), device=device)
    return Batch(ids[:, :-1], ids[:, 1:], torch.arange(number, device=device), torch.tensor(step, device=device), 0)


def _peak(setting: Setting) -> float:
    """Dense bf16 FLOP/s; a rehearsal's is made up."""
    if setting.tiny:
        return 1e12
    name = torch.cuda.get_device_name()
    peak = peak_flops(name)
    assert peak is not None, f"model/gpus.py does not know the peak of {name}"
    return peak


def seconds(work: Callable[[], object], setting: Setting) -> float:
    """Mean of a call among many that follow each other without a wait, after three that are not counted."""
    for _ in range(3):
        work()
    since = _now(setting)
    work()
    once = _now(setting) - since
    number = 2 if setting.tiny else max(3, min(100, int(SECONDS / once)))
    since = _now(setting)
    for _ in range(number):
        work()
    return (_now(setting) - since) / number


def medians(works: dict[str, Callable[[], object]], setting: Setting) -> dict[str, float]:
    """Seconds of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    turns = 2 if setting.tiny else 15
    for turn in range(-3, turns):
        for name, work in works.items():
            since = _now(setting)
            work()
            if turn >= 0:
                taken[name].append(_now(setting) - since)
            else:
                _now(setting)
    return {name: statistics.median(times) for name, times in taken.items()}


def _now(setting: Setting) -> float:
    """Seconds, when the device has done all that was asked of it."""
    if not setting.tiny:
        torch.cuda.synchronize()
    return time.perf_counter()


def masks(setting: Setting) -> Iterator[Row]:
    """A training step of the parallel model with masks, with dropout, and with neither, in bf16; eager, compiled."""
    shape = {"layers": 1, "width": 32, "heads": 2, "context": 64, "vocab_size": 256}
    if not setting.tiny:
        shape = {"layers": 4, "width": 1024, "heads": 16, "context": SEQUENCE, "vocab_size": 32768}
    kinds: dict[str, dict[str, Any]] = {"plain": OFF, "masks": {}, "dropout": {**OFF, "dropout": 0.1}}
    for way in ("eager",) if setting.tiny else ("eager", "compiled"):
        models = {name: _model(shape | made, setting, compiled=way == "compiled") for name, made in kinds.items()}
        batch = _rows(models["plain"], 2 if setting.tiny else 8, setting.device)
        took = medians({name: partial(_step, model, batch) for name, model in models.items()}, setting)
        for name in ("masks", "dropout"):
            note = f"{1e3 * took[name]:.1f} ms / {1e3 * took['plain']:.1f} ms"
            yield Row(f"a step with {name} / without, bf16, {way}", took[name] / took["plain"], note=note)


def _model(fields: dict[str, Any], setting: Setting, *, compiled: bool = False, trains: bool = True) -> TokenModel:
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = registry.build(configure(dict(fields))).to(torch.bfloat16)
    if compiled:
        compile_layers(model)
    return model.train(trains)


def _rows(model: TokenModel, number: int, device: str) -> Batch:
    config = model.config
    assert config.vocab_size is not None
    ids = torch.randint(config.vocab_size, (number, config.context + 1), device=device)
    return Batch(ids[:, :-1], ids[:, 1:], torch.arange(number, device=device), torch.tensor(1500, device=device), 0)


def _step(model: TokenModel, batch: Batch) -> None:
    model(batch).loss.backward()
    model.zero_grad(set_to_none=True)


def bare(setting: Setting) -> Iterator[Row]:
    """A step of ours beside one of bare DeepSpeed and of bare torch, in bf16, eager, in turns on the same tokens."""
    bootstrap()
    with join(timeout_minutes=2) as ranks:
        config = _config(setting, "decoder-125m", most=8)
        engine, batch = _engine(config, ranks), _batch(config, setting.device)
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


def gates(setting: Setting) -> Iterator[Row]:
    """A feed forward in 8 blocks of which 2 are open: open blocks alone beside all of them, by tokens and width; and
    whether `model/layers/block_sizes.py` would take the quicker one."""
    sizes = [(64, 32)] if setting.tiny else [(t, w) for w in (1024, 2048, 4096) for t in (2048, 16384)]
    yield from each({f"{t:,} tokens, width {w:,}": partial(_gates, setting, t, w) for t, w in sizes})


def _gates(setting: Setting, tokens: int, width: int) -> Iterator[Row]:
    shape = {"layers": 1, "width": width, "heads": 2, "context": 64, "vocab_size": 64}
    top = {"kind": "top", "blocks": 8, "density": 0.25}
    config: Any = configure({"architecture": "decoder_only", **shape, **OFF, "block_gates": top})
    with torch.device(setting.device):
        ff: Any = BlockFeedForward(config, "dec_ff", 0, 0.02).to(torch.bfloat16)
        x = torch.randn(1, tokens, width, dtype=torch.bfloat16)
    rows, found = x.flatten(0, 1).requires_grad_(), ff.gates(x)
    weights, opened = found.weights.to(x.dtype).flatten(0, 1).detach(), found.opened.flatten(0, 1)

    def run(form: Callable[[], Tensor], *, trains: bool) -> None:
        with torch.set_grad_enabled(trains):
            out = form()
        if trains:
            out.sum().backward()

    forms: dict[str, Callable[[], Tensor]] = {
        "all": lambda: all_blocks(rows, weights, ff._maps()),
        "open": lambda: open_blocks(rows, weights, opened, ff._maps()),
    }
    for trains in (False, True):
        took = medians({name: partial(run, form, trains=trains) for name, form in forms.items()}, setting)
        ratio = took["all"] / took["open"]
        taken = pays(tokens, width, config.block_width, cuda=True)
        right = "the quicker" if taken == (ratio > 1) else "the slower"
        note = f"{1e3 * took['all']:.2f} ms / {1e3 * took['open']:.2f} ms; {right} is taken"
        what = "in training" if trains else "forward"
        yield Row(f"{tokens:,} tokens, width {width:,}, {what}: all blocks / open blocks", ratio, note=note)


def window(setting: Setting) -> Iterator[Row]:
    """Causal attention of 8,192 tokens over windows: gathered, and FlexAttention, beside all keys by flash."""
    length, windows = (256, (64,)) if setting.tiny else (8192, (256, 1024))
    heads, channels = (2, 16) if setting.tiny else (16, 64)
    mixer = Softmax(configure({"layers": 1, "width": heads * channels, "heads": heads, "vocab_size": 64}))  # type: ignore[arg-type]
    inputs = torch.randn(4, 2, heads, length, channels, device=setting.device, dtype=torch.bfloat16)
    rows = Rows(torch.Size((2, length)), torch.device(setting.device))

    def run(mask: Any) -> None:
        leaves = [x.detach().requires_grad_(not setting.tiny) for x in inputs[:3]]
        out = mixer(*leaves, None, Visible(mask=mask))
        if out.requires_grad:
            out.backward(inputs[3])

    works: dict[str, Callable[[], object]] = {"all keys": partial(run, None)}
    for size in windows:
        works[f"window of {size}, gathered"] = partial(run, Gathered.of(rows, Pattern(window=size)))
        works[f"window of {size}, FlexAttention"] = partial(run, rows.blocks(Pattern(window=size)))
    works["all keys, FlexAttention"] = partial(run, rows.blocks(FULL))
    took = medians(works, setting)
    for name in list(works)[1:]:
        note = f"{1e3 * took['all keys']:.2f} ms / {1e3 * took[name]:.2f} ms"
        yield Row(
            f"{length:,} tokens, forward and backward: all keys / {name}", took["all keys"] / took[name], note=note
        )


def save(setting: Setting) -> Iterator[Row]:
    """For how long training waits for a save of decoder-350m, and how long the save takes behind it."""
    told: list[Any] = []
    with join(timeout_minutes=2) as ranks, tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        config = _config(setting, "decoder-350m")
        engine, batch = _engine(config, ranks), _batch(config, setting.device)
        step = seconds(lambda: engine.train_step([batch], 1e-4), setting)
        size = sum(v.numel() * v.element_size() for f in engine.owned_fragments() for v in f.states.values())
        nothing: Any = lambda *_: None  # noqa: E731
        calls = {"still_ours": nothing, "prune": nothing, "warn": print, "published": told.append}
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
        fields = _config(setting, preset).model.model_dump()
        model = _model(fields, setting, trains=False)
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
    since = _now(setting)
    for _ in range(tokens):
        writing.step()
    return number * tokens / (_now(setting) - since)


if __name__ == "__main__":
    sys.exit(main())
