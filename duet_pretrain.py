"""The one name of ours that nobody else has: the console scripts begin here, and so does Duet from Python.

What each start passes first: do `model`, `launch` and our other names mean our packages here, or somebody's own?
Standard library only; what `import duet_pretrain as duet` offers is imported from `launch/api.py` when it is asked for.
"""

import os
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.api import build, journal, load, open_dataset, train

__all__ = ["build", "journal", "load", "open_dataset", "train"]

SOURCE = Path(__file__).resolve().parent
"""Where our packages lie, and `configs` and `slurm`, which are read by path."""
ALL = ("data_pipeline", "model", "pretrain", "launch")


class NameTaken(ImportError):
    """One of our names means something else; says which file, and the way on."""


def check(*names: str) -> None:
    """Whether these names are ours; each package of ours asks for those that it builds on.

    Raises:
        NameTaken: one is not. Under `python -m` of ours that is said, and ends the process with 2.
    """
    try:
        for name in names:
            if (file := _file(name)) and file != (SOURCE / name / "__init__.py").resolve():
                raise NameTaken(f"{name} is {file} here, not Duet's package of that name: {_way_on(file)}")
    except NameTaken as error:
        if sys.argv[:1] == ["-m"]:  # what is to run is still looked for
            _leave(error)
        raise


def duet() -> None:
    """The command line; Ctrl-C before it can hear of it ends as after."""
    try:
        _check_all()
        from launch.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()


def rank() -> None:
    """One rank of a training, for torchrun and srun: `duet-rank CONFIG… KEY=VALUE…`."""
    _check_all()
    from pretrain.__main__ import run

    run()


def __getattr__(name: str) -> Any:
    """What Duet offers to Python.

    Raises:
        NameTaken: a package of ours means something else here.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    check(*ALL)
    from launch import api

    return getattr(api, name)


def _check_all() -> None:
    os.environ["PYTHONSAFEPATH"] = "1"  # nor do processes that this one starts look into the folder the user is in
    try:
        check(*ALL)
    except NameTaken as error:
        _leave(error)


def _leave(error: NameTaken) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _file(name: str) -> Path | None:
    """The file, or the folder without `__init__.py`, that a name means; None where it means nothing."""
    module = sys.modules.get(name)
    spec = find_spec(name) if module is None else module.__spec__
    if spec is None:
        return None
    found = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    return Path(found).resolve() if found else None


def _way_on(file: Path) -> str:
    """By how that file got in."""
    inside = file if file.is_dir() else file.parent if file.name == "__init__.py" else file
    folder = inside.parent
    if folder in _folders(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))):
        return f"take {folder} out of PYTHONPATH, or rename {inside.name}"
    if not sys.flags.safe_path and folder in _folders(sys.path[:1]):
        return f"rename {inside.name}, or start with `python -P`, which leaves this folder out"
    if folder.name in ("site-packages", "dist-packages") or folder not in _folders(sys.path):
        return "another installed package brings it; install Duet into an environment of its own"
    return f"take {folder} out of sys.path, or rename {inside.name}"


def _folders(paths: Iterable[str]) -> set[Path]:
    return {Path(path).resolve() for path in paths}
