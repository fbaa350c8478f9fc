"""Real text that some tests use where it is."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def corpora(name: str) -> Path:
    """A file of the real corpora; skips the test where they are not."""
    root = Path(os.environ.get("DUET_CORPORA", ROOT.parent / "shared" / "corpora"))
    if not (root / name).exists():
        pytest.skip(f"no corpus {root / name}; DUET_CORPORA names the folder")
    return root / name
