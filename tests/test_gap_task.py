"""A token that is known from both sides, for a model that reads in random orders and one that reads from the left.

`python -m tests.test_gap_task` prints the table in docs/results.md.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.batch import Batch
from model.generation.sampling import Sampling
from pretrain.inference.infilling import fill
from tests.model.helpers import configured, in_order, without_dropout
from tests.test_recurrence_tasks import learn

LETTERS, LENGTH, UPDATES = 8, 12, 1500
TARGETS = 6


def sums(count: int, generator: torch.Generator) -> Tensor:
    """Texts of four triples: two letters by chance, and between them their sum."""
    ids = torch.randint(LETTERS, (count, LENGTH + 1), generator=generator)
    ids[:, 1::3] = (ids[:, 0:-1:3] + ids[:, 2::3]) % LETTERS
    return ids


def from_the_left(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = sums(count, generator)
    return ids[:, :-1], ids[:, 1:]


def in_random_order(batch: Batch, generator: torch.Generator) -> Batch:
    """All tokens but for the last of the labels, which the inputs are without."""
    ids = torch.cat([batch.input_ids, batch.labels[:, -1:]], 1)
    return in_order(batch, ids, torch.rand(ids.shape, generator=generator).argsort(1), TARGETS)


def trained(architecture: str, seed: int, updates: int = UPDATES) -> Any:
    """Two layers, width 64."""
    shape = {"layers": 2, "width": 64, "heads": 4, "context": LENGTH, "vocab_size": LETTERS}
    own: dict[str, Any] = {"permutation": {"share": TARGETS / LENGTH}} if architecture == "two_stream" else {}
    config = configured(architecture=architecture, learned_dropout=without_dropout(), **shape, **own)
    return learn(config, from_the_left, updates, 2e-3, 64, 0.15, seed, *[in_random_order] * bool(own))


def gaps(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """New texts [B, T], a place in each that is a sum, and what stands there."""
    generator = torch.Generator().manual_seed(99)
    ids, place = sums(count, generator), 1 + 3 * torch.randint(4, (count,), generator=generator)
    return ids, place, ids.gather(1, place[:, None])[:, 0]


@torch.no_grad()
def filled(model: Any, count: int) -> float:
    """The share of gaps that is filled rightly."""
    right = 0
    for text, place, truth in zip(*gaps(count), strict=True):
        text[place] = -1
        [token] = fill(model, text, Sampling(temperature=0.0))
        right += int(token.token == int(truth))
    return right / count


@torch.no_grad()
def continued(model: Any, count: int) -> tuple[float, float]:
    """The same by a model that reads from the left: of what it knows there, and of whole texts for each letter."""
    ids, place, truth = gaps(count)
    known = model(ids[:, :-1]).gather(1, (place - 1)[:, None, None].expand(-1, 1, LETTERS))[:, 0]
    scores = []
    for letter in range(LETTERS):
        other = ids.scatter(1, place[:, None], letter)
        nats = model(other[:, :-1]).log_softmax(-1).gather(-1, other[:, 1:, None])
        scores.append(nats.sum((1, 2)))
    found = known, torch.stack(scores, 1)
    left, whole = (float((of.argmax(1) == truth).float().mean()) for of in found)
    return left, whole


@pytest.mark.drill
def test_a_gap_is_filled_from_both_sides_by_a_model_that_read_in_random_orders() -> None:
    assert filled(trained("two_stream", 0), 500) > 0.95
    assert continued(trained("decoder_only", 0), 500)[0] < 0.25


def main() -> None:
    """All rows, three seeds."""
    torch.set_num_threads(1)
    for seed in (0, 1, 2):
        print("two_stream", seed, filled(trained("two_stream", seed), 1000), flush=True)
        print("decoder_only", seed, continued(trained("decoder_only", seed), 1000), flush=True)


if __name__ == "__main__":
    main()
