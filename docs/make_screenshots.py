"""Takes the pictures of docs/tutorial.md and of the README: `python -m docs.make_screenshots FOLDER`.

FOLDER is that of `duet quickstart`. A short training runs anew on a terminal; Chromium shows what it said.
"""

import base64
import html
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from pretrain.tracking.mlflow_state import SERVED, State
from tests.browser.conftest import Browser, opened
from tests.browser.mlflow_page import drawn, mlflow_server
from tests.terminal import COLUMNS, on_terminal

IMAGES = Path(__file__).resolve().parent / "images"
BIN = Path(sys.executable).parent
PAGE = """<meta charset="utf-8"><body style="margin:0;background:#0d1117"><pre style="margin:0;padding:16px 20px;
color:#e6edf3;font:14px/1.35 'DejaVu Sans Mono',monospace;display:inline-block">{}</pre>"""
WIDTH = 1000
"""Of the report, in pixels."""
MLFLOW = (1280, 900)
"""Width and height of a run's page, in pixels."""
TRAIN = ["model/tiny", "run/quickstart", "data.path=data/python-docs", "run.name=short", "run.seed=2"]
TRAIN += ["train.steps=60", "train.log_every=6", "train.eval_every=30", "train.checkpoint_every=60"]


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end; of its commands those that we write."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b"):
            if part.endswith("A"):
                row = max(0, row - int(part[2:-1] or 1))
            elif part.endswith("K"):
                lines[row] = "" if part[2:-1] == "2" else lines[row][:column]
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return lines


def take(browser: Browser, name: str, width: int, height: int) -> None:
    """What is shown, from the upper left corner."""
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    found = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    (IMAGES / f"{name}.png").write_bytes(base64.b64decode(found["data"]))


def take_report(folder: Path) -> None:
    """The report's picture, smaller."""
    with Image.open(folder / "runs" / "quickstart" / "report.png") as report:
        small = report.convert("RGB").resize((WIDTH, report.height * WIDTH // report.width))
        small.quantize(128).save(IMAGES / "quickstart.png", optimize=True)


def take_terminal(folder: Path, at: Path, browser: Browser) -> None:
    """A short training on a copy of the data, in the folder `at`."""
    copy = at / "copy"
    shutil.copytree(folder / "data", copy / "data")
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    seen = on_terminal(["duet", "train", *TRAIN, "--ranks", "2"], copy, environment)
    lines = (line for line in screen(seen.text.replace(str(copy), "/home/you")) if line.strip())
    said = "\n".join(line[i : i + COLUMNS] for line in lines for i in range(0, len(line), COLUMNS))
    asked = "$ duet train " + " \\\n    ".join([" ".join(TRAIN[:3]), " ".join(TRAIN[3:6]), " ".join(TRAIN[6:])])
    page = at / "terminal.html"
    page.write_text(PAGE.format(html.escape(f"{asked} --ranks 2\n{said}")))
    browser.look(900, dark=False)
    browser.open(page.as_uri())
    shown = "document.querySelector('pre').getBoundingClientRect()"
    take(browser, "terminal", int(browser.run(f"{shown}.width")), int(browser.run(f"{shown}.height")))


def take_mlflow(folder: Path, at: Path, browser: Browser) -> None:
    """The page of the quickstart's run that its printed link opens."""
    state = State.load(folder / "runs" / "quickstart")
    assert state, f"{folder} was not tracked: `duet quickstart` tracks its run"
    with mlflow_server(folder / "runs" / "mlflow.db", at / "mlflow.log") as url:
        browser.look(MLFLOW[0], dark=False)
        browser.open(str(state.page(folder / "runs" / "quickstart")).replace(SERVED, url))
        drawn(browser)
        browser.run("document.querySelector('[aria-label=\"Close\"]')?.click()")  # the assistant beside the page
        browser.run("document.querySelectorAll('.modebar').forEach(bar => bar.remove())")  # Chromium has no mouse here
        take(browser, "mlflow", *MLFLOW)
    with Image.open(IMAGES / "mlflow.png") as shown:
        shown.convert("RGB").quantize(128).save(IMAGES / "mlflow.png", optimize=True)


def main(folder: Path) -> None:
    """All of them."""
    take_report(folder)
    with tempfile.TemporaryDirectory() as name, opened(Path(name) / "profile") as browser:
        take_terminal(folder, Path(name), browser)
        take_mlflow(folder, Path(name), browser)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
