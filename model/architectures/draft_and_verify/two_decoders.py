"""The model around the two decoders: their losses, and the passes that decoding is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.architectures.backbone import Backbone, Hidden
from model.architectures.draft_and_verify.masking import glanced, hidden_places
from model.architectures.draft_and_verify.model import DraftAndVerify, projected
from model.architectures.draft_and_verify.rollback import RollbackCache
from model.architectures.draft_and_verify.spec import DraftAndVerifyConfig
from model.architectures.token_model import TokenModel
from model.attention.attention import Projected
from model.attention.visibility import ACROSS, CAUSAL, Visible, visible_both_ways, visible_draft
from model.batch import IGNORE, Batch
from model.layers.chunks import chunk_tokens
from model.layers.noise import sample_keys
from model.masks.sites import dropout_at


class Reads(NamedTuple):
    """What a decoder reads of B sources: of each layer keys and values, and what of them is padding, [B, S] bool."""

    layers: list[Projected]
    padding: Tensor | None = None

    def across(self, queries: int) -> Visible:
        """To so many queries of each row."""
        if self.padding is None:
            return ACROSS
        return ACROSS._replace(mask=~self.padding[:, None, None].expand(-1, -1, queries, -1))

    def of(self, rows: list[int]) -> "Reads":
        """Of some of the sources."""
        at = torch.tensor(rows, device=self.layers[0].key.device)
        padding = None if self.padding is None else self.padding[at]
        return Reads([Projected(layer.key[at], layer.value[at]) for layer in self.layers], padding)


class SourceMemory(NamedTuple):
    """Of one source, what both decoders read: computed once."""

    read: Tensor
    """[1, S, C]."""
    writing: Reads | None
    """Of the layers that write; None while they wait for the draft's vectors (`draft.refine`)."""
    drafting: Reads
    """Of the layers that draft."""
    lengths: Tensor
    """[N]: log-probability of each length of the target, from 1."""


class ReadSource(NamedTuple):
    """Ask for the `SourceMemory` of each of B sources."""

    ids: Tensor
    """[B, S] int64."""
    counts: list[int]
    """Tokens of each; anything behind them."""


class MakeDraft(NamedTuple):
    """Ask for logits [n, V] of n of the places of B drafts, and the vectors [B, L, C] of all."""

    reads: Reads
    ids: Tensor
    """[B, L] int64; anything where hidden."""
    hidden: Tensor
    """[B, L] bool."""
    wanted: Tensor
    """[n] int64: numbers of places, counted through all rows."""
    padding: Tensor | None = None
    """[B, L] bool, behind the shorter ones."""


class ConsiderDraft(NamedTuple):
    """Ask for a memory that holds the vectors [1, L, C] of a draft, too."""

    memory: SourceMemory
    vectors: Tensor


class WriteOn(NamedTuple):
    """Ask for logits [n, V] of the token after each of n of those that are more, which go into the cache."""

    reads: Reads
    ids: Tensor
    """[B, U] int64; the first ever is end-of-text."""
    cache: RollbackCache
    rows: list[int]
    """Of the cache, B of them."""
    counts: list[int]
    """Tokens of each; anything behind them."""
    wanted: Tensor
    """[n] int64: numbers of tokens, counted through all rows."""


