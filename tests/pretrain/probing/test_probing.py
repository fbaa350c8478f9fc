"""What streams know: measures that find what was planted and nothing else, states that see nothing to come, a page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.token_stream import TokenStream
from data_pipeline.tokenize.tokenizer import Tokenizer
from pretrain.probing.examine import apart
from pretrain.probing.features import WordPlace, answers
from pretrain.probing.linear import entropy, likeness, probe
from pretrain.probing.states import states
from pretrain.probing.text import choose
from tests.model.helpers import batch_of, build, variant
from tests.runs import SMALL, duet


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_likeness_knows_a_turned_copy_from_noise() -> None:
    """However many channels there are: without the correction, noise of 300 channels on 200 tokens is alike by 0.6."""
    x = drawn(200, 300) + 3
    turn = torch.linalg.qr(drawn(300, 300, seed=1))[0]
    assert likeness(x, 2 * x @ turn + 1) == pytest.approx(1, abs=1e-9)
    assert likeness(x, 2 * x @ drawn(300, 300, seed=1)) < 0.9
    assert abs(likeness(x, drawn(200, 300, seed=2))) < 0.02
    y = x[:, :40] + drawn(200, 40, seed=3)
    assert likeness(x, y) == likeness(y, x) == pytest.approx(by_definition(x, y), rel=1e-9)


def by_definition(x: Tensor, y: Tensor) -> float:
    """With kernels of size n x n."""

    def kernel(of: Tensor) -> Tensor:
        return (of.double() @ of.double().T).fill_diagonal_(0)

    def hsic(k: Tensor, other: Tensor) -> Tensor:
        n, both = len(k), k @ other
        rest = k.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 * both.sum() / (n - 2)
        return (both.trace() + rest) / (n * (n - 3))

    k, other = kernel(x), kernel(y)
    return float(hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt())


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    x = drawn(1200, 20) * 5 + 2
    planted = (x @ drawn(20, 4, seed=1)).argmax(1)
    noise = torch.randint(4, (1200,), generator=torch.Generator().manual_seed(2))
    told = {
        name: (probe((x[:800], y[:800]), (x[800:], y[800:]), 4), entropy(y[:800], y[800:], 4))
        for name, y in {"planted": planted, "noise": noise}.items()
    }
    found, bits = told["planted"]
    assert found.accuracy > 0.95 and found.bits > 0.85 * bits
    found, bits = told["noise"]
    assert found.accuracy < 0.32 and found.bits < 0 and bits == pytest.approx(2, abs=0.02)
    assert probe((x[:800], planted[:800]), (x[800:], planted[800:]), 4) == told["planted"][0]


PASSED = {
    "decoder": ["layers 1", "layers 2"],
    "parallel": ["encoder 1", "encoder 2", "decoder 1", "decoder 2"],
    "serial": ["encoder 1", "encoder 2", "decoder 1", "decoder 2"],
    "universal_decoder": ["layers 1", "layers 2", "layers 3", "layers 4"],
    "universal": [f"{stream} {depth}" for stream in ("encoder", "decoder") for depth in range(1, 7)],
    "feedback": ["layers 1", "layers 2", "layers 3"],
    "two_stream": ["layers 1", "layers 2", "queries 1", "queries 2"],
    "refined": ["decoder 1", "decoder 2"],
    "sinks": ["layers 1", "layers 2"],
}


@pytest.mark.parametrize("name", PASSED)
def test_states_are_those_that_the_head_is_computed_from_and_see_nothing_to_come(name: str) -> None:
    changes: dict[str, Any] = {"architecture": "refined", "refine": {"chunk": 4}} if name == "refined" else {}
    config = variant("decoder" if name == "refined" else name, **changes)
    model = build(config).eval()
    batch = batch_of(variant("decoder", context=config.context))
    found = states(model, batch)
    assert [f"{state.stream} {state.depth}" for state in found] == ["embedded 0", *PASSED[name]]
    last = found[list(found)[-1]]
    with torch.no_grad():
        assert torch.equal(model.final_norm(last), model.hidden(batch.input_ids, None, batch).x)
    batch.input_ids[:, -1] = (batch.input_ids[:, -1] + 1) % 17
    for state, x in states(model, batch).items():
        torch.testing.assert_close(x[:, :-1], found[state][:, :-1], atol=1e-6, rtol=0)
        assert not torch.equal(x[:, -1], found[state][:, -1])


def test_what_is_asked_of_words_and_sentences(dataset: Path) -> None:
    """One token a character; `-` where a window does not tell."""
    tokenizer = Tokenizer.of(dataset / "tokenizer")
    text = "ow. As is, it was.\n"
    windows = tokenizer.encode([text])[0].astype(np.int64)[None]
    common = np.unique(windows)
    found = answers(windows, common, tokenizer)

    asked = {name: "".join("-" if answer < 0 else str(answer) for answer in of[0]) for name, of in found.items()}
    assert {name: asked[name] for name in WordPlace._fields} == {
        "word_place": "--0012012001201230",
        "capital": "----11-00--00-000-",
        "word_ends": "01--01-01--01-001-",
        "sentence_ends": "010000000000000010",
        "sentence_place": "---011122222223333",
    }
    assert [common[i] for i in found["token"][0]] == [common[i] for i in found["before"][0, 1:]] + [windows[0, -2]]
    assert (found["next"][0, :-1] == found["token"][0, 1:]).all() and found["before"][0, 0] == -1
    assert (answers(windows, common[:1], tokenizer)["token"] == -1).sum() == (windows[0, :-1] != common[0]).sum()


def test_probes_are_tested_on_other_documents(tmp_path: Path, dataset: Path) -> None:
    lines = [json.dumps({"text": f"document {number} " * (5 + 3 * number % 7)}) for number in range(40)]
    (tmp_path / "held.jsonl").write_text("\n".join(lines))
    (tmp_path / "train.txt").write_text("document 0123456789 ")
    args = ["data.sources.text.paths=[train.txt]", "data.split.rule=given", "data.split.files=[held.jsonl]"]
    built = duet("data", "build", "data/characters", *args, "data.path=many", cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    windows = Windows(TokenStream(Dataset.open(tmp_path / "many"), "validation"), 16)
    found = choose(windows, 10**6)
    touched = [{n for index in part for n, _ in windows.origin(int(index)).documents} for part in found[:2]]
    assert found.apart == "documents" and max(touched[0]) < min(touched[1])
    assert 0.5 < len(found.train) / len(windows) < 0.75 and len(found.test) > 0.25 * len(windows)
    assert len(choose(windows, 320).train) < 20
    single = Windows(TokenStream(Dataset.open(dataset), "validation"), 16)
    found = choose(single, 320)
    assert found.apart == "text" and found.train.max() < found.test.min() and len(found.train) == 13
    with pytest.raises(DataError, match="too few to train probes and test them; hold out more"):
        choose(Windows(TokenStream(Dataset.open(dataset), "validation"), single.num_tokens - 1), 10**6)


def test_names_are_told_without_what_all_have_in_common() -> None:
    assert apart(["a-b-seed-1", "a-c-d-seed-1"]) == ["b", "c-d"]
    assert apart(["a", "a-b"]) == ["a", "a-b"] and apart(["a-b"]) == ["a-b"] and apart(["a-b", "c-b"]) == ["a", "c"]


def test_runs_are_probed_and_a_study_shows_it(run: Path, exported: Path, dataset: Path, tmp_path: Path) -> None:
    shape = ["model.architecture=decoder_only", f"data.path={dataset}", "run.name=single", "train.steps=1"]
    trained = duet("train", *SMALL, "model.learned_dropout.enabled=false", *shape, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    words = ["study", "probe", str(run), "runs/single", "--to", "small", "--tokens", "1200"]
    done = duet(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = (tmp_path / "small" / "probes.json").read_bytes()
    found = json.loads(kept)
    names = [f"{state['run']}: {state['stream']} {state['depth']}" for state in found["states"]]
    assert [name.split(": ")[1] for name in names] == ["embedded 0", "encoder 1", "decoder 1", "embedded 0", "layers 1"]
    table = np.array(found["likeness"])
    assert (
        table.shape == (5, 5) and (table == table.T).all() and (table.diagonal() == 1).all() and (table < 1.001).all()
    )
    entropies = {name: question["entropy"] for name, question in found["questions"].items()}
    for state in found["states"]:
        for name, answer in state["trained"].items():
            assert answer["bits"] <= entropies[name] and 0 <= answer["accuracy"] <= 1
    embedded = found["states"][0]
    assert embedded["random"]["token"]["bits"] > 0.8 * entropies["token"]
    assert embedded["random"]["before"]["bits"] < 0.5 * entropies["before"]

    assert duet(*words, cwd=tmp_path).stdout == done.stdout and (tmp_path / "small/probes.json").read_bytes() == kept
    arms = {"one": {"about": "one", "config": []}}
    section = {"title": "None", "seeds": [1], "arms": arms}
    study = {"name": "small", "config": [f"data.path={dataset}"], "sections": {"core": section}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(study))
    assert duet("study", "report", "small.yaml", cwd=tmp_path).returncode == 0
    page = (tmp_path / "small.md").read_text()
    assert done.stdout.strip() in page and "](small/probes-answers.png)" in page and "small/probes-likeness.png" in page
    (tmp_path / "small" / "probes.json").write_bytes(kept[:100])
    broken = duet("study", "report", "small.yaml", cwd=tmp_path)
    assert broken.returncode == 2 and "probes.json: cannot be read" in broken.stderr

    for runs, said in (
        ([exported], "is an export, and does not say where its held-out text lies"),
        ([run, run], "two of the runs are called"),
        (["gone"], "gone: not a run folder"),
        ([run, "--to", "/proc/probes"], "cannot write /proc/probes/probes.json"),
    ):
        refused = duet("study", "probe", *map(str, runs), cwd=tmp_path)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
