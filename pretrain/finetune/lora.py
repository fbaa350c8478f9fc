"""Low-rank adapters beside linear maps: y = W x + (alpha / r) B A x, of which A and B are trained.

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al. 2021, arXiv:2106.09685, section 4).
"""

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.errors import ConfigError
from model.architectures.encoder_only.labels import HEAD
from model.architectures.token_model import TokenModel
from model.batch import Batch
from model.layers.dropout import dropout, noise_site
from model.layers.noise import sample_keys
from model.masks.learned_dropout import LearnedDropout, MaskSource
from pretrain.config.sections import FinetuneConfig

A, B = "lora_a", "lora_b"


class Noise:
    """What keys the noise of a micro-batch, for all adapters of a model."""

    keys: Tensor | None = None
    """[B] int64; None in evaluation."""

    def read(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before a forward pass of the model."""
        [batch] = inputs
        trains = model.training and isinstance(batch, Batch)
        self.keys = sample_keys(batch.seed, batch.step, batch.samples) if trains else None


class AdaptedLinear(nn.Linear):
    """A linear map whose weight stays, with an adapter. Its parameters keep their names."""

    def __init__(self, base: nn.Linear, config: FinetuneConfig, name: str, noise: Noise) -> None:
        """`name`: of its place in the model; keys the noise."""
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(config.rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self._name, self._site = name, noise_site(f"lora/{name}")
        self._rate, self._scale, self._noise = config.dropout, config.scale, noise

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, inputs] -> [B, T, outputs]; without dropout of any shape.

        Raises:
            ConfigError: what is to be dropped out does not come by sample.
        """
        keys = self._noise.keys if self._rate and self.training else None
        if keys is not None and (x.ndim != 3 or len(x) != len(keys)):
            raise ConfigError(f"finetune.dropout: {self._name} does not read samples by row; set finetune.dropout=0")
        low = functional.linear(dropout(x, keys, self._site, self._rate), self.lora_a)
        return super().forward(x) + functional.linear(low, self.lora_b) * self._scale


def adapt(model: TokenModel, config: FinetuneConfig, seed: int) -> None:
    """Freeze a model, but for a head of labels, and put adapters beside those of its linear maps that
    `config.targets` means.

    The adapters start alike on every rank.

    Raises:
        ConfigError: there is none of a name.
    """
    maps = dict(linear_maps(model))
    check_targets(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEAD))
    torch.manual_seed(seed)
    noise = Noise()
    for name, (base, of_mask) in maps.items():
        if is_adapted(name, of_mask, config):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, AdaptedLinear(base, config, name, noise))
    model.register_forward_pre_hook(noise.read)


def check_targets(model: TokenModel, config: FinetuneConfig) -> None:
    """Raises ConfigError if there is no linear map of the name of a target."""
    maps = dict(linear_maps(model))
    for target in config.targets or ():
        if not any(_named(name, target, of_mask) for name, (_, of_mask) in maps.items()):
            known = sorted({name.rpartition(".")[2] for name in maps})
            raise ConfigError(
                f"finetune.targets: no linear map of {model.config.architecture} is called {target}; there are "
                f"{', '.join(known) or 'none'}, and patterns of whole names, such as {next(iter(maps), '*.qkv')}"
            )


def merged(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights [outputs, inputs] with their adapters added: W + scale B A; others as they are.

    Args:
        adapters: A [r, inputs] and B [outputs, r], by the names that `AdaptedLinear` gives them; and a head, which is
            taken as it is.
        scale: alpha / r.
    """
    found = dict(base) | {name: values for name, values in adapters.items() if name.startswith(HEAD)}
    for name in (name.removesuffix(f".{A}") for name in adapters if name.endswith(f".{A}")):
        found[f"{name}.weight"] = base[f"{name}.weight"] + scale * (adapters[f"{name}.{B}"] @ adapters[f"{name}.{A}"])
    return found


def is_adapted(name: str, of_mask: bool, config: FinetuneConfig) -> bool:
    """Whether a linear map gets an adapter: one that is named, or any but a mask's where none is."""
    if config.targets is None:
        return not of_mask
    return any(_named(name, target, of_mask) for target in config.targets)


def linear_maps(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Linear, bool]]]:
    """Of a model, by name; and whether it is a mask's."""
    masks = [name for name, module in model.named_modules() if isinstance(module, LearnedDropout | MaskSource)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, (module, any(name.startswith(f"{mask}.") for mask in masks))


def _named(name: str, target: str, of_mask: bool) -> bool:
    """Whether a target means a map: by the last part of its name, unless it is a mask's, or by a pattern of all."""
    if "." in target or "*" in target:
        return fnmatchcase(name, target)
    return name.rpartition(".")[2] == target and not of_mask
