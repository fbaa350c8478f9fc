"""Ranks that share sequences learn, and tell, what one rank does."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from pretrain.config.schema import load
from pretrain.run import journal
from tests.distributed.test_weighing import PACKED, WINDOW, compare, uneven_texts, worse
from tests.runs import SMALL, duet

Ranks = Callable[..., list[Any]]
HEADS = ["model.width=32", "model.heads=8", "model.kv_heads=4"]
DECODER = "model.architecture=decoder_only"
ENCODER = ["model.architecture=encoder_only", "data.objective=masked"]
NO_MASKS = "model.learned_dropout.enabled=false"
EMBED = ["model.learned_dropout.source=embed", "model.learned_dropout.eval_rounding=sample"]
NEXT = "model.subtract_next_position=plain"
GATES = [NO_MASKS, "model.block_gates.kind=cosine", "model.block_gates.blocks=4"]
TWICE = ["model.recurrence.steps=2", "engine.activation_checkpointing=true"]
PONDER = ["model.recurrence.ponder.start_step=0", "model.recurrence.ponder.ramp_steps=0"]
HALT = ["model.recurrence.steps=5", "model.recurrence.halt=true", "model.recurrence.epsilon=0.193", *PONDER]
"""At first a token takes 3 steps or 4."""
SINES = "model.positions=sinusoidal"
RUNS = {
    "parallel": ["model.dropout=0.1", "model.attention_dropout=0", "model.z_loss=0.01", NEXT],
    "serial": ["data.objective=prefix", "model.topology=serial", SINES, *EMBED],
    "documents": [DECODER, PACKED, *WINDOW, "model.document_mask=true", "model.positions=rotary"],
    "gates": [DECODER, *WINDOW, *GATES, *TWICE],
    "masked": [*ENCODER, PACKED, NO_MASKS, "model.l0.enabled=true"],
    "halting": [DECODER, NO_MASKS, "data.objective=prefix", *HALT],
}
ALONE = (1, 1, 2, 1)
"""Stage, ranks, micro-batch, and ranks that share each sequence."""
SHARED = {
    "parallel": [(1, 4, 2, 2)],
    "serial": [(2, 2, 1, 2)],
    "documents": [(3, 4, 2, 4)],
    "gates": [(3, 2, 1, 2)],
    "masked": [(0, 2, 2, 2)],
    "halting": [(1, 4, 1, 4)],
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of documents of unequal length."""
    return str(uneven_texts(tmp_path_factory.mktemp("uneven")) / "texts")


def arguments(name: str, texts: str) -> list[str]:
    return [*SMALL, *HEADS, f"data.path={texts}", *RUNS[name]]


def test_ranks_that_share_sequences_learn_as_one_does(ranks: Ranks, texts: str) -> None:
    ways = {name: [ALONE, *SHARED[name]] for name in RUNS}
    assert not worse(compare(ranks, {name: arguments(name, texts) for name in RUNS}, ways))


def test_the_proof_fails_where_noise_does_not_know_its_place(ranks: Ranks, texts: str) -> None:
    args = {"parallel": arguments("parallel", texts)}
    assert worse(compare(ranks, args, {"parallel": [ALONE, (1, 2, 2, 2)]}, sabotage="columns"), than=1e-4)


def test_a_checkpoint_goes_on_where_other_numbers_of_ranks_share_sequences(texts: str, tmp_path: Path) -> None:
    """A run of two ranks that share sequences, and what one rank makes of its checkpoint: losses and counts."""
    steps = ["train.steps=3", "train.checkpoint_every=2", "train.eval_every=3"]
    args = [*arguments("documents", texts), *steps]
    shared = ["engine.sequence_parallel=2", "run.dir=shared", "--ranks", "2"]
    for more in (shared, ["--from", "shared@2", "engine.sequence_parallel=1", "run.dir=after"]):
        done = duet("train", *args, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    told = {}
    for name in ("shared", "after"):
        records = journal.read(tmp_path / name / "metrics.jsonl")
        told[name] = {(record.step, key): value for record in records for key, value in record.metrics.items()}
    assert told["shared"][3, "data/tokens_seen"] == 3 * 128
    for key in ("loss/total", "optim/grad_norm", "data/tokens_seen", "loss/val"):
        assert math.isclose(told["after"][3, key], told["shared"][3, key], rel_tol=1e-5), key


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["model.heads=6", "model.width=24"], "heads=6"),
        (["model.heads=8", "model.kv_heads=2"], "heads=8 in groups"),
        (["model.context=30", "batch.tokens=60"], "model.context=30"),
        (["model.architecture=encoder_decoder", "data.objective=pairs"], "encoder_decoder reads one sequence"),
        (["model.architecture=feedback"], "in feedback not only attention"),
        (["model.weights.kind=entmax"], "model.weights.kind=entmax"),
        (["model.encoder_loss.kind=mse"], "model.encoder_loss"),
        (["model.dropout=0.1"], "model.attention_dropout=0"),
        (["model.pattern.kind=fixed", "model.pattern.merge=heads"], "model.pattern.merge=heads"),
        (["engine.compile=true"], "engine.compile"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused(args: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match="engine.sequence_parallel=4") as caught:
        load(["model.heads=8", NO_MASKS, "engine.sequence_parallel=4", *args])
    assert said in str(caught.value)


GROUPS = ["model.heads=8", "model.context=16", "batch.tokens=96", "engine.sequence_parallel=4"]


def test_ranks_are_whole_groups() -> None:
    config = load(GROUPS)
    assert config.micro_batches(8) == (3, 1)
    with pytest.raises(ConfigError, match=r"6 rank\(s\) are no whole number of such groups; nearest: 4 or 8 ranks"):
        config.micro_batches(6)
    with pytest.raises(ConfigError, match="numbers of ranks that can: 12 or 24;"):
        config.micro_batches(16)
    with pytest.raises(ConfigError, match="does not divide the 3 sequences that 4 ranks, which share them, have of"):
        load([*GROUPS, "batch.micro_batch=2"]).micro_batches(8)
