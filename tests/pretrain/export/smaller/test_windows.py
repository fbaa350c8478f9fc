"""A run that learns spans, from its journal to a model with windows that predicts the same and keeps less."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from model.attention.cache import Cache
from pretrain.export.smaller.windows import _check
from pretrain.export.use import evaluate_run, open_trained
from pretrain.metric_names import SPAN, VALIDATION
from pretrain.run import journal
from pretrain.run.run_folder import RunFolder
from tests.model.helpers import small
from tests.pretrain.export.smaller.test_gates import shrink
from tests.runs import SMALL

Ranks = Callable[..., list[Any]]
SPANS = ["kind=adaptive_span", "ramp=2", "span_init=0.6", "penalty.start_step=0", "penalty.ramp_steps=0"]


def test_learned_spans_become_windows_that_change_nothing(
    ranks: Ranks, dataset: Path, run: Path, tmp_path: Path
) -> None:
    keys = [*SMALL, *(f"model.weights.{key}" for key in SPANS), "model.learned_dropout.enabled=false", "train.steps=3"]
    for name, more in (("spans", []), ("masks", ["model.learned_dropout.enabled=true"])):
        folder = ["train.eval_every=3", f"data.path={dataset}", f"run.dir={tmp_path / name}"]
        ranks("tests.distributed.cases:train_run", 1, args=[*keys, *folder, *more])
    told = journal.series(journal.read(RunFolder(tmp_path / "spans").journal))
    spans = [told[name][-1].value for name in told if name.startswith(SPAN.family)]
    assert len(spans) == 2 + 2 + 4, "of each head of encoder, decoder and cross attention"
    assert max(spans) < told[SPAN][0].value == pytest.approx(0.6 * 16)
    said = shrink(tmp_path / "spans", "--spans", "--to", tmp_path / "windows")
    before = evaluate_run(tmp_path / "spans", None)[VALIDATION]
    assert f"validation loss: {before:.6f} before, {before:.6f} after" in said
    whole, windowed = (open_trained(tmp_path / name).model.double() for name in ("spans", "windows"))
    [width] = windowed.config.pattern.windows  # type: ignore[attr-defined]
    assert f"windows by layer: {width} tokens" in said
    assert width < 16
    ids = torch.randint(1, 32, (2, 16))
    torch.testing.assert_close(windowed.logits(ids), whole.logits(ids), rtol=0, atol=1e-12)
    caches = [Cache(torch.tensor([0, 2]), 16) for _ in range(2)]
    for part in ids.split([8, 1, 6, 1], dim=1):
        kept, all_kept = (cache.logits(model, part) for cache, model in zip(caches, (windowed, whole), strict=True))
        torch.testing.assert_close(kept, all_kept, rtol=0, atol=1e-12)
    assert {keys.shape[2] for keys, _ in caches[0]._stored.values()} == {width}
    with pytest.raises(ConfigError, match="would see less, and the masks would be others"):
        shrink(tmp_path / "masks", "--spans", "--to", tmp_path / "other")
    with pytest.raises(ConfigError, match="there are no spans"):
        shrink(run, "--spans", "--to", tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architecture": "refined", "refine": {"chunk": 4}}, "the decoder reads whole chunks"),
        ({"architecture": "draft_and_verify", "draft": {"layers": 3}}, "draft.layers=3 are more"),
    ],
)
def test_spans_stay_where_windows_cannot_stand(changes: dict[str, Any], why: str) -> None:
    shape = small(**changes, weights={"kind": "adaptive_span"}, learned_dropout={"enabled": False})
    with pytest.raises(ConfigError, match=why):
        _check(shape)
