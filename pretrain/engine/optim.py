"""Which parameter gets which update, in torch's own terms. DeepSpeed's Muon is named here and built by the engine."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.attention.weights import AdaptiveSpan, Entmax
from model.masks.learned_dropout import LearnedDropout, MaskSource
from pretrain.config.sections import OptimizerConfig
from pretrain.engine.adamw8bit import AdamW8bit

ADAM_STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""What a parameter under AdamW is made of: the fp32 master weight and the two moments."""
MUON_STATES = ("fp32", "momentum_buffer")
"""What a parameter under Muon is made of."""
CHUNK = 2**24
"""Elements whose update is recomputed at once: 64 MiB for each temporary tensor."""


def peak_rates(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """Peak learning rate under AdamW of each parameter, by its name."""
    own = dict.fromkeys(_of(model, LearnedDropout | MaskSource), min(config.lr, config.mask_lr or config.lr))
    if config.kind != "muon":
        own |= dict.fromkeys(_of(model, Entmax | AdaptiveSpan), config.attention_lr or 10 * config.lr)
    return {name: own.get(id(parameter), config.lr) for name, parameter in model.named_parameters()}


def _of(model: nn.Module, kind: Any) -> Iterator[int]:
    """The parameters of all modules of a kind."""
    return (id(p) for module in model.modules() if isinstance(module, kind) for p in module.parameters())


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Tensors of two and more dimensions, with weight decay, and the others, without; by peak learning rate."""
    peaks = peak_rates(model, config)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for name, p in trained if peaks[name] == peak and (p.ndim >= 2) == decayed],
            "weight_decay": config.weight_decay if decayed else 0.0,
            **({} if peak == config.lr else {"peak": peak}),
        }
        for peak in dict.fromkeys(peaks.values())
        for decayed in (True, False)
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """torch's AdamW, on CUDA in one fused kernel; or ours with moments in 8 bits."""
    groups = parameter_groups(model, config)
    if config.kind == "adamw8bit":
        return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    fused = True if device.type == "cuda" else None
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def muon_settings(config: OptimizerConfig) -> dict[str, Any]:
    """DeepSpeed's block for Muon on the hidden matrices, with torch's AdamW for all else (no compiler needed)."""
    return {
        "type": "Muon",
        "params": {
            "muon_lr": config.muon_lr,
            "momentum": config.muon_momentum,
            "adam_lr": config.lr,
            "betas": config.betas,
            "eps": config.eps,
            "torch_adam": True,
        },
    }


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float, config: OptimizerConfig) -> None:
    """`lr` for most groups; for those with a peak of their own, Muon's and the masks', the same share of it."""
    for group in groups:
        peak = config.muon_lr if group.get("use_muon") else group.get("peak", config.lr)
        group["lr"] = lr * (peak / config.lr)


def adamw_update_norms(
    states: Sequence[Mapping[str, Tensor]],
    rates: Sequence[float],
    decays: Sequence[float],
    steps: int,
    config: OptimizerConfig,
) -> list[Tensor]:
    """Norms (0-d) of the last update that AdamW made to each of some tensors.

    The update is found from the parameter θ and the moments m, v after step t ("Decoupled Weight Decay
    Regularization", arXiv:1711.05101, algorithm 2):

        a = lr · m / (1 - β₁ᵗ) / (sqrt(v / (1 - β₂ᵗ)) + eps)
        Δθ = -(a + lr · λ · θ) / (1 - lr · λ)

    since θ = (1 - lr · λ) θ_before - a, with weight decay λ.

    Args:
        states: of each, by ADAM_STATES, [n].
        rates: lr of each at that step.
        decays: λ of each.
        steps: t.
    """
    beta_1, beta_2 = config.betas
    thetas, m, v = ([of_one[state] for of_one in states] for state in ADAM_STATES)
    shares = [lr * decay for lr, decay in zip(rates, decays, strict=True)]
    roots = torch._foreach_sqrt(v)
    torch._foreach_div_(roots, (1 - beta_2**steps) ** 0.5)
    torch._foreach_add_(roots, config.eps)
    updates = torch._foreach_mul(thetas, shares)
    torch._foreach_addcdiv_(updates, m, roots, [lr / (1 - beta_1**steps) for lr in rates])
    return list(torch._foreach_div(torch._foreach_norm(updates), [1 - share for share in shares]))
