"""Attention in every form: flash, FlexAttention, gathered, dense and explicit, beside the explicit one in fp64."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.attention.forms import Gathered, Mask, mask_of
from model.attention.rule import Rows
from model.attention.softmax import Softmax
from model.attention.visibility import Visible
from model.config.pattern_config import FULL, Pattern
from tests.gpu.setting import Row, Setting, each
from tests.model.helpers import small

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Of norms, output and gradients alike. fp32 gives 1e-6, TF32 would give 1e-3; bf16 rounds weights and results, each
by 0.004 at most."""
WINDOW = 64
SHOWN: dict[str, Pattern] = {"text": FULL, "documents": FULL, "prefixes": FULL, "window": Pattern(window=WINDOW)}
FORMS = {
    "text": ("auto", "flash", "explicit"),
    "documents": ("auto", "flash", "explicit", "blocks"),
    "prefixes": ("auto", "explicit", "blocks"),
    "window": ("gathered", "gathered, flash", "auto", "explicit", "blocks"),
}
"""Of `auto` and `explicit` the mask is dense."""


def forms(setting: Setting) -> Iterator[Row]:
    cases = {
        f"{shown}, {form}, {dtype}".replace("torch.", ""): partial(_beside, setting, shown, form, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for shown, names in FORMS.items()
        for form in names
        if not (form == "blocks" and dtype == torch.float32 and shown == "prefixes")  # compiling takes seconds
    }
    yield from each({name: partial(_named, name, found) for name, found in cases.items()})


def _named(name: str, found: Callable[[], float]) -> Iterator[Row]:
    limit = LIMITS[torch.float32 if name.endswith("float32") else torch.bfloat16]
    yield Row(name, found(), limit, unit="of the norm")


def _beside(setting: Setting, shown: str, form: str, dtype: torch.dtype) -> float:
    """The largest error of output and gradients, relative to their norms."""
    length, heads, channels = (256, 2, 16) if setting.tiny else (512, 4, 64)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 2, heads, length, channels, generator=generator).to(dtype)
    wanted = _computed(inputs.double(), "explicit", _mask(shown, "dense", length, "cpu"))
    found = _computed(inputs.to(setting.device), form, _mask(shown, form, length, setting.device))
    errors = [(x.cpu().double() - y).norm() / y.norm() for x, y in zip(found, wanted, strict=len(found) > 1)]
    return float(torch.stack(errors).max())


def _computed(inputs: Tensor, form: str, visible: Visible) -> list[Tensor]:
    """[output, gradients of query, key and value]; only the output where FlexAttention is not compiled."""
    kernel = "explicit" if form == "explicit" else "flash" if "flash" in form else "auto"
    mixer = Softmax(small(attention=kernel))
    query, key, value = (x.clone().requires_grad_(form != "blocks" or inputs.is_cuda) for x in inputs[:3])
    out = mixer(query, key, value, None, visible)
    if not out.requires_grad:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3])]


def _mask(shown: str, form: str, length: int, device: str) -> Visible:
    rows = Rows(torch.Size((2, length)), torch.device(device))
    if shown == "documents":
        segments, positions = _documents(length, device)
        rows = replace(rows, segments=segments, positions=positions)
    if shown == "prefixes":
        rows = replace(rows, prefixes=torch.tensor([17, length // 2], device=device))
    if shown == "text" and form != "explicit":
        return Visible()
    mask: Any = _of_form(rows, SHOWN[shown], form)
    return Visible(mask=mask, positions=rows.positions)


def _documents(length: int, device: str) -> tuple[Tensor, Tensor]:
    """Segments and positions, [2, T] each."""
    starts = torch.tensor([[0, 40, length // 2], [0, 100, length - 3]])
    places = torch.arange(length).expand(2, -1)
    segments = (places[:, :, None] >= starts[:, None]).sum(-1)
    begins = torch.gather(starts, 1, segments - 1)
    return segments.to(device), (places - begins).to(device)


def _of_form(rows: Rows, pattern: Pattern, form: str) -> Mask:
    if form == "blocks":
        return mask_of(rows, (pattern,), in_blocks=True, dense=False)
    if form.startswith("gathered"):
        return Gathered.of(rows, pattern)
    return rows.dense((pattern,))
