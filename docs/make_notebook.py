"""Runs the cells of docs/python.ipynb and keeps what they show: `python docs/make_notebook.py`, in half a minute.

No Jupyter is needed: a cell is Python; what it prints is kept, as is the picture that it draws.
"""

import base64
import io
import json
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "python.ipynb"


def run(notebook: dict[str, Any]) -> None:
    """Run the code cells in the current folder, one after the other, and put what they show into them."""
    from matplotlib import pyplot

    names: dict[str, Any] = {}
    for number, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
        shown = io.StringIO()
        with redirect_stdout(shown):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)  # noqa: S102
        cell["execution_count"] = number
        cell["outputs"] = []
        if text := shown.getvalue():
            cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            picture = io.BytesIO()
            figure.savefig(picture, dpi=80)
            data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
            cell["outputs"].append({"data": data, "metadata": {}, "output_type": "display_data"})
        pyplot.close("all")


if __name__ == "__main__":
    found = json.loads(NOTEBOOK.read_text())
    os.environ.setdefault("MPLBACKEND", "agg")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "LICENSE", folder)
        os.chdir(folder)
        sys.path[:] = [str(ROOT), *sys.path]
        run(found)
    NOTEBOOK.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
