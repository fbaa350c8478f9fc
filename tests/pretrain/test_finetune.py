"""Runs that begin with weights: all of them trained, or adapters, which are saved alone and added up afterwards."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.errors import CheckpointError, ConfigError, UserError
from launch.cli import app
from model.architectures.registry import ARCHITECTURES, configure
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.retention import reasons
from pretrain.config.sections import FinetuneConfig
from pretrain.export.portable import write_export
from pretrain.export.use import evaluate_run, open_trained
from pretrain.finetune.base import verify_base
from pretrain.finetune.lora import AdaptedLinear, adapt, merged
from pretrain.inference.trained import find_checkpoint
from pretrain.run import origin
from pretrain.run.checkpoint_folder import MANIFEST, step_path
from pretrain.run.journal import read, series
from pretrain.run.origin import base_hash
from tests.conftest import RanksFailed
from tests.model.helpers import VOCABULARY, batch_of, build, one_of, open_masks, small
from tests.runs import CHARACTERS, SMALL, documented_architecture, duet

Ranks = Callable[..., list[Any]]
TRAIN = "tests.distributed.cases:train_run"
LORA = FinetuneConfig(kind="lora", rank=2, targets=["*"])


def logits(model: Any, batch: Any) -> Tensor:
    """In evaluation."""
    found: Tensor = model.predict(batch.input_ids, None, batch if batch.decoder_input_ids is not None else None)
    return found


@pytest.mark.parametrize("name", [*ARCHITECTURES, "own"])
def test_adapters_on_every_linear_map_of_an_architecture(name: str, tmp_path: Path) -> None:
    """They change nothing at the start, alone have gradients, and are no more than other weights when added up."""
    if name == "own":
        (tmp_path / "gla.py").write_text(documented_architecture())
        shape = {"layers": 2, "width": 16, "heads": 2, "context": 12, "vocab_size": VOCABULARY}
        config = configure({"architecture": f"{tmp_path / 'gla.py'}:GLA", **shape}, [])
    else:
        config = one_of(name)
    model = open_masks(build(config)).double()
    base = {key: values.clone() for key, values in model.state_dict().items()}
    batch = batch_of(config)
    with torch.no_grad():
        before = logits(model.eval(), batch)
        maps = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
        adapt(model, LORA, seed=1)
        assert torch.equal(logits(model, batch), before)
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    assert len(adapted) == maps > 4
    model.train()(batch).loss.backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key in model.state_dict() if "lora_" in key}
    assert all((parameter.grad is None) == (key not in trained) for key, parameter in model.named_parameters())
    with torch.no_grad():
        for module in adapted:
            module.lora_b.normal_(std=0.3)
        adapters = {key: values for key, values in model.state_dict().items() if key in trained}
        other = build(config).double().eval()
        other.load_state_dict(merged(base, adapters, LORA.scale))
        after = logits(model.eval(), batch)
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(logits(other, batch), after, rtol=0, atol=1e-12)


def test_which_maps_are_meant_and_what_is_dropped_out() -> None:
    config = small("decoder_only")

    def adapted(*targets: str) -> set[str]:
        model = build(config)
        adapt(model, FinetuneConfig(targets=list(targets)), seed=0)
        return {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}

    assert adapted("qkv") == {f"backbone.layers.{layer}.attention.qkv" for layer in range(2)}
    assert adapted("*.qkv") > adapted("qkv"), "the masks' as well"
    assert adapted("backbone.layers.1.ff.*") == {"backbone.layers.1.ff.up", "backbone.layers.1.ff.down"}
    with pytest.raises(ConfigError, match=r"no linear map of decoder_only is called keys; there are .*qkv, up"):
        adapted("qkv", "keys")
    model = build(small("decoder_only", learned_dropout={"enabled": False}))
    adapt(model, LORA.model_copy(update={"dropout": 0.5}), seed=0)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            torch.nn.init.normal_(module.lora_b)
    batch = batch_of(config)
    losses = [model.train()(b).loss for b in (batch, batch, replace(batch, step=torch.tensor(6)))]
    assert losses[0] == losses[1] != losses[2], "the noise is a function of sample and step"
    assert torch.equal(model.eval()(batch).loss, model(batch).loss)


@pytest.fixture(scope="module")
def tuned(ranks: Ranks, exported: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders that began with the export: adapters, four steps at a stretch and in two parts, and all weights."""
    root = tmp_path_factory.mktemp("tuned")
    begin = [
        str(exported / "train.yaml"),
        *(key for key in SMALL if not key.startswith("model.")),
        f"data.path={dataset}",
    ]
    begin += [f"run.start_from={exported}", "optimizer.lr=0.05", "train.steps=4", "schedule.kind=constant"]
    lora = ["finetune.kind=lora", "finetune.rank=4", "finetune.dropout=0.1", "finetune.targets=[qkv,up,down]"]

    def train(name: str, world: int, stage: int, *more: str) -> Path:
        args = [*begin, f"run.dir={root / name}", f"engine.zero_stage={stage}", *more]
        ranks(TRAIN, world, args=args)
        return root / name

    train("parts", 2, 3, *lora, "train.steps=2")
    return {
        "parts": train("parts", 1, 1, *lora),
        "whole": train("whole", 1, 2, *lora),
        "full": train("full", 1, 1, "finetune.kind=full"),
        "again": train("again", 1, 0, *lora, f"run.start_from={root / 'whole'}", "train.steps=1"),
    }


