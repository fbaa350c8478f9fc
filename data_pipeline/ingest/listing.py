"""The files that a path, a folder, a glob or a URI stands for. What is not among them is named, or an error."""

import glob
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from data_pipeline.errors import DataError
from data_pipeline.files.filesystem import as_os_errors, is_uri, resolve, root_of
from data_pipeline.files.formats import is_utf8
from data_pipeline.ingest.saved_folders import without_others

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_Folder = tuple[int, int]
"""What tells a folder, whatever leads to it: device and inode."""


class Listing:
    """The files of a source, as they are found."""

    def __init__(self, key: str) -> None:
        """`key`: where the paths stand in the configuration."""
        self.files: list[str] = []
        self.left_out: list[str] = []
        """Hidden files and folders, and folders that a glob of files matches."""
        self._key = key

    def add(self, path: str) -> None:
        """Adds the files of a path: a file, a folder (all files below but hidden ones), or a glob.

        Raises DataError for one that stands for nothing, for what is no file, and for what cannot be looked at."""
        if is_uri(path) and not path.startswith("file://"):
            found = list(self._stored(path))
        else:
            where = os.path.expanduser(unquote(urlsplit(path).path) if is_uri(path) else path)  # noqa: PTH111
            found = list(self._local(where, path))
        try:
            found = without_others(found, self.left_out)
        except DataError as error:
            raise self._error(str(error)) from error
        for name in found:
            if not is_utf8(name):
                raise self._error(f"{os.fsencode(name)!r}: the name is not UTF-8; rename it")
        self.files += [name.removeprefix("./") for name in found]

    def _error(self, message: str) -> DataError:
        return DataError(f"{self._key}: {message}")

    # --- on a disk ---------------------------------------------------------------------------------------------------

    def _local(self, where: str, path: str) -> Iterator[str]:
        if glob.has_magic(where) and not os.path.lexists(where):
            # A slash at the end asks for folders.
            base, pattern = _cut_glob(where + "**" if where.endswith("/") else where)
            missing = f"no file matches {path!r} (from {Path.cwd()})"
        elif stat.S_ISDIR(self._status(where).st_mode):
            base, pattern, missing = str(Path(where)), ["**"], f"{path} is a directory without files"
        else:
            yield self._file(str(Path(where)))
            return
        before = len(self.left_out)
        found = list(self._matching(base, pattern, ()))
        if not found:
            left_out = self.left_out[before : before + 3]
            raise self._error("; left out: ".join([missing, *([", ".join(left_out)] if left_out else [])]))
        yield from found

    def _matching(self, folder: str, pattern: list[str], above: tuple[_Folder, ...]) -> Iterator[str]:
        """Files below `folder` that match, by component; `**` stands for any number of folders, at the end also for
        every file. `above`: the folders that `**` went through, none of which is entered again, whatever links lead
        there."""
        first, rest = pattern[0], pattern[1:]
        if not glob.has_magic(first):
            path = os.path.join(folder, first)  # noqa: PTH118
            if self._exists(path) and not rest:
                yield self._file(path)
            elif self._exists(path) and stat.S_ISDIR(self._status(path).st_mode):
                yield from self._matching(path, rest, ())
            return
        status = self._status(folder)
        here = status.st_dev, status.st_ino
        if first == "**" and here in above:
            return
        if first == "**" and rest:
            yield from self._matching(folder, rest, ())
        for entry in self._entries(folder):
            below = _is_folder(entry)
            if first != "**" and not fnmatchcase(entry.name, first):
                continue
            if entry.name.startswith(".") and not first.startswith("."):
                if not rest or (first == "**" and below):
                    self.left_out.append(f"{entry.path} (hidden)")
            elif below and first == "**":
                yield from self._matching(entry.path, pattern, (*above, here))
            elif below and rest:
                yield from self._matching(entry.path, rest, ())
            elif below:
                self.left_out.append(f"{entry.path} (a folder, which a glob that ends in /** enters)")
            elif not rest:
                yield self._file(entry.path, entry)
            elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
                self.left_out.append(f"{entry.path} (a link that leads nowhere)")

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise self._error(f"{folder} cannot be listed: {error.strerror}") from error

    def _file(self, path: str, entry: os.DirEntry[str] | None = None) -> str:
        """`path`, if it is that of a file. Raises DataError if not."""
        if entry is not None and entry.is_file(follow_symlinks=False):
            return path
        mode = self._status(path).st_mode
        if not stat.S_ISREG(mode):
            what = next((name for test, name in _KINDS if test(mode)), "a folder")
            raise self._error(f"{path} is {what}, not a file. A file is read several times: write one, or take it out")
        return path

    def _exists(self, path: str) -> bool:
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._error(f"{path} cannot be read: {error.strerror}") from error
        return True

    def _status(self, path: str) -> os.stat_result:
        try:
            return os.stat(path)  # noqa: PTH116
        except OSError as error:
            if os.path.islink(path):  # noqa: PTH114
                raise self._error(
                    f"{path} is a link to {os.readlink(path)}, which leads nowhere: {error.strerror}; "  # noqa: PTH115
                    "mend the link, or take it out"
                ) from error
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise self._error(f"{path} does not exist (from {Path.cwd()})") from error
            raise self._error(f"{path} cannot be read: {error.strerror}") from error

    # --- in a store --------------------------------------------------------------------------------------------------

    def _stored(self, uri: str) -> Iterator[str]:
        from pyarrow.fs import FileSelector, FileType

        try:
            filesystem, path = resolve(uri)
            magic = glob.has_magic(path)
            folder, pattern = _cut_glob(path) if magic else (path, ["**"])
            with as_os_errors():
                info = filesystem.get_file_info(folder)
                is_folder = info.type == FileType.Directory
                below = filesystem.get_file_info(FileSelector(folder, recursive=True)) if is_folder else []
            if not magic and info.type == FileType.File:
                yield uri
                return
            if not is_folder:
                raise self._error(f"{uri} does not exist")
        except OSError as error:
            raise self._error(f"{uri} cannot be listed: {error}") from error
        found = False
        base = root_of(uri)[1]
        for info in below:
            inner = info.path.removeprefix(folder).strip("/")
            if info.type == FileType.Directory:
                continue
            name = urlsplit(uri)._replace(path=quote(info.path.removeprefix(base))).geturl()
            if _matches(inner.split("/"), pattern, hidden=False):
                found = True
                yield name
            elif _matches(inner.split("/"), pattern, hidden=True):
                self.left_out.append(f"{name} (hidden)")
        if not found:
            raise self._error(f"no file matches {uri}" if magic else f"{uri} is a directory without files")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # It is looked at as a file, then, and is an error.
        return False


def _cut_glob(path: str) -> tuple[str, list[str]]:
    """The folder before the first component with a wildcard, and the components from there on."""
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) or ("/" if path.startswith("/") else "."), parts[first:]


def _matches(names: list[str], pattern: list[str], hidden: bool) -> bool:
    """Whether the components of a key match, as Listing does on a disk; `hidden`: also those that begin with a dot."""
    if not pattern or not names:
        return not pattern and not names
    first, rest = pattern[0], pattern[1:]
    visible = hidden or first.startswith(".") or not names[0].startswith(".")
    if first == "**":
        inner = visible and (_matches(names[1:], pattern, hidden) or (not rest and len(names) == 1))
        return inner or (bool(rest) and _matches(names, rest, hidden))
    return visible and fnmatchcase(names[0], first) and _matches(names[1:], rest, hidden)
