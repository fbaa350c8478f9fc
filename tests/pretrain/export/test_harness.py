"""Exports in the hands of the lm-evaluation-harness."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError
from data_pipeline.tokenize.tokenizer import Tokenizer
from launch.cli import app
from pretrain.export.use import open_trained
from tests.model.helpers import batch_of, build, small
from tests.pretrain.export.test_elsewhere import LICENSE, PROMPTS, greedy


def task(folder: Path, name: str, docs: list[dict[str, Any]], output: str, **rest: Any) -> str:
    """A task of the harness in files."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": output,
        **rest,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(content))
    return str(folder / f"{name}.yaml")


def evaluated(path: Path, *tasks: str) -> dict[str, float]:
    done = CliRunner().invoke(app, ["eval", str(path), "--tasks", ",".join(tasks)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = (line.split() for line in done.stdout.splitlines())
    return {row[0]: float(row[1]) for row in rows if len(row) == 2 and "/" in row[0]}


def answering(path: Path, batch: int | None = None) -> Any:
    from pretrain.export.harness import DuetLM

    return DuetLM(open_trained(path), batch)


def asked(*arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, part, number) for number, part in enumerate(arguments)]


def test_bits_per_byte_are_those_of_validation(
    ranks: Callable[..., list[Any]], run: Path, exported: Path, tmp_path: Path
) -> None:
    """Texts of whole windows behind the end of a document: there both cut alike, and each token counts once."""
    texts = [LICENSE[: 16 * 20], LICENSE[1000 : 1000 + 16 * 7], LICENSE[500:516]]
    [expected] = ranks("tests.distributed.evaluation_cases:validate_text", 1, path=str(run), texts=texts)
    rolling = task(
        tmp_path,
        "held_out",
        [{"text": text} for text in texts],
        "loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    for path in (run, exported):
        found = evaluated(path, rolling)
        assert found["held_out/bits_per_byte"] == pytest.approx(expected, abs=1e-6)


def test_likelihoods_are_the_models_and_do_not_depend_on_the_batch(exported: Path) -> None:
    trained = open_trained(exported)
    pairs = [("You may", " not"), ("", "A"), (LICENSE[:40], LICENSE[40:45]), ("x", LICENSE[:16]), ("of the ", "work")]
    one, many = (answering(exported, batch).loglikelihood(asked(*pairs), disable_tqdm=True) for batch in (1, 4))
    for (context, continuation), a, b in zip(pairs, one, many, strict=True):
        given = [trained.tokenizer.eos_id, *trained.tokenizer.encode([context + continuation])[0].tolist()]
        given = given[1:] if context else given
        length = len(continuation) + (context != context.rstrip())
        ids = torch.tensor(given[-17:])
        with torch.no_grad():
            logits = trained.model(ids[None, :-1])[0, -length:]
        expected = logits.log_softmax(-1)[range(length), ids[-length:]].sum()
        assert a[0] == pytest.approx(float(expected), abs=1e-5)
        assert b[0] == pytest.approx(a[0], abs=1e-5)
        assert a[1] == b[1] == bool((logits.argmax(-1) == ids[-length:]).all())
    greedily = greedy(exported, 5)[0].removeprefix(PROMPTS[0])
    assert answering(exported).loglikelihood(asked((PROMPTS[0], greedily)), disable_tqdm=True)[0][1]


def test_what_is_given_to_a_model_that_reads_prompts_apart_is_its_prefix(exported: Path) -> None:
    from pretrain.export.harness import DuetLM

    trained = open_trained(exported)
    shape = {"context": 16, "vocab_size": trained.model.config.vocab_size, "refine": {"form": "prefix"}}
    model = build(small("refined", **shape)).eval()
    pairs = [("You may", " not"), ("", "A"), (LICENSE[:40], LICENSE[40:45])]
    found = DuetLM(trained._replace(model=model, objective="prefix"), 2).loglikelihood(asked(*pairs))
    for (context, continuation), (likelihood, _) in zip(pairs, found, strict=True):
        ids = trained.tokenizer.encode([context + continuation])[0].tolist()
        ids = torch.tensor(ids if context else [trained.tokenizer.eos_id, *ids])[-17:]
        given = len(ids) - len(continuation)
        batch = replace(batch_of(model.config, 1), prefix_lengths=torch.tensor([given]))
        with torch.no_grad():
            logits = model.predict(ids[None, :-1], None, batch)[0, given - 1 :].log_softmax(-1)
        expected = logits[range(len(continuation)), ids[given:]].sum()
        assert likelihood == pytest.approx(float(expected), abs=1e-5)


def test_rolling_covers_every_token_once(exported: Path) -> None:
    """Also where the last window is not whole: there it has more to go by than in validation."""
    model = answering(exported, 3)
    text = LICENSE[: 16 * 3 + 5]
    [whole] = model.loglikelihood_rolling(asked((text,)))
    ids = torch.tensor([model.eot_token_id, *model.tok_encode(text)])
    with torch.no_grad():
        windows = [model._model(ids[None, start : start + 16])[0].log_softmax(-1) for start in (0, 16, 32, 37)]
    first = sum(float(windows[n][range(16), ids[16 * n + 1 : 16 * n + 17]].sum()) for n in range(3))
    assert whole == pytest.approx(first + float(windows[3][range(11, 16), ids[-5:]].sum()), abs=1e-4)
    assert model.loglikelihood_rolling(asked(("",))) == [0.0]


def test_tasks_that_choose_and_that_generate(exported: Path, tmp_path: Path) -> None:
    docs: list[dict[str, Any]] = [
        {"text": prompt, "answer": text[len(prompt) :]}
        for prompt, text in zip(PROMPTS, greedy(exported, 5), strict=True)
    ]
    generate = {
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["never"], "max_gen_toks": 5},
    }
    trained = open_trained(exported)
    choices = ["e", "Q", "z"]
    with torch.no_grad():
        for doc in docs:
            ids = torch.tensor(trained.tokenizer.encode([doc["text"]])[0].tolist())
            each = [trained.tokenizer.encode([choice])[0][0] for choice in choices]
            doc["gold"] = int(trained.model(ids[None])[0, -1, each].argmax())
    choose = {
        "doc_to_text": "{{text}}",
        "doc_to_choice": choices,
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    found = evaluated(
        exported,
        task(tmp_path, "writes", docs, "generate_until", **generate),
        task(tmp_path, "chooses", docs, "multiple_choice", **choose),
    )
    assert found["writes/exact_match"] == 1.0
    assert found["chooses/acc"] == 1.0
    assert found["chooses/acc_stderr"] == 0.0
    odd = task(
        tmp_path, "odd", docs, "generate_until", **generate | {"generation_kwargs": {"until": "x", "typical": 1}}
    )
    for words, message in (
        (odd, "generation_kwargs ask for typical"),
        (str(tmp_path / "none.yaml"), "none.yaml: no such file"),
        (task(tmp_path, "choosy", docs, "chooses"), "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluated(exported, words)
    (tmp_path / "writes.jsonl").unlink()
    with pytest.raises(ConfigError, match="writes.yaml: no such task or file, or it cannot be loaded"):
        evaluated(exported, str(tmp_path / "writes.yaml"))


def test_a_missing_harness_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pretrain.export.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"--tasks needs the library lm_eval: pip install 'duet-pretrain\[lm-eval\]'"):
        evaluated(exported, "lambada_openai")


MERGING = "the there then k ke e of work works zzz\n" * 30
"""Of it a small vocabulary joins letters of which a context could end with one, and a continuation begin."""


def merging(path: Path, **options: Any) -> Any:
    """The model with a tokenizer that joins letters, of as small a vocabulary."""
    file = io.BytesIO()
    defaults: dict[str, Any] = {"model_type": "bpe", "vocab_size": 40, "minloglevel": 2}
    defaults |= {"unk_id": 0, "eos_id": 1, "bos_id": -1, "pad_id": -1}
    defaults |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    options = defaults | {"sentence_iterator": iter(MERGING.splitlines()), "model_writer": file} | options
    sentencepiece.SentencePieceTrainer.train(**options)
    return open_trained(path)._replace(tokenizer=Tokenizer(file.getvalue()))


@pytest.mark.parametrize(
    "options",
    [{"add_dummy_prefix": False}, {}, {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}],
)
def test_a_continuation_is_scored_by_its_own_text(exported: Path, options: dict[str, Any]) -> None:
    """Wherever a token would reach over the end of the context, also where a tokenizer puts a space before a text."""
    from pretrain.export.harness import DuetLM

    trained = merging(exported, **options)
    model, tokenizer = DuetLM(trained), trained.tokenizer
    pieces = [tokenizer.piece(token) for token in tokenizer.encode(["ke the zzz"])[0].tolist()]
    assert any("ke" in piece for piece in pieces), "k and e are one piece"
    pairs = [
        (text[:cut], text[cut:]) for text in ("ke", "k zzz", "of the there", "works") for cut in range(1, len(text))
    ]
    for (context, continuation), found in zip(pairs, model.loglikelihood(asked(*pairs)), strict=True):
        given, follows, alone = model._encoded(context, continuation)
        assert tokenizer.decode([*given, *follows]) == context + continuation
        assert given == tokenizer.encode([context.rstrip()])[0].tolist()
        with torch.no_grad():
            logits = trained.model(torch.tensor([[*given, *follows]]))[0, len(given) - 1 : -1].log_softmax(-1)
        assert found[0] == pytest.approx(float(logits[range(len(follows)), follows].sum()), abs=1e-5)
        assert found[0] < -0.5
        assert alone == (tokenizer.encode([context + continuation])[0].tolist()[: len(given)] != given)
    number = sum(model._encoded(*pair)[2] for pair in pairs)
    assert f"each encoded by itself: {number}" in "".join(model.warnings())


def test_what_has_no_likelihood_is_refused(exported: Path) -> None:
    model = answering(exported)
    [(blank, _)] = model.loglikelihood(asked(("  \n", "The")))
    assert blank == pytest.approx(model.loglikelihood(asked(("", "  \nThe")))[0][0], abs=1e-5)
    for pair, message in (
        (("", ""), "how likely '' is after ''"),
        ((" ", ""), "how likely '' is after ' '"),
        (("The", ""), "how likely '' is after 'The'"),
        (("The", 5), "gives 5 where a text is wanted"),
        (("The", "a\ud800"), r"holds half a surrogate \(\\ud800\) at character 1"),
        (("The", "Y" * 17), "the likelihood of 17 tokens at once"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.loglikelihood(asked(pair))
    with pytest.raises(ConfigError, match=r"holds the byte 0x80, which is not UTF-8"):
        model.loglikelihood_rolling(asked(("a\udc80",)))
    model = answering(exported)
    assert model.loglikelihood(asked(("The", "Y"))) and model.warnings() == []
    model.loglikelihood(asked((LICENSE[:40], "é")))
    assert [text.rpartition(": ")[2] for text in model.warnings()] == ["1", "1"], "cut, and an unknown character"


def test_what_is_drawn_does_not_depend_on_the_batch(exported: Path) -> None:
    kinds = ({"do_sample": True, "max_gen_toks": 6, "until": None}, {"temperature": 2.0, "max_gen_toks": 6})
    requests = asked(*((PROMPTS[number % 3], kinds[number % 2]) for number in range(8)))
    one, many = (answering(exported, batch).generate_until(requests) for batch in (1, 3))
    assert one == many and len(set(one)) > 2
    for change in ({"until": 5}, {"until": ["a\ud800"]}, {"max_gen_toks": "6"}, {"temperature": "1e-5"}):
        with pytest.raises(ConfigError, match=r"generation_kwargs have|surrogate|gives 5"):
            answering(exported).generate_until(asked(("The", change)))


def test_a_task_that_the_harness_cannot_evaluate_is_named(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the harness raises of itself is the task's fault; what our answers raise is ours."""
    docs = [{"text": "The", "parts": 1}, {"text": "A", "parts": 0}]
    rest = {"doc_to_text": "", "metric_list": [{"metric": "bits_per_byte"}]}
    broken = task(tmp_path, "broken", docs, "loglikelihood_rolling", doc_to_target="{{3 / parts}}", **rest)
    with pytest.raises(ConfigError, match="broken.yaml: the harness cannot evaluate it: ZeroDivisionError"):
        evaluated(exported, broken)
    whole = task(tmp_path, "whole", docs, "loglikelihood_rolling", doc_to_target="{{text}}", **rest)
    monkeypatch.setattr("pretrain.export.harness.get_rolling_token_windows", None)
    with pytest.raises(TypeError):
        evaluated(exported, whole)
