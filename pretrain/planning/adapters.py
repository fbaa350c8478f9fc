"""What is trained of a model where adapters are (LoRA), and what it keeps: counted on the model itself, on torch's meta
device."""

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from data_pipeline.errors import ConfigError
from model.costs.totals import Activations
from pretrain.config.schema import Config

if TYPE_CHECKING:
    from model.architectures.token_model import TokenModel


class Adapters(NamedTuple):
    """Of a model."""

    parameters: int
    """Of all adapters, (inputs + outputs) r for each; and of a head of labels, which is trained beside them."""


def adapters_of(config: Config) -> Adapters | None:
    """None where all is trained.

    Raises:
        ConfigError: torch is not installed here; the vocabulary is not known; no map is called as a target.
    """
    if config.finetune.kind != "lora":
        return None
    return _count(_Key(config))


class _Key:
    """A configuration as a key: equal where its model and its adapters are."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._text = config.model.model_dump_json() + config.finetune.model_dump_json()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


def kept_beside(config: Config, kept: Activations) -> Activations:
    """What is kept for the backward pass of adapters, of what would be `kept` if all were trained.

    A map without an adapter keeps nothing of what it reads, nor does anything keep what comes before the first adapter;
    an adapter keeps what its second half reads. The shares are those that torch saves of one sample.

    Raises:
        ConfigError: as `adapters_of`.
    """
    shares = _shares(_Key(config), config.engine.precision == "fp32")
    return kept._replace(
        layers=round(kept.layers * shares.layers),
        largest_layer=round(kept.largest_layer * shares.largest_layer),
        outside=round(kept.outside * shares.outside),
    )


class _Shares(NamedTuple):
    """Of what is kept where all is trained."""

    layers: float
    largest_layer: float
    outside: float


@lru_cache(maxsize=64)
def _shares(key: _Key, exact: bool) -> _Shares:
    adapted = _model(key)
    import torch

    from model.architectures.measured import fused, saved
    from pretrain.finetune.lora import adapt

    with torch.random.fork_rng(devices=[]):
        adapt(adapted, key.config.finetune, seed=0)
    both = [model.to(torch.float32 if exact else torch.bfloat16).train() for model in (adapted, _model(key))]
    try:
        with fused(), torch.random.fork_rng(devices=[]):
            ours, whole = (saved(model, *model.config.lengths) for model in both)
    except (NotImplementedError, RuntimeError):  # values are asked for, which the meta device has none of
        return _Shares(1.0, 1.0, 1.0)  # as if all were trained: the most that is kept
    pairs = (
        (sum(ours.of_layers), sum(whole.of_layers)),
        (max(ours.of_layers, default=0), max(whole.of_layers, default=0)),
        (ours.outside, whole.outside),
    )
    return _Shares(*(of_ours / of_whole if of_whole else 1.0 for of_ours, of_whole in pairs))


@lru_cache(maxsize=64)
def _count(key: _Key) -> Adapters:
    model = _model(key)
    from model.architectures.encoder_only.labels import HEAD
    from pretrain.finetune.lora import check_targets, is_adapted, linear_maps

    check_targets(model, key.config.finetune)
    maps = linear_maps(model)
    adapted = [base for name, (base, of_mask) in maps if is_adapted(name, of_mask, key.config.finetune)]
    sizes = sum(base.in_features + base.out_features for base in adapted)
    head = sum(values.numel() for name, values in model.named_parameters() if name.startswith(HEAD))
    return Adapters(sizes * key.config.finetune.rank + head)


def _model(key: _Key) -> "TokenModel":
    """On the meta device. Raises ConfigError where torch is not."""
    try:
        import torch

        from model.architectures import registry
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError("finetune.kind=lora is counted with torch, which is not here; ask where it is") from None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return registry.build(key.config.model)
