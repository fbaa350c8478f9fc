"""Validation over the whole held-out text: the same batches, whatever the number of ranks.

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
from model.batch import IGNORE, ModelOutput
from model.masks.telemetry import KEPT
from pretrain.config.schema import Config
from pretrain.engine.distributed import Ranks
from pretrain.evaluation.batches import Batches
from pretrain.metric_names import BITS_PER_BYTE, VALIDATION, VALIDATION_DRAFT, of_validation

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
    edge: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Predict what `batches` asks for of the held-out text, in non-overlapping windows: every token but the first.

    The gates are averaged over tokens, of a decoder that reads another sequence over labels, and then over the masks.

    Args:
        text_bytes: UTF-8 bytes of that text by source, for bits per byte.
        batch: windows of a forward pass on each rank.
        edge: called before each batch, as often on every rank; may raise to break off.

    Returns:
        `loss/val` (nats a label), `loss/val_bits_per_byte` if every token is predicted, `loss/val_draft` (nats a hidden
        label) of a model that drafts, and the gates' means under evaluation rounding as `gate/val_…`. Where the text is
        of several sources, of each that has labels, too: `loss/val/NAME` and `loss/val_bits_per_byte/NAME`, of which
        the first two are the means, weighted by labels and by bytes.

    Raises:
        DataError: there is nothing to predict.
    """
    model.eval()
    # Every rank makes the same number of forward passes (ZeRO-3 gathers in each); what is missing counts for nothing.
    rounds = math.ceil(len(windows) / (batch * ranks.world_size))
    sources = windows.sources if len(windows.sources) > 1 else []
    tally: dict[str, np.ndarray] = {VALIDATION: np.zeros((2, 1))}
    by_source = np.zeros((2, len(sources)))
    for index in range(rounds):
        edge()
        first = (index * ranks.world_size + ranks.rank) * batch
        indices = np.arange(first, min(first + batch, len(windows)))
        inputs = batches.of_validation(windows, indices)
        output: ModelOutput = model(inputs)
        counts = inputs.labels != IGNORE
        for name, sum_and_number in _sums(output.metrics, int(counts.sum())).items():
            tally[name] = tally.get(name, 0.0) + sum_and_number
        if sources and counts.any():
            assert output.by_token is not None
            of_labels, kept = output.by_token.double().cpu().numpy(), counts.cpu().numpy()
            which = np.broadcast_to(batches.sources_of_labels(windows, indices), kept.shape)[kept]
            by_source += [np.bincount(which, of_label, len(sources)) for of_label in (of_labels[kept], None)]
    table = ranks.sum(torch.from_numpy(np.hstack([*tally.values(), by_source]))).numpy()
    whole = dict(zip([*tally, *map(VALIDATION.of, sources)], table.T, strict=True))
    return _means(whole, text_bytes if batches.objective.predicts_every_token else {})


def _sums(metrics: Mapping[str, Tensor], predicted: int) -> dict[str, np.ndarray]:
    """Of a batch, the sum of something and of how many it is, [2, 1]: the losses of labels, and over positions those of
    each mask, such as `density/enc_ff/00`."""
    found: dict[str, np.ndarray] = {VALIDATION: np.array([[float(metrics["cross_entropy"]) * predicted], [predicted]])}
    drafts = metrics.get("draft_cross_entropy")
    if drafts is not None:
        found[VALIDATION_DRAFT] = np.array([[float(drafts) * predicted], [predicted]])
    for name, value in metrics.items():
        gate, _, mask = name.partition("/")
        if mask and gate in GATES:
            positions = float(metrics[f"{KEPT}/{mask}"][-1])
            found[name] = np.array([[float(value) * positions], [positions]])
    return found


def _means(whole: Mapping[str, np.ndarray], text_bytes: Mapping[str, int]) -> dict[str, float]:
    """What `evaluate` returns, of sums and numbers, [2] each, over all ranks; no bits per byte without bytes."""
    nats, labels = whole[VALIDATION]
    if not labels:
        raise DataError("the held-out text is too short: nothing in it is to be predicted; hold out more")
    result: dict[str, float] = {VALIDATION: float(nats / labels)}
    if text_bytes:
        result[BITS_PER_BYTE] = _bits(result[VALIDATION] * float(labels)) / sum(text_bytes.values())
    if VALIDATION_DRAFT in whole:
        result[VALIDATION_DRAFT] = float(whole[VALIDATION_DRAFT][0] / labels)
    for gate in GATES:
        if of_masks := [float(sums[0] / sums[1]) for name, sums in whole.items() if name.startswith(f"{gate}/")]:
            result[of_validation(gate)] = sum(of_masks) / len(of_masks)
    for name, (total, number) in whole.items():
        if name.startswith(VALIDATION.family) and number:
            source = name.removeprefix(VALIDATION.family)
            result[name] = float(total / number)
            if size := text_bytes.get(source):
                result[BITS_PER_BYTE.of(source)] = _bits(float(total)) / size
    return result


def _bits(nats: float) -> float:
    return nats / math.log(2)
