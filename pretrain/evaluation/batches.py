"""From windows of tokens to what a model is shown: the objective of `data.objective`, on the device."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data_pipeline.loading import collate
from data_pipeline.loading.loader import StepSamples
from data_pipeline.sampling.kinds import AnyWindows
from data_pipeline.sampling.sample_plan import check_kind
from data_pipeline.storage.dataset import Dataset
from data_pipeline.tokenize.tokenizer import Tokenizer
from model.batch import IGNORE, Batch
from model.config.model_config import Objective
from pretrain.config.schema import Config

_VALIDATION_SEED = 0
"""What is random in validation is the same in every run and at every step."""


def to_batch(tokens: Tensor, samples: Tensor, step: int, seed: int, device: torch.device) -> Batch:
    """Windows [B, T+1] of tokens, -1 where there is none, as a causal model's batch."""
    tokens = tokens.to(device, non_blocking=True)
    inputs, labels = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
    labels = torch.where(labels < 0, IGNORE, labels)
    return Batch(inputs, labels, samples.to(device, non_blocking=True), torch.full((), step, device=device), seed)


class Batches:
    """Makes batches of windows. Nothing it does depends on ranks or on the size of a micro-batch."""

    def __init__(
        self,
        device: torch.device,
        objective: Objective = "causal",
        *,
        context: int = 0,
        document_mask: bool = False,
        mask_boundaries: bool = False,
        packed: bool = False,
        two_sequences: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`tokenizer` and `context`, the tokens of a window's inputs, are needed where tokens are hidden or cut out.

        `mask_boundaries`: the first token of a document is nobody's label; `packed`: windows begin with a document;
        `two_sequences`: the model reads the source of a pair and writes the target, else it reads both on end.

        Raises:
            DataError: the tokenizer lacks the pieces that the objective needs.
        """
        self.document_mask = document_mask
        self.needs_documents = document_mask or mask_boundaries
        self._packed = packed
        self._device = device
        self._objective = objective
        self._tokenizer = tokenizer
        self._two_sequences = two_sequences
        if objective in ("masked", "span_corruption", "pairs"):
            assert tokenizer is not None
            self._eos_id = tokenizer.eos_id
        if objective == "masked":
            assert tokenizer is not None
            self._mask_id, self._vocab_size = collate.mask_id(tokenizer), tokenizer.vocab_size
        if objective == "span_corruption":
            assert tokenizer is not None
            self._cut_out = collate.SpanCorruption(context, tokenizer.sentinel_ids, self._eos_id)

    @classmethod
    def of(cls, config: Config, dataset: Dataset, device: torch.device) -> "Batches":
        """As the configuration asks. Raises DataError like the constructor."""
        needs_pieces = config.data.objective in ("masked", "span_corruption", "pairs")
        check_kind(dataset, config.data)
        return cls(
            device,
            config.data.objective,
            context=config.model.context,
            document_mask=config.model.document_mask,
            mask_boundaries=config.data.mask_boundaries,
            packed=config.data.packing == "best_fit",
            two_sequences=config.model.traits.two_sequences,
            tokenizer=dataset.tokenizer() if needs_pieces else None,
        )

    @property
    def predicts_every_token(self) -> bool:
        """Whether the losses of all labels add up to the likelihood of the text."""
        return self._is_plain and not self._packed

    @property
    def _is_plain(self) -> bool:
        return self._objective == "causal" and not self.needs_documents

    def of_step(self, samples: StepSamples, micro_batch: int, step: int, seed: int) -> list[Batch]:
        """A rank's share of a step in micro-batches."""
        made = []
        size = micro_batch * samples.tokens.shape[1]
        parts = zip(samples.tokens.split(micro_batch), samples.positions.split(micro_batch), strict=True)
        for number, (tokens, positions) in enumerate(parts):
            starts = samples.document_starts
            if starts is not None:
                first, last = np.searchsorted(starts, [number * size, (number + 1) * size])
                starts = starts[first:last] - number * size
            made.append(self._batch(tokens, positions, starts, step, seed, padded=self._packed))
        return made

    def of_validation(self, windows: AnyWindows, indices: np.ndarray) -> Batch:
        """Windows of held-out text by number, at least one; a row that counts for nothing if there is none."""
        tokens, starts = np.full((1, windows.width), -1, np.int64), np.empty(0, np.int64)
        if len(indices):
            tokens = windows.read(indices)
            if self.needs_documents:
                batches, offsets = windows.places(indices)
                starts = windows.document_starts(batches.tolist(), offsets.tolist(), range(len(indices)))
        positions = torch.from_numpy(indices if len(indices) else np.zeros(1, np.int64))
        padded = self._packed or bool((tokens[:, :-1] < 0).any())
        return self._batch(torch.from_numpy(tokens), positions, starts, 0, _VALIDATION_SEED, padded=padded)

    def sources_of_labels(self, windows: AnyWindows, indices: np.ndarray) -> np.ndarray:
        """Number in `windows.sources` of the source that each label of `of_validation` is of, int64 [B, labels].

        Where spans are cut out the labels of a window are all of the source that it begins in, int64 [B, 1].
        """
        sources = windows.sources_of(indices)
        if self._objective in ("pairs", "span_corruption"):
            return sources[:, :1]
        return sources[:, :-1] if self._objective == "masked" else sources[:, 1:]

    def _batch(
        self, tokens: Tensor, positions: Tensor, starts: np.ndarray | None, step: int, seed: int, *, padded: bool
    ) -> Batch:
        """Windows int64 [B, T + 1] or pairs [B, 2 T], -1 where there is no token; `starts` of documents as a reader
        gives them. `padded`: the windows may have padding; pairs always may."""
        if self._objective == "pairs":
            return self._of_pairs(tokens, positions, step, seed)
        batch = to_batch(tokens, positions, step, seed, self._device)
        if padded:
            batch = replace(batch, padding=self._put(tokens.numpy()[:, :-1] < 0))
        if self._is_plain:
            return batch
        window, where = tokens.numpy(), positions.numpy()
        segments = None
        if self.document_mask:
            assert starts is not None
            segments = collate.sequences(starts, len(window), window.shape[1] - 1)
            batch = replace(
                batch,
                segment_ids=self._put(segments.segment_ids),
                position_ids=self._put(segments.position_ids),
            )
        if self._objective == "causal":
            return replace(batch, labels=self._put(collate.causal(window, starts)[1]))
        if self._objective == "prefix":
            inputs, labels, lengths = collate.prefix(window, where, seed)
            return replace(
                batch, input_ids=self._put(inputs), labels=self._put(labels), prefix_lengths=self._put(lengths)
            )
        if self._objective == "masked":
            return self._masked(batch, window, where, seed)
        inputs, labels = self._cut_out(np.maximum(window, 0), where, seed)
        written = np.concatenate([np.full((len(labels), 1), self._eos_id), labels[:, :-1]], axis=1)
        short = np.any(window[:, :-1] < 0, axis=1)  # spans are cut out of whole windows
        labels[short] = IGNORE
        return replace(
            batch,
            padding=self._put(np.repeat(short, inputs.shape[1]).reshape(inputs.shape)) if padded else None,
            input_ids=self._put(inputs),
            labels=self._put(labels),
            decoder_input_ids=self._put(written),
        )

    def _of_pairs(self, tokens: Tensor, positions: Tensor, step: int, seed: int) -> Batch:
        """Source and target, int64 [B, 2 T], for an encoder and a decoder; or on end, the source as a prefix."""
        samples = positions.to(self._device, non_blocking=True)
        at = torch.full((), step, device=self._device)
        if not self._two_sequences:
            inputs, labels, lengths, behind = collate.joined_pairs(tokens.numpy())
            return Batch(
                self._put(inputs),
                self._put(labels),
                samples,
                at,
                seed,
                prefix_lengths=self._put(lengths),
                padding=self._put(behind),
            )
        sources, targets = tokens.to(self._device, non_blocking=True).chunk(2, dim=1)
        written = torch.cat([torch.full_like(targets[:, :1], self._eos_id), targets[:, :-1].clamp(min=0)], dim=1)
        return Batch(
            sources.clamp(min=0),
            torch.where(targets < 0, IGNORE, targets),
            samples,
            at,
            seed,
            segment_ids=torch.where(sources < 0, -1, 0),
            decoder_input_ids=written,
            padding=sources < 0,
        )

    def _masked(self, batch: Batch, window: np.ndarray, where: np.ndarray, seed: int) -> Batch:
        inputs, labels = collate.masked(
            window, where, seed, mask_id=self._mask_id, vocab_size=self._vocab_size, spared=(self._eos_id,)
        )
        batch = replace(batch, input_ids=self._put(inputs), labels=self._put(labels))
        behind = window[:, :-1] < 0
        if not behind.any():
            return batch
        of_padding = self._put(behind)
        segments = torch.zeros_like(batch.input_ids) if batch.segment_ids is None else batch.segment_ids
        return replace(batch, segment_ids=segments.masked_fill(of_padding, -1))

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
