"""What ranks do in the tests of engine and checkpoint; started through the fixture `ranks`."""

import hashlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from model.architectures import registry
from model.architectures.token_model import TokenModel
from model.batch import Batch
from pretrain.checkpoint import checkpoint
from pretrain.checkpoint.retention import prune
from pretrain.checkpoint.saver import Published, Saver
from pretrain.config.schema import Config, load
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine, Guard
from pretrain.evaluation.batches import Batches
from pretrain.evaluation.evaluate import evaluate
from pretrain.finetune.lora import adapt
from pretrain.report import report
from pretrain.run.job_records import FailureFile
from pretrain.run.run_folder import RunFolder
from pretrain.run.signals import StopRequest
from pretrain.tracking.metrics import Meter

VOCABULARY = 41


def small_config(stage: int, precision: str, micro_batch: int | None = None) -> Config:
    """A model with every kind of parameter: tied table, matrices, vectors; noise on."""
    return load(
        [
            "model.layers=1",
            "model.width=16",
            "model.heads=2",
            "model.context=8",
            f"model.vocab_size={VOCABULARY}",
            "model.bias=true",
            "batch.tokens=64",
            f"engine.zero_stage={stage}",
            f"engine.precision={precision}",
        ]
        + ([f"batch.micro_batch={micro_batch}"] if micro_batch else [])
    )


def make_engine(ranks: Ranks, config: Config, seed: int = 0) -> Engine:
    """A fresh engine; `seed` chooses its first weights."""
    torch.manual_seed(seed)
    model = registry.build(config.model)
    if config.finetune.kind == "lora":
        adapt(model, config.finetune, seed)
    return Engine(model, config, ranks)


def train_steps(
    engine: Engine, ranks: Ranks, config: Config, first: int, last: int, guard: Guard | None = None
) -> list[float]:
    """Steps first..last on tokens that are a function of the global sample only; mean loss of each."""
    losses = []
    micro_batch, _ = config.micro_batches(ranks.world_size)
    for step in range(first, last + 1):
        positions = torch.arange((step - 1) * config.global_batch, step * config.global_batch)
        mine = positions[ranks.rank :: ranks.world_size]
        batches = [
            Batch(tokens[:, :-1], tokens[:, 1:], samples, torch.tensor(step), seed=5)
            for samples in mine.split(micro_batch)
            for tokens in [torch.stack([_tokens(int(s), config.model.context) for s in samples])]
        ]
        if config.model.traits.two_sequences:
            batches = [replace(batch, decoder_input_ids=batch.input_ids) for batch in batches]
        metrics, _, _ = engine.train_step(batches, 1e-2, guard)
        mean = torch.stack([m["loss"].float() for m in metrics]).mean()
        losses.append(float(ranks.sum(mean)) / ranks.world_size)
    return losses


def digest(engine: Engine, ranks: Ranks) -> dict[str, str]:
    """A hash of all parameters and moments, independent of how they are spread."""
    whole = {}
    for rank_pieces in ranks.gather(
        [(f.name, f.start, {k: v.clone() for k, v in f.states.items()}) for f in engine.owned_fragments()]
    ):
        for name, start, states in rank_pieces:
            whole[name, start] = states
    pieces: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name, start in sorted(whole):
        for state, values in whole[name, start].items():
            pieces.setdefault((state, name), []).append(values)
    result = {}
    for state in {state for state, _ in pieces}:
        sha = hashlib.sha256()
        for kind, name in sorted(pieces):
            if kind == state:
                sha.update(name.encode() + torch.cat(pieces[kind, name]).numpy().tobytes())
        result[state] = sha.hexdigest()
    return result


def save(engine: Engine, root: Path, step: int, ranks: Ranks) -> None:
    """Save, and wait until the checkpoint is there."""
    with a_saver(engine, root, ranks) as saver:
        saver.start(step, {"who": "test"})
        saver.join()


def a_saver(
    engine: Engine,
    root: Path,
    ranks: Ranks,
    keep: int = 10,
    still_ours: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = print,
) -> Saver:
    def published(checkpoint: Published) -> None:
        assert (checkpoint.path / "manifest.json").is_file(), "told too early"
        assert 0 < checkpoint.blocked <= checkpoint.seconds

    return Saver(
        engine,
        root,
        ranks,
        still_ours=still_ours,
        sync_journal=lambda: None,
        prune=lambda step: prune(root, keep, None, upto=step),
        warn=warn,
        published=published,
    )


def train_and_save(
    ranks: Ranks, root: str, stage: int, precision: str, save_at: int, until: int, micro_batch: int | None = None
) -> dict[str, Any]:
    """Train, save on the way, and go on."""
    config = small_config(stage, precision, micro_batch)
    engine = make_engine(ranks, config)
    before = train_steps(engine, ranks, config, 1, save_at)
    save(engine, Path(root), save_at, ranks)
    saved = digest(engine, ranks)
    after = train_steps(engine, ranks, config, save_at + 1, until)
    return {"losses": before + after, "saved": saved, "final": digest(engine, ranks)}


