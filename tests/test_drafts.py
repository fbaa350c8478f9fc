"""A run of a model that drafts, through the command line: trained on pairs, gone on with, written with, exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError
from model.generation.sampling import Sampling
from pretrain.export.harness import DuetLM
from pretrain.export.use import open_trained
from pretrain.inference.continuation import Continuation, Settings
from pretrain.run.journal import read
from tests.runs import SMALL, duet

MODEL = ["model.architecture=draft_and_verify", "data.objective=pairs"]
SITES = "model.learned_dropout.sites=[enc_ff,dec_ff,draft_ff,embed]"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of one to six letters, and the same with each letter twice."""
    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("doubled")
    words = ["".join(rng.choice(list("abcdef"), length)) for length in rng.integers(1, 7, 300)]
    lines = [json.dumps({"text": word, "target": "".join(letter * 2 for letter in word)}) for word in words]
    (folder / "words.jsonl").write_text("\n".join(lines) + "\n")
    sources = {"words": {"paths": [str(folder / "words.jsonl")], "target_key": "target"}}
    settings = {"path": str(folder / "data"), "sources": sources, "tokenizer": {"type": "char"}}
    build(DataConfig.model_validate(settings | {"split": {"rule": "hash", "fraction": 0.1}}))
    return folder / "data"


def losses(folder: Path) -> dict[int, list[float]]:
    """By step: of tokens, drafts, lengths, and of validation where there was one."""
    found: dict[int, list[float]] = {}
    for record in read(folder / "metrics.jsonl"):
        if record.kind == "metrics" and record.step is not None:
            names = [name for name in sorted(record.metrics) if name.startswith("loss/")]
            found.setdefault(record.step, []).extend(record.metrics[name] for name in names)
    return found


def test_a_run_goes_on_at_another_stage_writes_and_is_exported(
    ranks: Callable[..., list[Any]], pairs: Path, tmp_path: Path
) -> None:
    steps = ["train.steps=6", "train.eval_every=3", "train.checkpoint_every=3"]
    args = [*SMALL, *MODEL, *steps, SITES, f"data.path={pairs}"]
    case, run = "tests.distributed.cases:train_run", tmp_path / "moved"
    ranks(case, 1, args=[*args, f"run.dir={tmp_path / 'whole'}", "engine.zero_stage=2"])
    moved = [*args, f"run.dir={run}"]
    with pytest.raises(Exception, match="exit codes"):
        ranks(case, 2, args=[*moved, "engine.zero_stage=3"], die_at=5, wait_for_saves=True)
    ranks(case, 1, args=[*moved, "engine.zero_stage=1", "batch.micro_batch=4"])
    whole, again = losses(tmp_path / "whole"), losses(run)
    for step in (4, 5, 6):
        assert again[step][-len(whole[step]) :] == pytest.approx(whole[step], abs=1e-4)
    assert len(whole[2]) == 4, "total, tokens, drafts and lengths"

    said = {}
    for way in (["ar"], ["verify"], ["nar", "--candidates", "3"], ["mask_predict", "--iterations", "2"]):
        done = duet("generate", str(run), "--prompt", "abc", "--prompt", "fd", "--greedy", "--decode", *way)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("== 1 of 2 ==\nabc ⟶ ")
        assert f"{way[0]} 2 of 2: " in done.stderr and "passes of the decoder that writes" in done.stderr
        said[way[0]] = done.stdout
    assert said["verify"] == said["ar"]
    continuation = Continuation(open_trained(run), ["abc"], Settings(Sampling(temperature=0.0), 100))
    passes = [passes.writes for _ in continuation.pieces() for passes in continuation.passes or []]
    assert passes[0] == 1 < passes[-1], "what is certain is shown before the rest is drafted"
    page = tmp_path / "page.html"
    done = duet("generate", str(run), "--prompt", "abc", "--json", "--html", str(page))
    [record] = [json.loads(line) for line in done.stdout.splitlines()]
    assert record["drafting"] == {"decode": "verify", "iterations": 10, "candidates": 1}
    assert record["passes"]["encoder"] == 1 <= record["passes"]["drafts"] == record["passes"]["writes"]
    drawn = [token for token in record["tokens"] if not token["prompt"]]
    assert drawn[0]["draft"]["id"] >= 0 and all(
        len(shares) == len(record["tokens"]) for shares in record["density"].values()
    )
    assert {mask[:-3] for mask in record["density"]} == {"enc_ff", "dec_ff", "embed"}
    assert '"draft": {"id"' in page.read_text()

    refused = duet("generate", str(run), "--prompt", "a", "--decode", "refine")
    assert refused.returncode == 2 and "was trained with draft.refine=true; take verify" in refused.stderr
    assert duet("checkpoint", "export", str(run), "--to", str(tmp_path / "exported")).returncode == 0
    done = duet("generate", str(tmp_path / "exported"), "--prompt", "abc", "--prompt", "fd", "--greedy")
    assert done.stdout == said["ar"]
    with pytest.raises(ConfigError, match="does not give the next token of one text"):
        DuetLM(open_trained(run))


def test_a_model_that_does_not_draft_has_no_way_to_choose(tmp_path: Path) -> None:
    done = duet("generate", str(tmp_path), "--prompt", "a", "--candidates", "3")
    assert done.returncode == 2 and "--iterations and --candidates belong to --decode" in done.stderr
