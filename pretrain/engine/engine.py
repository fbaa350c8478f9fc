"""DeepSpeed ZeRO: the only room for deepspeed, of the pinned version 0.19.8."""

import gc
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.architectures.token_model import TokenModel
from model.batch import Batch, Counts, ModelOutput
from model.masks.block_gates import block_gates
from pretrain.config.schema import Config
from pretrain.engine import fragments
from pretrain.engine.adamw8bit import SIGNED
from pretrain.engine.buffers import Buffers, Centroids, Multipliers
from pretrain.engine.caches import own_caches
from pretrain.engine.distributed import Ranks
from pretrain.engine.fragments import Fragment, Kept, in_chunks
from pretrain.engine.hardware import check_hardware, keep_freed_memory
from pretrain.engine.layer_transforms import checkpoint_activations, compile_layers
from pretrain.engine.optim import (
    ADAM_STATES,
    CHUNK,
    MUON_STATES,
    adamw,
    adamw_update_norms,
    muon_settings,
    parameter_groups,
    peak_rates,
    set_learning_rate,
)
from pretrain.engine.profiling import Stopwatch
from pretrain.engine.snapshot import Snapshot

Guard = Callable[[list[dict[str, Tensor]]], Tensor]
"""Given the metrics of a step's micro-batches it returns a factor [] of the last one's loss, before that one's backward
pass: NaN on any rank makes all of them skip the step."""


def bootstrap() -> None:
    """Disarm DeepSpeed before its first use: quiet, and no side effects outside the run.

    Raises:
        ConfigError: a folder for compiled code belongs to somebody else.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    own_caches()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with _left_out("mlflow"):  # its autotuner takes it where it finds it: half of DeepSpeed's import
        import deepspeed.ops
    from torch import _dynamo  # noqa: F401  # torch's optimizers need it

    gc.freeze()  # what was imported stays: no collection looks through it
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # not before the import, which sets its own
    # Else every rank compiles this op and leaves a 66 MiB file in /dev/shm; training never uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def _left_out(name: str) -> Iterator[None]:
    """A module that is not to be found meanwhile, unless it was imported before."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules[name]


def _import_muon_uncompiled() -> None:
    """Whatever the optimizer, DeepSpeed asks whether it is its Muon; to import that sets torch's compiler up."""
    from deepspeed.runtime import compiler

    compiled, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiled


