"""What masks on updates cost, and what blocks of a feed forward that are shut save."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.architectures.registry import configure
from model.layers.block_forms import all_blocks, open_blocks
from model.layers.block_sizes import pays
from model.masks.block_gates import BlockFeedForward
from tests.gpu.setting import Row, Setting, each

from .making import OFF, SEQUENCE, model_of, rows_of, step_of
from .timing import medians


def masks(setting: Setting) -> Iterator[Row]:
    """A training step of the parallel model with masks, with dropout, and with neither, in bf16; eager, compiled."""
    shape = {"layers": 1, "width": 32, "heads": 2, "context": 64, "vocab_size": 256}
    if not setting.tiny:
        shape = {"layers": 4, "width": 1024, "heads": 16, "context": SEQUENCE, "vocab_size": 32768}
    kinds: dict[str, dict[str, Any]] = {"plain": OFF, "masks": {}, "dropout": {**OFF, "dropout": 0.1}}
    for way in ("eager",) if setting.tiny else ("eager", "compiled"):
        models = {name: model_of(shape | made, setting, compiled=way == "compiled") for name, made in kinds.items()}
        batch = rows_of(models["plain"], 2 if setting.tiny else 8, setting.device)
        took = medians({name: partial(step_of, model, batch) for name, model in models.items()}, setting)
        for name in ("masks", "dropout"):
            note = f"{1e3 * took[name]:.1f} ms / {1e3 * took['plain']:.1f} ms"
            yield Row(f"a step with {name} / without, bf16, {way}", took[name] / took["plain"], note=note)


def gates(setting: Setting) -> Iterator[Row]:
    """A feed forward in 8 blocks of which 2 are open: open blocks alone beside all of them, by tokens and width; and
    whether `model/layers/block_sizes.py` would take the quicker one."""
    sizes = [(64, 32)] if setting.tiny else [(t, w) for w in (1024, 2048, 4096) for t in (2048, 16384)]
    yield from each({f"{t:,} tokens, width {w:,}": partial(_gates, setting, t, w) for t, w in sizes})


def _gates(setting: Setting, tokens: int, width: int) -> Iterator[Row]:
    shape = {"layers": 1, "width": width, "heads": 2, "context": 64, "vocab_size": 64}
    top = {"kind": "top", "blocks": 8, "density": 0.25}
    config: Any = configure({"architecture": "decoder_only", **shape, **OFF, "block_gates": top})
    with torch.device(setting.device):
        ff: Any = BlockFeedForward(config, "dec_ff", 0, 0.02).to(torch.bfloat16)
        x = torch.randn(1, tokens, width, dtype=torch.bfloat16)
    rows, found = x.flatten(0, 1).requires_grad_(), ff.gates(x)
    weights, opened = found.weights.to(x.dtype).flatten(0, 1).detach(), found.opened.flatten(0, 1)

    def run(form: Callable[[], Tensor], *, trains: bool) -> None:
        with torch.set_grad_enabled(trains):
            out = form()
        if trains:
            out.sum().backward()

    forms: dict[str, Callable[[], Tensor]] = {
        "all": lambda: all_blocks(rows, weights, ff._maps()),
        "open": lambda: open_blocks(rows, weights, opened, ff._maps()),
    }
    for trains in (False, True):
        took = medians({name: partial(run, form, trains=trains) for name, form in forms.items()}, setting)
        ratio = took["all"] / took["open"]
        taken = pays(tokens, width, config.block_width, cuda=True)
        right = "the quicker" if taken == (ratio > 1) else "the slower"
        note = f"{1e3 * took['all']:.2f} ms / {1e3 * took['open']:.2f} ms; {right} is taken"
        what = "in training" if trains else "forward"
        yield Row(f"{tokens:,} tokens, width {width:,}, {what}: all blocks / open blocks", ratio, note=note)
