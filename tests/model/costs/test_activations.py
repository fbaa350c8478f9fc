"""What is kept for the backward pass is what torch saves, storage by storage."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from model.architectures.token_model import TokenModel
from model.attention import softmax
from model.batch import Batch
from model.config import pattern_config
from model.config.model_config import ModelConfig
from model.costs import parts
from model.costs.totals import activations, forward_flops
from model.layers import chunked_loss
from pretrain.engine.layer_transforms import checkpoint_activations, layers
from pretrain.engine.sequence import Ulysses
from tests.model.helpers import (
    EVERY,
    MIXED,
    MIXED_BOTH_WAYS,
    NAMED,
    VOCABULARY,
    batch_of,
    build,
    configured,
    small,
    variant,
)

ROWS = 3
HEADS = 8
"""The most that an attention here has."""
TYPES = {4: torch.float32, 2: torch.bfloat16}
ESTIMATES = [name for name in EVERY if "encoder_loss" in name or "l0" in name]


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU keeps is counted; a CPU keeps less of short rows in bf16 (test_short_rows.py)."""
    monkeypatch.setattr(softmax, "SHORT_ROWS", (1, 0))


class Kept:
    """A tensor that is saved; dies with the graph that it is of."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that is saved would hold its own graph


def saved_bytes(model: TokenModel, batch: Batch, recomputed: bool = False) -> int:
    """Of a forward pass in training, each storage once; without parameters, vectors [B], [C] and of heads, and scalars.

    `recomputed`: layers are, and so their inputs are kept.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: weakref.WeakSet[Kept] = weakref.WeakSet()
    inputs: list[Tensor] = []

    def keep(_: object, given: tuple[object, ...]) -> None:
        if torch.is_grad_enabled():
            inputs.extend(x for x in given if isinstance(x, Tensor))

    for layer in layers(model) if recomputed else ():
        layer.register_forward_pre_hook(keep)

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        found.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = model(batch)
    storages = {}
    for tensor in [*(kept.tensor for kept in found), *inputs]:
        storage = tensor.untyped_storage()
        elements = storage.nbytes() // tensor.element_size()
        if storage.data_ptr() not in parameters and elements > HEADS and elements != model.config.width:
            storages[storage.data_ptr()] = storage.nbytes()
    assert output.loss.requires_grad
    return sum(storages.values())


def model_of(config: ModelConfig, size: int) -> TokenModel:
    return build(config).to(TYPES[size]).train()


def measure(config: ModelConfig, size: int, recomputed: bool = False, documents: bool = False) -> int:
    batch = batch_of(config, ROWS)
    batch = replace(batch, input_ids=batch.input_ids.clone())  # a view of more
    if documents:
        places = torch.arange(config.context).expand(ROWS, -1).clone()
        batch = replace(batch, segment_ids=torch.zeros_like(places), position_ids=places)
    model = build(config).to(TYPES[size]).train()
    if recomputed:
        checkpoint_activations(model)
    return saved_bytes(model, batch, recomputed)


def larger(name: str, **changes: Any) -> ModelConfig:
    return variant(name, width=48, heads=variant(name).heads, context=40, **changes)


@pytest.mark.parametrize("size", TYPES)
@pytest.mark.parametrize("name", [*EVERY, *MIXED, *MIXED_BOTH_WAYS])
def test_every_variant(name: str, size: int) -> None:
    config = larger(name)
    counted = activations(config, ROWS, size)
    expected = counted.kept(checkpointing=False) + counted.loss
    measured = measure(config, size)
    assert expected == (pytest.approx(measured, rel=0.1) if name in ESTIMATES else measured)


@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_only"])
def test_a_text_that_is_sorted_by_cluster(architecture: str) -> None:
    """FLOPs are of the keys that are seen: 20 of a cluster, and 16 of a window, to either side."""
    scores = {"kind": "routing", "clusters": 16, "cluster_window": 20, "window": 16}
    config, other = (
        small(architecture, width=48, heads=4, context=256, learned_dropout={"enabled": False}, scores=scores | changes)
        for changes in ({}, {"cluster_window": None})
    )
    counted = activations(config, ROWS, 2)
    assert counted.kept(checkpointing=False) + counted.loss == measure(config, 2)
    keys = 20 + 16 if architecture == "decoder_only" else 40 + 31
    assert forward_flops(other) - forward_flops(config) == 2 * 256 * 4 * 24 * (2 * 256 - keys)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ESTIMATES and "batchnorm" not in name])
