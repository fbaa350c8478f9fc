import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import DataError
from data_pipeline.files.sealed import seal
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from data_pipeline.tokenize.tokenizer import train_tokenizer
from tests.data_pipeline.conftest import stream


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shard_path(dataset: Dataset, number: int = 0) -> Path:
    return dataset.path / dataset.manifest.shards[number].path


def flip_body(dataset: Dataset) -> None:
    flip(shard_path(dataset), shard_path(dataset).stat().st_size // 2)


def zero_page(dataset: Dataset) -> None:
    data = bytearray(shard_path(dataset).read_bytes())
    data[:] = data[:2048] + bytes(4096) + data[2048 + 4096 :]
    shard_path(dataset).write_bytes(data)


def truncate(dataset: Dataset) -> None:
    shard_path(dataset).write_bytes(shard_path(dataset).read_bytes()[:-1])


def flip_footer(dataset: Dataset) -> None:
    flip(shard_path(dataset), shard_path(dataset).stat().st_size - 7)


def flip_schema_metadata(dataset: Dataset) -> None:
    data = shard_path(dataset).read_bytes()
    flip(shard_path(dataset), data.index(b"tokenizer_sha256") + 3)


def swap(dataset: Dataset) -> None:
    first, second = shard_path(dataset, 0), shard_path(dataset, 1)
    first.rename(first.with_suffix(".aside"))
    second.rename(first)
    first.with_suffix(".aside").rename(second)


def remove(dataset: Dataset) -> None:
    shard_path(dataset).unlink()


def replace_tokenizer(dataset: Dataset) -> None:
    (dataset.path / "tokenizer" / "spm.model").write_bytes(train_tokenizer(["other"], TokenizerConfig(type="char"), 0))


def remove_tokenizer(dataset: Dataset) -> None:
    (dataset.path / "tokenizer" / "spm.model").unlink()


FAULTS: list[tuple[Callable[[Dataset], None], str]] = [
    (flip_body, r"t-000000-.*\.arrow: batch 0 \(tokens 0 to 4095 of the shard\) does not match its hash; "),
    (zero_page, r"t-000000-.*\.arrow: batch 0 .* does not match its hash: .*page of zeros"),
    (truncate, r"t-000000-.*\.arrow is truncated: \d+ bytes, the manifest says \d+"),
    (flip_footer, r"t-000000-.*\.arrow: damaged header or footer"),
    (flip_schema_metadata, r"t-000000-.*\.arrow does not match its hash, though every batch does"),
    (swap, r"swapped shards: .*t-000000-.*\.arrow has the content of train/t-000001-"),
    (remove, r"shard .*t-000000-.*\.arrow is missing"),
    (replace_tokenizer, r"wrong tokenizer: .*spm\.model"),
    (remove_tokenizer, r"no tokenizer at .*spm\.model"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_every_fault_has_its_own_message(dataset: Dataset, fault: Callable[[Dataset], None], message: str) -> None:
    fault(dataset)
    with pytest.raises(DataError, match=message):
        Dataset.open(dataset.path).verify()


def replace_shard(dataset: Dataset) -> None:
    """One of the same size and hash cannot be had, so the manifest takes the blame: its shard has other counts."""
    edit(dataset, '"documents": ', '"documents": 1', after='"shards"')


def shrink_vocabulary(dataset: Dataset) -> None:
    edit(dataset, '"vocab_size": 400', '"vocab_size": 200', after='"tokenizer": {\n  "sha256"')


def edit(dataset: Dataset, old: str, new: str, after: str) -> None:
    """Whoever writes a manifest gives it a hash that fits."""
    manifest = dataset.path / "manifest.json"
    text = manifest.read_text().partition(',\n "sha256": ')[0] + "\n}"
    where = text.index(old, text.index(after))
    manifest.write_text(seal(text[:where] + new + text[where + len(old) :]))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (replace_shard, r"t-000000-.*\.arrow holds 4096 tokens and \d documents, the manifest says 4096 and 1\d"),
        (shrink_vocabulary, r"manifest\.json is damaged: vocab_size of its tokenizer is 200, and .*spm\.model has 400"),
    ],
)
def test_counts_and_ids_are_verified_too(dataset: Dataset, fault: Callable[[Dataset], None], message: str) -> None:
    Dataset.open(dataset.path).verify()
    fault(dataset)
    with pytest.raises(DataError, match=message):
        Dataset.open(dataset.path).verify()


@pytest.mark.parametrize("check", [True, False])
def test_opening_looks_at_sizes_and_footers_on_one_rank_of_a_node(dataset: Dataset, check: bool) -> None:
    for fault, message in ((truncate, "is truncated"), (flip_footer, "damaged header or footer")):
        whole = shard_path(dataset).read_bytes()
        fault(dataset)
        if check:
            with pytest.raises(DataError, match=message):
                Dataset.open(dataset.path)
        else:
            windows = Windows.of(Dataset.open(dataset.path, check=False), "train", 64)
            with pytest.raises(DataError, match=r"t-000000-.*damaged header or footer"):
                windows.read(np.array([0]))
        shard_path(dataset).write_bytes(whole)


def test_batches_are_hashed_when_they_are_first_touched(dataset: Dataset) -> None:
    windows = Windows.of(dataset, "train", 64)
    last = len(windows) - 1
    windows.read(np.array([0, last]))
    flip_body(dataset)
    windows.read(np.array([0]))  # touched before
    windows = Windows.of(dataset, "train", 64)
    windows.read(np.array([last]))
    with pytest.raises(DataError, match=r"t-000000-.*: batch 0 .* does not match its hash"):
        windows.read(np.array([last, 0]))


def test_many_shards_are_open_a_few_at_a_time(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Windows.of(dataset, "train", 50)
    wanted = reference.read(np.arange(len(reference)))
    monkeypatch.setattr("data_pipeline.storage.token_stream._MAX_OPEN_SHARDS", 2)
    windows = Windows.of(dataset, "train", 50)
    for index in np.random.default_rng(0).permutation(len(windows)):
        assert np.array_equal(windows.read(np.array([index]))[0], wanted[index])
        assert len(windows._stream._opened) <= 2
        assert len(windows._stream._tokens) == len(windows._stream._bounds) <= 2


def test_every_flipped_bit_is_found(dataset: Dataset) -> None:
    path = shard_path(dataset, 2)
    original = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(original), 60).tolist():
        flip(path, at)
        with pytest.raises(DataError, match=path.name):
            Dataset.open(dataset.path).verify()
        path.write_bytes(original)
    done: list[tuple[int, int]] = []
    Dataset.open(dataset.path).verify(lambda now, total: done.append((now, total)))
    assert done[-1][0] == done[-1][1] == sum(shard.bytes for shard in dataset.manifest.shards)


@pytest.mark.parametrize("context", [1, 7, 64, 5000])
def test_windows_cross_edges_and_predict_every_token_once(dataset: Dataset, context: int) -> None:
    for split in ("train", "validation"):
        reference = stream(Windows.of(dataset, split, 1, partial=True))
        assert len(reference) == dataset.manifest.splits[split].tokens
        partial = Windows.of(dataset, split, context, partial=True)
        rows = partial.read(np.arange(len(partial)))
        assert rows.dtype == np.int64
        labels = rows[:, 1:].ravel()
        assert np.array_equal(labels[labels >= 0], reference[1:])
        if len(reference) > context:
            whole = Windows.of(dataset, split, context)
            assert len(whole) == (len(reference) - 1) // context
            order = np.random.default_rng(0).permutation(len(whole))
            wanted = np.stack([reference[i * context : i * context + context + 1] for i in order])
            assert np.array_equal(whole.read(order), wanted)
    assert len(dataset.manifest.shards_of("train")) > 2


def test_tokens_are_views_of_the_mapped_file(dataset: Dataset) -> None:
    shard = dataset.shard(dataset.manifest.shards[0])
    view = shard.tokens(0)
    assert view is shard.tokens(0)
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_too_small_a_split_names_tokens_and_context(dataset: Dataset) -> None:
    tokens = dataset.manifest.splits["validation"].tokens
    with pytest.raises(DataError, match=rf"validation split of .* has {tokens} tokens: .*context {tokens}"):
        Windows.of(dataset, "validation", tokens)
    assert len(Windows.of(dataset, "validation", tokens - 1)) == 1
    assert len(Windows.of(dataset, "validation", 10 * tokens, partial=True)) == 1


def _read_in_child(dataset: Dataset, connection) -> None:  # type: ignore[no-untyped-def]
    connection.send(Windows.of(dataset, "train", 64).read(np.arange(5)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_make_their_own_maps(dataset: Dataset, method: str) -> None:
    wanted = Windows.of(dataset, "train", 64).read(np.arange(5))
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(  # type: ignore[attr-defined]
        target=_read_in_child, args=(dataset, theirs)
    )
    child.start()
    assert np.array_equal(ours.recv(), wanted)
    child.join()
    assert len(pickle.dumps(dataset)) < 100_000
