"""The quickstart's corpus is prose, and what its model wrote reads like it."""

import json
import re
from pathlib import Path

import zstandard

from launch.commands.quickstart import collect, paragraphs
from tests.runs import ROOT

LEAST_KNOWN = 0.95
"""Of the words of the sample, to be found in the corpus."""


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def test_paragraphs_of_prose_stay() -> None:
    prose = "Return the number of items in the list, or\n    zero if there are none of them."
    code = "Call it with all of the arguments, such as f(1, 2, 3) or g(x=4, y=5) and then h[6]."
    assert list(paragraphs(f"{prose}\n\n>>> f(1)\n2\n\n{code}\n\nSee also.")) == [" ".join(prose.split())]


def test_the_sample_in_the_readme_is_of_words_that_were_read(tmp_path: Path) -> None:
    documents, size = collect(tmp_path / "corpus.jsonl.zst")
    with zstandard.open(tmp_path / "corpus.jsonl.zst", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert (len(texts), sum(len(text.encode()) for text in texts)) == (documents, size)
    assert size > 500_000
    every = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert len(set(every)) == len(every), "each paragraph once"
    [sample] = re.findall(r"(?ms)^sample: .*? ⟶ (.*?)\n\nrun ", (ROOT / "README.md").read_text())
    wrote = words(sample)
    known = set(words("\n".join(texts)))
    assert len(wrote) > 40
    assert sum(word in known for word in wrote) >= LEAST_KNOWN * len(wrote), [w for w in wrote if w not in known]