def test_with_activation_checkpointing_the_inputs_of_layers_are_kept(name: str) -> None:
    config = larger(name)
    counted = activations(config, ROWS, 2)
    assert counted.kept(checkpointing=True) + counted.loss == measure(config, 2, recomputed=True)


@pytest.mark.parametrize("changes", [{}, {"attention": "explicit"}, {"positions": "rotary"}], ids=str)
@pytest.mark.parametrize("name", ["parallel", "decoder"])
def test_with_documents_apart(name: str, changes: dict[str, Any]) -> None:
    config = larger(name, document_mask=True, **changes)
    counted = activations(config, ROWS, 2, dense_mask=True)
    assert counted.kept(checkpointing=False) + counted.loss == measure(config, 2, documents=True)


@pytest.mark.parametrize("changes", [{}, {"attention": "explicit"}], ids=str)
@pytest.mark.parametrize("name", ["decoder", "modern", "everywhere_embed", "next_position"])
def test_of_ranks_that_share_rows_each_keeps_its_part(name: str, changes: dict[str, Any]) -> None:
    """The real exchange, but that what is sent comes back."""
    exchange: Any = object.__new__(Ulysses)
    exchange.size, exchange.rank, exchange._group = 2, 1, None
    exchange._exchange = lambda group, sent: sent.clone()
    config = larger(name, **changes)
    batch = batch_of(config, ROWS).shared(exchange)
    counted = activations(config, ROWS, 2, sharing=2)
    assert counted.kept(checkpointing=False) + counted.loss == saved_bytes(model_of(config, 2), batch)


@pytest.mark.parametrize("name", ["t5_dropout", "t5_modern"])
def test_pairs_are_two_full_sequences(name: str) -> None:
    config = larger(name)
    ids = torch.ones(ROWS, config.context, dtype=torch.int64)
    batch = replace(batch_of(config, ROWS), input_ids=ids, labels=ids.clone(), decoder_input_ids=ids.clone())
    counted = activations(config, ROWS, 2, pairs=True)
    model = build(config).bfloat16().train()
    assert counted.kept(checkpointing=False) + counted.loss == saved_bytes(model, batch)


def test_a_loss_in_chunks_keeps_the_gradient_of_the_table_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (chunked_loss, parts):
        monkeypatch.setattr(module, "chunk_tokens", lambda *_: 7)
    config = larger("decoder")
    counted = activations(config, ROWS, 2)
    assert counted.loss == ROWS * 40 * 48 * 2 + VOCABULARY * 48 * 4
    assert counted.kept(checkpointing=False) + counted.loss == measure(config, 2)


def test_without_a_vocabulary_there_is_nothing_to_count() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is not set"):
        activations(configured(), 1, 2)


SEEN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("parallel", {"kind": "window", "window": 3}, {}),
    ("modern", {"kind": "window", "window": 7, "sinks": 2, "full_every": 2}, {}),
    ("decoder", {"kind": "window", "window": 130, "sinks": 1}, {"context": 601}),
    ("bert", {"kind": "window", "window": 9}, {}),
    ("decoder", {"kind": "window", "window": 20}, {}),
    ("decoder", {"kind": "fixed", "stride": 100}, {"context": 601}),
    ("parallel", {"kind": "strided", "merge": "alternate"}, {}),
    ("decoder", {"kind": "strided", "merge": "heads"}, {"heads": 4}),
    ("modern_decoder", {"kind": "fixed", "merge": "heads"}, {}),
    ("everywhere_embed", {"kind": "fixed"}, {}),
    ("t5_modern", {"kind": "fixed", "merge": "alternate"}, {}),
    ("modern_decoder", {"kind": "strided", "stride": 4}, {"context": 98}),
    ("bert", {"kind": "strided", "stride": 4}, {"context": 144}),
]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("name", "pattern", "changes"), SEEN)
def test_with_a_pattern(
    name: str, pattern: dict[str, Any], changes: dict[str, Any], documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattern_config, "FEWEST", 1)
    shape = {"width": 48, "heads": NAMED[name].get("heads", 2), "context": 40} | changes
    documents = documents and not variant(name).traits.two_sequences
    config = variant(name, pattern=pattern, document_mask=documents, **shape)
    counted = activations(config, ROWS, 2, dense_mask=documents)
    measured = measure(config, 2, documents=documents)
    # The numbers of far keys are not counted.
    exact = pattern["kind"] == "window" or config.context < 600
    assert counted.kept(checkpointing=False) + counted.loss == (
        measured if exact else pytest.approx(measured, rel=1e-3)
    )