class TwoDecoders(TokenModel):
    """Learns the target token by token, the hidden places of a draft, and the target's length."""

    config: DraftAndVerifyConfig
    backbone: DraftAndVerify

    def __init__(self, config: DraftAndVerifyConfig, backbone: Callable[[], Backbone]) -> None:
        """As `TokenModel`."""
        super().__init__(config, backbone)
        self.draft_dropout = dropout_at(config, "embed", 2)

    def forward(self, inputs: Any) -> Any:
        """The loss of a batch, or what a pass of decoding asks for: `ReadSource` and those beside it.

        One entrance for all, because a partitioned model (ZeRO-3) gathers its weights only when called.
        """
        match inputs:
            case ReadSource():
                return self._read_sources(inputs)
            case MakeDraft():
                return self._make_draft(inputs)
            case ConsiderDraft():
                return self._memory(inputs.memory.read, inputs.memory.lengths, inputs.vectors)
            case WriteOn():
                return self._write_on(inputs)
        return super().forward(inputs)

    def hidden(self, input_ids: Tensor, keys: Tensor | None, batch: Batch | None = None) -> Hidden:
        """Of the decoder that writes token by token; see `TokenModel.hidden`."""
        return self._pass(input_ids, keys, batch, losses=False)

    def learning(self, batch: Batch, keys: Tensor | None) -> Hidden:
        """The same, with the losses of draft and length, and the statistics of all masks."""
        return self._pass(batch.input_ids, keys, batch, losses=True)

    def _pass(self, input_ids: Tensor, keys: Tensor | None, batch: Batch | None, *, losses: bool) -> Hidden:
        written, source = self._read(input_ids, keys, batch)
        assert source is not None and batch is not None
        read, statistics = self.backbone.encode(source.embedded, keys)
        across, auxiliary, metrics = source.across, None, dict[str, Tensor]()
        if losses or self.config.draft.refine:
            hidden = self._hidden_places(batch, keys, read, across)
            draft = self._draft(batch, hidden, keys, read, across)
            statistics |= draft.statistics
            if losses:
                auxiliary, metrics = self._losses(batch, draft.x, hidden, self.backbone.lengths(read, batch.padding))
            if self.config.draft.refine:
                read, across = _beside(read, across, draft.x.detach(), batch)
        found = self.backbone.write(written, keys, read, across)
        auxiliary = auxiliary if self.training else None
        return Hidden(self.final_norm(found.x), statistics | found.statistics, auxiliary, metrics)

    def _hidden_places(self, batch: Batch, keys: Tensor | None, read: Tensor, across: Visible) -> Tensor:
        """[B, U] bool. Validation draws from the seed and the sample, too; of `glat` it hides all."""
        config, held = self.config.draft, batch.labels != IGNORE
        draws = sample_keys(batch.seed, batch.step, batch.samples) if keys is None else keys
        if config.masking != "glat":
            return hidden_places(config.masking, draws, held)
        if keys is None:
            return held
        with torch.no_grad():
            first = self._draft(batch, held, keys, read, across).x
            wrong = self._likeliest(first) != batch.labels
        share = config.glat_start + (config.glat_end - config.glat_start) * (batch.step / config.glat_steps).clamp(
            max=1
        )
        return glanced(draws, held, wrong, share)

    def _draft(self, batch: Batch, hidden: Tensor, keys: Tensor | None, read: Tensor, across: Visible) -> Hidden:
        ids = batch.labels.masked_fill(hidden | (batch.labels == IGNORE), 0)
        embedded = self.embed(ids, keys, visible_draft(batch, self.config), self.draft_dropout)
        return self.backbone.draft(embedded, hidden, keys, read, across)

    def _losses(self, batch: Batch, x: Tensor, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted, and what is told of them.

        The draft's is a sum over the hidden labels, divided by how many are expected of all labels: by their own number
        it would depend on how a step is split into micro-batches.
        """
        config = self.config.draft
        smoothing = self.config.label_smoothing if self.training else 0.0
        count = batch.num_labels().clamp(min=1) if batch.counts is None else batch.counts.labels
        labels = torch.where(hidden, batch.labels, IGNORE)
        drafted = self.token_embed(x, labels, smoothing, 0.0, count * self.config.expected_share)
        longest = (batch.labels != IGNORE).sum(1) - 1
        total = functional.cross_entropy(lengths.float(), longest, ignore_index=-1, reduction="sum")
        length = total / len(lengths)
        loss = config.weight * drafted.loss + config.length_weight * length
        told = {"draft_cross_entropy": drafted.cross_entropy, "length_cross_entropy": length.detach()}
        return loss, told

    def _likeliest(self, x: Tensor) -> Tensor:
        """Tokens [B, U] of vectors [B, U, C], the logits by chunks."""
        assert self.config.vocab_size is not None
        rows = x.flatten(0, 1)
        size = chunk_tokens(len(rows), self.config.vocab_size, self.config.width)
        return torch.cat([self.token_embed(part).argmax(-1) for part in rows.split(size)]).view(x.shape[:2])

    def _read_sources(self, asked: ReadSource) -> list[SourceMemory]:
        ids, padding = asked.ids, padding_behind(asked.counts, asked.ids.device)
        visible = visible_both_ways(ids.shape, ids.device, self.config, padding)
        read, _ = self.backbone.encode(self.embed(ids, None, visible, self.embed_dropout), None)
        lengths = self.backbone.lengths(read, padding).float().log_softmax(-1)
        of_each = [read[row : row + 1, :count] for row, count in enumerate(asked.counts)]
        return [self._memory(own, row, None) for own, row in zip(of_each, lengths, strict=True)]

    def _memory(self, read: Tensor, lengths: Tensor, beside: Tensor | None) -> SourceMemory:
        """Of vectors [1, S, C], and, to the decoder that writes, those of a draft behind them."""
        writing = None
        if beside is not None or not self.config.draft.refine:
            both = read if beside is None else torch.cat([read, beside], dim=1)
            writing = Reads(projected(self.backbone.decoder, both))
        return SourceMemory(read, writing, Reads(projected(self.backbone.drafting_layers, read)), lengths)

    def _make_draft(self, asked: MakeDraft) -> tuple[Tensor, Tensor]:
        ids = asked.ids.masked_fill(asked.hidden, 0)
        visible = visible_both_ways(ids.shape, ids.device, self.config, asked.padding)
        embedded = self.embed(ids, None, visible, self.draft_dropout)
        across = asked.reads.across(ids.shape[1])
        x = self.backbone.draft(embedded, asked.hidden, None, asked.reads.layers, across).x
        return self.token_embed(x.flatten(0, 1)[asked.wanted]), x

    def _write_on(self, asked: WriteOn) -> Tensor:
        count = asked.ids.shape[1]
        with asked.cache.going_on(self, asked.rows, asked.counts):
            visible = CAUSAL._replace(positions=asked.cache.positions(count))
            embedded = self.embed(asked.ids, None, visible, self.target_dropout)
            found = self.backbone.write(embedded, None, asked.reads.layers, asked.reads.across(count))
            return self.token_embed(self.final_norm(found.x.flatten(0, 1)[asked.wanted]))


def padding_behind(counts: list[int], device: torch.device) -> Tensor | None:
    """[B, T] bool, of rows of so many tokens, T of the longest; None where there is none."""
    if len(set(counts)) == 1:
        return None
    return torch.arange(max(counts), device=device) >= torch.tensor(counts, device=device)[:, None]


def joined(reads: list[Reads]) -> Reads:
    """Of sources of any length, one row each, side by side."""
    if len(reads) == 1:
        return reads[0]
    counts = [one.layers[0].value.shape[1] for one in reads]

    def beside(tensors: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence([tensor[0] for tensor in tensors], batch_first=True)

    layers = zip(*(one.layers for one in reads), strict=True)
    both = [Projected(beside([own.key for own in layer]), beside([own.value for own in layer])) for layer in layers]
    return Reads(both, padding_behind(counts, both[0].value.device))


def _beside(read: Tensor, across: Visible, states: Tensor, batch: Batch) -> tuple[Tensor, Visible]:
    """What the encoder gives and what the draft does, one behind the other, and what may be seen of both."""
    both = torch.cat([read, states], dim=1)
    if across.mask is None:
        return both, across
    assert isinstance(across.mask, Tensor)
    held = (batch.labels != IGNORE)[:, None, None].expand(-1, 1, across.mask.shape[2], -1)
    return both, across._replace(mask=torch.cat([across.mask, held], dim=-1))
