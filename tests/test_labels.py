"""Heads of labels from data to export: begun with an encoder, trained at every stage, gone on with, used, exported."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Fast
from tokenizers import models
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from data_pipeline.building.api import build
from data_pipeline.errors import ConfigError, UserError
from data_pipeline.tokenize.tokenizer import Tokenizer
from model.architectures import registry
from model.architectures.encoder_only.labels import LabelModel
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.export.hugging_face.folder import About, write_tokenizer
from pretrain.export.portable import write_export
from pretrain.export.use import evaluate_run, open_trained
from pretrain.finetune.base import prepare
from pretrain.inference.classification import Asked, Classifier
from pretrain.inference.trained import find_checkpoint
from pretrain.run.checkpoint_folder import step_path
from pretrain.run.journal import read, series
from pretrain.run.origin import base_hash, check_model
from pretrain.run.run_folder import RunFolder
from pretrain.run.run_summary import load, verdict
from tests.data_pipeline.conftest import config
from tests.model.helpers import small
from tests.runs import SMALL, duet

Ranks = Callable[..., list[Any]]
TRAIN = "tests.distributed.cases:train_run"
NAMES = {"sequence": ["north", "south"], "token": ["O", "PER"], "span": []}
AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "span": AutoModelForQuestionAnswering,
}
PEOPLE, NORTH, SOUTH = ["Anna", "Bob", "Carl"], ["Oslo", "Riga"], ["Rome", "Lima"]
STEPS = 20
ENCODER = ["model.architecture=encoder_only", "model.learned_dropout.enabled=false", "model.context=48"]
FAST = [key for key in SMALL if not key.startswith("model.")] + ["batch.tokens=768", "schedule.kind=constant"]


def told(number: int) -> dict[str, dict[str, Any]]:
    """A text with labels of each kind."""
    draw = random.Random(number)
    who, where = draw.choice(PEOPLE), draw.choice(NORTH + SOUTH)
    text, at = f"{who} lived in {where}.", len(f"{who} lived in ")
    return {
        "sequence": {"text": " ".join([where] * 5), "label": "north" if where in NORTH else "south"},
        "token": {"text": text, "label": [{"start": 0, "end": len(who), "label": "PER"}]},
        "span": {"text": text, "question": "Where?", "label": {"start": at, "text": where}},
    }


@pytest.fixture(scope="module")
def root(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that learned from the sentences, and each kind of labels learned with it."""
    root = tmp_path_factory.mktemp("labels")
    (root / "text.txt").write_text("\n".join(told(number)["span"]["text"] for number in range(200)))
    symbols = {"vocab_size": 282, "user_defined_symbols": ["\n", "<mask>"]}
    build(config(root / "text", root / "text.txt", tokenizer=symbols))
    begin = [*SMALL, *ENCODER, "data.objective=masked", f"data.path={root / 'text'}"]
    ranks(TRAIN, 1, args=[*begin, f"run.dir={root / 'encoder'}", "batch.tokens=768", "train.steps=1"])
    for kind, names in NAMES.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(told(number)[kind]) + "\n" for number in range(120)))
        tokenizer = {"model": str(root / "text" / "tokenizer" / "spm.model")}
        build(
            config(
                root / kind,
                sources={"all": {"paths": [str(root / f"{kind}.jsonl")]}},
                labels={"kind": kind, "names": names},
                split={"rule": "given", "files": [str(root / f"{kind}.jsonl")]},
                tokenizer=tokenizer,
            )
        )
        args = [str(root / "encoder" / "config.yaml"), *FAST, f"run.start_from={root / 'encoder'}"]
        args += ["finetune.kind=full", "data.objective=labels", f"model.head.kind={kind}", f"data.path={root / kind}"]
        args += ["optimizer.lr=0.02", f"train.steps={STEPS}", f"train.eval_every={STEPS}"]
        (root / f"{kind}.args").write_text(json.dumps(args))
        ranks(TRAIN, 1, args=[*args, f"run.dir={root / f'{kind}-run'}", "engine.zero_stage=2"])
    return root


