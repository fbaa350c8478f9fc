"""How often labels are right: sums and numbers of a batch, [2] each, that add up over batches and ranks."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from model.batch import IGNORE
from pretrain.metric_names import VALIDATION_ACCURACY, VALIDATION_EXACT, VALIDATION_F1


def label_sums(chosen: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Of what a model chose in the place of labels, [B, L] both, which have `names`; none where they are places.

    F1 of a label is 2 hits / (chosen + given): hits are its sum, and half of the others its number. Of answers it is
    that of the tokens in both, a mean over answers (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1).
    """
    given, found = labels.cpu().numpy(), chosen.cpu().numpy()
    kept = given != IGNORE
    if not names:
        return _of_answers(found[kept[:, 0]], given[kept[:, 0]])
    found, given = found[kept], given[kept]
    hits = found == given
    told: dict[str, np.ndarray] = {VALIDATION_ACCURACY: np.array([hits.sum(), hits.size], float)}
    count = len(names)
    both = np.bincount(found, minlength=count) + np.bincount(given, minlength=count)
    for name, hit, of in zip(names, np.bincount(given[hits], minlength=count), both, strict=True):
        told[VALIDATION_F1.of(name)] = np.array([hit, of / 2])
    return told


def label_scores(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What validation tells: shares, F1 of each label that there is, and its mean over these (macro F1)."""
    names = (VALIDATION_ACCURACY, VALIDATION_EXACT, VALIDATION_F1)
    told = {str(name): float(sums[name][0] / sums[name][1]) for name in names if name in sums and sums[name][1]}
    of_labels = {name: of for name, of in sums.items() if name.startswith(VALIDATION_F1.family)}
    each = {name: float(hit / of) for name, (hit, of) in of_labels.items() if of}
    if each:
        told[VALIDATION_F1] = sum(each.values()) / len(each)
    return told | each


def _of_answers(found: np.ndarray, given: np.ndarray) -> dict[str, np.ndarray]:
    """First and last tokens, int64 [n, 2] both."""
    common = np.minimum(found[:, 1], given[:, 1]) - np.maximum(found[:, 0], given[:, 0]) + 1
    sizes = (found[:, 1] - found[:, 0] + 1) + (given[:, 1] - given[:, 0] + 1)
    exact = (found == given).all(axis=1)
    return {
        VALIDATION_EXACT: np.array([exact.sum(), len(exact)], float),
        VALIDATION_F1: np.array([(2 * common.clip(min=0) / sizes).sum(), len(exact)], float),
    }
