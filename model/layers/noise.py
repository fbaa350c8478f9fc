"""Uniform noise as a pure function of (seed, step, global sample, site, element).

It knows nothing of ranks, batch layout or history: a run resumed on other machines meets the same noise, and a
recomputed layer meets it again. SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014) in int64, whose arithmetic wraps alike on every device.
"""

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


_GAMMA = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: the step from one state to the next
_GAMMA_INT64 = _signed(_GAMMA)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _fold(z: Tensor, bits: int) -> Tensor:
    """z ^ (z >>> bits); torch's own shift keeps the sign, so the copies of the sign bit are masked off."""
    return (z >> bits).bitwise_and_(2 ** (64 - bits) - 1).bitwise_xor_(z)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of int64 in which every input bit reaches every output bit."""
    z = _fold(z, 30).mul_(_MIX_1)
    z = _fold(z, 27).mul_(_MIX_2)
    return _fold(z, 31)


def sample_keys(seed: int, step: Tensor, samples: Tensor) -> Tensor:
    """One key for each sequence of a batch.

    Args:
        step: 0-d int64.
        samples: [B] int64, global positions in the data order.

    Returns:
        [B] int64.
    """
    key = _mix(torch.full_like(step, _signed(seed)))
    key = _mix(key + step * _GAMMA_INT64)
    return _mix(key + samples * _GAMMA_INT64)


def of_step(keys: Tensor, number: int) -> Tensor:
    """Keys [B] of a stack's further applications, `number` from 1; the first one's, 0, are as they come."""
    return _mix(keys + _signed(number * _GAMMA)) if number else keys


def uniform(keys: Tensor, site: int, shape: tuple[int, int], first: int = 0) -> Tensor:
    """Noise in [0, 1) for one site, in steps of 2^-24.

    Args:
        keys: [B] int64, from `sample_keys`.
        site: number of the place in the model.
        shape: (T, C); element (t, c) draws number (first + t) C + c, so a shorter sequence meets the same noise.
        first: column of the first position, where another rank holds those before it.

    Returns:
        [B, T, C] float32.
    """
    return _draws(keys, site, shape, first).to(torch.float32).mul_(2.0**-24)


def at_least(keys: Tensor, site: int, shape: tuple[int, int], rate: float, first: int = 0) -> Tensor:
    """Where `uniform` of the same arguments is at least `rate`, in [0, 1): [B, T, C] int32, 1 there and 0 elsewhere.

    Integers are compared, in place: fewer passes over the numbers. `rate` counts as the float32 next to it.
    """
    mantissa, exponent = math.frexp(rate)
    least = math.ceil(math.ldexp(round(math.ldexp(mantissa, 24)), exponent))
    return _draws(keys, site, shape, first).ge_(least)


def _draws(keys: Tensor, site: int, shape: tuple[int, int], first: int) -> Tensor:
    """[B, T, C] int32, in [0, 2^24)."""
    begin, count = first * shape[1], shape[0] * shape[1]
    # Two numbers come from each 64-bit state: half the work.
    states = torch.arange(begin // 2 + 1, (begin + count + 1) // 2 + 1, device=keys.device).mul_(_GAMMA_INT64)
    bits = _mix(_stream(keys, site)[:, None] + states).view(torch.int32)[:, begin % 2 : begin % 2 + count]
    return (bits >> 8).bitwise_and_(0xFFFFFF).unflatten(1, shape)


def uniform_at(keys: Tensor, site: int, positions: Tensor, width: int) -> Tensor:
    """The same numbers, of chosen positions only.

    Args:
        keys: [B] int64, or [1].
        positions: [B, T] int64: rows t of `uniform`'s shape (T, C).
        width: C.

    Returns:
        [B, T, C] float32.
    """
    numbers = positions[..., None] * width + torch.arange(width, device=positions.device)
    bits = _mix(_stream(keys, site)[:, None, None] + (numbers // 2 + 1) * _GAMMA_INT64)
    return ((bits >> (numbers % 2 * 32 + 8)) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def _stream(keys: Tensor, site: int) -> Tensor:
    """State [B] before the first number of a site."""
    return _mix(keys + _signed(site * _GAMMA))