def scores(folder: Path) -> dict[str, float]:
    """How often labels were right at the last validation."""
    found = series(read(folder / "metrics.jsonl"))
    return {name: points[-1].value for name, points in found.items() if name.startswith("labels/")}


def test_labels_are_learned_and_told(root: Path) -> None:
    assert scores(root / "sequence-run")["labels/val_accuracy"] > 0.95
    found = scores(root / "token-run")
    assert found["labels/val_f1"] == (found["labels/val_f1/O"] + found["labels/val_f1/PER"]) / 2 > 0.95
    assert scores(root / "span-run").keys() == {"labels/val_exact", "labels/val_f1"}
    assert scores(root / "span-run")["labels/val_f1"] > 0.8
    for kind in NAMES:
        assert "nats per label" in verdict(load(root / f"{kind}-run"))[0]
        again = evaluate_run(root / f"{kind}-run", None)
        assert {name: again[name] for name in again if name.startswith("labels/")} == pytest.approx(
            scores(root / f"{kind}-run")
        )


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_head_is_trained_at_every_stage_and_goes_on_elsewhere(ranks: Ranks, root: Path, how: str) -> None:
    """ZeRO 3 on two ranks, then ZeRO 1 on one, comes to what ZeRO 2 does at a stretch; adapters have the head beside
    them, and it begins anew."""
    args = [*json.loads((root / "token.args").read_text()), f"finetune.kind={how}", "train.eval_every=4"]

    def train(name: str, world: int, stage: int, steps: int) -> Path:
        folder = root / f"{how}-{name}"
        ranks(TRAIN, world, args=[*args, f"run.dir={folder}", f"engine.zero_stage={stage}", f"train.steps={steps}"])
        return folder

    train("parts", 2, 3, 2)
    parts = train("parts", 1, 1, 4)
    ours = Checkpoint(step_path(parts / "checkpoints", 4)).weights()
    if how == "full":
        theirs = Checkpoint(step_path(train("whole", 1, 2, 4) / "checkpoints", 4)).weights()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        return
    assert {name for name in ours if ".lora_" not in name} == {"head.weight"}
    tuned = open_trained(parts).model
    assert torch.equal(tuned.token_embed.weight, open_trained(root / "encoder").model.token_embed.weight)
    assert isinstance(tuned, LabelModel)
    assert torch.equal(tuned.head.weight, ours["head.weight"])
    fresh = Checkpoint(step_path(parts / "checkpoints", 2)).weights()["head.weight"]
    assert not torch.equal(tuned.head.weight, fresh)


@pytest.mark.parametrize("start", ["token-run", "sequence-run"])
def test_other_labels_have_a_fresh_head_and_the_same_go_on(root: Path, start: str) -> None:
    config = RunFolder(root / "sequence-run").config()
    run = config.run.model_copy(update={"start_from": f"{root / start}@{STEPS}"})
    finetune = config.finetune.model_copy(update={"base": base_hash(root / start, STEPS)})
    begun = config.model_copy(update={"run": run, "finetune": finetune})
    check_model(root / start, begun)
    model, trained = registry.build(config.model), open_trained(root / start).model
    assert isinstance(model, LabelModel)
    assert isinstance(trained, LabelModel)
    fresh = model.head.weight.clone()
    prepare(model, begun, begun=False)
    assert torch.equal(model.token_embed.weight, trained.token_embed.weight)
    assert torch.equal(model.head.weight, fresh if start == "token-run" else trained.head.weight)


