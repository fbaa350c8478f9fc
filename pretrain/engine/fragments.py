"""Where each parameter's pieces lie in the buffers of DeepSpeed 0.19.8's optimizers, on one rank.

Reads private attributes of the pinned version and imports nothing of it; the matrix of tests/distributed holds it.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.engine.adamw8bit import AdamW8bit, new_state

MOMENTUM = "momentum_buffer"
Kept = Mapping[Tensor, Mapping[str, Tensor]]
"""Tensors that an optimizer keeps, by state, of each tensor that it moves."""


@dataclass(frozen=True)
class Fragment:
    """A piece of a parameter that this rank holds: `numel` elements from `start` of the flattened parameter."""

    name: str
    start: int
    numel: int
    states: dict[str, Tensor]
    """Views [numel] by the parameter's names in `Engine.states`; writing to them, and `adopt_fragments`, changes the
    engine. Moments that it keeps in 8 bits are copies in fp32, on the host."""

    def part(self, start: int, numel: int) -> "Fragment":
        """`numel` elements of it, from its own `start`."""
        views = {state: view.narrow(0, start, numel) for state, view in self.states.items()}
        return Fragment(self.name, self.start + start, numel, views)


def in_chunks(fragments: Iterable[Fragment], most: int) -> Iterator[list[Fragment]]:
    """All of them, cut where they are longer, in lists of at most so many elements."""
    held, size = list[Fragment](), 0
    for fragment in fragments:
        for start in range(0, fragment.numel, most):
            part = fragment.part(start, min(most, fragment.numel - start))
            if held and size + part.numel > most:
                yield held
                held, size = [], 0
            held.append(part)
            size += part.numel
    if held:
        yield held


@dataclass(frozen=True)
class OwnedPiece:
    """A piece of a parameter in one of the optimizer's tensors."""

    parameter: nn.Parameter
    start: int
    numel: int
    flat: Tensor
    """fp32; the optimizer's key for what else it keeps."""
    offset: int
    """Of the piece in `flat`, and in the moments."""
    muon_offset: int | None = None
    """Of the whole parameter in Muon's momentum, where that keeps whole parameters: ZeRO 1 and 2."""


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed's ZeRO wraps, or itself."""
    return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer


def pieces(optimizer: Any, stage: int, rank: int) -> Iterator[OwnedPiece]:
    """Every piece on this rank, in a fixed order; at stage 3 also empty ones."""
    if stage == 3:
        for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for parameter in parameters:
                partition = parameter.ds_tensor.ds_numel
                numel = max(0, min(partition, parameter.ds_numel - rank * partition))
                yield OwnedPiece(parameter, rank * partition, numel, flat, offset)
                offset += partition
    elif stage:
        for index, (parameters, flat) in enumerate(zip(*_groups(optimizer), strict=True)):
            muon_offsets = _muon_offsets(optimizer, index)
            for parameter in parameters:
                if parameter._hp_mapping is not None:  # else another rank holds all of it
                    low = parameter._hp_mapping.lp_fragment_address
                    high = parameter._hp_mapping.get_hp_fragment_address()
                    yield OwnedPiece(parameter, low.start, low.numel, flat, high.start, muon_offsets.get(parameter))
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield OwnedPiece(parameter, 0, parameter.numel(), parameter, 0)


