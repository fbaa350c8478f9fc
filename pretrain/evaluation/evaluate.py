"""Validation over the held-out text, or a part of it: the same batches, whatever the number of ranks.

The text is one stream, and a window may begin in one source and end in the next; what a source comes to is told by
its labels, so it costs no pass of its own.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.errors import DataError
from data_pipeline.sampling.kinds import AnyWindows, kind_of, open_windows
from data_pipeline.storage.dataset import Dataset
from model.batch import IGNORE, Batch, ModelOutput
from model.masks.telemetry import KEPT
from pretrain.config.schema import Config
from pretrain.engine.distributed import Ranks
from pretrain.evaluation.batches import Batches
from pretrain.evaluation.labels import label_scores, label_sums
from pretrain.evaluation.part import HeldOutPart
from pretrain.metric_names import (
    BITS_PER_BYTE,
    VALIDATION,
    VALIDATION_DRAFT,
    VALIDATION_IN_ORDER,
    VALIDATION_PART,
    VALIDATION_PONDER,
    Metric,
    of_validation,
)

GATES = ("density", "mask_mean")
"""What validation tells of the masks."""


def held_out(dataset: Dataset, config: Config) -> AnyWindows:
    """The windows that are validated on. Raises DataError when the held-out text is too short."""
    kind = kind_of(dataset, config.data)
    # Spans are cut out of whole windows.
    partial = config.data.objective != "span_corruption"
    return open_windows(dataset, kind, "validation", config.model.context, partial=partial)


def held_out_bytes(dataset: Dataset) -> dict[str, int]:
    """UTF-8 bytes of the held-out text of each source, for bits per byte."""
    return {source.name: source.split_bytes["validation"] for source in dataset.manifest.sources}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: AnyWindows,
    text_bytes: Mapping[str, int],
    batch: int,
    ranks: Ranks,
    batches: Batches,
    edge: Callable[[int, int], object] = lambda done, total: None,
    *,
    part: HeldOutPart | None = None,
    whole: bool = True,
) -> dict[str, float]:
    """Predict what `batches` asks for of the held-out text, in non-overlapping windows: every token but the first.

    The gates are averaged over tokens, of a decoder that reads another sequence over labels, and then over the masks.

    Args:
        text_bytes: UTF-8 bytes of that text by source, for bits per byte.
        batch: windows of a forward pass on each rank, or on ranks that share rows.
        edge: called before each batch on every rank, with how many are done and of how many; may raise to break off.
        part: what is predicted instead, if not the `whole` text; else what is told of beside it.

    Returns:
        `loss/val` (nats a label), `loss/val_bits_per_byte` if every token is predicted, `loss/val_draft` (nats a hidden
        label) of a model that drafts, and the gates' means under evaluation rounding as `gate/val_…`;
        `ponder/val_steps` where tokens halt; `loss/val_in_order` where the model learns from other orders than the
        text's, of which bits per byte are then; `labels/val_…`, how often labels of texts are right. Where the text is
        of several sources, of each that has labels, too: `loss/val/NAME` and `loss/val_bits_per_byte/NAME`, of which
        the first two are the means, weighted by labels and by bytes. A part's bytes are those that its labels would
        have if they were of the mean length in their source. `loss/val_part`, the loss of `part`, beside that of the
        whole text.

    Raises:
        DataError: there is nothing to predict.
    """
    model.eval()
    # Every rank makes the same number of forward passes (ZeRO-3 gathers in each); what is missing counts for nothing.
    chosen = part.windows if part and not whole else np.arange(len(windows))
    beside = np.isin(chosen, part.windows) if part and whole else None
    rounds = math.ceil(len(chosen) / (batch * ranks.readers))
    sources = windows.sources if len(windows.sources) > 1 else []
    tally = {name: np.zeros(2) for name in _told(batches, sources, part=beside is not None)}
    for index in range(rounds):
        edge(index, rounds)
        first = (index * ranks.readers + ranks.reader) * batch
        rows = None if beside is None else beside[first : first + batch]
        for name, sum_and_number in _of_batch(model, windows, chosen[first : first + batch], batches, rows).items():
            tally[name] = tally.get(name, 0.0) + sum_and_number
    table = ranks.sum(torch.from_numpy(np.stack([*tally.values()]))).numpy()
    return _means(dict(zip(tally, table, strict=True)), text_bytes if part is None or whole else part, batches)


def _told(batches: Batches, sources: list[str], *, part: bool) -> list[str]:
    """The losses, of all and of each source: every rank adds up the same."""
    losses = [VALIDATION] if batches.in_order is None else [VALIDATION, VALIDATION_IN_ORDER]
    return [*losses, *([VALIDATION_PART] if part else []), *(loss.of(name) for loss in losses for name in sources)]


def _of_batch(
    model: nn.Module, windows: AnyWindows, indices: np.ndarray, batches: Batches, rows: np.ndarray | None
) -> dict[str, np.ndarray]:
    """What is counted of a batch, [2]: sum and number; of its `rows`, bool [B], too, if there are any given."""
    inputs = batches.of_validation(windows, indices)
    output: ModelOutput = model(inputs)
    tokens = int(inputs.num_tokens()) if len(indices) else 0  # a row that counts for nothing
    found = _sums(output.metrics, int((inputs.labels != IGNORE).sum()), tokens)
    if output.chosen is not None:
        found |= label_sums(output.chosen, inputs.labels, batches.objective.setting.labels)
    if len(indices) and len(windows.sources) > 1:
        found |= _by_source(output, inputs, windows.sources, batches.sources_of_labels(windows, indices, inputs))
    if len(indices) and rows is not None:
        found[VALIDATION_PART] = _of_rows(output, inputs, rows)
    if batches.in_order is not None:
        plain = _of_batch(model, windows, indices, batches.in_order, None)
        found[VALIDATION_IN_ORDER] = plain[VALIDATION]
        found |= {VALIDATION_IN_ORDER.of(source): of for source, of in _of_sources(plain, VALIDATION).items()}
    return found


def _sums(metrics: Mapping[str, Tensor], predicted: int, tokens: int) -> dict[str, np.ndarray]:
    """Of a batch, the sum of something and of how many it is, [2]: the losses of labels, and over positions those of
    each mask, such as `density/enc_ff/00`."""
    found: dict[str, np.ndarray] = {VALIDATION: np.array([float(metrics["cross_entropy"]) * predicted, predicted])}
    if "ponder_steps" in metrics:
        found[VALIDATION_PONDER] = np.array([float(metrics["ponder_steps"]) * tokens, tokens])
    if "draft_cross_entropy" in metrics:
        found[VALIDATION_DRAFT] = np.array([float(metrics["draft_cross_entropy"]) * predicted, predicted])
    for name, value in metrics.items():
        gate, _, mask = name.partition("/")
        if mask and gate in GATES:
            positions = float(metrics[f"{KEPT}/{mask}"][-1])
            found[name] = np.array([float(value) * positions, positions])
    return found


def _by_source(output: ModelOutput, inputs: Batch, sources: list[str], which: np.ndarray) -> dict[str, np.ndarray]:
    """The losses of labels and their number, [2], of each source; `which` has its number for each label."""
    of_labels, kept = _losses(output, inputs)
    number = np.broadcast_to(which, kept.shape)[kept]
    table = np.stack([np.bincount(number, of_label, len(sources)) for of_label in (of_labels[kept], None)], axis=1)
    return {VALIDATION.of(name): row for name, row in zip(sources, table, strict=True)}


def _of_rows(output: ModelOutput, inputs: Batch, rows: np.ndarray) -> np.ndarray:
    """The losses of labels and their number, [2], in the windows where `rows`, bool [B], is true."""
    of_labels, kept = _losses(output, inputs)
    return np.array([of_labels[rows][kept[rows]].sum(), kept[rows].sum()])


def _losses(output: ModelOutput, inputs: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Of each label, float64 [B, T]; and whether it counts, bool [B, T]."""
    assert output.by_token is not None
    return output.by_token.double().cpu().numpy(), (inputs.labels != IGNORE).cpu().numpy()


