"""What `duet plan` counts holds together: micro-batches divide and fit, what is proposed fits."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import ConfigError
from model.attention import softmax
from model.costs.flops import training_flops_per_token
from model.costs.totals import activations, num_parameters
from model.gpus import GPUS
from pretrain.config.schema import Config, load
from pretrain.finetune.lora import adapt
from pretrain.planning.adapters import kept_beside
from pretrain.planning.costs import changed, costs, largest_micro_batch
from pretrain.planning.memory import memory, state
from tests.model.costs.test_activations import TYPES, saved_bytes
from tests.model.helpers import batch_of, build

GPU = GPUS["h100"]
SIZE = GPU.memory_gb * 1e9


def config_of(*args: str) -> Config:
    return load(["model/parallel-1b3", "model.vocab_size=50304", "batch.tokens=1572864", *args])


@pytest.mark.parametrize("gpus", [1, 6, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("again", [False, True])
def test_the_largest_micro_batch_divides_the_batch_and_the_next_does_not_fit(
    gpus: int, stage: int, again: bool
) -> None:
    config = config_of(f"engine.zero_stage={stage}", f"engine.activation_checkpointing={again}")
    largest = largest_micro_batch(config, gpus, SIZE)
    assert largest
    share = config.global_batch // gpus
    assert share % largest == 0
    for size in (size for size in range(1, share + 1) if share % size == 0 and size >= largest):
        needed = memory(changed(config, {"batch.micro_batch": size}), gpus)
        assert (needed.total <= SIZE) == (size == largest)


def test_where_nothing_fits_there_is_no_largest_micro_batch() -> None:
    assert largest_micro_batch(config_of(), 64, 1e9) is None
    found = costs(load(["model/gpt-3-175b", "model.vocab_size=50304", "batch.tokens=2097152"]), 1, GPU, 0.4)
    assert found.stages[3].largest_micro_batch is None
    assert found.fitting == []


def test_what_is_proposed_fits() -> None:
    config = load(["model/gpt-3-6b7", "model.vocab_size=50304", "batch.tokens=2097152"])
    found = costs(config, 8, GPU, 0.4)
    assert len(found.fitting) > 3
    for proposal in found.fitting:
        gpus, changes = 8, []
        words = proposal.split()
        if words[0] == "--gpus":
            gpus, words = int(words[1]), words[2:]
        changes = [word for word in words if "=" in word]
        other = load(["model/gpt-3-6b7", "model.vocab_size=50304", "batch.tokens=2097152", *changes])
        assert memory(other, gpus).total <= SIZE, proposal


def test_time_is_flops_over_what_the_gpus_do() -> None:
    config = config_of("train.steps=500")
    found = costs(config, 64, GPU, 0.5)
    assert found.flops_per_step == training_flops_per_token(config.model) * 1572864
    assert found.step_seconds == pytest.approx(found.flops_per_step / (64 * 0.5 * 989e12))
    assert found.run_seconds == 500 * found.step_seconds
    assert found.tokens_per_second * found.run_seconds == pytest.approx(500 * 1572864)


@pytest.mark.parametrize(
    ("changes", "said", "share"),
    [
        (["kind=top"], "training computes all, too small to gain by it in micro-batches of 2,048 tokens", 1.0),
        (["kind=cosine"], "training computes all: model.block_gates.train_sparse_after is not set", 1.0),
        (["kind=cosine", "train_sparse_after=1000"], "train_sparse_after is 1,000, and train.steps=1,000", 1.0),
        (["kind=cosine", "train_sparse_after=250", "wide"], "training computes these alone after step 250", 0.7),
        (["kind=top", "wide"], "8 blocks of 8192 hidden units, 0.25 of them open; training computes these alone", 0.6),
        (["kind=top", "wide", "compile"], "training computes all, engine.compile takes fixed shapes", 1.0),
        (["kind=top", "blocks=512"], "too small to decode by: take fewer blocks or a larger model", 1.0),
    ],
)
def test_gates_that_gain_nothing_are_told_and_time_is_that_of_what_is_executed(
    changes: list[str], said: str, share: float
) -> None:
    off = ["model.learned_dropout.enabled=false", "batch.micro_batch=1"]
    gates = [f"model.block_gates.{change}" for change in changes if "=" in change]
    wide = ["model.width=16384", "model.heads=128", "batch.tokens=32768"] if "wide" in changes else []
    config = config_of(*off, *gates, *wide, f"engine.compile={'compile' in changes}")
    found = costs(config, 1, GPU, 0.4)
    assert said in found.gates
    assert found.executed_flops_per_step / found.flops_per_step == pytest.approx(share, abs=0.15)
    assert found.step_seconds == pytest.approx(found.executed_flops_per_step / (GPU.peak_flops * 0.4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.weights.kind=entmax", "weights in each layer, which no kernel forms; a dozen passes over them"),
        ("model.weights.kind=adaptive_span", "FLOPs are those of whole texts"),
        ("model.scores.kind=synthesizer", "synthesizer: "),
        ("model.scores.kind=routing", "clusters are a mask over them and save nothing"),
        ("model.scores={kind: routing, cluster_window: 9}", " tokens by cluster, each sees 9 of its own"),
        ("model.heads=2", ""),
    ],
)
def test_what_other_attention_forms_is_told_and_needs_memory(change: str, said: str) -> None:
    found, plain = (costs(config_of(*more), 1, GPU, 0.4) for more in ([change], []))
    assert said in found.attention
    assert bool(found.attention) == bool(said)
    one, two = found.stages[1].memory, plain.stages[1].memory
    assert one is not None and two is not None
    assert (one.activations > two.activations) == bool(said)


def test_gates_that_group_tokens_are_not_compiled() -> None:
    gates = ["model.block_gates.kind=cosine", "model.block_gates.train_sparse_after=9"]
    with pytest.raises(ConfigError, match="engine.compile: model.block_gates.train_sparse_after groups tokens"):
        config_of("model.learned_dropout.enabled=false", "engine.compile=true", *gates)


def test_state_is_divided_as_zero_says() -> None:
    """DeepSpeed's formula for AdamW in mixed precision, with gradients summed in fp32: 2 + 4 + 12 bytes."""
    config = config_of()
    count = num_parameters(config.model)
    by_stage = {
        stage: sum(state(changed(config, {"engine.zero_stage": stage}), count, 8)) / count for stage in (1, 2, 3)
    }
    assert by_stage == pytest.approx({1: 2 + 4 + 2 + 12 / 8, 2: 2 + 4 / 8 + 12 / 8, 3: 2 / 8 + 4 / 8 + 12 / 8})


