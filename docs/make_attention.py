"""Draws docs/images/attention.png, what each pattern lets a query see, and docs/images/mixers.png, what other weights
and scores make of a text, from the rule and the modules that the model computes by.

python docs/make_attention.py
"""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

from model.architectures.registry import configure
from model.attention.attention import SelfAttention
from model.attention.linformer import Linformer
from model.attention.routing import Routing
from model.attention.rule import Rows
from model.attention.visibility import CAUSAL
from model.config.pattern_config import PatternConfig

PICTURE = Path(__file__).with_name("images") / "attention.png"
TOKENS = 16
SHOWN: dict[str, tuple[dict[str, Any], bool]] = {
    "full": ({}, True),
    "window 4": ({"kind": "window", "window": 4}, True),
    "window 4, both ways": ({"kind": "window", "window": 4}, False),
    "window 4, sinks 2": ({"kind": "window", "window": 4, "sinks": 2}, True),
    "window 4, globals 2 and 9": ({"kind": "window", "window": 4, "globals": [2, 9]}, True),
    "strided 4": ({"kind": "strided", "stride": 4}, True),
    "fixed 4": ({"kind": "fixed", "stride": 4}, True),
    "fixed 4, both ways": ({"kind": "fixed", "stride": 4}, False),
}
"""Options, and whether the text is read forwards only. With `merge=heads` both parts are there, each in its colour."""
COLOURS = ListedColormap(["#f3f1ec", "#2457a6", "#d98c2b", "#5b3f8c"])
"""Not seen; seen by the first part, by the second, by both."""
INK = "#1f2328"
MIXERS = PICTURE.with_name("mixers.png")
MIXED: dict[str, dict[str, Any]] = {
    "softmax": {},
    "entmax, alpha 1.5": {"weights": {"kind": "entmax", "alpha": 1.5}},
    "adaptive span: z 3, ramp 4": {"weights": {"kind": "adaptive_span", "span_init": 3 / TOKENS, "ramp": 4}},
    "synthesizer, dense": {"scores": {"kind": "synthesizer"}},
    "synthesizer, random": {"scores": {"kind": "synthesizer", "parts": ["random"]}},
    "linformer, 4 slots": {"scores": {"kind": "linformer", "slots": 4}, "architecture": "encoder_only"},
    "routing: a head of 3 clusters": {"scores": {"kind": "routing", "clusters": 3}},
    "routing: a local head": {"scores": {"kind": "routing", "clusters": 3, "window": 4}},
}
"""All with the same inputs; of routing, the last head and the first."""


def main() -> None:
    """Write the files."""
    figure = Figure(figsize=(10, 5.6))
    for number, (title, (options, causal)) in enumerate(SHOWN.items()):
        panel(figure.add_subplot(2, 4, number + 1), title, options, causal)
    figure.text(0.01, 0.015, LEGEND, fontsize=9, color=INK)
    figure.subplots_adjust(left=0.04, right=0.99, top=0.94, bottom=0.1, wspace=0.12, hspace=0.25)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    figure = Figure(figsize=(10, 5.6))
    for number, (title, options) in enumerate(MIXED.items()):
        mixer_panel(figure.add_subplot(2, 4, number + 1), title, options)
    figure.text(0.01, 0.015, WEIGHTS_LEGEND, fontsize=9, color=INK)
    figure.subplots_adjust(left=0.04, right=0.99, top=0.94, bottom=0.1, wspace=0.12, hspace=0.25)
    figure.savefig(MIXERS, dpi=110, metadata={"Software": None})


LEGEND = (
    "Rows are queries, columns keys, from the first token of a text on. Two colours: the two parts of a pattern, which "
    "`merge` puts together; violet: both."
)


WEIGHTS_LEGEND = (
    "Weights of one head over a text of random tokens, of untrained modules with large maps: rows are queries, columns "
    "keys or slots. Pale: exactly 0."
)


def weights_of(title: str, options: dict[str, Any]) -> Tensor:
    """[T, S] of one head."""
    shape = {"architecture": "decoder_only", "layers": 1, "width": 16, "heads": 2, "context": TOKENS, "vocab_size": 17}
    config: Any = configure(shape | options)
    torch.manual_seed(1)
    x = torch.randn(1, TOKENS, 16)
    module = SelfAttention(config, "dec_sa/00", 0.02, both_ways=not config.causal)
    for name, parameter in module.named_parameters():
        if name.endswith(("qkv.weight", "dense")):
            nn.init.normal_(parameter, std=0.5)
    mixer: Any = module.attention.mixer
    query, key, _ = module.qkv(x).split(module._sizes, dim=-1)
    if isinstance(mixer, Routing):
        query, key = mixer.routed(query, key)
    if isinstance(mixer, Linformer):
        query, key, _ = module.attention._in_heads(query, key, key, CAUSAL)
        return mixer.weights(query, mixer.slots_of(key, CAUSAL), CAUSAL._replace(causal=False))[0, 0].detach()
    return module.attention.weights(query, key)[0, 0 if "local" in title else -1].detach()


def mixer_panel(axes: Axes, title: str, options: dict[str, Any]) -> None:
    """One way to weigh."""
    found = weights_of(title, options).flip(0)
    shades = matplotlib.colormaps["YlGnBu"].with_extremes(bad="#f3f1ec")
    axes.pcolormesh(
        found.masked_fill(found == 0, torch.nan).numpy(),
        cmap=shades,
        vmin=-0.15,
        vmax=0.8,
        edgecolor="white",
        linewidth=0.8,
    )
    axes.set_aspect("equal" if found.shape[0] == found.shape[1] else 0.25)
    axes.set_title(title, fontsize=10, color=INK)
    axes.axis("off")


def seen(options: dict[str, Any], causal: bool) -> torch.Tensor:
    """[T, T] int: 1 where the first part of a pattern lets a query see a key, 2 the second, 3 both."""
    merge = {"merge": "heads"} if options.get("kind") in ("strided", "fixed") else {}
    parts = PatternConfig.model_validate(options | merge).of_layer(0, TOKENS)
    rows = Rows(torch.Size((1, TOKENS)), torch.device("cpu"), causal)
    return sum((rows.dense((part,))[0, 0].int() << number for number, part in enumerate(parts)), torch.zeros(()).int())


def panel(axes: Axes, title: str, options: dict[str, Any], causal: bool) -> None:
    """One pattern."""
    axes.pcolormesh(
        seen(options, causal).flip(0).numpy(), cmap=COLOURS, vmin=0, vmax=3, edgecolor="white", linewidth=0.8
    )
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=10, color=INK)
    axes.axis("off")


if __name__ == "__main__":
    main()
