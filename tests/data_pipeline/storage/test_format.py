"""The layout on disk: a stream for each source, and datasets of the format before it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.ingest.splits import GIVEN, SPLITS, Split
from data_pipeline.inspection.statistics import documents
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import ALL, Manifest
from tests.data_pipeline.conftest import config, prose, stream

FORMAT_1 = Path(__file__).parents[1] / "format1"
"""Built by the last version that wrote format 1: `one` of prose(1500), `two` of sources a and b and a given split."""


def source_stream(dataset: Dataset, split: Split, source: str) -> np.ndarray:
    """The tokens of one source, shard by shard."""
    shards = [dataset.shard(facts) for facts in dataset.manifest.shards_of(split, source)]
    parts = [shard.tokens(batch) for shard in shards for batch in range(shard.num_batches)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def write_sources(folder: Path) -> DataConfig:
    (folder / "a.txt").write_text(prose(1500))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": prose(60, seed)}) + "\n" for seed in range(1, 9)))
    (folder / "c.txt").write_text(prose(500, 5))
    sources = {name[0]: {"paths": [str(folder / name)]} for name in ("c.txt", "a.txt", "b.jsonl")}
    return config(folder / "all", sources=sources, tokenizer={"type": "char"}, shard_tokens=1024)


def test_each_source_is_a_stream_of_its_own(tmp_path: Path) -> None:
    settings = write_sources(tmp_path)
    build(settings)
    dataset = Dataset.open(tmp_path / "all")
    manifest = dataset.manifest
    tokenizer = dataset.tokenizer()
    assert [source.name for source in manifest.sources] == ["c", "a", "b"]
    for split in SPLITS:
        parts = [source_stream(dataset, split, name) for name in "cab"]
        assert [len(part) for part in parts] == [source.tokens[split] for source in manifest.sources]
        assert np.array_equal(np.concatenate(parts), stream(Windows.of(dataset, split, 50, partial=True)))
        assert sum(len(part) for part in parts) == manifest.splits[split].tokens
        for key in ("documents", "bytes"):
            shares = [getattr(source, f"split_{key}")[split] for source in manifest.sources]
            assert sum(shares) == getattr(manifest.splits[split], key)
        sizes = {name: [shard.tokens for shard in manifest.shards_of(split, name)] for name in "cab"}
        for name in "cab":
            assert all(size == 1024 for size in sizes[name][:-1])
            assert sum(shard.documents for shard in manifest.shards_of(split, name)) > 0
        names = [Path(shard.path).name[:8] for shard in manifest.shards_of(split)]
        assert names == [f"{split[0]}-{number:06d}" for number in range(len(names))]
    text = (tmp_path / "a.txt").read_text()
    both = [tokenizer.decode(source_stream(dataset, split, "a")) for split in SPLITS]
    assert "".join(both) == text
    assert len(list(documents(dataset, "train"))) == manifest.splits["train"].documents


def test_order_of_sources_and_their_names_are_in_the_fingerprint_but_weights_are_not(tmp_path: Path) -> None:
    settings = write_sources(tmp_path)
    fingerprint = build(settings).fingerprint
    sources = {name: source.model_dump() for name, source in settings.sources.items()}
    renamed = {name.upper(): source for name, source in sources.items()}
    moved = dict(reversed(sources.items()))
    for number, other in enumerate((renamed, moved)):
        changed = settings.model_validate(
            {**settings.model_dump(), "sources": other, "path": str(tmp_path / f"{number}")}
        )
        assert build(changed).fingerprint != fingerprint
    weighted = {name: {**source, "weight": 3.0, "repeat": 2} for name, source in sources.items()}
    assert build(settings.model_validate({**settings.model_dump(), "sources": weighted})).fingerprint == fingerprint


def pieces(dataset: Dataset) -> dict[str, float]:
    """Of its tokenizer, with their scores."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(Path(dataset.path) / "tokenizer" / "spm.model"))
    return {model.id_to_piece(token): model.get_score(token) for token in range(model.get_piece_size())}


def test_one_source_gives_the_stream_it_always_gave(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(1500))
    build(config(tmp_path / "d", tmp_path / "a.txt", shard_tokens=1024))
    old, new = Dataset.open(FORMAT_1 / "one"), Dataset.open(tmp_path / "d")
    assert pieces(new) == pytest.approx(pieces(old), abs=1e-3)  # of sums that another C library may round otherwise
    for split in SPLITS:
        assert np.array_equal(
            stream(Windows.of(new, split, 50, partial=True)), stream(Windows.of(old, split, 50, partial=True))
        )


@pytest.mark.parametrize(("name", "source"), [("one", "text"), ("two", ALL)])
def test_datasets_of_format_1_are_read_as_one_source(name: str, source: str) -> None:
    dataset = Dataset.open(FORMAT_1 / name)
    dataset.verify()
    assert dataset.manifest.format == 1
    assert [facts.name for facts in dataset.manifest.sources] == [source]
    tokenizer = dataset.tokenizer()
    for split in SPLITS:
        found = source_stream(dataset, split, source)
        assert np.array_equal(found, stream(Windows.of(dataset, split, 100, partial=True)))
        assert len(found) == dataset.manifest.sources[0].tokens[split] == dataset.manifest.splits[split].tokens
    if name == "one":
        assert tokenizer.decode(source_stream(dataset, "train", source)) in prose(1500)
    else:
        assert tokenizer.decode(source_stream(dataset, "validation", source)) == prose(120, 77)
    # What stands there was built from the same text and settings as ever.
    assert dataset.manifest.fingerprint == json.loads((FORMAT_1 / name / "manifest.json").read_text())["fingerprint"]


def test_a_given_split_is_a_source_of_validation_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(1500))
    (tmp_path / "held.txt").write_text(prose(100, 3))
    split = {"rule": "given", "files": [str(tmp_path / "held.txt")]}
    manifest = build(config(tmp_path / "d", tmp_path / "a.txt", split=split))
    text, given = manifest.sources
    assert given.name == GIVEN
    assert text.tokens["validation"] == given.tokens["train"] == 0
    assert manifest.shards_of("validation") == manifest.shards_of("validation", GIVEN)
    assert manifest.shards_of("train", "text") == manifest.shards_of("train")


def test_a_damaged_manifest_of_format_1_is_named(tmp_path: Path) -> None:
    shutil.copytree(FORMAT_1 / "one", tmp_path / "d")
    path = tmp_path / "d" / "manifest.json"
    for key in ("sources", "splits", "shards"):
        content = json.loads((FORMAT_1 / "one" / "manifest.json").read_text())
        del content[key]
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            Manifest.load(tmp_path / "d")
