"""What ranks do in the tests of the engine; started through the fixture `ranks`."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from pretrain.checkpoint import checkpoint
from pretrain.config.schema import Config, load
from pretrain.engine import fragments
from pretrain.engine.adamw8bit import SIGNED, AdamW8bit, dynamic_map
from pretrain.engine.caches import CACHES
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from tests.distributed.cases import VOCABULARY, make_engine, save, train_run, train_steps

SMALL = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.context=8",
    f"model.vocab_size={VOCABULARY}",
    "model.bias=true",
    "batch.tokens=64",
]


def small(*more: str) -> Config:
    """A model with every kind of parameter: tied table, matrices, vectors; noise on."""
    return load([*SMALL, *more])


def digest(engine: Engine, ranks: Ranks) -> dict[str, str]:
    """A hash of each kind of state, independent of how it is spread; tells types apart."""
    pieces: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    mine = [(f.name, f.start, {k: v.clone() for k, v in f.states.items()}) for f in engine.owned_fragments()]
    for rank_pieces in ranks.gather(mine):
        for name, start, states in rank_pieces:
            for state, values in states.items():
                pieces.setdefault((state, name), []).append((start, values))
    hashes: dict[str, Any] = {}
    for (state, name), parts in sorted(pieces.items(), key=lambda item: item[0]):
        whole = torch.cat([values for _, values in sorted(parts, key=lambda part: part[0])])
        key = f"{state} {whole.dtype}".replace("torch.", "")
        hashes.setdefault(key, hashlib.sha256()).update(name.encode() + whole.view(torch.uint8).numpy().tobytes())
    return {key: sha.hexdigest() for key, sha in hashes.items()}


def train_and_save(ranks: Ranks, root: str, args: list[str], save_at: int, until: int) -> dict[str, Any]:
    """Train, save on the way, and go on."""
    torch._dynamo.config.disable = True  # Muon's kernel as it is written: compiling it takes half a minute
    config = small(*args)
    engine = make_engine(ranks, config)
    before = train_steps(engine, ranks, config, 1, save_at)
    save(engine, Path(root), save_at, ranks)
    saved = digest(engine, ranks)
    after = train_steps(engine, ranks, config, save_at + 1, until)
    return {"losses": before + after, "saved": saved, "final": digest(engine, ranks)}


def skipped_steps(ranks: Ranks, setups: list[list[str]]) -> list[list[tuple[list[bool], dict[str, str]]]]:
    """Of each set-up."""
    return [with_and_without_a_skipped_step(ranks, args) for args in setups]


def with_and_without_a_skipped_step(ranks: Ranks, args: list[str]) -> list[tuple[list[bool], dict[str, str]]]:
    """Which of the steps 1 to 4 were applied, and the state after them: the second not finite, or left out."""
    found = []
    config = small(*args)
    for steps in ([1, 2, 3, 4], [1, 3, 4]):
        engine = make_engine(ranks, config)
        applied: list[bool] = []
        train_step = engine.train_step

        def noted(batches: Any, *more: Any, train_step: Any = train_step, applied: list[bool] = applied) -> Any:
            result = train_step(batches, *more)
            applied.append(result[2])
            return result

        engine.train_step = noted  # type: ignore[assignment, method-assign]
        for step in steps:
            guard = (lambda metrics: torch.tensor(torch.nan)) if step == 2 else None
            train_steps(engine, ranks, config, step, step, guard)
        found.append((applied, digest(engine, ranks)))
    return found


def resume(ranks: Ranks, root: str, args: list[str], until: int) -> dict[str, Any]:
    """Load the newest checkpoint into an engine with other first weights, and train on."""
    torch._dynamo.config.disable = True
    config = small(*args)
    engine = make_engine(ranks, config, seed=99)
    found = checkpoint.newest(Path(root), ranks, lambda text: None)
    assert found is not None
    found.load(engine)
    loaded = digest(engine, ranks)
    losses = train_steps(engine, ranks, config, found.manifest.step + 1, until)
    return {"loaded": loaded, "losses": losses, "final": digest(engine, ranks)}


def norms(ranks: Ranks, args: list[str], steps: int) -> dict[str, Any]:
    """Losses and gradient norms of an engine, and the names of its parameters."""
    config = small(*args)
    engine = make_engine(ranks, config)
    told: list[float] = []
    step = engine.train_step

    def remember(*given: Any) -> Any:
        metrics, norm, applied = step(*given)
        told.append(float(norm))
        return metrics, norm, applied

    engine.train_step = remember  # type: ignore[method-assign,assignment]
    losses = train_steps(engine, ranks, config, 1, steps)
    names = [name for name, _ in engine.module.named_parameters()]
    assert set(names) == set(engine.shapes) == set(engine.states)
    return {"losses": losses, "norms": told, "names": names}


def first_update(ranks: Ranks, args: list[str]) -> dict[str, float]:
    """The largest change of an element in the first step, of each parameter."""
    config = small(*args)
    engine = make_engine(ranks, config)
    before = [fragment.states["fp32"].clone() for fragment in engine.owned_fragments()]
    train_steps(engine, ranks, config, 1, 1)
    largest: dict[str, float] = {}
    for old, new in zip(before, engine.owned_fragments(), strict=True):
        change = float((new.states["fp32"] - old).abs().max())
        largest[new.name] = max(largest.get(new.name, 0.0), change)
    return {name: max(of.get(name, 0.0) for of in ranks.gather(largest)) for name in engine.shapes}


def tagged(ranks: Ranks, args: list[str]) -> dict[str, list[str]]:
    """Which parameters are Muon's, and which are AdamW's."""
    torch._dynamo.config.disable = True
    engine = make_engine(ranks, small(*args))
    found: dict[str, list[str]] = {"muon": [], "adamw": []}
    for name, states in engine.states.items():
        found["muon" if "momentum_buffer" in states else "adamw"].append(name)
    return found


def activations(ranks: Ranks, args: list[str]) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters left out."""
    config = small(*args)
    engine = make_engine(ranks, config)
    own = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train_steps(engine, ranks, config, 1, 1)
    return sum(kept.values())


