"""Which places of a target are hidden from the decoder that drafts, in training and validation.

It is a function of a row's noise key alone, as all noise (model/layers/noise.py), so it does not depend on how a batch
is split, and a run that goes on meets it again.
"""

import torch
from torch import Tensor

from model.layers.dropout import noise_site
from model.layers.noise import uniform

_ORDER, _COUNT, _KIND = (noise_site(f"draft/{name}") for name in ("order", "count", "kind"))


def hidden_places(masking: str, keys: Tensor, held: Tensor) -> Tensor:
    """Where a target is hidden, [B, U] bool, at least at one place of each that has some.

    `nat`: everywhere (Gu et al. 2018, arXiv:1711.02281). `cmlm`: at n places, n from 1 to T all as likely
    (Ghazvininejad et al. 2019, arXiv:1904.09324, section 2.2). `mixed`: so, or at the last n, each in half of the rows.

    Args:
        keys: [B] int64.
        held: [B, U] bool, where the targets have their T tokens.
    """
    if masking == "nat":
        return held
    lengths = held.sum(1, keepdim=True)
    count = 1 + (uniform(keys, _COUNT, (1, 1))[:, 0] * lengths).long().clamp(max=lengths - 1)
    scattered = ranks(keys, held) < count
    if masking == "cmlm":
        return scattered & held
    last = held.cumsum(1) > lengths - count
    is_suffix = uniform(keys, _KIND, (1, 1))[:, 0] < 0.5
    return torch.where(is_suffix, last, scattered) & held


def glanced(keys: Tensor, held: Tensor, wrong: Tensor, share: Tensor) -> Tensor:
    """What stays hidden when a share of as many places as were wrong are shown, [B, U] bool.

    "Glancing Transformer" (Qian et al. 2021, arXiv:2008.07905, equation 6): the number is the Hamming distance times
    `share`, rounded down; the places are any.

    Args:
        wrong: [B, U] bool, where the first pass took another token.
        share: 0-d.
    """
    shown = ((wrong & held).sum(1, keepdim=True) * share).floor()
    return (ranks(keys, held) >= shown) & held


def ranks(keys: Tensor, held: Tensor) -> Tensor:
    """The places of each target in a random order: [B, U] int64, from 0 to T - 1, and behind that where none is."""
    draws = uniform(keys, _ORDER, (held.shape[1], 1))[..., 0]
    order = draws.masked_fill(~held, 2.0).argsort(dim=1, stable=True)
    return order.argsort(dim=1)
