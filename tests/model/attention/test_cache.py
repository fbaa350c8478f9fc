"""What a model computes with a cache is what it computes without, in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.architectures.token_model import TokenModel
from model.attention.cache import Cache
from tests.model.helpers import VARIANTS, VOCABULARY, batch_of, build, open_masks, variant

CHUNKS = {
    "steps": [1] * 12,
    "prefill": [5, 1, 1, 1, 1, 1, 1, 1],
    "chunks": [5, 4, 1, 2],
}


def model_of(name: str, **changes: object) -> TokenModel:
    return open_masks(build(variant(name, **changes))).double().eval()


def cached(model: TokenModel, ids: Tensor, chunks: Sequence[int], padding: Sequence[int] | None = None) -> Tensor:
    """Logits after each chunk, [B, chunks, V]."""
    cache = Cache(torch.tensor(padding or [0] * len(ids)), ids.shape[1])
    return torch.stack([cache.logits(model, part) for part in ids.split(list(chunks), dim=1)], dim=1)


def full(model: TokenModel, ids: Tensor, chunks: Sequence[int]) -> Tensor:
    """The same from one pass over everything."""
    with torch.no_grad():
        return model(ids)[:, torch.tensor(chunks).cumsum(0) - 1]


def difference(model: TokenModel, ids: Tensor, chunks: Sequence[int]) -> float:
    return (cached(model, ids, chunks) - full(model, ids, chunks)).abs().max().item()


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_cache_changes_nothing(name: str, chunks: str) -> None:
    model = model_of(name)
    assert difference(model, batch_of(model.config).input_ids, CHUNKS[chunks]) < 1e-12


@pytest.mark.parametrize("name", VARIANTS)
def test_a_text_in_a_padded_batch_is_the_text_alone(name: str) -> None:
    model = model_of(name)
    ids = batch_of(model.config, sequences=4).input_ids
    padding = [0, 3, 7, 10]
    together = cached(model, ids, [5, 4, 1, 2], padding)
    changed = ids.clone()
    for row, pads in enumerate(padding):
        changed[row, :pads] = (changed[row, :pads] + 1) % VOCABULARY
        alone = full(model, ids[row : row + 1, pads:], [1] * (12 - pads))
        for chunk, end in enumerate([5, 9, 10, 12]):
            if end > pads:
                torch.testing.assert_close(together[row, chunk], alone[0, end - pads - 1], rtol=0, atol=1e-12)
    assert torch.equal(cached(model, changed, [5, 4, 1, 2], padding)[:, -1], together[:, -1]), "pads are never read"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunks", ["prefill", "chunks"])
def test_the_check_catches_a_mask_aligned_at_the_top_left(
    name: str, chunks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def top_left(self: Cache, *_: object) -> Tensor:
        assert self._rows is not None
        end = self._rows.length
        return torch.ones(end - self.length, end, dtype=torch.bool).tril()[None, None]

    monkeypatch.setattr(Cache, "_mask", top_left)
    model = model_of(name)
    assert difference(model, batch_of(model.config).input_ids, CHUNKS[chunks]) > 1e-6


SAMPLED = [name for name, changes in VARIANTS.items() if "sample" in str(changes)]
"""Without position vectors and rotations the noise is all that knows positions."""


@pytest.mark.parametrize("name", VARIANTS)
def test_the_check_catches_positions_without_their_offset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_zero(self: Cache, count: int) -> Tensor:
        return torch.arange(count).expand(len(self._padding), count)

    monkeypatch.setattr(Cache, "positions", from_zero)
    model = model_of(name)
    assert difference(model, batch_of(model.config).input_ids, CHUNKS["prefill"]) > 1e-6


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_of_the_masks_follow_the_position(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name, positions="rotary")
    ids = batch_of(model.config).input_ids
    assert difference(model, ids, CHUNKS["chunks"]) < 1e-12
    assert cached(model, ids, [12], [3, 3, 3]).sub(full(model, ids[:, 3:], [9])).abs().max() < 1e-12


def test_rows_are_reordered() -> None:
    model = model_of("modern")
    ids = batch_of(model.config).input_ids
    padding, order = torch.tensor([0, 2, 4]), torch.tensor([2, 0, 0])
    cache = Cache(padding, 12)
    cache.logits(model, ids[:, :6])
    cache.reorder(order)
    reordered = cache.logits(model, ids[order, 6:])
    fresh = Cache(padding[order], 12)
    torch.testing.assert_close(reordered, fresh.logits(model, ids[order]), rtol=0, atol=1e-12)


def test_a_full_cache_refuses_more_and_keeps_what_it_has() -> None:
    model = model_of("parallel")
    ids = batch_of(model.config).input_ids
    cache = Cache(torch.zeros(3, dtype=torch.int64), 6)
    cache.logits(model, ids[:, :4])
    with pytest.raises(ValueError, match="7 tokens do not fit a cache of 6"):
        cache.logits(model, ids[:, 4:7])
    torch.testing.assert_close(cache.logits(model, ids[:, 4:6]), full(model, ids[:, :6], [6])[:, 0])


def test_a_pass_that_fails_leaves_the_model_without_a_cache() -> None:
    model = model_of("parallel")
    ids = batch_of(model.config).input_ids
    before = full(model, ids, [12])
    with pytest.raises(IndexError):
        Cache(torch.zeros(3, dtype=torch.int64), 12).logits(model, ids + 100)
    assert torch.equal(full(model, ids, [12]), before)


def test_what_is_kept_has_the_size_that_the_documents_name() -> None:
    """10 L C numbers a token with two masks in a pair of layers, 6 L C without; fewer with grouped queries."""
    for name, factor in (("parallel", 10), ("next_position_norm", 6), ("dropout_modern", 3)):
        model = model_of(name)
        cache = Cache(torch.zeros(2, dtype=torch.int64), 12)
        cache.logits(model, batch_of(model.config, sequences=2).input_ids[:, :3])
        numbers = sum(keys.numel() + values.numel() for keys, values in cache._stored.values())
        assert numbers == 2 * 12 * factor * model.config.layers * model.config.width