def surroundings(ranks: Ranks, args: list[str]) -> dict[str, Any]:
    """What an engine leaves in the process: timeouts (s) of all groups, levels of logs, folders of caches."""
    make_engine(ranks, small(*args))
    groups = torch.distributed.distributed_c10d._world.pg_map
    return {
        "timeouts": sorted({g._get_backend(ranks.device).options._timeout.total_seconds() for g in groups}),
        "groups": len(groups),
        "level": logging.getLogger("DeepSpeed").level,
        "caches": {name: os.environ[name] for name in CACHES},
    }


def muon_step(ranks: Ranks, args: list[str]) -> dict[str, float]:
    """Of each Muon parameter: how far its first step is from the formula written out, as a share of that step."""
    torch._dynamo.config.disable = True
    config = small(*args)
    engine = make_engine(ranks, config)
    before = {name: p.detach().double().clone() for name, p in engine.module.named_parameters()}
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: gradients.__setitem__(name, gradient.double().clone()))
    train_steps(engine, ranks, config, 1, 1)
    lr = 1e-2 * config.optimizer.muon_lr / config.optimizer.lr  # train_steps gives AdamW 1e-2
    beta, decay = config.optimizer.muon_momentum, config.optimizer.weight_decay
    errors = {}
    for name, parameter in engine.module.named_parameters():
        if "momentum_buffer" not in engine.states[name]:
            continue
        momentum = (1 - beta) * gradients[name]
        update = (1 - beta) * gradients[name] + beta * momentum
        rows, columns = update.shape
        x = update.T if rows > columns else update
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        update = (x.T if rows > columns else x) * max(1.0, rows / columns) ** 0.5
        step = -lr * (update + decay * before[name])
        errors[name] = float((parameter.double() - before[name] - step).norm() / step.norm())
    return errors


def muon_losses(ranks: Ranks, args: list[str], compiled: bool) -> list[float]:
    """With DeepSpeed's kernel as it is, which torch compiles, or eagerly."""
    torch._dynamo.config.disable = not compiled
    config = small(*args)
    return train_steps(make_engine(ranks, config), ranks, config, 1, 3)


def muon_run(ranks: Ranks, args: list[str]) -> int:
    """A whole training run."""
    torch._dynamo.config.disable = True
    return train_run(ranks, args)


def requantised(ranks: Ranks, root: str, args: list[str]) -> dict[str, Any]:
    """Load the newest checkpoint of 8-bit moments: how far they are from what was saved, in steps of the map there."""
    engine = make_engine(ranks, small(*args), seed=99)
    found = checkpoint.newest(Path(root), ranks, lambda text: None)
    assert found is not None
    optimizer = fragments.inner(engine._deepspeed.optimizer)
    assert isinstance(optimizer, AdamW8bit)
    for fragment in engine.fragments():
        found.read(fragment)
    saved = {flat: {name: values.clone() for name, values in kept.items()} for flat, kept in engine._kept.items()}
    engine.adopt_fragments(found.manifest.optimizer_steps)
    errors, exact = [], True
    for flat, loaded in optimizer.unpack().items():
        for name, values in loaded.items():
            codes, scales = (optimizer.state[flat][key] for key in (name, f"{name}_scale"))
            gaps = torch.tensor(dynamic_map(SIGNED[name])).diff()
            index = codes.long()
            gap = torch.maximum(gaps[index.clamp(max=254)], gaps[(index - 1).clamp(min=0)]) * scales.abs()[:, None]
            error = (values - saved[flat][name]).abs()
            errors.append(float((error / gap.view(-1)[: len(error)]).max()))
            exact &= torch.equal(values, saved[flat][name])
    return {"loaded": digest(engine, ranks), "error": max(errors), "exact": exact}


def compared_losses(ranks: Ranks, args: list[str], kinds: list[str], steps: int) -> list[tuple[list[float], int]]:
    """Of each kind of optimizer: its losses over the same few samples again and again, and the bytes that it keeps."""
    found = []
    for kind in kinds:
        config = small(*args, f"optimizer.kind={kind}")
        engine = make_engine(ranks, config)
        losses = [train_steps(engine, ranks, config, 1, 1)[0] for _ in range(steps)]
        kept = fragments.inner(engine._deepspeed.optimizer).state.values()
        found.append((losses, sum(t.nbytes for state in kept for t in state.values())))
    return found
