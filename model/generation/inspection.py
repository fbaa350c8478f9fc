"""What a model does with each token of a finished text: its gates, and what it attends to.

One pass over the whole text, beside the one that made it: hooks compute again, from what goes into each site and each
attention, what the pass itself does not form. Without them nothing is computed and nothing is kept.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.architectures.recurrence import Recurrence
from model.architectures.token_model import TokenModel
from model.attention.attention import CausalAttention
from model.batch import Batch
from model.masks.block_gates import BlockFeedForward
from model.masks.site import SiteDropout

Look = Callable[[str, Tensor], None]
"""Gets the name of an attention, for example `enc_sa/00`, and its weights [H, T, T]: row t is what token t sees."""


class Inspection(NamedTuple):
    """Of a text of T tokens. Vectors of token t are those from which token t + 1 is predicted."""

    states: Tensor
    """[T, C], what the head reads."""
    density: dict[str, Tensor]
    """By mask, for example `enc_ff/00`: the share of elements that it keeps of each token, or of blocks that it opens,
    [T] float32."""
    steps: Tensor | None = None
    """[T] float32: how often each token went through the layers, where tokens halt."""


class Scores(NamedTuple):
    """Of tokens [T] under the model, whatever they were drawn by."""

    log_probability: Tensor
    """[T] float32, in nats, at temperature 1."""
    rank: Tensor
    """[T] int64: 1 for the likeliest token."""
    likeliest: Tensor
    """[T, n] int64, from the likeliest on."""
    likeliest_log_probability: Tensor
    """[T, n] float32."""


@torch.no_grad()
def inspect(model: TokenModel, ids: Tensor, look: Look | None = None, prompt: int | None = None) -> Inspection:
    """Read a text once more, in evaluation.

    Args:
        model: causal, in evaluation mode.
        ids: [T] int64, T <= context, on the model's device.
        look: gets the weights of each attention of a stream, in the order in which they are used; those of masks are
            left out, and those of a stream that sees both ways. They are the largest there is, so what is to be kept of
            them is for it to say.
        prompt: tokens at the start of the text that were given, where the model reads these apart.
    """
    with _watched(model, look) as (density, taken):
        states = model.hidden(ids[None], None, _alone(ids, prompt)).x[0]
    [steps] = taken or [None]
    return Inspection(states, density, None if steps is None else steps[0])


@torch.no_grad()
def inspect_target(model: TokenModel, source: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """The density of each mask, as in `Inspection`, while a target is written token by token.

    Args:
        model: of two sequences, in evaluation mode.
        source: [S] int64, what is read.
        ids: [U] int64, what the decoder that writes has read: end-of-text, then all but the last of the target.

    Returns:
        [S] of masks in the encoder and on its embedded tokens, [U] of the others.
    """
    batch = replace(_alone(source, None), labels=ids[None], decoder_input_ids=ids[None])
    with _watched(model, None) as (density, _):
        model.hidden(source[None], None, batch)
    return density


@contextmanager
def _watched(model: TokenModel, look: Look | None) -> Iterator[tuple[dict[str, Tensor], list[Tensor | None]]]:
    """The density of each mask, and the steps that tokens took, once a pass has been made."""
    density: dict[str, Tensor] = {}
    taken: list[Tensor | None] = []
    masks, attentions = (_Places(model.config.layers) for _ in range(2))
    hooks = []
    for module in model.modules():
        if isinstance(module, SiteDropout):
            hooks.append(module.register_forward_hook(partial(_density, density, masks)))
        elif isinstance(module, BlockFeedForward):
            hooks.append(module.register_forward_hook(partial(_open_share, density, masks)))
        elif isinstance(module, CausalAttention) and module.name and look:
            hooks.append(module.register_forward_hook(partial(_weights, look, attentions)))
        elif isinstance(module, Recurrence):
            hooks.append(module.register_forward_hook(lambda _, inputs, found: taken.append(found.taken)))
    try:
        yield density, taken
    finally:
        for hook in hooks:
            hook.remove()


def attention_heads(model: TokenModel) -> list[int]:
    """Of each attention that `inspect` looks at, how many heads it has."""
    steps = model.config.depth // model.config.layers
    return [m.heads for m in model.modules() if isinstance(m, CausalAttention) and m.name] * steps


def score(logits: Tensor, tokens: Tensor, count: int) -> Scores:
    """Tokens [T] under the logits [T, V] that predict them, beside the `count` likeliest."""
    log_probabilities = logits.float().log_softmax(-1)
    own = log_probabilities.gather(-1, tokens[:, None])
    rank = (log_probabilities > own).sum(-1) + 1
    likeliest = log_probabilities.topk(min(count, logits.shape[-1]))
    return Scores(own[:, 0], rank, likeliest.indices, likeliest.values)


class _Places:
    """Names by layer. Layers that are applied several times count on: of two the first is `enc_ff/02` in step 2."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._met: Counter[str] = Counter()

    def __call__(self, name: str) -> str:
        site, _, layer = name.partition("/")
        number = int(layer) + self._met[name] * self._layers
        self._met[name] += 1
        return f"{site}/{number:02d}"


def _alone(ids: Tensor, prompt: int | None) -> Batch:
    """One sequence."""
    zero = torch.zeros(1, dtype=torch.int64, device=ids.device)
    return Batch(ids[None], ids[None], zero, zero[0], 0, prefix_lengths=None if prompt is None else zero + prompt)


def _density(
    found: dict[str, Tensor], named: _Places, module: nn.Module, inputs: tuple[Any, ...], output: object
) -> None:
    x, _, source, visible = inputs
    assert isinstance(module, SiteDropout)
    kept = module.kept(x, source, visible)
    if kept is not None:
        found[named(module.name)] = kept[0, -visible.asking :].float().mean(-1)


def _open_share(
    found: dict[str, Tensor], named: _Places, module: nn.Module, inputs: tuple[Any, ...], output: object
) -> None:
    assert isinstance(module, BlockFeedForward)
    x, _, visible = inputs
    found[named(module.name)] = module.gates(x).opened[0, -visible.asking :].float().mean(-1)


def _weights(look: Look, named: _Places, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
    query, key, _, _, visible = inputs
    assert isinstance(module, CausalAttention)
    if visible.causal or not visible.aligned:
        weights = module.weights(query, key, visible)[0, :, -visible.asking :]
        look(named(module.name), weights[..., -weights.shape[1] :])  # without a null memory before the others
