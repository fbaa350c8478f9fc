"""The model around the two decoders: their losses, and the passes that decoding is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.errors import ConfigError
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


class SourceMemory(NamedTuple):
    """Of one source, what both decoders read: computed once."""

    read: Tensor
    """[1, S, C]."""
    writing: list[Projected] | None
    """Of each layer that writes; None while they wait for the draft's vectors (`draft.refine`)."""
    drafting: list[Projected]
    """Of each layer that drafts."""
    lengths: Tensor
    """[N]: log-probability of each length of the target, from 1."""


class ReadSource(NamedTuple):
    """Ask for the `SourceMemory` of a source."""

    ids: Tensor
    """[1, S] int64."""


class MakeDraft(NamedTuple):
    """Ask for logits [L - start, V] of the places from `start` on, and the vectors [1, L, C] of all."""

    memory: SourceMemory
    ids: Tensor
    """[1, L] int64; anything where hidden."""
    hidden: Tensor
    """[1, L] bool."""
    start: int = 0


class ConsiderDraft(NamedTuple):
    """Ask for a memory that holds the vectors [1, L, C] of a draft, too."""

    memory: SourceMemory
    vectors: Tensor


class WriteOn(NamedTuple):
    """Ask for logits [n, V] of the token after each of n more, which go into the cache."""

    memory: SourceMemory
    ids: Tensor
    """[1, n] int64; the first ever is end-of-text."""
    cache: RollbackCache


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
                return self._read_source(inputs.ids)
            case MakeDraft():
                return self._make_draft(inputs)
            case ConsiderDraft():
                return self._with_draft(inputs.memory, inputs.vectors)
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

    def _read_source(self, ids: Tensor) -> SourceMemory:
        visible = visible_both_ways(ids.shape, ids.device, self.config)
        read, _ = self.backbone.encode(self.embed(ids, None, visible, self.embed_dropout), None)
        lengths = self.backbone.lengths(read, None)[0].float().log_softmax(-1)
        writing = None if self.config.draft.refine else projected(self.backbone.decoder, read)
        return SourceMemory(read, writing, projected(self.backbone.drafting_layers, read), lengths)

    def _make_draft(self, asked: MakeDraft) -> tuple[Tensor, Tensor]:
        ids = asked.ids.masked_fill(asked.hidden, 0)
        visible = visible_both_ways(ids.shape, ids.device, self.config)
        embedded = self.embed(ids, None, visible, self.draft_dropout)
        x = self.backbone.draft(embedded, asked.hidden, None, asked.memory.drafting, ACROSS).x
        return self.token_embed(x[:, asked.start :])[0], x

    def _with_draft(self, memory: SourceMemory, vectors: Tensor) -> SourceMemory:
        read = torch.cat([memory.read, vectors], dim=1)
        return memory._replace(writing=projected(self.backbone.decoder, read))

    def _write_on(self, asked: WriteOn) -> Tensor:
        if asked.memory.writing is None:
            raise ConfigError("draft.refine=true: nothing is written before the draft's vectors are there")
        count = asked.ids.shape[1]
        with asked.cache.going_on(self, count):
            visible = CAUSAL._replace(positions=asked.cache.positions(count))
            embedded = self.embed(asked.ids, None, visible, self.target_dropout)
            found = self.backbone.write(embedded, None, asked.memory.writing, ACROSS)
            return self.token_embed(self.final_norm(found.x))[0]


def _beside(read: Tensor, across: Visible, states: Tensor, batch: Batch) -> tuple[Tensor, Visible]:
    """What the encoder gives and what the draft does, one behind the other, and what may be seen of both."""
    both = torch.cat([read, states], dim=1)
    if across.mask is None:
        return both, across
    assert isinstance(across.mask, Tensor)
    held = (batch.labels != IGNORE)[:, None, None].expand(-1, 1, across.mask.shape[2], -1)
    return both, across._replace(mask=torch.cat([across.mask, held], dim=-1))