def _means(
    whole: Mapping[str, np.ndarray], text: Mapping[str, int] | HeldOutPart, batches: Batches
) -> dict[str, float]:
    """What `evaluate` returns, of sums and numbers, [2] each, over all ranks; no bits per byte without bytes."""
    nats, labels = whole[VALIDATION]
    if not labels:
        raise DataError(
            "nothing in the held-out text is to be predicted: hold out more; of answers, none stands whole within "
            "model.context"
        )
    sources, spelt = _of_sources(whole, VALIDATION), VALIDATION if batches.in_order is None else VALIDATION_IN_ORDER
    of_text = _of_sources(whole, spelt)
    text_bytes = _bytes_of(text, of_text or {"": whole[spelt]}) if isinstance(text, HeldOutPart) else text
    result: dict[str, float] = {VALIDATION: float(nats / labels)}
    if (of_part := whole.get(VALIDATION_PART)) is not None and of_part[1]:
        result[VALIDATION_PART] = float(of_part[0] / of_part[1])
    if not (batches.in_order or batches).objective.predicts_every_token:
        text_bytes = {}
    result |= label_scores(whole)
    if text_bytes:
        nats, labels = whole[spelt]
        result[BITS_PER_BYTE] = _bits(float(nats / labels) * float(labels)) / sum(text_bytes.values())
    for name in (VALIDATION_PONDER, VALIDATION_DRAFT, VALIDATION_IN_ORDER):
        if name in whole:
            result[name] = float(whole[name][0] / whole[name][1])
    for gate in GATES:
        if of_masks := [float(sums[0] / sums[1]) for name, sums in whole.items() if name.startswith(f"{gate}/")]:
            result[of_validation(gate)] = sum(of_masks) / len(of_masks)
    for source, (total, number) in sources.items():
        if number:
            result[VALIDATION.of(source)] = float(total / number)
    for source, (total, number) in of_text.items():
        if number and (size := text_bytes.get(source)):
            result[BITS_PER_BYTE.of(source)] = _bits(float(total)) / size
    return result


def _of_sources(sums: Mapping[str, np.ndarray], loss: Metric) -> dict[str, np.ndarray]:
    """What is there of a loss, by source."""
    return {name.removeprefix(loss.family): of for name, of in sums.items() if name.startswith(loss.family)}


def _bytes_of(part: HeldOutPart, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of a part's text, by source: its labels have the length that those of the whole text have in the mean."""
    return {name: labels * part.bytes_per_label[name] for name, (_, labels) in sums.items()}


def _bits(nats: float) -> float:
    return nats / math.log(2)
