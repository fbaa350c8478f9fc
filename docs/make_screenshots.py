"""Takes the pictures of docs/tutorial.md and of the README: `python -P -m docs.make_screenshots FOLDER`.

FOLDER is that of `duet quickstart`. A short training runs anew on a terminal; Chromium shows what it said, and MLflow.
"""

import base64
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.browser.conftest import Browser, opened
from tests.terminal import on_terminal

IMAGES = Path(__file__).resolve().parent / "images"
BIN = Path(sys.executable).parent
PAGE = """<meta charset="utf-8"><body style="margin:0;background:#0d1117"><pre style="margin:0;padding:16px 20px;
color:#e6edf3;font:14px/1.35 'DejaVu Sans Mono',monospace;display:inline-block">{}</pre>"""
WIDTH = 1000
"""Of the report, in pixels."""
CHARTS_SECONDS = 120
CHARTS = "document.querySelectorAll('.js-plotly-plot .trace.scatter').length"
CLOSE_ASSISTANT = """[...document.querySelectorAll('button')].filter(button => {
    const box = button.getBoundingClientRect(); return box.x > 1100 && box.y < 80}).pop()?.click()"""
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


@contextmanager
def mlflow(store: Path) -> Iterator[str]:
    """Its pages, as `mlflow ui` shows a store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"sqlite:///{store}"
    command = [str(BIN / "mlflow"), "ui", "--backend-store-uri", uri, "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < end and server.poll() is None
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def main(folder: Path) -> None:
    """All of them."""
    from mlflow import MlflowClient

    with Image.open(folder / "runs" / "quickstart" / "report.png") as report:
        small = report.convert("RGB").resize((WIDTH, report.height * WIDTH // report.width))
        small.quantize(128).save(IMAGES / "quickstart.png", optimize=True)
    with tempfile.TemporaryDirectory() as name, opened(Path(name) / "profile") as browser:
        copy = Path(name) / "copy"
        shutil.copytree(folder / "data", copy / "data")
        environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        seen = on_terminal(["duet", "train", *TRAIN, "--ranks", "2"], copy, environment)
        said = "\n".join(line for line in screen(seen.text.replace(str(copy), "/home/you")) if line.strip())
        asked = "$ duet train " + " \\\n    ".join([" ".join(TRAIN[:3]), " ".join(TRAIN[3:6]), " ".join(TRAIN[6:])])
        page = Path(name) / "terminal.html"
        page.write_text(PAGE.format(html.escape(f"{asked} --ranks 2\n{said}")))
        browser.look(900, dark=False)
        browser.open(page.as_uri())
        shown = "document.querySelector('pre').getBoundingClientRect()"
        take(browser, "terminal", int(browser.run(f"{shown}.width")), int(browser.run(f"{shown}.height")))
        with mlflow(folder / "runs" / "mlflow.db") as address:
            browser.look(1200, dark=False)
            store = f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
            run = json.loads((folder / "runs" / "quickstart" / "tracking.json").read_text())["run_id"]
            experiment = MlflowClient(store).get_run(run).info.experiment_id
            browser.open(f"{address}/#/experiments/{experiment}/runs/{run}/model-metrics?workflowType=machine_learning")
            end = time.monotonic() + CHARTS_SECONDS
            while browser.run(CHARTS) < 3:
                assert time.monotonic() < end, "no charts"
                browser.run(CLOSE_ASSISTANT)  # it leaves them no room
                time.sleep(3)
            take(browser, "mlflow", 1200, 800)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
