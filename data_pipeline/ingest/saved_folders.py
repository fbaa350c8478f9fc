"""Folders that Hugging Face's `save_to_disk` wrote: Arrow streams, and `state.json`, which says which of them count.

Read by the layout alone: the library `datasets` is not needed.
"""

import json
from collections.abc import Iterable
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files.filesystem import open_raw

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""With which an Arrow stream ends that was written to its end."""


def without_others(found: Iterable[str], left_out: list[str]) -> list[str]:
    """Of files below folders that were named: those that hold the data, where `save_to_disk` wrote the folder.

    What is not read beside them, such as the cache of a `map`, is named in `left_out`.

    Raises:
        DataError: several splits, of which one must be chosen; or a folder that is damaged.
    """
    names = list(found)
    folders = {name.rpartition("/")[0] for name in names}
    listed = set(names)
    described = {f"{folder}/{SPLITS}" for folder in folders if f"{folder}/{SPLITS}" in listed}
    for file in described:
        _check_splits(file)
    saved = {folder for folder in folders if {f"{folder}/{STATE}", f"{folder}/{INFO}"} <= listed}
    data = {f"{folder}/{name}" for folder in saved for name in _data_files(f"{folder}/{STATE}")}
    for name in sorted(data):
        _check_whole(name, listed)
    kept = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if name not in described and (folder not in saved or name in data):
            kept.append(name)
        elif file not in (STATE, INFO, SPLITS):
            left_out.append(f"{name} (not of the dataset that is saved there)")
    return kept


def _check_splits(file: str) -> None:
    splits = _json(file).get("splits")
    if not isinstance(splits, list):
        raise DataError(f"{file} does not list the splits; save the dataset again")
    if len(splits) > 1:
        folder = file.rpartition("/")[0]
        places = ", ".join(f"{folder}/{split}" for split in splits)
        raise DataError(f"{folder} holds a dataset in {len(splits)} splits: name those that are to be read: {places}")


def _data_files(file: str) -> list[str]:
    state = _json(file)
    if state.get("_indices_data_files"):
        raise DataError(
            f"{file}: an old version of `datasets` saved a selection of rows, not the rows; load the folder there, and "
            "save `dataset.flatten_indices()`"
        )
    files = state.get("_data_files")
    try:
        return [str(one["filename"]) for one in files]  # type: ignore[union-attr]
    except (TypeError, KeyError):
        raise DataError(f"{file} does not list the files of the data; save the dataset again") from None


def _check_whole(name: str, listed: set[str]) -> None:
    if name not in listed:
        raise DataError(f"{name} is missing, which {STATE} beside it names; fetch the folder again")
    with open_raw(name) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(_END_OF_STREAM)))
        if file.read() != _END_OF_STREAM:
            raise DataError(f"{name} is cut off: it does not end as an Arrow stream does; fetch the file again")


def _json(file: str) -> dict[str, Any]:
    with open_raw(file) as raw:
        text = raw.read()
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}; fetch the folder again") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds no JSON object; fetch the folder again")
    return found
