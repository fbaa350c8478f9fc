"""What an input file holds: what its name says, and what its first bytes say against that."""

import codecs
import json
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from data_pipeline.errors import DataError

PACKINGS = {".gz": ".gz", ".gzip": ".gz", ".zst": ".zst", ".zstd": ".zst", ".bz2": ".bz2", ".xz": ".xz"}
"""Endings of packed files, in lower case, and what unpacks them."""
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), "jsonl"),
    **dict.fromkeys((".parquet", ".parq", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".arrows", ".feather", ".ipc"), "arrow"),
}
_TABLES = "convert it to JSON Lines or Parquet"
_ARCHIVES = "unpack it, and give the folder"
_DOCUMENTS = "convert it to plain text"
_OTHER_PACKINGS = f"pack it as {', '.join(dict.fromkeys(PACKINGS.values()))}, or not at all"
_REFUSED = {
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx", ".ods", ".orc", ".avro", ".sqlite", ".db"), _TABLES),
    **dict.fromkeys((".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".zip", ".7z", ".rar"), _ARCHIVES),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".ps", ".epub"), _DOCUMENTS),
    **dict.fromkeys((".lz4", ".lzma", ".lzo", ".br", ".sz", ".z"), _OTHER_PACKINGS),
}
"""Endings of files that would be syntax or noise as plain text, and the way on."""

HEAD_BYTES = 512
"""How much of a file `check_head` looks at."""
MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0"}
_SKIPPABLE_ZSTD = (b"\x2a\x4d\x18", 1)
_ENCODINGS = (
    # UTF-32 first: its mark begins with that of UTF-16.
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_SURE_BYTES = 64
_OTHERS = (
    (0, MAGIC[".gz"], "is packed: let its name end in .gz"),
    (0, MAGIC[".zst"], "is packed: let its name end in .zst"),
    (4, b"1AY&SY", "is packed: let its name end in .bz2"),
    (0, MAGIC[".xz"], "is packed: let its name end in .xz"),
    (0, b"\x04\x22\x4d\x18", f"is packed as .lz4: {_OTHER_PACKINGS}"),
    (0, b"PAR1\x15", "is a table: let its name end in .parquet"),
    (0, b"ARROW1\0\0", "is a table: let its name end in .arrow"),
    (0, b"SQLite format 3\0", f"is a database: {_TABLES}"),
    (0, b"Obj\x01", f"is an Avro table: {_TABLES}"),
    (0, b"PK\x03\x04", f"is a ZIP archive (as .docx, .xlsx and .epub are): {_ARCHIVES}, or {_DOCUMENTS}"),
    (257, b"ustar", f"is a tar archive: {_ARCHIVES}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"is a 7z archive: {_ARCHIVES}"),
    (0, b"Rar!\x1a\x07", f"is a RAR archive: {_ARCHIVES}"),
    (0, b"%PDF-", f"is a PDF: {_DOCUMENTS}"),
    (0, b"%!PS", f"is PostScript: {_DOCUMENTS}"),
    (0, b"{\\rtf", f"is RTF: {_DOCUMENTS}"),
    (0, b"\xd0\xcf\x11\xe0", f"is a document of an old office: {_DOCUMENTS}"),
)


def is_utf8(name: str) -> bool:
    """Whether a name can be written to a file; Python reads bytes that are not UTF-8 as halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _path(name: str) -> PurePosixPath:
    return PurePosixPath(urlsplit(name).path if "://" in name else name)


def packing(name: str) -> str:
    """How a file is packed, which its name says: `.gz`, `.zst`, `.bz2`, `.xz`, or nothing."""
    return PACKINGS.get(_path(name).suffix.lower(), "")


def kind(name: str) -> str:
    """How a file is read, which its name says: `jsonl`, `parquet`, `arrow` or `plain`.

    Raises DataError for a name that says it is none of them."""
    path = _path(name)
    suffix = (path.with_suffix("") if packing(name) else path).suffix.lower()
    if suffix in _REFUSED:
        raise DataError(
            f"{name}: {suffix} is not read, and is no plain text: {_REFUSED[suffix]}. In a folder, take it out or give "
            "a glob of the others"
        )
    return KINDS.get(suffix, "plain")


def check_packing(name: str, head: bytes) -> None:
    """Raises DataError if a file does not begin as one that is packed so does."""
    packed = packing(name)
    if head.startswith(MAGIC[packed]) or (packed == ".zst" and head.startswith(*_SKIPPABLE_ZSTD)):
        return
    if head:
        raise DataError(
            f"{name}: damaged or truncated {packed} data: it begins with {head[:4].hex(' ')}, as no such file does; "
            f"fetch the file again, or take {_path(name).suffix} off its name if it is not packed"
        )
    raise DataError(f"{name}: damaged or truncated {packed} data: it is empty; fetch the file again, or take it out")


def check_head(name: str, head: bytes) -> None:
    """Raises DataError if text begins as no UTF-8 does, or as a file of another kind."""
    for mark, encoding in _ENCODINGS:
        if head.startswith(mark):
            raise DataError(
                f"{name}: is {encoding}, as its byte order mark {mark.hex(' ')} says: convert it, as by "
                f"`iconv -f {encoding} -t UTF-8`"
            )
    if len(head) >= _SURE_BYTES and {0} in (set(head[::2]), set(head[1::2])):
        encoding = "UTF-16BE" if head[0] == 0 else "UTF-16LE"
        raise DataError(
            f"{name}: is {encoding}, for each second byte is 0: convert it, as by `iconv -f {encoding} -t UTF-8`"
        )
    for offset, magic, what in _OTHERS:
        if head.startswith(magic, offset):
            raise DataError(f"{name}: its content {what}")
    if b"\0" in head and not _is_text(head):
        raise DataError(
            f"{name}: is no text, for it begins with bytes that are 0 and others that are not UTF-8: take it out"
        )


def _is_text(head: bytes) -> bool:
    try:
        codecs.utf_8_decode(head, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def check_plain(name: str, text: str, text_key: str) -> None:
    """Raises DataError if plain text begins as JSON Lines: with an object that has `text_key`, or with two objects."""
    if not text.lstrip().startswith("{"):
        return
    first, _, rest = text.lstrip().partition("\n")
    if (found := _object(first)) and (text_key in found or _object(rest.lstrip().partition("\n")[0])):
        raise DataError(f"{name}: its content is JSON Lines: let its name end in .jsonl")


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