class Engine:
    """A model under ZeRO with its optimizer: one optimizer step at a time, and its state as fragments."""

    def __init__(self, model: TokenModel, config: Config, ranks: Ranks) -> None:
        """Partition the model over the ranks; a collective.

        Raises:
            ConfigError: the ranks cannot share the batch, or the hardware cannot do what the configuration asks for.
        """
        check_hardware(config, ranks.world_size, ranks.device)
        keep_freed_memory(ranks.device)
        bootstrap()
        self.stage = config.engine.zero_stage
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.shapes = {name: list(parameter.shape) for name, parameter in trained.items()}
        self._ranks = ranks
        self._uneven = config.labels_vary
        self._optimizer = config.optimizer
        self._peaks = peak_rates(model, config.optimizer)
        self._offloads = config.engine.offload != "none"
        self._lr, self._applied = 0.0, False
        self.snapshot = Snapshot(ranks.device)
        """The copy of a save. It is made before parameters or optimizer states change: before an update, and when
        `fragments` gives them out. Nothing else changes them; `tests/distributed/test_saver.py` holds that."""
        self.stopwatch = Stopwatch(ranks.device)
        # The table of tokens is first in the forward pass, so its gradient is the last; hooks run in order of
        # registration, and DeepSpeed's, which may wait for other ranks, come later.
        first = next(iter(trained.values()))
        first.register_post_accumulate_grad_hook(lambda _: self.stopwatch.lap("backward"))
        self._deepspeed = _initialized(model, config, ranks)
        self._names: dict[Any, str] = {p: n for p, n in self._deepspeed.param_names.items() if p.requires_grad}
        self.buffers = Buffers(model, ranks)
        self._multipliers = Multipliers(model, ranks)
        self._centroids = Centroids(model, ranks)
        self.gated_sites = [gates.name for gates in block_gates(model)]
        """Of feed forwards in gated blocks, for example `enc_ff/00`."""
        momentum_type = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        fragments.create_states(self._deepspeed.optimizer, self.stage, ranks.rank, momentum_type)
        self.states: dict[str, tuple[str, ...]] = {
            name: MUON_STATES if fragments.uses_muon(parameter) else ADAM_STATES
            for parameter, name in self._names.items()
        }
        """What each parameter is made of, alike on every rank."""
        self.types: dict[str, str] = {}
        """Types of the states that are not always fp32; another one in a checkpoint is converted when it is loaded.
        Moments in 8 bits are of another type where DeepSpeed's partitions, and so the blocks, may be others."""
        if config.optimizer.kind == "muon":
            self.types = {fragments.MOMENTUM: str(momentum_type).removeprefix("torch.")}
        elif config.optimizer.kind == "adamw8bit":
            layout = f"zero_stage={self.stage}, {config.engine.precision}, world size {ranks.world_size}"
            self.types = dict.fromkeys(SIGNED, f"8-bit blocks ({layout})")
        self._kept: Kept = {}

    @property
    def module(self) -> TokenModel:
        """The model; call it for evaluation."""
        model: TokenModel = self._deepspeed.module
        return model

    def train_step(
        self, micro_batches: Sequence[Batch], lr: float, guard: Guard | None = None
    ) -> tuple[list[dict[str, Tensor]], Tensor, bool]:
        """One optimizer step over all micro-batches of this rank, in which every label of all ranks weighs alike.

        Laps of the stopwatch: `forward`, `backward` up to the last gradient, `reduce` until the backward pass returns,
        `optimizer`. At stages 0 and 1 the first two wait for no other rank; at stage 2 only when gradients fill a
        bucket of DeepSpeed's; at stage 3 in each layer. Stage 0 waits for the device once a step, in its check of the
        norm; at the other stages only DeepSpeed does.

        Returns:
            metrics of each micro-batch, whose means over all ranks are the step's; the global gradient norm before
            clipping (0-d); and whether the update was applied: it is skipped on all ranks when a gradient is not
            finite.
        """
        self._deepspeed.train()
        self.buffers.before_step()
        self._lr = lr
        set_learning_rate(self._deepspeed.optimizer.param_groups, lr, self._optimizer)
        if self._uneven:
            micro_batches = self._weighed(micro_batches)
            self.stopwatch.start()  # no part of the forward pass: ranks wait for each other here
        metrics: list[dict[str, Tensor]] = []
        for batch in micro_batches:
            output: ModelOutput = self._deepspeed(batch)
            self.stopwatch.lap("forward")
            metrics.append(output.metrics)
            is_last = len(metrics) == len(micro_batches)
            self._deepspeed.backward(output.loss * guard(metrics) if guard and is_last else output.loss)
            self.stopwatch.lap("reduce")
            if not is_last:
                self._deepspeed.step()  # only counts
                self.stopwatch.lap("optimizer")
        norm = self._update()
        if self._applied:
            self._multipliers.after_step(metrics)
        self._centroids.after_step(self._applied)
        self.buffers.after_step(self._applied)
        return metrics, norm, self._applied

    def _update(self) -> Tensor:
        """Update with the gradients there are, unless one is not finite. Returns their norm before clipping, 0-d."""
        norm = self._gradient_norm() if self.stage == 0 else None
        if norm is not None and not torch.isfinite(norm):  # the one stage that DeepSpeed does not guard in fp32
            self._deepspeed.optimizer.zero_grad()
            self._deepspeed.micro_steps += 1  # what step() would have counted
            self.stopwatch.lap("optimizer")
            self._applied = False
            return norm
        self.snapshot.before_change()
        self.stopwatch.start()  # no part of the update
        self._deepspeed.step()
        self.stopwatch.lap("optimizer")
        if norm is None:
            norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), dtype=torch.float32)
        self._applied = self._deepspeed.was_step_applied()
        if not self._applied and self._offloads and self.stage < 3:
            # DeepSpeed 0.19.8 forgets to: every later step would add to what is not finite, and be skipped, too.
            gradients = self._deepspeed.optimizer.averaged_gradients
            gradients.update(dict.fromkeys(gradients))
        return norm

    def replay(self, micro_batches: Sequence[Batch], lr: float) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Compute a skipped step again, from the same weights, samples and noise; it is skipped again in any case.

        A collective. Good steps pay nothing for knowing where a bad one went wrong.

        Returns:
            this rank's loss of each micro-batch (0-d), and for each parameter whether the micro-batch's own gradient
            was finite (0-d, bool), in the order of `shapes`.
        """
        finite: dict[str, list[Tensor]] = {name: [] for name in self.shapes}

        def watch(name: str) -> Callable[[Tensor], Tensor]:
            def note(gradient: Tensor) -> Tensor:
                finite[name].append(torch.isfinite(gradient).all())
                return gradient * math.nan

            return note

        hooks = [parameter.register_hook(watch(name)) for parameter, name in self._names.items()]
        try:
            metrics, _, applied = self.train_step(micro_batches, lr)
        finally:
            for hook in hooks:
                hook.remove()
        assert not applied
        return [of_one["loss"] for of_one in metrics], finite

    def squared_norms(self) -> tuple[float, float | None]:
        """Squares summed over the parameters, and over the last step's update of them; waits for the device.

        Of what this rank owns: the sums over the ranks are ‖θ‖² and ‖Δθ‖². The update is 0 for a step that applied
        none, and None under Muon and AdamW in 8 bits, whose update cannot be found from what they keep.
        """
        norms, update_norms = list[Tensor](), list[Tensor]()
        knows_update = self._optimizer.kind == "adamw"
        states = self.states if knows_update else dict.fromkeys(self.states, ("fp32",))
        moved = self._applied and knows_update
        steps = self.optimizer_steps if moved else 0  # once: a GPU is waited for
        for parts in in_chunks(self._owned(states, self._inner.state), CHUNK):
            norms += torch._foreach_norm([part.states["fp32"] for part in parts])
            if moved:
                decays = [self._optimizer.weight_decay if len(self.shapes[x.name]) >= 2 else 0.0 for x in parts]
                rates = [self._lr * (self._peaks[x.name] / self._optimizer.lr) for x in parts]
                update_norms += adamw_update_norms([x.states for x in parts], rates, decays, steps, self._optimizer)
        return _sum_of_squares(norms), _sum_of_squares(update_norms) if knows_update else None

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer has applied; corrects the bias of AdamW's moments."""
        return int(next(kept["step"] for kept in self._inner.state.values() if "step" in kept))

    def fragments(self) -> list[Fragment]:
        """All that this rank holds, to be written to, in a fixed order. At stage 0 every rank holds everything.

        Under Muon at stages 1 and 2, ranks that share a parameter each hold all of its momentum: that comes last.
        """
        self.snapshot.before_change()
        optimizer = self._deepspeed.optimizer
        self._kept = fragments.kept_states(optimizer)
        pieces = self._pieces(self.states, self._kept)
        return [*pieces, *fragments.whole_momenta(optimizer, self.stage, self._ranks.rank, self._names)]

    def owned_fragments(self) -> list[Fragment]:
        """What this rank writes to a checkpoint: over the ranks, each element exactly once."""
        return self._owned(self.states, fragments.kept_states(self._deepspeed.optimizer))

    def adopt_fragments(self, optimizer_steps: int) -> None:
        """Make the model compute with what was written into the views of `fragments()`; a collective."""
        fragments.adopt(self._deepspeed.optimizer, self.stage, optimizer_steps, self._kept)
        self._kept = {}

    def export_deepspeed(self, folder: Path) -> None:
        """Save in DeepSpeed's own layout (pickles), below a folder named after the optimizer step; a collective."""
        self._deepspeed.save_checkpoint(str(folder), tag=f"step-{self.optimizer_steps:09d}", client_state={})

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return fragments.inner(self._deepspeed.optimizer)

    def _pieces(self, states: Mapping[str, tuple[str, ...]], kept: Kept) -> Iterator[Fragment]:
        optimizer, rank = self._deepspeed.optimizer, self._ranks.rank
        return fragments.fragments(optimizer, self.stage, rank, self._names, states, kept)

    def _owned(self, states: Mapping[str, tuple[str, ...]], kept: Kept) -> list[Fragment]:
        pieces = self._pieces(states, kept)
        if self.stage:
            return list(pieces)
        shares = (fragments.share(f, self._ranks.rank, self._ranks.world_size) for f in pieces)
        return [share for share in shares if share.numel]

    def _weighed(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """The same, with the step's numbers of labels and tokens a micro-batch; a collective, on the device.

        DeepSpeed averages over micro-batches and ranks, so each one's sums are to be divided by the mean number.
        """
        numbers = torch.stack([torch.stack([b.num_labels(), b.num_tokens()]) for b in micro_batches]).sum(0)
        dist.all_reduce(numbers)
        means = numbers.clamp(min=1).double() / (len(micro_batches) * self._ranks.world_size)
        counts = Counts(*means.unbind())
        return [replace(batch, counts=counts) for batch in micro_batches]

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).float()


