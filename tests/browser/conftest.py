"""A headless Chromium, driven by selenium; without one its tests are skipped, or fail under DUET_REQUIRE_BROWSER."""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


class Browser:
    """One window; what its pages ask the network for is recorded."""

    def __init__(self, driver: "Chrome") -> None:
        self.driver = driver

    def look(self, width: int, *, dark: bool) -> None:
        """Make the window a phone's or a desk's, for a reader who likes it dark or light."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, url: str) -> list[str]:
        """Open a page and wait until it is loaded. Returns the addresses it asked for, but for itself."""
        self.driver.get_log("performance")  # reading empties it
        self.driver.get(url)
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if address != url and not address.startswith("data:")]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {script}")


@contextmanager
def opened(profile: Path) -> Iterator[Browser]:
    """A browser that keeps what it writes in the folder `profile`."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    found = {"chromium": chromium, "chromedriver": chromedriver, "selenium": importlib.util.find_spec("selenium")}
    if absent := [name for name, what in found.items() if not what]:
        give_up = pytest.fail if os.environ.get("DUET_REQUIRE_BROWSER") else pytest.skip
        give_up(f"no {', '.join(absent)} here; `make system-deps` installs Chromium and its driver")
    with opened(tmp_path_factory.mktemp("profile")) as window:
        yield window
