"""States of the random number generators of one rank, as tensors: nothing of them needs pickle."""

import random

import numpy as np
import torch
from torch import Tensor


def rng_states() -> dict[str, Tensor]:
    """States of torch (CPU, and this rank's GPU), numpy and python.

    The words of both Mersenne twisters have 32 bits and are kept as float64, beside the next normal number if there
    is one: exact.
    """
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    _, key, position, has_normal, normal = np.random.get_state(legacy=True)
    states["numpy"] = torch.tensor([*map(int, key), position, has_normal, normal], dtype=torch.float64)
    _, words, next_normal = random.getstate()
    states["python"] = torch.tensor([*words, next_normal is not None, next_normal or 0.0], dtype=torch.float64)
    return states


def restore_rng_states(states: dict[str, Tensor]) -> None:
    """What `rng_states` returned; the GPU's only where there is one."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    *key, position, has_normal, normal = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), int(position), int(has_normal), normal))
    *words, has_next, next_normal = states["python"].tolist()
    random.setstate((3, tuple(int(word) for word in words), next_normal if has_next else None))
