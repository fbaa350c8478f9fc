"""What `save_to_disk` wrote, by its layout and by the library itself; and the same at `hf://`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.ingest.listing import Listing
from data_pipeline.ingest.splits import SPLITS
from data_pipeline.inspection.statistics import documents
from data_pipeline.storage.dataset import Dataset
from tests.data_pipeline.ingest.hub import hub
from tests.runs import ROOT

TEXTS = [f"document {number}, which is number {number}\n" for number in range(12)]


def write_folder(folder: Path, texts: list[str], shards: int = 2) -> Path:
    """As `Dataset.save_to_disk` lays it out, by pyarrow alone."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{shards:05}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        table = pa.table({"text": texts[number * len(texts) // shards : (number + 1) * len(texts) // shards]})
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    state: dict[str, object] = dict.fromkeys(("_format_columns", "_format_type", "_split"))
    state |= {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1", "_format_kwargs": {}}
    state |= {"_output_all_columns": False}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string", "_type": "Value"}}}))
    return folder


def text_of(path: str, dataset: Path) -> str:
    """Of all documents built from `path`, as the dataset gives them back; the tail is held out."""
    config = {
        "path": str(dataset),
        "sources": {"it": {"paths": [path]}},
        "tokenizer": {"type": "char", "vocab_size": 100},
        "split": {"rule": "tail", "fraction": 0.1},
    }
    build(DataConfig.model_validate(config))
    opened = Dataset.open(dataset)
    decode = opened.tokenizer().decode
    return "".join(decode(part) for split in SPLITS for parts in documents(opened, split) for part in parts)


def test_a_round_trip(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "saved", TEXTS)
    (folder / "cache-0123.arrow").write_bytes(b"of a map")
    assert text_of(str(folder), tmp_path / "built") == "".join(TEXTS)
    listing = Listing("data.sources.it.paths")
    listing.add(str(folder))
    assert listing.left_out == [f"{folder}/cache-0123.arrow (not of the dataset that is saved there)"]


def test_what_the_library_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    one = datasets.DatasetDict({"train": rows.select(range(2, len(TEXTS)))})  # by indices, which are not saved
    one.save_to_disk(tmp_path / "one", num_shards={"train": 3})
    assert text_of(str(tmp_path / "one"), tmp_path / "built") == "".join(TEXTS[2:])
    ours = write_folder(tmp_path / "ours", TEXTS)
    assert datasets.load_from_disk(ours)["text"][:] == TEXTS, "the layout above is the library's"


def test_damage_and_choices_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / "both" / split, TEXTS)
    both = tmp_path / "both"
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    def refused(path: Path, match: str) -> None:
        with pytest.raises(DataError, match=match):
            Listing("data.sources.it.paths").add(str(path))

    refused(both, f"name those that are to be read: {both}/train, {both}/test")
    train = both / "train"
    last = train / "data-00001-of-00002.arrow"
    whole = last.read_bytes()
    last.write_bytes(whole[:-8])  # at the end of a batch, where the Arrow library sees no fault
    refused(train, "data-00001-of-00002.arrow is cut off")
    last.unlink()
    refused(train, "data-00001-of-00002.arrow is missing")
    for state, match in (
        ("[]", "no JSON object"),
        ("{", "no JSON"),
        ("{}", "does not list"),
        ('{"_indices_data_files": [{"filename": "x"}]}', "flatten_indices"),
    ):
        (train / "state.json").write_text(state)
        refused(train, match)


def test_at_the_hub(tmp_path: Path) -> None:
    """huggingface_hub's own file system, in a new process, against a server on this machine."""
    write_folder(tmp_path / "repository" / "saved", TEXTS)
    program = """
import sys
from pathlib import Path
from data_pipeline.errors import DataError
from tests.data_pipeline.ingest.test_saved_folders import text_of
assert text_of("hf://datasets/me/mine/saved", Path(sys.argv[1])) == sys.argv[2]
for wrong in ("hf://datasets/me/other/saved", "hf://datasets/me/broken/saved", "hf://datasets/me/mine/nothing.jsonl"):
    try:
        text_of(wrong, Path("nowhere"))
    except DataError as error:
        print(error)
"""
    with hub(tmp_path / "repository") as endpoint:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "built"), "".join(TEXTS)],
            env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    for repository in ("other", "broken"):
        assert f"hf://datasets/me/{repository}/saved cannot be listed" in done.stdout
    assert "hf://datasets/me/mine/nothing.jsonl does not exist" in done.stdout