@torch.no_grad()
@pytest.mark.parametrize("kind", NAMES)
def test_transformers_says_the_same(root: Path, kind: str) -> None:
    folder = root / f"{kind}-out"
    write_export(*find_checkpoint(root / f"{kind}-run"), folder)
    ours, theirs = open_trained(folder), AUTO[kind].from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = ["Anna lived in Rome.", "Bob"]
    batch = tokenizer(["Where?"] * 2, texts, return_tensors="pt", padding=True) if kind == "span" else None
    batch = batch or tokenizer(texts, return_tensors="pt", padding=True)
    ids = ours.tokenizer.encode(texts)[0].tolist()
    if kind == "span":
        ids = [*ours.tokenizer.encode(["Where?"])[0].tolist(), ours.tokenizer.eos_id, *ids]
    assert batch["input_ids"][0].tolist() == ids
    logits = ours.model(torch.tensor([ids]))
    said = theirs(**batch)
    if kind == "span":
        torch.testing.assert_close(torch.stack([said.start_logits, said.end_logits], -1)[:1], logits)
        return
    assert theirs.config.id2label == dict(enumerate(NAMES[kind]))
    torch.testing.assert_close(said.logits[:1], logits[:, 0] if kind == "sequence" else logits)
    labels = torch.tensor([1, 0]) if kind == "sequence" else (batch["attention_mask"] - 1) * 100
    assert theirs(**batch, labels=labels).loss > 0


def test_who_uses_a_given_tokenizer_json_is_told_to_join_question_and_text(tmp_path: Path) -> None:
    fast = Fast(models.WordLevel({"</s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    fast.add_special_tokens(["</s>"])
    content, span = fast.to_str().encode(), small("encoder_only", head={"kind": "span"})
    about = About(span, "labels", "run", 1, {}, Tokenizer(content), content, ["a"])
    fits, why = write_tokenizer(tmp_path, about)
    assert fits
    assert why == "Its tokenizer puts no end-of-text between the texts of a pair: do it yourself."
    assert (tmp_path / "tokenizer.json").read_bytes() == content


def test_classify_says_labels_tokens_and_answers(root: Path) -> None:
    def said(kind: str, *args: str) -> list[str]:
        done = duet("classify", str(root / f"{kind}-run"), *args)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert [line.split()[0] for line in said("sequence", "--text", "Lima Lima Lima", "--text", "Riga Riga")] == [
        "south",
        "north",
    ]
    [found] = map(json.loads, said("token", "--json", "--text", "Anna lived in Oslo."))
    people = [(of["text"], of["start"]) for of in found["tokens"] if of["label"] == "PER"]
    assert people == [("Anna", 0)]
    assert all(found["text"][of["start"] : of["end"]] == of["text"] for of in found["tokens"])
    # Longer than a context: what is read in parts is told of the whole text.
    long = " ".join(["nobody lived"] * 5 + ["Bob lived in Lima."])
    [found] = map(json.loads, said("token", "--json", "--text", long))
    assert "".join(of["text"] for of in found["tokens"]) == long.replace(" ", "")
    answers = [json.loads(line) for line in said("span", "--file", str(root / "span.jsonl"), "--json")]
    right = [of["answer"] in of["text"] and of["text"][of["start"] : of["end"]] == of["answer"] for of in answers]
    assert len(answers) == 120
    assert all(right)
    exact = sum(of["answer"] == told(number)["span"]["label"]["text"] for number, of in enumerate(answers)) / 120
    assert exact >= scores(root / "span-run")["labels/val_exact"] - 1e-9
    done = duet("classify", str(root / "sequence-run"))
    assert (done.returncode, "give --text TEXT" in done.stderr) == (2, True)
    for kind, asked, why in (
        ("sequence", Asked("a", "b"), "the model answers no questions"),
        ("span", Asked("a"), "give --question"),
        ("sequence", Asked(""), "text 1 is empty"),
    ):
        with pytest.raises(UserError, match=why):
            Classifier(open_trained(root / f"{kind}-run")).told([asked], 1)
    with pytest.raises(ConfigError, match="not with labels"):
        Classifier(open_trained(root / "encoder"))
