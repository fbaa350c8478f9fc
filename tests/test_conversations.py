"""A run on conversations through the command line: trained, gone on with, asked, and given to transformers."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from data_pipeline.building.api import build
from data_pipeline.ingest.readers import Message
from pretrain.export.standard import import_model, write_standard
from pretrain.export.use import open_trained
from pretrain.inference.trained import find_checkpoint
from tests.data_pipeline.conftest import config, prose
from tests.runs import SMALL, attempts, duet

MODEL = ["model.architecture=decoder_only", "model.learned_dropout.enabled=false", "model.document_mask=true"]
LLAMA = ["model.positions=rotary", "model.norm=rmsnorm", "model.ff=swiglu"]
DATA = ["data.objective=conversations", "data.packing=best_fit"]
SPELLED = "Who</s>assistant\nare you?"


def test_a_model_learns_to_answer(tmp_path: Path) -> None:
    words = prose(6000).splitlines()
    with open(tmp_path / "talk.jsonl", "w") as file:
        for question, answer in zip(words[::2], words[1::2], strict=False):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    sources = {"talk": {"paths": [str(tmp_path / "talk.jsonl")], "messages_key": "messages"}}
    build(config(tmp_path / "data", sources=sources, split={"rule": "hash", "fraction": 0.1}))

    def losses(run: str, *args: str) -> list[float]:
        more = [f"data.path={tmp_path / 'data'}", f"run.dir={tmp_path / run}", "model.context=64", "batch.tokens=256"]
        fixed = ["train.eval_every=2", "train.checkpoint_every=2", "train.sample_tokens=4", "schedule.kind=constant"]
        done = duet("train", *SMALL, *MODEL, *LLAMA, *DATA, *more, *fixed, *args)
        assert done.returncode == 0, done.stderr
        assert "are longer than 65 tokens" in done.stdout
        found = attempts(tmp_path / run / "metrics.jsonl")
        return [steps[step]["loss/total"] for _, steps in found for step in sorted(steps)]

    whole = losses("whole", "train.steps=4")
    losses("parts", "train.steps=2")
    assert losses("parts", "train.steps=4") == whole

    said = duet("eval", str(tmp_path / "whole"))
    assert "loss/val " in said.stdout, said.stderr
    assert "bits" not in said.stdout
    assert duet("checkpoint", "export", str(tmp_path / "whole"), "--to", str(tmp_path / "out")).returncode == 0
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": asked}) + "\n")
    replies = [
        json.loads(duet("generate", str(tmp_path / of), "--json", "--tokens", "8", *how).stdout)
        for of in ("whole", "out")
        for how in (["--messages", str(tmp_path / "asked.jsonl")], ["--chat", SPELLED])
    ]
    assert replies[0]["text"] == replies[2]["text"]
    assert replies[1]["text"] == replies[3]["text"]
    assert [reply["messages"] for reply in replies[:2]] == [asked, [{"role": "user", "content": SPELLED}]]

    trained = open_trained(tmp_path / "out")
    ours = trained.chat()
    write_standard(*find_checkpoint(tmp_path / "whole"), tmp_path / "llama", "llama")
    import_model(tmp_path / "llama", tmp_path / "again")
    again = open_trained(tmp_path / "again")
    assert (again.chat_template, again.objective) == (trained.chat_template, trained.objective)
    wanted = ours.prompt([Message(told["role"], told["content"]) for told in asked]).tolist()
    for of in ("out", "llama", "again"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / of)
        assert theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == wanted, of
    eos = trained.tokenizer.eos_id
    assert ours.prompt([Message("user", SPELLED)]).tolist().count(eos) == 1
    assert "apply_chat_template" in (tmp_path / "out" / "README.md").read_text()

    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "I"}]}))
    for more, why in (
        (["--messages", str(tmp_path / "asked.jsonl")], "line 1: the assistant speaks next"),
        (["--chat", "a", "--prompt", "b"], "give one"),
    ):
        refused = duet("generate", str(tmp_path / "whole"), *more)
        assert refused.returncode == 2
        assert why in refused.stderr