def create_states(optimizer: Any, stage: int, rank: int, momentum_type: torch.dtype) -> None:
    """What the optimizer would make at its first step, so that a checkpoint can be written and read at any time."""
    kept = inner(optimizer).state
    in_8_bits = isinstance(inner(optimizer), AdamW8bit)
    for _, group in itertools.groupby(pieces(optimizer, stage, rank), key=lambda piece: id(piece.flat)):
        *_, last = group
        flat = last.flat
        if in_8_bits:
            kept[flat] = new_state(flat)
        elif not uses_muon(last.parameter):
            kept[flat] = {
                "step": torch.tensor(0.0, device=flat.device),  # fused AdamW wants it there
                "exp_avg": torch.zeros_like(flat, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(flat, dtype=torch.float32),
            }
        elif last.muon_offset is not None:
            size = last.muon_offset + last.parameter.numel()
            kept[flat] = {MOMENTUM: torch.zeros(size, dtype=momentum_type, device=flat.device)}
        else:
            kept[flat] = {MOMENTUM: torch.zeros_like(flat, dtype=momentum_type)}


def uses_muon(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed has tagged it for Muon, by its name and shape."""
    return bool(getattr(parameter, "use_muon", False))


def kept_states(optimizer: Any) -> Kept:
    """What the optimizer keeps; of moments in 8 bits, copies."""
    wrapped = inner(optimizer)
    return wrapped.unpack() if isinstance(wrapped, AdamW8bit) else wrapped.state


def fragments(
    optimizer: Any, stage: int, rank: int, names: Mapping[Any, str], states: Mapping[str, tuple[str, ...]], kept: Kept
) -> Iterator[Fragment]:
    """Every piece of this rank that is not empty, with those `states` of its parameter."""
    for piece in pieces(optimizer, stage, rank):
        name = names[piece.parameter]
        views = {}
        for state in states[name]:
            tensor = piece.flat if state == "fp32" else kept[piece.flat][state]
            whole = state == MOMENTUM and piece.muon_offset is not None
            offset = piece.muon_offset + piece.start if whole else piece.offset  # type: ignore[operator]
            views[state] = tensor.detach().reshape(-1).narrow(0, offset, piece.numel)
        if piece.numel:
            yield Fragment(name, piece.start, piece.numel, views)


def whole_momenta(optimizer: Any, stage: int, rank: int, names: Mapping[Any, str]) -> Iterator[Fragment]:
    """Of parameters that ranks share at ZeRO 1 and 2: Muon's momentum of all of it, which each of them keeps."""
    kept = inner(optimizer).state
    for piece in pieces(optimizer, stage, rank):
        numel = piece.parameter.numel()
        if piece.muon_offset is not None and piece.numel < numel:
            whole = kept[piece.flat][MOMENTUM].narrow(0, piece.muon_offset, numel)
            yield Fragment(names[piece.parameter], 0, numel, {MOMENTUM: whole})


def share(fragment: Fragment, rank: int, world_size: int) -> Fragment:
    """A rank's even share of what every rank holds; may be empty."""
    size = math.ceil(fragment.numel / world_size)
    start = min(fragment.numel, size * rank)
    return fragment.part(start, min(fragment.numel - start, size))


@torch.no_grad()
def adopt(optimizer: Any, stage: int, optimizer_steps: int, kept: Kept) -> None:
    """Make the model compute with what was written into the fragments of `kept`; a collective."""
    wrapped = inner(optimizer)
    if isinstance(wrapped, AdamW8bit):
        wrapped.pack(kept)
    for state in wrapped.state.values():
        if "step" in state:
            # One tensor each, since a shared one would count too fast; in place, so that it stays on its device.
            state["step"].fill_(float(optimizer_steps))
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            low = optimizer.fp16_partitioned_groups_flat[index]
            low.data.copy_(flat.data)
            parts = optimizer.fp16_partitioned_groups[index]
            for part, value in zip(parts, optimizer.unflatten(low, parts), strict=True):
                part.data = value.data
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()


def _groups(optimizer: Any) -> tuple[list[list[Any]], list[Tensor]]:
    if hasattr(optimizer, "bit16_groups"):
        return optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    # BF16_Optimizer: stage 1 with bf16 weights and fp32 gradients
    return optimizer.bf16_groups, optimizer.fp32_groups_flat_partition


def _muon_offsets(optimizer: Any, group: int) -> dict[nn.Parameter, int]:
    """Muon's momentum holds all parameters of which this rank has a piece, whole, one after the other."""
    parameters = getattr(optimizer, "params_in_partition", {})[group] if hasattr(optimizer, "bit16_groups") else []
    if not parameters or not uses_muon(parameters[0]):
        return {}
    ends = itertools.accumulate((parameter.numel() for parameter in parameters), initial=0)
    return dict(zip(parameters, ends, strict=False))
