"""What linear maps find in vectors: a probe of classes, and the likeness of two spaces."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

STEPS = 60
"""Of L-BFGS, at most."""
PENALTY = 1e-3
"""Half of this times the squared norm of the weights is added to the mean cross entropy, in nats."""


class Score(NamedTuple):
    """Of tokens that the probe was not trained on."""

    accuracy: float
    bits: float
    """That the vector tells of the class: by so much is the mean cross entropy lower than `entropy`."""


def entropy(train: Tensor, test: Tensor, classes: int) -> float:
    """Mean cross entropy, in bits, of classes int64 [m] under their frequencies among others, int64 [n]."""
    return functional.cross_entropy(_frequencies(train, classes).expand(len(test), -1), test).item() / math.log(2)


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int) -> Score:
    """Train a multinomial logistic regression and test it.

    Args:
        train: vectors [n, C] and classes, int64 [n]; each channel is brought to mean 0 and deviation 1.
        test: the same of others.
        classes: how many there are.
    """
    x, y = train[0].float(), train[1]
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x, other = (x - mean) / scale, (test[0].float() - mean) / scale
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    bias = _frequencies(y, classes).requires_grad_()
    search = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")
    before = entropy(y, test[1], classes)

    def loss() -> Tensor:
        search.zero_grad()
        found = functional.cross_entropy(x @ weight + bias, y) + PENALTY / 2 * weight.square().sum()
        found.backward()
        return found

    search.step(loss)
    with torch.no_grad():
        logits = other @ weight + bias
        right = (logits.argmax(1) == test[1]).float().mean().item()
        return Score(right, before - functional.cross_entropy(logits, test[1]).item() / math.log(2))


def _frequencies(y: Tensor, classes: int) -> Tensor:
    """Logarithms of the shares of classes, [classes]; each counts once more than it is there."""
    return (torch.bincount(y, minlength=classes) + 1.0).log().log_softmax(0)


def likeness(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of vectors [n, C] and [n, D] of the same n > 3 tokens.

    1: one is the other, turned, mirrored and scaled; near 0: they have nothing to do with each other, however many
    channels there are, since HSIC is estimated without bias.

    Kornblith et al. 2019 (arXiv:1905.00414), section 3; the estimator as Nguyen et al. 2021 (arXiv:2010.15327) have it.
    """
    x, y = (vectors.double() - vectors.double().mean(0) for vectors in (x, y))
    return _hsic(x, y) / math.sqrt(_hsic(x, x) * _hsic(y, y))


def _hsic(x: Tensor, y: Tensor) -> float:
    """With kernels K = x xᵀ and L = y yᵀ whose diagonals are left out; nothing of size n x n is made."""
    n = len(x)
    own_x, own_y = x.square().sum(1), y.square().sum(1)
    trace = (x.T @ y).square().sum() - own_x @ own_y
    rows_x, rows_y = x @ x.sum(0) - own_x, y @ y.sum(0) - own_y
    rest = rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2)) - 2 * (rows_x @ rows_y) / (n - 2)
    return float((trace + rest) / (n * (n - 3)))
