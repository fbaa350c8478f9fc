"""MLflow's own server and the page of a run in it, as its user sees them."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.browser.conftest import Browser
from tests.ports import free_port

CHART = '[data-testid="experiment-view-compare-runs-card"]'


@contextmanager
def mlflow_server(database: Path, log: Path) -> Iterator[str]:
    """`mlflow server` over a SQLite file, until left; its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}"]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).read()
                break
            except OSError:
                try:
                    raise AssertionError(f"mlflow ended with {process.wait(0.5)}: {log.read_text()}")
                except subprocess.TimeoutExpired:
                    pass
        else:
            raise AssertionError(f"mlflow does not answer: {log.read_text()}")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the server and its workers
        process.wait(30)


def drawn(browser: Browser) -> list[str]:
    """The names of the charts on a run's page in their order, once the training loss is drawn."""
    from selenium.webdriver.support.wait import WebDriverWait

    charts = f"[...document.querySelectorAll('{CHART}')].filter(c => c.querySelector('.trace path.js-line'))"

    def names(_: object) -> list[str]:
        found: list[str] = browser.run(f"{charts}.map(c => /\\(([^)]+)\\)$/.exec(c.innerText.trim())?.[1] ?? '')")
        return found if "loss/train" in found else []

    return WebDriverWait(browser.driver, 60).until(names)
