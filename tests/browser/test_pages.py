"""What a reader sees of a real run: its page in MLflow, and its report."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from pretrain.report_data import load, verdict
from tests.browser.conftest import Browser
from tests.runs import ROOT, SMALL, duet

DESK, PHONE = 1280, 390
SECTION = '[data-testid="experiment-view-compare-runs-section-header"]'
CHART = '[data-testid="experiment-view-compare-runs-card"]'


@pytest.fixture(scope="module")
def run_dir(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracked run; asks for the browser first, since without one there is nothing to train for."""
    folder = tmp_path_factory.mktemp("pages")
    data, run = folder / "data", folder / "runs" / "small"
    source = f"data.sources.text.paths=[{ROOT / 'LICENSE'}]"
    cadence = ["train.steps=40", "train.log_every=5", "train.eval_every=10", "train.sample_tokens=20"]
    for command in (
        ["data", "build", "data/characters", source, f"data.path={data}"],
        ["train", *SMALL, f"data.path={data}", f"run.dir={run}", *cadence, "tracking.mode=online", "--ranks", "2"],
    ):
        done = duet(*command)
        assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def server(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow server` over the store that the run was tracked in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--workers", "1"], stdout=file, stderr=file, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(60):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).read()
                break
            except (urllib.error.URLError, TimeoutError):
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.5)
        else:
            pytest.fail(f"mlflow does not answer: {log.read_text()}")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the server and its workers
        process.wait(30)


def test_the_loss_is_the_first_chart_of_the_runs_page(browser: Browser, server: str, run_dir: Path) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    with urllib.request.urlopen(f"{server}/api/2.0/mlflow/runs/get?run_id={run_id}") as answer:
        experiment = json.load(answer)["run"]["info"]["experiment_id"]
    browser.look(DESK, dark=False)
    browser.open(f"{server}/#/experiments/{experiment}/runs/{run_id}/model-metrics")
    charts = f"[...document.querySelectorAll('{CHART}')].filter(c => c.querySelector('.trace path.js-line'))"

    def names(_: object) -> list[str]:
        """The charts in their order, once the training loss is drawn."""
        found: list[str] = browser.run(f"{charts}.map(c => /\\(([^)]+)\\)$/.exec(c.innerText.trim())?.[1] ?? '')")
        return found if "loss/train" in found else []

    shown = WebDriverWait(browser.driver, 60).until(names)
    assert [name for name in shown[: shown.index("loss/train")] if not name.startswith("loss/")] == []
    assert browser.run(f"document.querySelector('{SECTION}').innerText").split()[0] == "loss"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_report_is_whole_at_every_width_and_in_every_light(
    browser: Browser, run_dir: Path, width: int, dark: bool
) -> None:
    browser.look(width, dark=dark)
    assert browser.open((run_dir / "report.html").as_uri()) == [], "nothing comes from the network"
    lines = browser.run("[...document.querySelectorAll('.verdict')].map(line => line.innerText)")
    assert tuple(lines) == verdict(load(run_dir))
    assert browser.run("document.querySelector('.verdict').getBoundingClientRect().bottom") < 400, "on top"
    assert_pictures_render(browser)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    cells = browser.run("[...document.querySelectorAll('td:first-child')].map(cell => cell.clientWidth)")
    assert cells
    assert min(cells) > 100, "names are not broken into letters"
    ink, paper = (brightness(browser, name) for name in ("color", "backgroundColor"))
    assert (ink > 180 and paper < 60) if dark else (ink < 60 and paper > 180)


def test_several_runs_are_a_table_and_overlays(browser: Browser, run_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    done = duet("report", str(run_dir), str(run_dir), "--out", str(page))
    assert done.returncode == 0, done.stderr
    browser.look(PHONE, dark=False)
    assert browser.open(page.as_uri()) == []
    assert browser.run("document.querySelectorAll('table')[0].rows.length") == 3
    assert_pictures_render(browser)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "a wide table scrolls by itself"


def test_a_page_that_is_not_whole_is_noticed(browser: Browser, run_dir: Path, tmp_path: Path) -> None:
    page, absent = tmp_path / "broken.html", "http://127.0.0.1:9/picture.png"
    first, rest = (run_dir / "report.html").read_text().split('src="data:image/png;base64,', 1)
    page.write_text(f'{first}src="{absent}" alt="{rest}')
    assert browser.open(page.as_uri()) == [absent]
    with pytest.raises(AssertionError, match="rendered"):
        assert_pictures_render(browser)


def assert_pictures_render(browser: Browser) -> None:
    sizes = browser.run("[...document.images].map(i => [i.complete ? i.naturalWidth : 0, i.clientWidth, i.offsetTop])")
    assert len(sizes) > 8
    assert all(natural > 0 and shown > 100 for natural, shown, _ in sizes), f"not all pictures are rendered: {sizes}"
    assert all(upper <= lower for (_, _, upper), (_, _, lower) in pairwise(sizes))


def brightness(browser: Browser, name: str) -> float:
    """Of a colour of the page, 0 to 255."""
    text: str = browser.run(f"getComputedStyle(document.body).{name}")
    return sum(float(part) for part in text.removeprefix("rgb(").rstrip(")").split(",")) / 3
