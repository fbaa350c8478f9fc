"""Who wrote a paragraph: an encoder that read novels before it learned from labels, and one that begins with these.

The numbers are in docs/results.md; `pytest -m drill -s tests/test_label_drills.py` prints them.
"""

import io
import json
import random
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
import zstandard

from pretrain.metric_names import VALIDATION_ACCURACY, VALIDATION_F1
from pretrain.run.journal import read, series
from tests.corpora import corpora
from tests.runs import duet

pytestmark = pytest.mark.drill

SEEDS = (1, 2, 3)
LEARNED, HELD_OUT = 100, 100
"""Paragraphs of each author: to learn from, and, of another novel, to be asked about."""
READING = 1200
"""Steps of 4,096 tokens in which the encoder reads novels."""
MODEL = ["model/encoder-tiny", "model.layers=2", "engine.precision=fp32", "tracking.mode=off", "train.sample_tokens=0"]
LABELS = ["data.objective=labels", "model.head.kind=sequence", "batch.tokens=4096", "train.steps=150"]
LABELS += ["schedule.warmup_steps=15", "train.eval_every=150", "train.eval_tokens=all", "train.log_every=50"]


def novels() -> dict[str, dict[str, list[str]]]:
    """Chapters by author and title."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in ("eltec/eng.train.jsonl.zst", "eltec/eng.valid.jsonl.zst"):
        with open(corpora(name), "rb") as file:
            for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"):
                chapter = json.loads(line)
                found[chapter["author"]][chapter["title"]].append(chapter["text"])
    return found


def paragraphs(chapters: list[str], count: int) -> list[str]:
    """So many of about a context's length, from all over a novel."""
    fitting = [text for chapter in chapters for text in chapter.split("\n\n") if 250 <= len(text) <= 450]
    return random.Random(0).sample(fitting, min(count, len(fitting)))


def write(path: Path, objects: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Novels to read, paragraphs with their authors, and the encoder that has read."""
    root, texts = tmp_path_factory.mktemp("authors"), novels()
    authors = sorted(author for author, written in texts.items() if len(written) > 1)
    last = {author: min(texts[author], key=lambda title: len("".join(texts[author][title]))) for author in authors}
    kept = {author: [title for title in written if title != last.get(author)] for author, written in texts.items()}
    write(root / "novels.jsonl", [{"text": c} for a, titles in kept.items() for t in titles for c in texts[a][t]])
    for name, of in (("train", kept), ("valid", {author: [last[author]] for author in authors})):
        chosen = [(a, [chapter for title in of[a] for chapter in texts[a][title]]) for a in authors]
        count = LEARNED if name == "train" else HELD_OUT
        told = [{"text": text, "label": a.partition(",")[0]} for a, read in chosen for text in paragraphs(read, count)]
        write(root / f"{name}.jsonl", told)
    names = ",".join(author.partition(",")[0] for author in authors)
    told_of = [f"data.sources.x.paths=[{root / 'train.jsonl'}]", f"data.split.files=[{root / 'valid.jsonl'}]"]
    tokenizer = ["data.tokenizer.vocab_size=2048", "data.tokenizer.sample_bytes=4000000"]
    run(
        *("data", "build", f"data.path={root / 'novels'}", f"data.sources.x.paths=[{root / 'novels.jsonl'}]"),
        *(*tokenizer, 'data.tokenizer.user_defined_symbols=["\\n","<mask>"]'),
    )
    run(
        *("data", "build", f"data.path={root / 'authors'}", *told_of, "data.split.rule=given"),
        *("data.labels.kind=sequence", f"data.labels.names=[{names}]"),
        f"data.tokenizer.model={root / 'novels' / 'tokenizer' / 'spm.model'}",
    )
    run(
        *("train", *MODEL, "data.objective=masked", f"data.path={root / 'novels'}", f"run.dir={root / 'encoder'}"),
        *("batch.tokens=4096", f"train.steps={READING}", "schedule.warmup_steps=50", "optimizer.lr=2e-3"),
        *("train.eval_every=200", "train.log_every=50"),
    )
    return root


def run(*args: str) -> str:
    done = duet(*args, timeout=1800)
    assert done.returncode == 0, done.stderr
    print("\n".join(line for line in done.stdout.splitlines() if "validation" in line or "speed" in line), flush=True)
    return done.stdout


def scores(folder: Path, name: str, *args: str) -> tuple[float, float]:
    """Accuracy and macro F1 on the held-out novels, in the mean over the seeds."""
    found = []
    for seed in SEEDS:
        path = folder / f"{name}-{seed}"
        run("train", *args, *LABELS, f"data.path={folder / 'authors'}", f"run.seed={seed}", f"run.dir={path}")
        points = series(read(path / "metrics.jsonl"))
        found.append([points[metric][-1].value for metric in (VALIDATION_ACCURACY, VALIDATION_F1)])
        print(name, seed, *(f"{value:.4f}" for value in found[-1]), flush=True)
    accuracy, f1 = (mean(of) for of in zip(*found, strict=True))
    print(f"{name}: accuracy {accuracy:.4f}, macro F1 {f1:.4f}", flush=True)
    return accuracy, f1


def test_authors_are_known_by_another_of_their_novels(folder: Path) -> None:
    begun = ["--from", str(folder / "encoder"), "finetune.kind=full", "optimizer.lr=1e-3"]
    scratch = scores(folder, "scratch", *MODEL, "optimizer.lr=1e-3")
    full = scores(folder, "full", *begun)
    assert min(scratch[0], full[0]) > 0.15, "the most frequent author has 0.108"
