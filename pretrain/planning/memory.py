"""What a run needs of each GPU's memory, by part, at the fullest moment of a step (docs/plan.md). Free of torch.

What DeepSpeed 0.19.8 holds was read off its source and measured on a CPU (tests/distributed/test_memory.py).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.costs.totals import Activations, activations, num_parameters
from pretrain.config.schema import Config
from pretrain.planning.adapters import adapters_of, kept_beside

_MOMENTS = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "muon": 4.0}
"""Bytes a parameter; Muon's of the matrices, which are nearly all, in fp32."""
_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once, its `reduce_bucket_size`; on CUDA the buffer is as large for any model."""
_LIVE = 1_000_000_000
"""Elements of gathered parameters that ZeRO 3 holds at most, its `stage3_max_live_parameters`."""
_ADAMW8_CHUNKS = 6 * 2**24
"""Temporary tensors of AdamW in 8 bits (pretrain/engine/adamw8bit.py)."""

Device = Literal["cuda", "cpu"]
Moment = Literal["backward pass", "reduction", "optimizer step"]


class StateBytes(NamedTuple):
    """Bytes on each GPU."""

    weights: float
    gradients: float
    optimizer: float


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the `moment` that needs most."""

    moment: Moment
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """With the layer that activation checkpointing computes again."""
    loss: float
    """The loss's gradients, and the logits of a chunk."""
    buffers: float
    """For communication, gathered parameters (ZeRO 3), and temporary tensors."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.buffers


def state(config: Config, parameters: int, world_size: int) -> StateBytes:
    """Weights, gradients and optimizer state, in full while the optimizer's step begins.

    For each parameter (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054, sections 3 and 5; over N ranks):

        weights      2 in bf16 and fp16, 4 in fp32                           divided by N at stage 3
        gradients    4, the sum over micro-batches; in fp16 2                by N at stages 2 and 3
                     and at stage 1 in bf16 2 more, a micro-batch's own
        optimizer    4 master weights (none apart at stage 0) + moments      by N at stages 1 to 3
                         (AdamW 8, in 8 bits 2, Muon 4)

    With `engine.offload=cpu` gradients and optimizer state are the host's. Of adapters (LoRA) there are gradients and
    optimizer state, and of the `parameters` of the model, which stay, weights alone.
    """
    engine, adapters = config.engine, adapters_of(config)
    size = element_size(config)
    trained = adapters.parameters if adapters else parameters
    parameters += adapters.parameters if adapters else 0
    weights = parameters * size / (world_size if engine.zero_stage == 3 else 1)
    if engine.hpz_partition_size > 1:
        weights += parameters * size / engine.hpz_partition_size
    if engine.offload == "cpu":
        return StateBytes(weights, 0.0, 0.0)
    gradient = 2 if engine.precision == "fp16" else 4
    gradients = trained * gradient / (world_size if engine.zero_stage >= 2 else 1)
    if engine.zero_stage == 1 and engine.precision == "bf16":
        gradients += 2 * trained
    optimizer = trained * _MOMENTS[config.optimizer.kind]
    if engine.zero_stage:
        optimizer = (optimizer + 4 * trained) / world_size
    return StateBytes(weights, gradients, optimizer)


def memory(config: Config, world_size: int, device: Device = "cuda") -> Memory:
    """Of a step with the configuration's micro-batches: the largest of its three moments.

        backward pass    its start: all activations, the loss's gradients, and gradients of micro-batches before
        reduction        all gradients, and what DeepSpeed sends them in
        optimizer step   all state, and temporary tensors: none with AdamW on CUDA, which is one kernel

    With adapters activations are those that these need (`kept_beside`).

    Args:
        device: a CPU's buffers are as large as what was written to them, and its AdamW needs 8 bytes a parameter.

    Raises:
        ConfigError: `vocab_size` is not known, or the ranks cannot share the batch.
    """
    parameters, adapters = num_parameters(config.model), adapters_of(config)
    trained = adapters.parameters if adapters else parameters
    micro_batch, accumulation = config.micro_batches(world_size)
    kept = _activations(config, micro_batch, device)
    if adapters:
        kept = kept_beside(config, kept)
    engine, size = config.engine, element_size(config)
    weights, gradients, optimizer = state(config, parameters, world_size)
    always, bucket, reduction = _buffers(config, trained, device)
    before = gradients
    if accumulation == 1 and engine.zero_stage < 3:  # at stage 1 in bf16 the sum has its place from the start
        before = 4.0 * trained if (engine.zero_stage, engine.precision) == (1, "bf16") else 0.0
        before = min(before, gradients)
    gathered = 0.0
    if engine.zero_stage == 3 and world_size > 1:
        table = (config.model.vocab_size or 0) * config.model.width
        gathered = size * (min(parameters, _LIVE) + 2 * table)
    # The logits are gone when the bucket is made and a layer computed again.
    again, logits = (kept.largest_layer if engine.activation_checkpointing else 0), kept.logits
    if again + bucket > logits:
        logits = 0
    else:
        again, bucket = 0, 0.0
    held = kept.kept(engine.activation_checkpointing) + again
    loss = kept.loss + logits
    backward = Memory("backward pass", weights, before, optimizer, held, loss, always + bucket + gathered)
    sending = max(always, reduction) + gathered
    reducing = Memory("reduction", weights, gradients, optimizer, kept.largest_layer, 0.0, sending)
    steps = _step_bytes(config, trained, world_size, device)
    stepping = Memory("optimizer step", weights, gradients, optimizer, 0.0, 0.0, always + steps)
    return max(backward, reducing, stepping, key=lambda moment: moment.total)


def state_bytes(config: Config, parameters: int, world_size: int) -> float:
    """The sum of `state`: what each GPU holds at least."""
    return sum(state(config, parameters, world_size))


def element_size(config: Config) -> int:
    """Bytes of a weight in the model."""
    return 4 if config.engine.precision == "fp32" else 2


def _activations(config: Config, micro_batch: int, device: Device) -> Activations:
    model, objective = config.model, config.objective
    masked = model.document_mask or objective.restricts_attention(config.data.packing == "best_fit")
    in_blocks = device == "cuda" and model.sees_in_blocks
    return activations(
        model,
        micro_batch,
        element_size(config),
        sharing=config.engine.sequence_parallel,
        pairs=objective.of_pairs,
        dense_mask=masked and not in_blocks,
        in_blocks=in_blocks,
        table_stays=config.finetune.kind == "lora" and model.label_head is None,
    )


def _buffers(config: Config, parameters: int, device: Device) -> tuple[float, float, float]:
    """What is there all the time; what is there from the start of a backward pass; and what reducing takes, with it."""
    engine, size = config.engine, element_size(config)
    filled = min(parameters, _BUCKET)
    allocated = _BUCKET if device == "cuda" else filled
    if engine.zero_stage == 3:
        return size * allocated, 0.0, size * allocated
    if engine.zero_stage == 2 or (engine.zero_stage == 1 and engine.precision != "bf16"):
        copy = 4 * filled if engine.zero_stage == 2 else 0
        return 0.0, size * allocated if device == "cuda" else 0.0, size * allocated + copy
    return 0.0, 0.0, (4 + (2 if engine.precision == "bf16" else 0)) * filled


def _step_bytes(config: Config, parameters: int, world_size: int, device: Device) -> float:
    """Temporary tensors of the optimizer's step."""
    engine = config.engine
    share = parameters / (world_size if engine.zero_stage else 1)
    total = 0.0
    if engine.zero_stage == 3 or (engine.zero_stage and engine.precision != "bf16"):
        total += 4 * share  # the gradients once more, in one tensor
    if config.optimizer.kind == "adamw8bit":
        return total + _ADAMW8_CHUNKS
    if device == "cpu" and engine.zero_stage:
        total += 8 * share
    return total
