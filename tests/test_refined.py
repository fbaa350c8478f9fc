"""A refined model through the command line: trained on some ranks, gone on with on others, and used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from pretrain.config.schema import load
from pretrain.export.use import evaluate_run, open_trained
from pretrain.report.report import write_report
from pretrain.run.journal import read
from tests.runs import SMALL, attempts, duet

REFINED = [*SMALL, "model.architecture=refined", "schedule.kind=constant"]
TRAIN = "tests.distributed.cases:train_run"
STEPS = "model.refine.steps"


@pytest.fixture(scope="module")
def run(ranks: Callable[..., list[Any]], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on one rank at stage 1, two more on two ranks at stage 3, where a sample is written, too."""
    folder = tmp_path_factory.mktemp("refined")
    args = [*REFINED, "model.refine.chunk=4", "model.refine.reweight=true", f"data.path={dataset}"]
    args += ["train.eval_every=2", "train.sample_tokens=6"]
    for name, steps in (("whole", 4), ("parted", 2)):
        ranks(TRAIN, 1, args=[*args, f"run.dir={folder / name}", f"train.steps={steps}"])
    more = ["train.steps=4", "engine.zero_stage=3", "batch.micro_batch=2", "engine.activation_checkpointing=true"]
    ranks(TRAIN, 2, args=[*args, f"run.dir={folder / 'parted'}", *more])
    return folder / "parted"


def test_it_learns_the_same_on_other_ranks_and_at_another_stage(run: Path) -> None:
    [(_, whole)] = attempts(run.with_name("whole") / "metrics.jsonl")
    [(_, first), (resumed_from, then)] = attempts(run / "metrics.jsonl")
    assert (list(first), resumed_from, list(then)) == ([1, 2], 2, [3, 4])
    for name in ("loss/train", "loss/earlier_step", "loss/total", "refine/change/04"):
        assert [step[name] for step in (first | then).values()] == pytest.approx(
            [step[name] for step in whole.values()], abs=1e-3
        ), name
    validations = [r.metrics for r in read(run / "metrics.jsonl") if "loss/val" in r.metrics]
    assert all("loss/val_bits_per_byte" in metrics for metrics in validations)
    assert [r for r in read(run / "metrics.jsonl") if r.kind == "sample"]
    page = write_report([run], None).read_text()
    assert "Change of the vectors by step of refinement" in page
    assert "Loss read from an earlier step" in page


def test_it_thinks_longer_where_it_is_asked_to(run: Path, tmp_path: Path) -> None:
    plain = evaluate_run(run, None)["loss/val"]
    said = duet("eval", str(run), "--set", f"{STEPS}=4,1,9", "--plot", str(tmp_path / "steps.png"))
    assert said.returncode == 0, said.stderr
    found = dict(line.split("  ")[:2] for line in said.stdout.splitlines())
    assert found[f"{STEPS}=4"] == f"loss/val {plain:.6f}"
    assert len(set(found.values())) == 3
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    texts = []
    for steps in ("1", "9"):
        prompt = ["--prompt", "the ", "--prompt", "", "--tokens", "20", "--json", "--html", str(tmp_path / "page.html")]
        said = duet("generate", str(run), *prompt, "--greedy", "--set", f"{STEPS}={steps}")
        assert said.returncode == 0, said.stderr
        texts.append([json.loads(line) for line in said.stdout.splitlines()])
    one, nine = ([[token["log_probability"] for token in text["tokens"]] for text in found] for found in texts)
    assert [len(tokens) for tokens in one] == [24, 21]
    assert one != nine
    assert "enc_ff/01" in texts[0][0]["density"], "the step counts as a layer of the encoder"
    assert "dec_sa/00" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "model.layers=2",
            "--set model.layers: it may not change in a trained model; of refined these may: model.refine",
        ),
        (STEPS, "expected KEY=VALUE"),
        (f"{STEPS}=many", r"model\.refine\.steps: Input should be a valid integer"),
        (f"{STEPS}=0", "reweight and refine.gradient mean nothing"),
    ],
)
def test_what_a_trained_model_cannot_be_told_is_refused(run: Path, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_trained(run, None, [words])
    said = duet("eval", str(run), "--set", words)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith("error: --set ")


def test_a_gradient_step_is_trained_but_where_the_table_is_divided(
    ranks: Callable[..., list[Any]], dataset: Path, tmp_path: Path
) -> None:
    """And a prefix, from which a prompt is continued."""
    model = [*REFINED, "model.refine.form=prefix", "model.refine.gradient=true", "data.objective=prefix"]
    args = [*model, "train.steps=2", f"data.path={dataset}"]
    with pytest.raises(ConfigError, match=r"engine.zero_stage=3: model.refine.gradient reads the whole token table"):
        load([*args, "engine.zero_stage=3"])
    for name, world, more in (("one", 1, "engine.zero_stage=0"), ("two", 2, "engine.zero_stage=2")):
        ranks(TRAIN, world, args=[*args, "batch.micro_batch=2", more, f"run.dir={tmp_path / name}"])
    journals = [tmp_path / name / "metrics.jsonl" for name in ("one", "two")]
    one, two = ([step["loss/total"] for step in attempts(journal)[0][1].values()] for journal in journals)
    assert two == pytest.approx(one, abs=2e-4)
    said = duet("generate", str(tmp_path / "one"), "--prompt", "the first", "--tokens", "20", "--greedy", "--json")
    assert said.returncode == 0, said.stderr
    [text] = [json.loads(line) for line in said.stdout.splitlines()]
    drawn = [token for token in text["tokens"] if not token["prompt"]]
    assert len(drawn) == 20
    assert all(token["rank"] == 1 for token in drawn)
