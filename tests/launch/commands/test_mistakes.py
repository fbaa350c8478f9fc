"""What people typed, and the way on that they are told: the key, the path, the command.

Three of the mistakes need what takes long: Ctrl-C on two ranks is in tests/launch/local/test_afterwards.py, `duet track
sync` in a copied run folder in tests/pretrain/tracking/test_tracking_store.py, a report of runs on different data in
tests/pretrain/report/test_report.py.
"""

import builtins
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError, UserError
from launch.cli import app
from launch.commands.generate import ask
from model.generation.sampling import Sampling
from pretrain.config.layers import presets
from pretrain.config.other_words import OURS
from pretrain.config.schema import load
from pretrain.export.portable import load_export
from pretrain.inference.continuation import Settings
from tests.conftest import ROOT
from tests.runs import documented_architecture

OLDER = ROOT / "tests" / "formats" / "2026-11"
FIRST_LINES = 5
MINE = ("data", "build", "data.sources.mine.paths=text", "data.tokenizer.vocab_size=400")
RESUME = ("train", "runs/first/config.yaml", "data.path=data", "--dry-run")
PLAN = ("plan", "model/tiny", "model.vocab_size=4096")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """What somebody has who began yesterday: text, a dataset and another, a run of four steps, an export, odds and
    ends."""
    made = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(OLDER / "data", made / "data")
    shutil.copytree(dataset, made / "other")
    shutil.copytree(OLDER / "trained" / "decoder_only", made / "runs" / "first")
    shutil.copytree(OLDER / "exports" / "decoder_only", made / "exported")
    (made / "text").mkdir()
    (made / "llama").mkdir()
    (made / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (made / "llama" / "model.safetensors").touch()
    (made / "text" / "a.txt").write_text((ROOT / "LICENSE").read_text())
    (made / "broken.model").write_bytes(bytes(range(256)))
    (made / "dotted.yaml").write_text("train.steps: 4\n")
    (made / "mine.py").write_text(documented_architecture().replace('("causal",)', '("casual",)'))
    (made / "few.yaml").write_text("train: {steps: 4}\nmodel: {layers: 1}\n")
    (made / "study.yaml").write_text("name: many\nconfig: []\nsections: {}\n")
    (made / "ladder.yaml").write_text("name: rungs\nconfig: []\nsizes: {}\n")
    return made


@pytest.fixture(autouse=True)
def _in_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield


def typed(*words: str) -> tuple[int, str]:
    """Exit code, and what is said."""
    done = CliRunner().invoke(app, list(words))
    if isinstance(done.exception, UserError):
        return 2, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("generate", "data"),
            "data: this is a dataset, and a run folder, checkpoint or export is wanted; `duet data inspect data`",
        ),
        (("train", "runs/first"), "did you mean runs/first/config.yaml?"),
        (("train", "data"), "did you mean data.path=data?"),
        (("train", "runs/first/checkpoints/step-000000004"), "did you mean runs/first/config.yaml?"),
        (("train", "model/tiny", "data.path=runs/first"), "data.path=runs/first: this is a run folder, and a dataset"),
        (("train", "model/tiny", "data.path=none", "run.name=b"), "none is not a dataset: there is no such folder"),
        (
            ("train", "study.yaml"),
            "a study, and the configuration of one run is wanted; `duet study run study.yaml`",
        ),
        (("config", "show", "model.architecture=mine.py:GLA"), "traits.objectives: no casual; there are causal, "),
        (("config", "show", "ladder.yaml"), "`duet study ladder ladder.yaml` trains all of its runs"),
        (
            ("study", "run", "few.yaml"),
            "few.yaml: this configures one run, and a study is wanted; `duet",
        ),
        (("study", "ladder", "few.yaml"), "`duet train few.yaml`"),
        (("train", "model/tiny", "run.dir=data"), "run.dir=data: this is a dataset, and a run folder is wanted"),
        (("train", "model/tiny", "run.dir=broken.model"), "run.dir=broken.model: this is a file, and a folder is"),
        (("eval", "runs/second"), "runs/second: not a run folder (there is no such folder), and not a"),
        (("checkpoint", "ls", "data"), "data: this is a dataset, and a run folder is wanted"),
        (("checkpoint", "ls", "exported"), "this is an export, and a run folder is wanted; `duet generate exported`"),
        (("checkpoint", "verify", "data"), "this is a dataset, and a checkpoint or run folder is wanted"),
        (("runs", "ls", "data"), "data: this is a dataset, and a run folder is wanted"),
        (("logs", "exported"), "this is an export, and a run folder is wanted"),
        (("report", "data"), "this is a dataset, and a run folder is wanted"),
        (("track", "sync", "data"), "this is a dataset, and a run folder is wanted"),
        (
            ("data", "inspect", "runs/first"),
            "this is a run folder, and a dataset is wanted; `duet config show",
        ),
        (("push", "exported", "me/mine/it", "--dry-run"), "a repository is called NAME/MODEL"),
        (("push", "runs/first", "me/mine"), "this is a run folder, and an export is wanted"),
        (("eval", "runs/first", "--tasks", "mine.yaml", "--rounding", "none"), "leave it or --tasks out"),
        (("eval", "runs/first", "--set", "model.refine.steps=1", "--plot", "a.svg"), "a file that ends in .png"),
        (("eval", "runs/first", "--set", "model.refine.steps=1", "--plot", "no/a.png"), "in a folder that is there"),
        (("embed", "nowhere", "text/a.txt", "--to", "/proc/x.npy"), "cannot write /proc/x.npy: no file or folder can"),
        (("embed", "nowhere", "text/a.txt", "--to", "text"), "whose name ends in .npy"),
        (
            ("track", "export", "runs/first", "--to", "tensorboard", "--out", "/proc/x"),
            "cannot write /proc/x/first:",
        ),
        (
            ("generate", "llama"),
            "llama: this is a model as transformers saves it, and an export is wanted; `duet",
        ),
        (("train", "--from", "llama", "run.name=a"), "`duet checkpoint import llama --to NEW` makes an export of it"),
        (
            ("train", "--from", "runs/nix", "run.name=a"),
            "runs/nix: not a run folder (there is no such folder); `duet train`",
        ),
        (("checkpoint", "import", "exported", "--to", "new"), "`duet train --from exported` begins with it"),
        (
            ("checkpoint", "shrink", "exported", "--gates", "--to", "new"),
            "an export, and a run folder or checkpoint",
        ),
        (("status", "data"), "data: this is a dataset, and a run folder is wanted"),
        (("status", "exported", "--json"), "exported: this is an export, and a run folder is wanted"),
        (("config", "show", "train.steps=true"), "train.steps: expected a number such as 5000"),
        (("config", "show", "optimizer.betas=[true,0.9]"), "optimizer.betas.0: Input should be a valid number"),
        (("config", "show", "engine.zero_stage=true"), "engine.zero_stage: Input should be 0, 1, 2 or 3"),
        (("data", "verify", "exported"), "this is an export, and a dataset is wanted"),
        (("train", "model/tiny", "optimizer.learning_rate=1e-3"), "learning_rate is optimizer.lr here"),
        (("train", "model/tinny"), "did you mean model/tiny, "),
        (("train", "tiny"), "did you mean model/tiny?"),
        (("train", "model/tiny", "optimizer.lr", "=", "1e-3"), "no spaces around `=`: write optimizer.lr=VALUE"),
        (("train", "model/tiny", "optimizer.lr=", "1e-3"), "no spaces around `=`: write optimizer.lr=VALUE"),
        (("train", "model/tiny", "optimizer.lr", "1e-3"), "a key and its value are one word: optimizer.lr=VALUE"),
        (("config", "show", "run.name=a/b"), "run.name: expected letters, digits, "),
        (("config", "show", "dotted.yaml"), "key train.steps; in a file it is `train: {steps: …}`"),
        ((*RESUME, "run.name=b", "engine.precision=fp16"), "engine.precision=fp16 needs CUDA; on cpu use"),
        (("config", "show", "batch.tokens=2Q"), "batch.tokens: expected a number such as 5000, 300M, 1.5B"),
        (
            ("config", "show", "optimizer.betas=0.9"),
            "optimizer.betas: expected 2 values in brackets, such as [0.9",
        ),
        ((*RESUME, "model.layers=5"), "--from begins with a checkpoint, and keeps model.layers"),
        ((*RESUME, "train.steps=50"), "duet train --from runs/first@4 run.name=NEW train.steps=50"),
        (
            ("train", "runs/first/config.yaml", "data.path=other", "--dry-run"),
            "as a new phase (data.phase); for these data start a new run: run.name=NEW",
        ),
        (
            ("data", "locate", "--run", "runs/first", "--step", "100000"),
            "step 100000 was not trained: the run has 8",
        ),
        (("data", "locate", "--run", "runs/first", "--step", "8"), "data locate runs/first/config.yaml --step 8"),
        (PLAN, "name the GPU: --gpu NAME, such as a100"),
        ((*PLAN, "--gpu", "rtx4070"), "near it: rtx4090, rtx5090, rtx3090 "),
        ((*PLAN, "--gpu", "gtx1080"), "any other by --tflops T --memory GB"),
        ((*PLAN, "--gpus", "128", "--gpu", "A100"), "batch.tokens that 128 can: 16384"),
        (("generate", "runs/first", "Once upon"), "duet generate runs/first --prompt 'Once upon'"),
        ((*MINE, "data.path=broken", "data.tokenizer.model=broken.model"), "broken.model is not a SentencePiece model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_told_with_the_way_on(words: tuple[str, ...], said: str) -> None:
    runs = {*Path("runs").iterdir()}
    code, text = typed(*words)
    assert code == 2 and {*Path("runs").iterdir()} == runs, "and leaves no folder"
    assert said in "\n".join(text.splitlines()[:FIRST_LINES]), text
    assert sum(name in text for name in presets()) <= 3, "a list of all presets helps nobody"


@pytest.mark.parametrize(
    "words",
    [
        ("config", "show", "model/tiny", "run/quickstart", "train.tokens=1048576"),
        ("config", "show", "batch.tokens=2.048M"),
        ("config", "show", "data.sources.mine.paths=text"),
        (*PLAN, "--gpu", "A100"),
        (*PLAN, "--gpu", "RTX 4090"),
        (*PLAN, "--gpu", "rtx4090", "--gpus", "2"),
        (*PLAN, "--tflops", "125", "--memory", "32"),
    ],
    ids=" ".join,
)
def test_what_was_refused_is_taken(words: tuple[str, ...]) -> None:
    code, text = typed(*words)
    assert code == 0, text


def test_the_version_is_told_with_that_of_torch_and_deepspeed() -> None:
    code, text = typed("--version")
    assert code == 0
    assert text.splitlines()[:3] == [f"{name} {version(name)}" for name in ("duet-pretrain", "torch", "deepspeed")]


def test_a_build_that_failed_does_not_stand_in_the_way_of_the_advice_it_gave() -> None:
    code, text = typed(*MINE, "data.path=failed")
    assert code == 2
    assert "no text fell into the validation split" in text
    assert "use data.split.rule=tail" in text
    code, text = typed(*MINE, "data.path=failed", "data.split.rule=tail", "data.split.fraction=0.1")
    assert code == 0, text


def test_help_in_the_prompt_loop_is_not_sent_to_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/help", "/quit", "/set seed 7"])

    def typed_in(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", typed_in)
    ask(load_export(OLDER / "exports" / "decoder_only"), Settings(Sampling(), 3, (), 0))
    greeting, help_text, values, unknown, changed, _ = capsys.readouterr().out.splitlines()
    assert help_text == greeting
    assert "temperature=" in values and "seed=0" in values, "no text was written, which would draw from the next seed"
    assert unknown.startswith("/quit: no command, and not sent to the model; there are /set and /help")
    assert "seed=7" in changed


WORDS = (
    "learning_rate batch_size per_device_train_batch_size gradient_accumulation_steps epochs num_train_epochs "
    "max_steps max_iters warmup_ratio warmup_iters block_size seq_length max_position_embeddings n_layer "
    "num_hidden_layers n_embd hidden_size d_model n_head num_attention_heads intermediate_size vocab_size fp16 bf16 "
    "save_steps logging_steps eval_steps eval_interval output_dir lr_scheduler_type max_grad_norm adam_beta2 "
    "adam_epsilon min_lr gradient_checkpointing report_to run_name"
)


@pytest.mark.parametrize("word", WORDS.split())
def test_a_word_of_another_trainer_leads_to_our_key(word: str) -> None:
    key = OURS[word][0]
    for typed_as in (word, f"train.{word}", f"trainer.args.{word}"):
        with pytest.raises(ConfigError, match=rf"unknown key .*; {word} is {key} here"):
            load([f"{typed_as}=1"])


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("seed", "run.seed or data.seed"),
        ("weight_decay", "optimizer.weight_decay"),
        ("warmup_steps", "schedule.warmup_steps"),
        ("train.lr", "optimizer.lr"),
    ],
)
def test_a_key_of_ours_in_another_section_is_named(word: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key {word}; did you mean {ours}\?"):
        load([f"{word}=1"])


def test_every_key_that_is_named_is_there() -> None:
    known = load(["data.sources.NAME.paths=x"]).model_dump()
    for key, _ in OURS.values():
        value = known
        for part in key.split("."):
            assert part in value, key
            value = value[part]


def test_the_later_of_steps_and_tokens_wins(tmp_path: Path) -> None:
    steps, tokens = tmp_path / "steps.yaml", tmp_path / "tokens.yaml"
    steps.write_text("train: {steps: 7}\n")
    tokens.write_text("train: {tokens: 81920}\n")
    assert load([str(steps), str(tokens)]).train.steps == 10
    assert load([str(tokens), str(steps)]).train.steps == 7
    assert load([str(tokens), "train.steps=3"]).train.steps == 3
    assert load(["train.tokens=16384", str(steps)]).train.steps == 2
    for both in (["train.steps=3", "train.tokens=81920"], ["train.tokens=81920", "train.steps=3"]):
        with pytest.raises(ConfigError, match="steps=3 and tokens=81920 both say how long to train"):
            load([str(steps), *both])
