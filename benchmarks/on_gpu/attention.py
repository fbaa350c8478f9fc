"""Attention that sees less than all keys, beside attention to all."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from model.architectures.registry import configure
from model.attention.attention import SelfAttention
from model.attention.forms import Gathered
from model.attention.rule import Rows
from model.attention.softmax import Softmax
from model.attention.visibility import Visible
from model.config.pattern_config import FULL, Pattern
from tests.gpu.setting import Row, Setting, each

from .making import OFF
from .timing import medians


def window(setting: Setting) -> Iterator[Row]:
    """Causal attention of 8,192 tokens over windows: gathered, and FlexAttention, beside all keys by flash."""
    length, windows = (256, (64,)) if setting.tiny else (8192, (256, 1024))
    heads, channels = (2, 16) if setting.tiny else (16, 64)
    mixer = Softmax(configure({"layers": 1, "width": heads * channels, "heads": heads, "vocab_size": 64}))  # type: ignore[arg-type]
    inputs = torch.randn(4, 2, heads, length, channels, device=setting.device, dtype=torch.bfloat16)
    rows = Rows(torch.Size((2, length)), torch.device(setting.device))

    def run(mask: Any) -> None:
        leaves = [x.detach().requires_grad_(not setting.tiny) for x in inputs[:3]]
        out = mixer(*leaves, None, Visible(mask=mask))
        if out.requires_grad:
            out.backward(inputs[3])

    works: dict[str, Callable[[], object]] = {"all keys": partial(run, None)}
    for size in windows:
        works[f"window of {size}, gathered"] = partial(run, Gathered.of(rows, Pattern(window=size)))
        works[f"window of {size}, FlexAttention"] = partial(run, rows.blocks(Pattern(window=size)))
    works["all keys, FlexAttention"] = partial(run, rows.blocks(FULL))
    took = medians(works, setting)
    for name in list(works)[1:]:
        note = f"{1e3 * took['all keys']:.2f} ms / {1e3 * took[name]:.2f} ms"
        yield Row(
            f"{length:,} tokens, forward and backward: all keys / {name}", took["all keys"] / took[name], note=note
        )


def routing(setting: Setting) -> Iterator[Row]:
    """Self attention within clusters of tokens, a text sorted by them, beside attention to all keys: maps and all."""
    sizes = [(256, 32)] if setting.tiny else [(2048, 64), (8192, 128), (32768, 256)]
    yield from each({f"{length:,} tokens": partial(_routing, setting, length, size) for length, size in sizes})


def _routing(setting: Setting, length: int, size: int) -> Iterator[Row]:
    """As many tokens of any length; half of the heads see a window of `size`, half as many of their cluster."""
    rows, width, heads = (2, 32, 2) if setting.tiny else (32768 // length, 1024, 16)
    shape: dict[str, Any] = {"architecture": "decoder_only", "layers": 1, "width": width, "heads": heads, **OFF}
    shape |= {"context": length, "vocab_size": 64}
    scores = {"kind": "routing", "clusters": length // size, "window": size, "cluster_window": size}
    configs: dict[str, Any] = {"all keys": configure(shape), "clusters": configure(shape | {"scores": scores})}
    assert configs["clusters"].scores.sorts(length, length, length)
    x, gradient = torch.randn(2, rows, length, width, device=setting.device, dtype=torch.bfloat16)
    x.requires_grad_()
    keys = torch.zeros(rows, dtype=torch.int64, device=setting.device)

    def run(attention: SelfAttention) -> None:
        torch.autograd.grad(attention(x, keys), (x, *attention.parameters()), gradient)

    works: dict[str, Callable[[], object]] = {}
    for name, config in configs.items():
        with torch.device(setting.device):
            works[name] = partial(run, SelfAttention(config, "dec_sa/00", 0.02).to(torch.bfloat16))
    took = medians(works, setting)
    note = f"{rows} rows; {1e3 * took['all keys']:.2f} ms / {1e3 * took['clusters']:.2f} ms"
    name = f"{length:,} tokens, forward and backward: all keys / {size} of a window or a cluster, sorted"
    yield Row(name, took["all keys"] / took["clusters"], note=note)
