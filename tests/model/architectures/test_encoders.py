"""Models of other objectives: what each position sees, and that they learn."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from model.attention.attention import CausalAttention
from model.batch import IGNORE
from model.config.model_config import ModelConfig
from model.generation.generate import generate
from model.generation.sampling import Sampling
from model.layers.noise import sample_keys
from model.masks import learned_dropout
from tests.model.attention.test_causality import LeakyAttention, leaky
from tests.model.helpers import NAMED, NOT_CAUSAL, VOCABULARY, batch_of, build, open_masks, small, variant

BERT = [name for name in NOT_CAUSAL if name.startswith("bert")]
T5 = [name for name in NOT_CAUSAL if name not in BERT]
MODES = ("train", "eval")


def changes(config: ModelConfig, mode: str, side: str) -> Tensor:
    """Largest change of a logit: of a changed token of the inputs or of what the decoder reads, at each place."""
    model = open_masks(build(config)).double()
    batch = batch_of(config, sequences=1)
    ids = batch.input_ids if side == "inputs" else batch.decoder_input_ids
    assert ids is not None
    length = ids.shape[1]
    rows = ids.repeat(length + 1, 1)  # row t changes token t; the last one none
    for place in range(length):
        rows[place, place] = (rows[place, place] + 1) % VOCABULARY
    read = rows if side == "inputs" else batch.input_ids.expand(length + 1, -1)
    written = batch.decoder_input_ids
    if written is not None:
        written = rows if side == "decoder" else written.expand(length + 1, -1)
    keys = sample_keys(batch.seed, batch.step, batch.samples).repeat(length + 1) if mode == "train" else None
    with torch.no_grad():
        labels = batch.labels.expand(length + 1, -1)
        logits = model.predict(read, keys, replace(batch, input_ids=read, labels=labels, decoder_input_ids=written))
    return (logits[:-1] - logits[-1]).abs().amax(dim=-1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", T5)
def test_the_decoder_is_causal_and_sees_all_that_is_read(name: str, mode: str) -> None:
    change = changes(variant(name), mode, "decoder")
    assert change.tril(-1).max() < 1e-12
    assert change.diagonal().min() > 1e-3
    assert changes(variant(name), mode, "inputs").min() > 1e-9


@pytest.mark.parametrize("name", T5)
def test_the_check_catches_a_decoder_that_sees_the_future(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalAttention, "forward", leaky)
    assert changes(variant(name), "eval", "decoder").tril(-1).max() > 1e-6


@pytest.mark.parametrize("source", ["attention", "embed"])
def test_the_check_catches_a_mask_that_sees_the_future(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_dropout, "CausalAttention", LeakyAttention)
    config = small("encoder_decoder", learned_dropout={"source": source})
    assert changes(config, "eval", "decoder").tril(-1).max() > 1e-3


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_an_encoder_sees_both_ways(name: str) -> None:
    """Each vector that the encoder gives depends on each token, and so does each mask in it."""
    config = variant(name)
    model = open_masks(build(config)).double()
    batch = batch_of(config, sequences=1)
    layers: Any = model.backbone.layers if name in BERT else model.backbone.encoder
    found: list[Tensor] = []
    layers[-1].register_forward_hook(lambda module, args, output: found.append(output[0]))
    ids = batch.input_ids
    for place in range(-1, ids.shape[1]):
        changed = ids.clone()
        if place >= 0:
            changed[0, place] = (changed[0, place] + 1) % VOCABULARY
        model.predict(changed, None, replace(batch, input_ids=changed))
    assert min((one - found[0]).abs().amax(dim=-1).min() for one in found[1:]) > 1e-9


@pytest.mark.parametrize("name", ["bert_modern", "t5_modern"])
def test_masks_of_an_encoder_see_both_ways(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its self attention shut off, only the mask's attention can tell a position of a later token."""
    config = variant(
        name, layers=1, learned_dropout={"sites": ["enc_ff"], "eval_rounding": "none"}, norm_position="pre"
    )
    model = open_masks(build(config)).double()
    layers: Any = model.backbone.encoder if name.startswith("t5") else model.backbone.layers
    torch.nn.init.zeros_(layers[0].attention.out.weight)
    torch.nn.init.normal_(layers[0].ff.down.weight, std=1.0, generator=torch.Generator().manual_seed(5))
    batch = batch_of(config, sequences=1)
    found: list[Tensor] = []
    layers[0].register_forward_hook(lambda module, args, output: found.append(output[0]))
    changed = batch.input_ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCABULARY
    for ids in (batch.input_ids, changed):
        model.predict(ids, None, replace(batch, input_ids=ids))
    assert (found[0] - found[1])[0, :-1].abs().amax(dim=-1).min() > 1e-9


@pytest.mark.parametrize("name", [name for name in NOT_CAUSAL if "batchnorm" not in name])
def test_a_sample_alone_meets_the_same_masks_as_in_a_batch(name: str) -> None:
    config = variant(name)
    model = open_masks(build(config)).double()
    batch = batch_of(config, sequences=4)
    keys = sample_keys(batch.seed, batch.step, batch.samples)
    together = model.predict(batch.input_ids, keys, batch)
    for row in range(4):
        one = slice(row, row + 1)
        written = batch.decoder_input_ids
        alone = replace(
            batch,
            input_ids=batch.input_ids[one],
            labels=batch.labels[one],
            decoder_input_ids=None if written is None else written[one],
        )
        found = model.predict(alone.input_ids, keys[one], alone)
        torch.testing.assert_close(found[0], together[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "encoder_only"])
def test_it_learns_32_sequences_by_heart(architecture: Any) -> None:
    config = small(architecture, width=32, heads=4, learned_dropout={"enabled": False})
    model, batch = build(config), batch_of(config, sequences=32)
    if architecture == "encoder_only":  # two places in each sequence are hidden
        hidden = torch.zeros_like(batch.labels, dtype=torch.bool)
        hidden[:, [3, 8]] = True
        labels = torch.where(hidden, batch.input_ids, IGNORE)
        batch = replace(batch, input_ids=batch.input_ids.masked_fill(hidden, 0), labels=labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.metrics["cross_entropy"].item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.05


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_labels_that_are_not_chosen_count_for_nothing(name: str) -> None:
    config = variant(name)
    model, batch = build(config), batch_of(config)
    labels = batch.labels.clone()
    labels[:, 1:] = IGNORE
    logits = model.predict(batch.input_ids, None, batch)
    expected = -logits[:, 0].log_softmax(-1).gather(1, batch.labels[:, :1]).mean()
    torch.testing.assert_close(model.eval()(replace(batch, labels=labels)).loss, expected)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_it_does_not_continue_a_text(name: str) -> None:
    with pytest.raises(ConfigError, match=str(NAMED[name]["architecture"])):
        next(generate(build(variant(name)), torch.tensor([3, 1]), Sampling(), max_new_tokens=1))


def test_two_sequences_are_needed_to_write_one() -> None:
    with pytest.raises(ConfigError, match="reads two sequences"):
        build(small("encoder_decoder")).logits(torch.zeros(1, 12, dtype=torch.int64))
