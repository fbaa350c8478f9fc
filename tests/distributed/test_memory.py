"""What is counted of a rank's memory is what its resident memory grows by, within 15 %."""

import pytest

from tests.conftest import RunRanks

_OF_SIZE = ["model.heads=8", "model.vocab_size=8192"]
_OFF = "model.learned_dropout.enabled=false"
MODELS = {
    "decoder": [*_OF_SIZE, "model.architecture=decoder_only", _OFF, "model.layers=4", "model.width=512"],
    "parallel": [*_OF_SIZE, "model.layers=2", "model.width=384"],
    "t5": [
        *_OF_SIZE,
        "model.architecture=encoder_decoder",
        "data.objective=span_corruption",
        "model.positions=rotary",
        _OFF,
        "model.layers=2",
        "model.width=512",
    ],
}
CONTEXT = 256
AGAIN = "engine.activation_checkpointing=true"
CASES = [
    ("decoder", 1, 1, "bf16", 8, 2, []),
    ("parallel", 2, 3, "fp32", 4, 1, [AGAIN]),
    ("t5", 1, 0, "fp32", 8, 1, []),
]
MORE = [
    ("decoder", 1, 0, "fp32", 8, 1, []),
    ("decoder", 1, 1, "fp32", 8, 2, [AGAIN]),
    ("decoder", 2, 1, "bf16", 12, 1, ["model.norm=rmsnorm", "model.ff=swiglu", "model.attention=explicit"]),
    ("decoder", 1, 1, "bf16", 8, 1, ["optimizer.kind=adamw8bit"]),
    ("decoder", 1, 3, "bf16", 2, 2, []),
    ("parallel", 1, 1, "fp32", 6, 1, []),
    ("parallel", 2, 1, "bf16", 6, 2, []),
    ("parallel", 2, 1, "fp32", 2, 1, ["model.dropout=0.1"]),
    ("parallel", 2, 2, "bf16", 8, 1, [AGAIN]),
    ("parallel", 2, 2, "fp32", 4, 2, []),
    ("t5", 2, 1, "fp32", 8, 1, []),
    ("t5", 2, 1, "bf16", 16, 2, [AGAIN]),
    ("t5", 2, 3, "bf16", 16, 1, []),
]
Case = tuple[str, int, int, str, int, int, list[str]]


def check(ranks: RunRanks, case: Case) -> None:
    model, world, stage, precision, micro_batch, accumulation, more = case
    args = [
        *MODELS[model],
        f"model.context={CONTEXT}",
        f"batch.tokens={CONTEXT * micro_batch * accumulation * world}",
        f"batch.micro_batch={micro_batch}",
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
        *more,
    ]
    for counted, measured, moment in ranks("tests.distributed.memory_cases:growth", world, args=args):
        print(f"{model} ZeRO {stage} {precision} {micro_batch} x {accumulation} on {world} {' '.join(more)}: "
              f"counted {counted / 2**20:.0f} MiB ({moment}), measured {measured / 2**20:.0f} MiB, "
              f"{counted / measured:.3f}")
        assert counted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_grows_by_what_is_counted(ranks: RunRanks, case: Case) -> None:
    check(ranks, case)


@pytest.mark.drill
@pytest.mark.parametrize("case", MORE, ids=str)
def test_memory_grows_by_what_is_counted_elsewhere(ranks: RunRanks, case: Case) -> None:
    check(ranks, case)