def resume(
    ranks: Ranks, root: str, stage: int, precision: str, until: int, micro_batch: int | None = None
) -> dict[str, Any]:
    """Load the newest checkpoint into an engine with other first weights, and train on."""
    config = small_config(stage, precision, micro_batch)
    engine = make_engine(ranks, config, seed=99)
    warnings: list[str] = []
    found = checkpoint.newest(Path(root), ranks, warnings.append)
    assert found is not None
    found.load(engine)
    loaded = digest(engine, ranks)
    losses = train_steps(engine, ranks, config, found.manifest.step + 1, until)
    return {
        "step": found.manifest.step,
        "loaded": loaded,
        "losses": losses,
        "final": digest(engine, ranks),
        "warnings": warnings,
    }


def _tokens(sample: int, context: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sample)
    return torch.randint(VOCABULARY, (context + 1,), generator=generator)


def poisoned(ranks: Ranks, stage: int) -> dict[str, Any]:
    """Rank 0's loss is not finite in the second of three steps."""
    config = small_config(stage, "fp32")
    engine = make_engine(ranks, config)
    applied, losses, unchanged = [], [], False
    parameter = next(p for p in engine.module.parameters())
    for step in (1, 2, 3):
        before = digest(engine, ranks)
        handle = None
        if step == 2 and ranks.rank == 0:
            handle = engine.module.register_forward_hook(
                lambda module, inputs, output: output._replace(loss=output.loss * float("nan"))
            )
        positions = torch.arange(ranks.rank, config.global_batch, ranks.world_size) + step * 100
        tokens = torch.stack([_tokens(int(s), config.model.context) for s in positions])
        batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, torch.tensor(step), seed=5)
        metrics, _, done = engine.train_step([batch], lr=1e-2)
        if handle:
            handle.remove()
        applied.append(done)
        losses.append(float(ranks.sum(metrics[0]["loss"])))
        if step == 2:
            unchanged = digest(engine, ranks) == before
    assert torch.isfinite(parameter).all()
    return {"applied": applied, "losses": losses, "unchanged": unchanged}


def without_report() -> None:
    """From now on a run writes no report at its end: the pictures take longer than all the steps of a small one."""
    report.write = lambda runs, out: None


def train_run(
    ranks: Ranks,
    args: list[str],
    die_at: int | None = None,
    signal_at: tuple[int, int] | None = None,
    sabotage: str | None = None,
    taken_over_at: int | None = None,
    wait_for_saves: bool = False,
    reported: bool = False,
) -> int:
    """A whole training run, but for its report; rank 1 can be killed or get a signal in the middle of a step."""
    from pretrain import trainer
    from pretrain.run import lease

    if not reported:
        without_report()
    original_step = Engine.train_step
    original_lr = trainer.learning_rate
    now = 0

    def remember_step(config: Config, tokens: int) -> float:
        nonlocal now
        now = tokens // config.batch.tokens
        return original_lr(config, tokens)

    def step(*given: Any) -> Any:
        if ranks.rank == 1 and now == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.rank == 1 and signal_at and now == signal_at[0]:
            os.kill(os.getpid(), signal_at[1])
        if ranks.rank == 0 and now == taken_over_at:
            heart = next(t for t in threading.enumerate() if t.name == "lease-heartbeat")
            (load(args).run_dir / "attempts" / "000002.json").write_text("{}")
            heart.join(30)  # it ends when it has noticed
            assert not heart.is_alive()
        return original_step(*given)

    start = Saver.start

    def start_and_wait(saver: Saver, *args: Any) -> None:
        start(saver, *args)
        saver.join()

    if wait_for_saves:
        Saver.start = start_and_wait  # type: ignore[method-assign,assignment]
    lease.HEARTBEAT_SECONDS = 0.1
    trainer.learning_rate = remember_step
    Engine.train_step = step  # type: ignore[method-assign,assignment]
    if sabotage == "load nothing":
        checkpoint.Checkpoint.load = lambda self, engine: None  # type: ignore[method-assign]
    elif sabotage == "find nothing":
        checkpoint.newest = lambda root, ranks, warn: None
        RunFolder.check_never_saved = lambda self: None  # type: ignore[method-assign]
    elif sabotage == "forget the moments":
        read = checkpoint.Checkpoint.read
        checkpoint.Checkpoint.read = lambda self, target: read(  # type: ignore[method-assign]
            self, replace(target, states={"fp32": target.states["fp32"]})
        )
    elif sabotage == "forget the data position":
        DataState.model_validate = classmethod(  # type: ignore[method-assign,assignment]
            lambda cls, content: cls(**(content | {"samples_seen": 0}))
        )
    return trainer.train(load(args), ranks, StopRequest(), time.time(), FailureFile(ranks.rank))


