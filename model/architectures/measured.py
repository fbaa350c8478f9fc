"""What a model costs, measured on torch's meta device, which computes nothing: where its architecture does not say, and
where adapters are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipeline.errors import ConfigError
from model.config.model_config import ModelConfig
from model.costs.parts import Costs, Part, Shape, head
from model.costs.totals import CostsUnknown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model.architectures.token_model import TokenModel


_NAMES = {"position_embed": "position table", "final_norm": "norms"}
"""Parts as those of our architectures are called."""


class _Found(NamedTuple):
    parameters: dict[str, int]
    """By the model's children; the token table is the head's."""
    flops: int
    layers: list[int]
    """Bytes that each layer keeps."""
    outside: int
    """Bytes that are kept beside these."""


def costs(self: ModelConfig, shape: Shape) -> Costs:
    """The method of an architecture that has none of its own.

    Parameters are those of the model, and FLOPs those that torch counts, as it does for ours: of matrix products. Bytes
    are what autograd saves of one sample, times the samples: an estimate, since a GPU's kernels may save otherwise.
    Layers are the members of the backbone's ModuleLists, as for activation checkpointing.

    Raises:
        CostsUnknown: torch is not installed here, or the model cannot run on the meta device.
    """
    found = _measure(_Key(self), shape.inputs, shape.targets, shape.size)
    outside = [Part(name, number) for name, number in found.parameters.items()]
    outside += [Part("backbone", flops=found.flops), Part(saved=shape.rows * found.outside), *head(shape)]
    layers = [(1, [Part(saved=shape.rows * saved)]) for saved in found.layers]
    return Costs(outside, layers, len(layers) * shape.vectors(shape.inputs))


class _Key:
    """A configuration as a key: equal where all its keys are, hashed by what is written of it."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._text = config.model_dump_json()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other._text == self._text and type(other.config) is type(self.config)

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=64)
def _measure(key: _Key, inputs: int, targets: int, size: int) -> _Found:
    called = key.config.architecture.partition("@")[0]
    try:
        import torch

        from model.architectures.registry import build
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise CostsUnknown(
            f"{called} does not say what it costs, so that is measured with torch, which is not here; give it "
            "a method `costs(self, shape) -> Costs` (model.costs.parts), or ask where torch is"
        ) from None
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = build(key.config).to(torch.float32 if size == 4 else torch.bfloat16).train()
            return _run(model, inputs, targets)
    except ConfigError:
        raise
    except Exception as error:
        raise CostsUnknown(
            f"{called} does not say what it costs, and it cannot be measured: on torch's meta device it fails with "
            f"{type(error).__name__}: {error}; give it a method `costs(self, shape) -> Costs` (model.costs.parts)"
        ) from error


def _run(model: "TokenModel", inputs: int, targets: int) -> _Found:
    """One sample, forward, up to the head."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        kept = saved(model, inputs, targets)
    parameters = {
        _NAMES.get(name, name): sum(parameter.numel() for parameter in child.parameters())
        for name, child in model.named_children()
        if name != "token_embed"
    }
    return _Found(parameters, counter.get_total_flops(), kept.of_layers, kept.outside)


def saved(model: "TokenModel", inputs: int, targets: int) -> "Saved":
    """What autograd saves of one sample of so many tokens, forward, up to the head, of a model on the meta device."""
    import torch

    from model.batch import Batch

    two = model.config.traits.two_sequences
    with torch.device("meta"):
        ids = torch.zeros(1, inputs, dtype=torch.int64)
        written = torch.zeros(1, targets, dtype=torch.int64)
        batch = Batch(
            ids,
            written if two else ids,
            samples=torch.zeros(1, dtype=torch.int64),
            step=torch.ones((), dtype=torch.int64),
            seed=0,
            decoder_input_ids=written if two else None,
        )
        kept = Saved(model)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
            model.hidden(ids, torch.zeros(1, dtype=torch.int64), batch)
    return kept


class Saved:
    """Counts what autograd saves, each storage once and where it is first met, without parameters."""

    def __init__(self, model: "TokenModel") -> None:
        from torch import nn

        self.outside = 0
        self.of_layers: list[int] = []
        self._inside = False
        self._tensors: list[Tensor] = []  # held, so that no storage takes the place of another
        self._seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        for child in model.backbone.children():
            for layer in child if isinstance(child, nn.ModuleList) else ():
                layer.register_forward_pre_hook(self._enter)
                layer.register_forward_hook(self._leave)

    def pack(self, tensor: "Tensor") -> "Tensor":
        """Count a tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._tensors.append(tensor)
            if self._inside:
                self.of_layers[-1] += storage.nbytes()
            else:
                self.outside += storage.nbytes()
        return tensor

    def _enter(self, layer: "nn.Module", given: object) -> None:
        self._inside = True
        self.of_layers.append(0)

    def _leave(self, layer: "nn.Module", given: object, found: object) -> None:
        self._inside = False


@contextmanager
def fused() -> Iterator[None]:
    """Have attention keep meanwhile what kernels keep: the meta device has none, and keeps T x T weights."""
    import torch
    from torch import Tensor
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    class Fused(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is functional.scaled_dot_product_attention and (*args, *kwargs.values())[0].dim() == 4:
                return kept_by_kernel(*args, **kwargs)
            return func(*args, **kwargs)

    def kept_by_kernel(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """The result, and a mask in the type of the scores; its values are none, so nothing else matters."""
        mask = None if attn_mask is None else attn_mask.to(query.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found: Tensor = kernel(query, key, value, attn_mask=mask)[0]
        return found

    with Fused():
        yield