@pytest.mark.parametrize(
    "steps, every, keep, for_ever, expected",
    [(1, 200, 3, None, 1), (1000, 200, 3, None, 4), (1000, 200, 3, 400, 5), (400, 200, 10, None, 3)],
)
def test_checkpoints_that_stay(steps: int, every: int, keep: int, for_ever: int | None, expected: int) -> None:
    config = config_of(f"train.steps={steps}", f"train.checkpoint_every={every}", f"train.keep_checkpoints={keep}")
    assert costs(changed(config, {"train.keep_every": for_ever}), 64, GPU, 0.4).checkpoints == expected


def test_gpus_that_cannot_share_the_batch() -> None:
    with pytest.raises(ConfigError, match="numbers of ranks that can: 64 or 96"):
        costs(config_of(), 65, GPU, 0.4)


@pytest.mark.parametrize(
    ("args", "dense"),
    [
        (["model/decoder-tiny", "model.document_mask=true"], False),
        (["model/decoder-tiny", "model.document_mask=true", "model.heads=8"], True),
        (["model/decoder-tiny", "model.document_mask=true", "model.attention=explicit"], True),
        (["model/decoder-tiny", "data.objective=prefix"], False),
        (["model/encoder-tiny", "model.document_mask=true"], False),
        (["model/encoder-decoder-tiny", "data.objective=pairs"], True),
    ],
)
def test_a_dense_mask_counts_where_the_model_makes_one(args: list[str], dense: bool) -> None:
    """On CUDA; elsewhere it always does. The rule is the one that attention goes by."""
    config = load([*args, "model.width=64", "model.vocab_size=500", "engine.zero_stage=0", "engine.precision=fp32"])
    on = {device: memory(config, 1, device).activations for device in ("cuda", "cpu")}
    assert (on["cuda"] == on["cpu"]) == dense


@pytest.mark.parametrize(
    ("preset", "targets", "size"),
    [
        ("decoder-4", ["qkv"], 2),
        ("tiny", ["down"], 2),
        ("encoder-decoder-tiny", ["up"], 4),
        ("two-stream-4", ["out"], 2),
        ("tiny", None, 4),
    ],
)
def test_adapters_keep_what_torch_saves(
    preset: str, targets: list[str] | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what maps without one read, nothing is kept; and what a GPU keeps is counted."""
    monkeypatch.setattr(softmax, "SHORT_ROWS", (1, 0))
    precision = f"engine.precision={'bf16' if size == 2 else 'fp32'}"
    lora = ["finetune.kind=lora", "run.start_from=elsewhere"]
    lora += [] if targets is None else [f"finetune.targets=[{','.join(targets)}]"]
    config = load([f"model/{preset}", "model.vocab_size=67", "batch.tokens=256", precision, *lora])
    model = build(config.model)
    adapt(model, config.finetune, seed=0)
    measured = saved_bytes(model.to(TYPES[size]).train(), batch_of(config.model, 3))
    whole = activations(config.model, 3, size, table_stays=True)
    counted = kept_beside(config, whole)
    assert counted.kept(checkpointing=False) + counted.loss == pytest.approx(measured, rel=0.02)
    assert targets is None or whole.kept(checkpointing=False) + whole.loss > 1.2 * measured


@pytest.mark.parametrize("targets", [None, ["qkv"]])
def test_adapters_are_counted_as_torch_counts_them(targets: list[str] | None) -> None:
    more = [] if targets is None else [f"finetune.targets=[{','.join(targets)}]"]
    shape = ["model/decoder-4", "model.vocab_size=67", "model.attention=explicit", "batch.tokens=256"]
    full = load([*shape, "engine.precision=fp32"])
    config = load([*shape, "engine.precision=fp32", "finetune.kind=lora", "run.start_from=elsewhere", *more])
    model = build(config.model).train()
    adapt(model, config.finetune, seed=0)
    trained = sum(values.numel() for values in model.parameters() if values.requires_grad)
    found = costs(config, 1, GPU, 0.4)
    assert (found.adapters, found.parameters) == (trained, num_parameters(config.model))
    assert found.checkpoint_bytes == 12 * trained
    with FlopCounterMode(display=False) as counter:
        model(batch_of(config.model, 4)).loss.backward()
    assert found.flops_per_step == pytest.approx(counter.get_total_flops(), rel=0.05)
    held = state(config, found.parameters, 1)
    assert held.gradients + held.optimizer == (4 + 8 + 4) * trained
    assert held.weights == 4 * (found.parameters + trained)
    assert memory(config, 1).total < memory(full, 1).total
    other = config.finetune.model_copy(update={"targets": ["nothing"]})
    with pytest.raises(ConfigError, match="no linear map of decoder_only is called nothing"):
        costs(config.model_copy(update={"finetune": other}), 1, GPU, 0.4)