def _initialized(model: TokenModel, config: Config, ranks: Ranks) -> Any:
    """DeepSpeed's engine, of a model whose layers are compiled and keep what they are told to; a collective."""
    import deepspeed
    from deepspeed.utils import groups

    if config.engine.activation_checkpointing:
        checkpoint_activations(model)
    if config.engine.compile:
        compile_layers(model)
    # DeepSpeed works in a group of its own, which it would give torch's timeout of half an hour.
    groups._WORLD_GROUP = dist.new_group(timeout=timedelta(minutes=config.engine.timeout_minutes))
    if not (muon := config.optimizer.kind == "muon"):
        _import_muon_uncompiled()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, config.optimizer) if muon else None,
        optimizer=None if muon else adamw(model, config.optimizer, ranks.device),
        config=deepspeed_config(config, ranks),
        dist_init_required=False,
    )
    return engine


def _sum_of_squares(norms: list[Tensor]) -> float:
    return float(torch.stack(norms).double().square().sum()) if norms else 0.0


def deepspeed_config(config: Config, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's own configuration, generated; never written by hand."""
    engine = config.engine
    micro_batch, accumulation = config.micro_batches(ranks.world_size)
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if engine.precision == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif engine.precision == "fp16":
        settings |= {"fp16": {"enabled": True}}
    if engine.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": ranks.device.type == "cuda"}
        settings["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own would be compiled at the first start
    if engine.hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = engine.hpz_partition_size
    if config.optimizer.kind == "muon":
        settings["optimizer"] = muon_settings(config.optimizer)
        zero["reduce_scatter"] = False  # at stage 3 Muon wants whole gradients
    return settings
