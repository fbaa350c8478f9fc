"""What zeros among the weights would cost: the smallest of each linear map, or two of each four in a row.

An analysis: products take as long with zeros in them, on a CPU and in torch's dense kernels on a GPU, so no model is
written. Kernels for two of four exist for some GPUs alone, in 16 bits and 8.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pretrain.export.smaller.comparison import comparing
from pretrain.finetune.lora import linear_maps
from pretrain.inference.trained import find_checkpoint, read_model

SHARES = (0.2, 0.4, 0.6, 0.8)
TWO_OF_FOUR = "2:4"


@torch.no_grad()
def losses_with_zeros(path: Path, step: int | None) -> Iterator[tuple[str, float]]:
    """What is zero in the linear maps but those of masks, and the validation loss; first of the model as it is.

    Raises:
        RunError, DataError: as `find_checkpoint` and `evaluate_run`.
    """
    checkpoint, config = find_checkpoint(path, step)
    model = read_model(checkpoint, config)
    weights = [base.weight for _, (base, of_mask) in linear_maps(model) if not of_mask]
    whole = [weight.clone() for weight in weights]
    with comparing(checkpoint, config) as text:
        yield "none", text.loss(model)
        for share in (*SHARES, None):
            for weight, values in zip(weights, whole, strict=True):
                weight.copy_(two_of_four(values) if share is None else without_smallest(values, share))
            yield TWO_OF_FOUR if share is None else f"{share:.0%}", text.loss(model)


def without_smallest(weight: Tensor, share: float) -> Tensor:
    """A matrix with zeros in the place of that share of it which is the smallest."""
    flat = weight.flatten().clone()
    flat[flat.abs().argsort()[: round(share * len(flat))]] = 0.0
    return flat.view_as(weight)


def two_of_four(weight: Tensor) -> Tensor:
    """A matrix [outputs, inputs] in which of each four inputs the two largest stay; of a rest of less than four all."""
    fours = weight[:, : weight.shape[1] // 4 * 4].unflatten(1, (-1, 4))
    kept = torch.zeros_like(fours).scatter(-1, fours.abs().topk(2, dim=-1).indices, 1.0)
    return torch.cat([(fours * kept).flatten(1), weight[:, fours.shape[1] * 4 :]], dim=1)
