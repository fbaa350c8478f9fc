"""DeepSpeed ZeRO: the only room for deepspeed and its private attributes, of the pinned version 0.19.8."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.interface import Batch, ModelOutput
from model.language_model import LanguageModel
from pretrain.config import Config
from pretrain.distributed import Ranks
from pretrain.profiling import Stopwatch
from pretrain.sections import EngineConfig

ADAM_STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""What a parameter under AdamW is made of: the fp32 master weight and the two moments."""
CHUNK = 2**24
"""Elements whose update is recomputed at once: 64 MiB for each temporary tensor."""


@dataclass(frozen=True)
class Fragment:
    """A piece of a parameter that this rank holds: `numel` elements from `start` of the flattened parameter."""

    name: str
    start: int
    numel: int
    states: dict[str, Tensor]
    """Views [numel] by the parameter's names in `Engine.states`; writing to them, and `adopt_fragments`, changes the
    engine."""


def bootstrap() -> None:
    """Disarm DeepSpeed before its first use: quiet, and no side effects outside the run."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed.ops

    # Else every rank compiles this op and leaves a 66 MiB file in /dev/shm; training never uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """A model under ZeRO with AdamW: one optimizer step at a time, and its state as fragments."""

    def __init__(self, model: LanguageModel, config: Config, ranks: Ranks) -> None:
        """Partition the model over the ranks.

        Raises:
            ConfigError: the ranks cannot share the batch.
        """
        bootstrap()
        import deepspeed

        micro_batch, accumulation = config.micro_batches(ranks.world_size)
        self.stage = config.engine.zero_stage
        self.shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        self.states: dict[str, tuple[str, ...]] = dict.fromkeys(self.shapes, ADAM_STATES)
        """What each parameter is made of, alike on every rank."""
        self._ranks = ranks
        self._adamw = config.optimizer
        self._applied = False
        self.guard: Callable[[list[dict[str, Tensor]]], Tensor] | None = None
        """Given the metrics of a step's micro-batches it returns a factor [] of the last one's loss, before that one's
        backward pass: NaN on any rank makes all of them skip the step."""
        self.stopwatch = Stopwatch(ranks.device)
        # The table of tokens is first in the forward pass, so its gradient is the last; hooks run in order of
        # registration, and DeepSpeed's, which may wait for other ranks, come later.
        model.token_embed.weight.register_post_accumulate_grad_hook(lambda _: self.stopwatch.lap("backward"))
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, config.optimizer.weight_decay),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True if ranks.device.type == "cuda" else None,
        )
        self._deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config.engine, config.optimizer.clip, micro_batch, accumulation),
            dist_init_required=False,
        )
        self._names: dict[Any, str] = self._deepspeed.param_names
        self._create_moments()

    @property
    def module(self) -> LanguageModel:
        """The model; call it for evaluation."""
        model: LanguageModel = self._deepspeed.module
        return model

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> tuple[list[dict[str, Tensor]], Tensor, bool]:
        """One optimizer step over all micro-batches of this rank.

        Laps of the stopwatch: `forward`, `backward` up to the last gradient, `reduce` until the backward pass returns,
        `optimizer`. At stages 0 and 1 the first two wait for no other rank; at stage 2 only when gradients fill a
        bucket of DeepSpeed's; at stage 3 in each layer. Stage 0 waits for the device once a step, in its check of the
        norm; at the other stages only DeepSpeed does.

        Returns:
            metrics of each micro-batch (0-d tensors), the global gradient norm before clipping (0-d), and whether
            the update was applied: DeepSpeed skips it on all ranks when a gradient is not finite.
        """
        self._deepspeed.train()
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        metrics: list[dict[str, Tensor]] = []
        for batch in micro_batches:
            output: ModelOutput = self._deepspeed(batch)
            self.stopwatch.lap("forward")
            loss = output.loss
            if self.guard and batch is micro_batches[-1]:
                loss = loss * self.guard([*metrics, output.metrics])
            self._deepspeed.backward(loss)
            self.stopwatch.lap("reduce")
            if batch is micro_batches[-1] and self.stage == 0:
                norm = self._gradient_norm()
                if not torch.isfinite(norm):  # the one stage that DeepSpeed does not guard in fp32
                    self._deepspeed.optimizer.zero_grad()
                    self._deepspeed.micro_steps += 1  # what step() would have counted
                    self.stopwatch.lap("optimizer")
                    self._applied = False
                    return [*metrics, output.metrics], norm, False
            self._deepspeed.step()
            self.stopwatch.lap("optimizer")
            metrics.append(output.metrics)
        if self.stage:
            norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), dtype=torch.float32)
        self._applied = self._deepspeed.was_step_applied()
        return metrics, norm, self._applied

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
        guard, self.guard = self.guard, None
        try:
            metrics, _, applied = self.train_step(micro_batches, lr)
        finally:
            self.guard = guard
            for hook in hooks:
                hook.remove()
        assert not applied
        return [of_one["loss"] for of_one in metrics], finite

    def squared_norms(self) -> tuple[float, float]:
        """Squares summed over the parameters, and over the last step's update of them; waits for the device.

        Of what this rank owns: the sums over the ranks are ‖θ‖² and ‖Δθ‖². The update is found from the parameter θ
        and the moments m, v after step t ("Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2):

            a = lr · m / (1 - β₁ᵗ) / (sqrt(v / (1 - β₂ᵗ)) + eps)
            Δθ = -(a + lr · λ · θ) / (1 - lr · λ)

        since θ = (1 - lr · λ) θ_before - a, with weight decay λ. It is 0 for a step that applied no update.
        """
        lr, (beta_1, beta_2) = self._deepspeed.optimizer.param_groups[0]["lr"], self._adamw.betas
        steps = self.optimizer_steps
        norms, update_norms = [], []
        for fragment in self.owned_fragments():
            decay = lr * self._adamw.weight_decay if len(self.shapes[fragment.name]) >= 2 else 0.0
            for theta, m, v in zip(*(fragment.states[state].split(CHUNK) for state in ADAM_STATES), strict=True):
                norms.append(torch.linalg.vector_norm(theta))
                if self._applied:
                    root = v.sqrt().div_((1 - beta_2**steps) ** 0.5).add_(self._adamw.eps)
                    update = torch.addcdiv(theta * decay, m, root, value=lr / (1 - beta_1**steps))
                    update_norms.append(torch.linalg.vector_norm(update) / (1 - decay))
        return _sum_of_squares(norms), _sum_of_squares(update_norms)

    @property
    def optimizer_steps(self) -> int:
        """Updates that AdamW has applied; corrects the bias of its moments."""
        return int(next(iter(self._adam.state.values()))["step"])

    def fragments(self) -> list[Fragment]:
        """All that this rank holds, in a fixed order. At stage 0 every rank holds everything."""
        found = []
        for name, start, numel, flat, offset in self._layout():
            moments = self._adam.state[flat]
            tensors = {"fp32": flat, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
            views = {key: tensor.detach().reshape(-1).narrow(0, offset, numel) for key, tensor in tensors.items()}
            if numel:
                found.append(Fragment(name, start, numel, views))
        return found

    def owned_fragments(self) -> list[Fragment]:
        """What this rank writes to a checkpoint: over the ranks, each element exactly once."""
        if self.stage:
            return self.fragments()
        owned = []
        for fragment in self.fragments():
            share = math.ceil(fragment.numel / self._ranks.world_size)
            start = min(fragment.numel, share * self._ranks.rank)
            numel = min(fragment.numel - start, share)
            if numel:
                views = {key: view.narrow(0, start, numel) for key, view in fragment.states.items()}
                owned.append(Fragment(fragment.name, start, numel, views))
        return owned

    def adopt_fragments(self, optimizer_steps: int) -> None:
        """Make the model compute with what was written into the fragments' views."""
        optimizer = self._deepspeed.optimizer
        for state in self._adam.state.values():
            # One tensor each, since a shared one would count too fast; in place, so that it stays on its device.
            state["step"].fill_(float(optimizer_steps))
        with torch.no_grad():
            if self.stage == 3:
                optimizer.checkpoint_event_prologue()
                for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                    low = optimizer.fp16_partitioned_groups_flat[index]
                    low.data.copy_(flat.data)
                    parts = optimizer.fp16_partitioned_groups[index]
                    for part, value in zip(parts, optimizer.unflatten(low, parts), strict=True):
                        part.data = value.data
                optimizer.checkpoint_event_epilogue()
            elif self.stage:
                optimizer.update_lp_params()

    def export_deepspeed(self, folder: Path) -> None:
        """Save in DeepSpeed's own layout (pickles), below a folder named after the optimizer step; a collective."""
        self._deepspeed.save_checkpoint(str(folder), tag=f"step-{self.optimizer_steps:09d}", client_state={})

    @property
    def _adam(self) -> torch.optim.Optimizer:
        optimizer = self._deepspeed.optimizer
        return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer

    def _layout(self) -> list[tuple[str, int, int, Tensor, int]]:
        """(parameter, start, numel, fp32 tensor that holds it, offset there) of every piece on this rank."""
        optimizer, pieces = self._deepspeed.optimizer, []
        if self.stage == 3:
            rank = self._ranks.rank
            for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
                offset = 0
                for parameter in parameters:
                    partition = parameter.ds_tensor.ds_numel
                    numel = max(0, min(partition, parameter.ds_numel - rank * partition))
                    pieces.append((self._names[parameter], rank * partition, numel, flat, offset))
                    offset += partition
        elif self.stage:
            if hasattr(optimizer, "bit16_groups"):
                groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
            else:  # BF16_Optimizer: stage 1 with bf16 weights and fp32 gradients
                groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
            for parameters, flat in zip(groups, flats, strict=True):
                for parameter in parameters:
                    if parameter._hp_mapping is not None:  # else another rank holds all of it
                        low = parameter._hp_mapping.lp_fragment_address
                        high = parameter._hp_mapping.get_hp_fragment_address()
                        pieces.append((self._names[parameter], low.start, low.numel, flat, high.start))
        else:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    pieces.append((self._names[parameter], 0, parameter.numel(), parameter, 0))
        return pieces

    def _create_moments(self) -> None:
        """Adam's state before its first step, so that a checkpoint can be written and read at any time."""
        for flat in {id(piece[3]): piece[3] for piece in self._layout()}.values():
            self._adam.state[flat] = {
                "step": torch.tensor(0.0, device=flat.device),  # fused AdamW wants it there
                "exp_avg": torch.zeros_like(flat, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(flat, dtype=torch.float32),
            }

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).float()


def _sum_of_squares(norms: list[Tensor]) -> float:
    return float(torch.stack(norms).double().square().sum()) if norms else 0.0


def deepspeed_config(engine: EngineConfig, clip: float, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, generated; never written by hand."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if engine.precision == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
