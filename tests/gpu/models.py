"""Every architecture and option: one step beside the CPU's, loss and gradients; layers compiled and not; texts."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.architectures.registry import ARCHITECTURES
from model.architectures.token_model import TokenModel
from model.batch import Batch
from model.generation.generate import Generation
from model.generation.sampling import Sampling
from pretrain.config.schema import load
from pretrain.engine.layer_transforms import compile_layers
from tests.gpu.setting import Row, Setting, each
from tests.model.helpers import batch_of, build, open_masks, small
from tests.model.situations import SITUATIONS, Made, changed, documents, of_architecture

PRESETS = (
    *("tiny", "decoder-tiny", "encoder-tiny", "encoder-decoder-tiny", "draft-tiny", "universal", "refined-tiny"),
    "feedback",
)
"""The smallest of each architecture that has one, and of tied depth."""
IN_FP32 = 1e-4
"""Of norms, at most: sums of fp32 in another order differ by 1e-6 to 1e-5 here, and TF32, which is off, by 1e-3."""
IN_BF16, BESIDE_CPU = 0.02, 2.0
"""bf16 has 8 bits, and what is rounded falls open or shut: so the device may be this much further from fp32 on the CPU
than twice what bf16 on the CPU is."""
Found = dict[str, Tensor]


def steps(setting: Setting) -> Iterator[Row]:
    """Presets first, with documents in blocks for FlexAttention; then each option."""
    presets = {f"model/{name}": partial(_of_preset, name) for name in PRESETS[: 2 if setting.tiny else None]}
    others = [name for name in ARCHITECTURES if name not in map(_architecture, PRESETS)]
    presets |= {name: partial(of_architecture, name) for name in others}
    presets["model/tiny, documents"] = partial(_of_preset, "tiny", "model.document_mask=true")
    yield from each({name: partial(_beside, setting, name, make) for name, make in (presets | SITUATIONS).items()})


def _architecture(preset: str) -> str:
    architecture: str = _preset(preset).architecture
    return architecture


def _preset(name: str, *more: str) -> Any:
    return load([f"model/{name}", "model.vocab_size=512", *more]).model


def _of_preset(name: str, *more: str) -> Made:
    config = _preset(name, *more)
    batch = batch_of(config)
    return build(config), documents(batch) if config.document_mask else batch


def _beside(setting: Setting, name: str, make: Callable[[], Made]) -> Iterator[Row]:
    model, batch = make()
    model = open_masks(model).train()
    plain = step(model, batch)
    on_device = step(model.to(setting.device), turned(put(batch, setting.device)))
    yield Row(f"{name}, fp32", distance(on_device, plain), IN_FP32, unit="of the norm")
    rounded = step(model.to("cpu", torch.bfloat16), batch)
    on_device = step(model.to(setting.device), turned(put(batch, setting.device)))
    limit = BESIDE_CPU * distance(rounded, plain) + IN_BF16
    yield Row(f"{name}, bf16", distance(on_device, plain), limit, unit="of the norm")


def step(model: TokenModel, batch: Batch) -> Found:
    """The loss [1] and the gradients, on the CPU in fp64."""
    model.zero_grad(set_to_none=True)
    loss = model(batch).loss
    loss.backward()
    found = {"loss": loss.detach()[None]}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.to("cpu", torch.float64) for name, x in found.items()}


def distance(found: Found, wanted: Found) -> float:
    """The larger of the loss's relative error and that of all gradients together."""
    assert found.keys() == wanted.keys(), f"gradients of other parameters: {found.keys() ^ wanted.keys()}"
    loss = (found["loss"] - wanted["loss"]).abs() / wanted["loss"].abs()
    names = [name for name in wanted if name != "loss"]
    apart = torch.stack([(found[name] - wanted[name]).square().sum() for name in names]).sum()
    whole = torch.stack([wanted[name].square().sum() for name in names]).sum()
    return float(torch.maximum(loss[0], (apart / whole).sqrt()))  # NaN stays NaN


def put(batch: Batch, device: str) -> Batch:
    return changed(batch, lambda x: x.to(device))


def turned(batch: Batch) -> Batch:
    """Its rows in the opposite order: the same loss by other sums, so that a rehearsal compares something."""
    return changed(batch, lambda x: x.flip(0) if x.dim() else x)


COMPILED: dict[str, dict[str, Any]] = {
    "decoder": {"architecture": "decoder_only", "norm": "rmsnorm", "ff": "swiglu", "positions": "rotary"},
    "parallel": {"dropout": 0.1},
    "t5": {"architecture": "encoder_decoder", "cross_heads": 2},
}


def compiled(setting: Setting) -> Iterator[Row]:
    """Layers compiled as `engine.compile` has them, beside the same layers eager, on the device."""
    size: dict[str, Any] = (
        {"layers": 1, "width": 32} if setting.tiny else {"layers": 2, "width": 256, "heads": 4, "context": 128}
    )
    names = list(COMPILED)[: 1 if setting.tiny else None]
    yield from each({name: partial(_compiled, setting, name, size | COMPILED[name]) for name in names})


def _compiled(setting: Setting, name: str, options: dict[str, Any]) -> Iterator[Row]:
    config = small(**options)
    model, batch = open_masks(build(config)).train().to(setting.device), put(batch_of(config), setting.device)
    eager = step(model, batch)
    torch._dynamo.reset()
    compile_layers(model)
    yield Row(f"{name}, fp32", distance(step(model, batch), eager), IN_FP32, unit="of the norm")
    counted = torch._dynamo.utils.counters
    yield Row(f"{name}: breaks of the graph", float(sum(counted["graph_break"].values())), 0.0)
    yield Row(f"{name}: graphs", float(counted["stats"]["unique_graphs"]), 1.0, at_least=True)


WRITERS = {"tiny": 1, "decoder-tiny": 3, "draft-tiny": 1, "refined-tiny": 1, "universal": 2, "feedback": 2}
"""Presets that continue a text, and how many texts side by side."""


def texts(setting: Setting) -> Iterator[Row]:
    """Greedy texts in fp32 are the CPU's, token by token; tokens are drawn on the device."""
    names = list(WRITERS)[: 2 if setting.tiny else None]
    yield from each({name: partial(_texts, setting, name, WRITERS[name]) for name in names})


def _texts(setting: Setting, name: str, number: int) -> Iterator[Row]:
    model = build(_preset(name)).eval()
    prompts = torch.randint(0, 512, (number, 5), generator=torch.Generator().manual_seed(2))
    wanted = _written(model, prompts)
    found = _written(model.to(setting.device), prompts.to(setting.device))
    yield Row(f"{name}: tokens that differ", float((wanted != found.cpu()).sum()), 0.0)
    generator = torch.Generator(setting.device).manual_seed(3)
    drawn = _written(model, prompts.to(setting.device)[:1], Sampling(temperature=1.0, top_p=0.9), [generator])
    yield Row(f"{name}: tokens drawn beyond the vocabulary", float(((drawn < 0) | (drawn >= 512)).sum()), 0.0)


def _written(model: TokenModel, prompts: Tensor, sampling: Sampling | None = None, generators: Any = None) -> Tensor:
    generation = Generation(model, list(prompts), sampling or Sampling(temperature=0.0), generators=generators)
    written: list[list[int]] = [[] for _ in prompts]
    while len(written[0]) < 24:
        for text, tokens in generation.step().items():
            written[text] += tokens
    return torch.tensor([text[:24] for text in written])