def validate_in_batches_of(ranks: Ranks, run: str, sizes: list[int]) -> list[dict[str, float]]:
    """Validation of a run's newest checkpoint, with several numbers of windows a forward pass."""
    from pretrain.inference.trained import find_checkpoint, read_model

    checkpoint, config = find_checkpoint(Path(run))
    model = read_model(checkpoint, config)
    dataset = Dataset.open(config.data.path)
    windows = Windows.of(dataset, "validation", config.model.context, partial=True)
    batches = Batches.of(config, dataset, ranks.device)
    return [evaluate(model, windows, {"text": 1000}, size, ranks, batches) for size in sizes]


def update_ratios(ranks: Ranks, engines: list[tuple[int, str]], mask_lr: float | None) -> list[dict[str, Any]]:
    """Of an engine of each stage and precision."""
    return [update_ratio(ranks, stage, precision, mask_lr) for stage, precision in engines]


def update_ratio(ranks: Ranks, stage: int, precision: str, mask_lr: float | None) -> dict[str, Any]:
    """Of a few steps, the last one skipped: ‖Δθ‖ and ‖θ‖ as the engine tells them and as the parameters changed."""
    config = small_config(stage, precision)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"mask_lr": mask_lr})})
    engine = make_engine(ranks, config)

    def over_ranks(squares: list[float]) -> list[float]:
        return [sum(values) ** 0.5 for values in zip(*ranks.gather(squares), strict=True)]

    told, measured = [], []
    for step in range(1, 6):
        before = [f.states["fp32"].double() for f in engine.owned_fragments()]
        handle = None
        if step == 5:
            handle = engine.module.register_forward_hook(
                lambda module, inputs, output: output._replace(loss=output.loss * float("nan"))
            )
        train_steps(engine, ranks, config, step, step)
        if handle:
            handle.remove()
        after = [f.states["fp32"].double() for f in engine.owned_fragments()]
        change = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
        measured.append(over_ranks([sum(float(a.square().sum()) for a in after), change]))
        theta, update = engine.squared_norms()
        assert update is not None
        told.append(over_ranks([theta, update]))
    return {
        "told": [x for pair in told for x in pair],
        "measured": [x for pair in measured for x in pair],
        "laps": engine.stopwatch.read(),
    }


def slow_rank(ranks: Ranks, args: list[str], slow: int, seconds: float) -> int:
    """A run in which one rank's forward pass takes longer."""
    from pretrain import trainer

    without_report()
    original = TokenModel.hidden

    def hidden(model: TokenModel, *rest: Any) -> Any:
        time.sleep(seconds if ranks.rank == slow else 0.0)
        return original(model, *rest)

    TokenModel.hidden = hidden  # type: ignore[method-assign,assignment]
    return trainer.train(load(args), ranks, StopRequest(), time.time(), FailureFile(ranks.rank))


WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor that need its value on the host."""


def host_waits(ranks: Ranks, args: list[str], sabotage: bool = False) -> list[str]:
    """Train, and tell where our own files wait for the device between flushes, as `file:function`.

    Every call of WAITS counts, on a CPU, too; on CUDA also what torch itself sees as a synchronisation.
    """
    from pretrain import trainer

    without_report()
    root = Path(trainer.__file__).parent.parent
    found: set[str] = set()
    between_flushes = False

    def note(file: str, place: object) -> None:
        path = Path(file)
        here = threading.current_thread() is threading.main_thread()  # the threads that write may wait
        if (
            here
            and between_flushes
            and path.is_relative_to(root)
            and path.relative_to(root).parts[0] in ("pretrain", "model")
        ):
            found.add(f"{path.name}:{place}")

    def watch(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            note(caller.f_code.co_filename, caller.f_code.co_name)
            return original(*args, **kwargs)

        setattr(torch.Tensor, name, watched)

    def exempt(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def exempted(*args: Any, **kwargs: Any) -> Any:
            nonlocal between_flushes
            between_flushes = False
            try:
                return original(*args, **kwargs)
            finally:
                between_flushes = True

        setattr(owner, name, exempted)

    for name in WAITS:
        watch(name)
    for owner, name in ((Meter, "__init__"), (Meter, "flush"), (trainer.Loop, "_validate"), (trainer.Loop, "_save")):
        exempt(owner, name)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: (
            note(filename, lineno) if "synchroniz" in str(message) else None
        )
    if sabotage:
        source = "def learning_rate(config, step):\n    return float(tensor(original(config, step)))\n"
        scope: dict[str, Any] = {"tensor": torch.tensor, "original": trainer.learning_rate}
        exec(compile(source, str(root / "pretrain" / "sabotage.py"), "exec"), scope)
        trainer.learning_rate = scope["learning_rate"]
    trainer.train(load(args), ranks, StopRequest(), time.time(), FailureFile(ranks.rank))
    return sorted(found)