def test_adapters_are_trained_at_every_stage_and_go_on_elsewhere(tuned: dict[str, Path]) -> None:
    """ZeRO 3 on two ranks, then ZeRO 1 on one: the same adapters as at a stretch at ZeRO 2."""
    parts, whole = (Checkpoint(step_path(tuned[name] / "checkpoints", 4)) for name in ("parts", "whole"))
    assert whole.manifest.shapes.keys() == parts.manifest.shapes.keys()
    assert all(".lora_" in name for name in whole.manifest.shapes)
    theirs = whole.weights()
    for name, values in parts.weights().items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-4, atol=1e-5)
    losses = [series(read(tuned[name] / "metrics.jsonl"))["loss/total"][0].value for name in tuned]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6), "all begin with the export's loss"


def test_what_was_tuned_is_used_exported_and_tuned_again(
    tuned: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    ids = torch.arange(12)[None]
    before = open_trained(exported).model(ids)
    for name in ("whole", "full"):
        model = open_trained(tuned[name]).model
        assert not torch.equal(model(ids), before)
        write_export(*find_checkpoint(tuned[name]), tmp_path / name)
        assert torch.equal(open_trained(tmp_path / name).model(ids), model(ids))
    lowest = series(read(tuned["whole"] / "metrics.jsonl"))["loss/val"][-1].value
    assert evaluate_run(tuned["whole"], None)["loss/val"] == pytest.approx(lowest, rel=1e-5)
    assert lowest < evaluate_run(exported.parent / "run", None)["loss/val"]
    first = series(read(tuned["again"] / "metrics.jsonl"))["loss/total"][0].value
    last = series(read(tuned["whole"] / "metrics.jsonl"))["loss/total"][-1].value
    assert first == pytest.approx(last, abs=0.3), "it began where the adapters had come to"
    whole = tuned["whole"] / "checkpoints"
    assert reasons(whole, 1, None)[step_path(whole, 4)] == ["newest", f"needed by {tuned['again']}", "best"]


def test_a_base_may_be_validated_after_adapters_have_begun_with_it(tuned: dict[str, Path]) -> None:
    """Its loss is added to its manifest then. An older version's run has noted a hash that includes it."""
    base = step_path(tuned["whole"] / "checkpoints", 4)
    checkpoint, config = find_checkpoint(tuned["again"])
    manifest = CheckpointManifest.load(base)
    (base / MANIFEST).write_text(manifest.model_copy(update={"validation_loss": 9.0}).sealed())
    verify_base(checkpoint)
    noted = config.finetune.base
    assert noted == origin.resolve(config).finetune.base == base_hash(tuned["whole"], 4)
    former = xxhash.xxh3_128_hexdigest((base / MANIFEST).read_bytes())
    assert base_hash(tuned["whole"], 4, former) == former != noted
    (base / MANIFEST).write_text(manifest.model_copy(update={"optimizer_steps": 3}).sealed())
    with pytest.raises(CheckpointError, match="changed since the run has begun with it"):
        verify_base(checkpoint)
    (base / MANIFEST).write_text(manifest.sealed())


def test_what_a_run_cannot_begin_with_is_said(
    ranks: Ranks, tuned: dict[str, Path], exported: Path, dataset: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "exported"))
    begin = [str(folder / "train.yaml"), *(key for key in SMALL if not key.startswith("model.")), "train.steps=1"]
    begin += [f"run.start_from={folder}", f"run.dir={tmp_path / 'run'}"]

    def refused(message: str, *more: str, data: Path = dataset) -> None:
        with pytest.raises(RanksFailed, match=message):
            ranks(TRAIN, 1, args=[*begin, f"data.path={data}", *more])

    refused("(?s)weights of another model:.*model.heads", "model.heads=1")
    refused("an export has weights of one step, and no state to go on with", "finetune.kind=none")
    (tmp_path / "few.txt").write_text("a few letters only. " * 400)
    duet(
        "data",
        "build",
        CHARACTERS,
        f"data.sources.text.paths=[{tmp_path / 'few.txt'}]",
        f"data.path={tmp_path / 'few'}",
    )
    way = re.escape(f"data.tokenizer.model={folder / 'spm.model'}")
    refused(f"(?s)was tokenized otherwise than the weights.*{way}", data=tmp_path / "few")
    tensors = load_file(folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"finetune\.kind=lora: of which weights"):
        from pretrain.config.schema import load

        load(["finetune.kind=lora"])
    with pytest.raises(UserError, match=r"step-000000003.*cannot be read: No such file.*; there are .* of steps 1, 4$"):
        base_hash(tuned["whole"], 3)
    # What adapters were trained beside has to stay.
    lora = Path(shutil.copytree(tuned["whole"], tmp_path / "lora"))
    checkpoint, config = find_checkpoint(lora)
    moved = config.model_copy(update={"run": config.run.model_copy(update={"start_from": str(folder)})})
    write_export(checkpoint, moved, tmp_path / "same")
    models = [open_trained(path).model for path in (lora, tmp_path / "same")]
    assert torch.equal(*(model(torch.arange(9)[None]) for model in models))
    verify_base(checkpoint)
    tensors["token_embed.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="changed since the run has begun with it"):
        write_export(checkpoint, moved, tmp_path / "new")
    shutil.rmtree(folder)
    state = checkpoint.manifest.state | {"config": moved.model_dump(mode="json")}
    checkpoint.manifest = checkpoint.manifest.model_copy(update={"state": state})
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify_base(checkpoint)
    with pytest.raises(CheckpointError, match=r"cannot be read.*what is trained are changes to these weights"):
        write_export(checkpoint, moved, tmp_path / "new")


def test_the_command_line_takes_an_export(exported: Path, dataset: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    options = [key for key in SMALL if not key.startswith("model.")]
    named = shutil.copytree(exported, tmp_path / "x@5")  # no step of a run
    words = ["train", *options, f"data.path={dataset}", "run.name=tuned", "train.steps=2", "--from", str(named)]
    done = CliRunner().invoke(app, [*words, f"run.dir={tmp_path / 'run'}", "--dry-run"], catch_exceptions=False)
    assert f"begins at  {named}" in done.output
    size = open_trained(exported).model.num_parameters()
    words = ["plan", f"run.start_from={named}", *options, "--gpu", "h100"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert f", {size:,} parameters" in done.output, "the export's model, not the default one"
    with pytest.raises(UserError, match="weights of another model"):
        CliRunner().invoke(app, [*words, "model.layers=3"], catch_exceptions=False)
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "EXPORT.txt").touch()
    with pytest.raises(UserError, match=r"without train\.yaml; export the checkpoint again"):
        CliRunner().invoke(app, ["train", *options, "--from", str(tmp_path / "older")], catch_exceptions=False)
