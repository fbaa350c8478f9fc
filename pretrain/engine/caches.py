"""Where torch, inductor and Triton keep what they compile: in folders that nobody else can write to."""

import os
import tempfile
from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.files.private import own_folder

CACHES = ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""What names them; DUET_CACHE names a folder for all."""


def own_caches() -> None:
    """Give compiled code a folder of the user's own: in DUET_CACHE, or else in TMPDIR, unless the variables name some.

    Raises:
        ConfigError: one belongs to somebody else, whose code would run in our name, or others can write to it.
    """
    # A home that nodes share is slow, and a lock that a killed build left there stops every later start.
    shared = os.environ.pop("DUET_CACHE", None)
    for variable in CACHES:
        given = os.environ.get(variable)
        if given and not shared:
            try:
                own_folder(Path(given), ConfigError, given=True)
            except ConfigError as error:
                raise ConfigError(f"{variable}: {error}") from None
        else:
            caches = own_folder(Path(shared or tempfile.gettempdir()) / f"duet-{os.getuid()}", ConfigError)
            os.environ[variable] = str(own_folder(caches / variable.lower(), ConfigError))
