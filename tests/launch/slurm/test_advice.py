"""What does not fit a GPU, and what submit and plan advise then: only what the configuration allows."""

import re

import pytest
import yaml

from data_pipeline.errors import ConfigError
from launch.slurm import checks
from launch.slurm.site import Cluster
from model.gpus import GPUS, Gpu
from pretrain.config.schema import load
from pretrain.planning.costs import changed, costs
from pretrain.planning.memory import state_bytes

KINDS = ("adamw", "adamw8bit", "muon")
ENGINES = [
    [f"optimizer.kind={kind}", f"engine.precision={precision}", f"engine.zero_stage={stage}", "optimizer.clip=0", *more]
    for kind in KINDS
    for precision in ("bf16", "fp32", "fp16")
    for stage in range(4)
    for more in (
        [],
        ["model.architecture=encoder_decoder", "model.norm=batchnorm", "data.objective=span_corruption"],
        ["engine.hpz_partition_size=2"],
        ["engine.offload=cpu"],
        ["engine.activation_checkpointing=true"],
    )
]
ADVICE = re.compile(r"\b((?:engine|optimizer|model|batch)\.\w+=[\w.]+)((?: (?:engine|batch)\.\w+=[\w.]+)*)")


def test_all_that_is_advised_the_configuration_allows() -> None:
    """What submit and plan name when a run does not fit, and what an impossible configuration is told to change."""
    big = ["model.width=2048", "model.heads=16", "model.layers=12", "model.vocab_size=5000", "batch.tokens=65536"]
    advised, refused = set(), 0
    for engine in ENGINES[::7]:
        try:
            config = load([*big, *engine])
        except ConfigError as error:
            refused += 1
            for found in ADVICE.finditer(str(error).partition("; use ")[2]):
                _follow([*big, *engine], found[1])
            continue
        for size in (2, 16):
            try:
                site = Cluster(gpus_per_node=4, gpu_memory_gib=size)
                [finding] = checks.check_memory(config, site)
                told = finding.text if finding.warning else ""
            except ConfigError as error:
                told = str(error)
            proposals = [told.partition("What would")[2], *costs(config, 4, _gpu(size), 0.4).fitting]
            for found in ADVICE.finditer(", ".join(proposals)):
                changes = found[0].split()
                advised.add(tuple(change.partition("=")[0] for change in changes))
                # It raises where the configuration refuses.
                changed(config, {key: yaml.safe_load(value) for key, _, value in (c.partition("=") for c in changes)})
    assert refused > 10
    assert len(advised) > 4


@pytest.mark.parametrize(
    ("args", "never"),
    [
        (["optimizer.kind=muon", "engine.zero_stage=2", "optimizer.clip=0"], "engine.offload"),
        (
            ["model.architecture=encoder_decoder", "model.norm=batchnorm", "data.objective=span_corruption"],
            "engine.activation_checkpointing",
        ),
    ],
)
def test_what_the_configuration_refuses_is_not_advised(args: list[str], never: str) -> None:
    config = load(["model.width=2048", "model.layers=12", "model.vocab_size=5000", "batch.tokens=65536", *args])
    for size in (2, 4, 8, 16):
        try:
            [finding] = checks.check_memory(config, Cluster(gpus_per_node=4, gpu_memory_gib=size))
            assert never not in finding.text
        except ConfigError as error:
            assert "What would fit" in str(error)
            assert never not in str(error)


def _gpu(gib: float) -> Gpu:
    return GPUS["h100"]._replace(memory_gb=gib * 2**30 / 1e9)  # type: ignore[arg-type]


def _refusal(args: list[str]) -> str | None:
    try:
        load(args)
    except ConfigError as error:
        return str(error)
    return None


def _follow(args: list[str], advice: str) -> None:
    """Change what is advised, and what is advised then: no key twice, until the configuration is possible."""
    changes: dict[str, str] = {}
    while True:
        key, _, value = advice.partition("=")
        assert key not in changes, f"{args}: {advice} after {changes}"
        changes[key] = value
        told = _refusal([*args, *(f"{key}={value}" for key, value in changes.items())])
        found = ADVICE.search(told.partition("; use ")[2]) if told else None
        if found is None:
            return
        advice = found[1]


def test_plan_and_submit_agree_on_what_fits() -> None:
    for engine in ENGINES[::7]:
        args = ["model.width=1024", "model.heads=16", "model.layers=8", "model.vocab_size=5000", "batch.tokens=65536"]
        if _refusal([*args, *engine]) is None:
            config = load([*args, *engine])
            for size in (3, 6, 12):
                planned = costs(config, 4, _gpu(size), 0.4)
                own = planned.stages[config.engine.zero_stage].memory
                assert own
                try:
                    [finding] = checks.check_memory(config, Cluster(gpus_per_node=4, gpu_memory_gib=size))
                except ConfigError:
                    assert own.total > planned.gpu_bytes
                else:
                    assert finding.warning == (own.total > planned.gpu_bytes)


@pytest.mark.parametrize(
    ("changes", "ranks", "expected"),
    [
        (["engine.zero_stage=0", "engine.precision=fp32"], 8, 4 + 4 + 8),
        (["engine.zero_stage=1"], 8, 2 + 6 + 12 / 8),
        (["engine.zero_stage=2"], 8, 2 + 16 / 8),
        (["engine.zero_stage=3"], 8, 18 / 8),
        (["engine.zero_stage=2", "engine.precision=fp16"], 8, 2 + 14 / 8),
        (["engine.zero_stage=1", "optimizer.kind=adamw8bit"], 4, 2 + 6 + (6 + 8 / 256) / 4),
        (["engine.zero_stage=2", "optimizer.kind=muon", "optimizer.clip=0"], 4, 2 + 12 / 4),
        (["engine.zero_stage=3", "engine.offload=cpu"], 4, 2 / 4),
        (["engine.zero_stage=3", "engine.hpz_partition_size=2"], 4, 18 / 4 + 1),
    ],
)
def test_bytes_of_a_parameter(changes: list[str], ranks: int, expected: float) -> None:
    assert state_bytes(load(changes), 1000, ranks) == 1000 * expected
