"""`duet plan`: the counted numbers, told."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError
from launch.cli import app
from model.gpus import GPUS, find

RUN = ["model/parallel-1b3", "model.vocab_size=50304", "batch.tokens=1048576"]
WHERE = ["--gpus", "64", "--gpu", "h100"]


def plan(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == code, done.output
    return done.stdout


def test_a_run_that_fits() -> None:
    lines = plan(*RUN, *WHERE, "--mfu", "0.5").splitlines()
    assert lines[0].split()[:3] == ["model", "parallel_encoder_decoder,", "1,272,024,576"]
    assert "64 rank(s) x 1 x 8 sequences of 2048" in lines[2]
    assert lines[3].endswith("s at MFU 0.5")
    stages = lines[-4:]
    assert "use engine.zero_stage=1" in stages[0]
    assert [line[0] for line in stages] == [" ", "*", " ", " "]
    assert not any("does not fit" in line for line in lines)


def test_what_is_far_from_the_peak_is_said_to_be_slow() -> None:
    told = plan("model/feedback", "model.vocab_size=5000", "--gpu", "a100").splitlines()
    assert told[3].endswith("s at MFU 0.4, which 64 tokens one after the other are far from (--mfu)")
    told = plan("model/tiny", "model.vocab_size=5000", "engine.precision=fp32", "--gpu", "a100").splitlines()
    assert told[3].endswith("s at MFU 0.4, a share of the bf16 peak, which fp32 is far from (--mfu)")


def test_interruptions_are_told_and_the_best_interval() -> None:
    few = plan(*RUN, *WHERE, "--interruption-hours", "5", "--time", "save=3", "--time", "load=90")
    assert "with an interruption every 5h00m" in few
    assert "seconds     save 3, " in few and "load 90, start 60, requeue 120, detect 60 (--time)" in few
    best = few.partition("best ")[2].partition("train.checkpoint_every=")[2].partition(":")[0].replace(",", "")
    found = json.loads(plan(*RUN, f"train.checkpoint_every={best}", *WHERE, "--interruption-hours", "5", "--json"))
    assert found["goodput"]["best"]["share"] >= found["goodput"]["own"]["share"] > 0.9


def test_as_json_parts_are_the_total() -> None:
    found = json.loads(plan(*RUN, *WHERE, "--json"))
    assert found["parameters"] == 1_272_024_576
    own = found["stages"]["1"]
    parts = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")
    assert sum(own["memory"][part] for part in parts) == own["memory"]["total"]
    assert own["fits"] and own["largest_micro_batch"] == 8
    assert found["stages"]["0"]["memory"] is None


def test_a_run_that_does_not_fit_says_what_does() -> None:
    big = ["model/gpt-3-6b7", "model.vocab_size=50304", "batch.tokens=2097152", "--gpus", "8", "--gpu", "a100-40gb"]
    told = plan(*big, code=1)
    assert "The run does not fit. What would:" in told
    assert "engine.zero_stage=3 engine.activation_checkpointing=true batch.micro_batch=" in told
    found = json.loads(plan(*big, "--json", code=1))
    assert found["fitting"]


def test_nothing_but_a_smaller_model_fits() -> None:
    told = plan(
        "model/gpt-3-175b", "model.vocab_size=50304", "batch.tokens=2048", "--gpus", "1", "--gpu", "h100", code=1
    )
    assert told.endswith("a smaller model only\n")


def test_the_vocabulary_is_that_of_the_dataset(dataset: Path) -> None:
    found = json.loads(plan("model/tiny", f"data.path={dataset}", "--gpus", "1", "--gpu", "h100", "--json"))
    vocabulary = json.loads((dataset / "manifest.json").read_text())["tokenizer"]["vocab_size"]
    given = json.loads(plan("model/tiny", f"model.vocab_size={vocabulary}", "--gpus", "1", "--gpu", "h100", "--json"))
    assert found == given


def test_without_a_vocabulary() -> None:
    done = CliRunner().invoke(app, ["plan", "model/tiny", "--gpus", "1", "--gpu", "h100", "data.path=nowhere"])
    assert isinstance(done.exception, ConfigError)
    assert "model.vocab_size is not set" in str(done.exception)


@pytest.mark.parametrize("name", ["A100-80GB", "NVIDIA GeForce RTX 4090", "rtx_4090", "H100", "MI300X", *GPUS])
def test_a_gpu_is_known_in_any_case_and_spelling(name: str) -> None:
    assert find(name) is not None


def test_a_gpu_that_is_not_known_is_told_by_its_peak_and_its_memory() -> None:
    known = json.loads(plan(*RUN, "--gpus", "64", "--gpu", "H100", "--json"))
    assert json.loads(plan(*RUN, "--gpus", "64", "--tflops", "989", "--memory", "80", "--json")) == known
    for options in (["--gpu", "h100", "--tflops", "989"], ["--tflops", "989"], ["--memory", "80"]):
        assert isinstance(CliRunner().invoke(app, ["plan", *RUN, *options]).exception, ConfigError)
