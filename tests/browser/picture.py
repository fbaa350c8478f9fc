"""The picture in docs/generate.md: `python -m tests.browser.picture RUN`, of the quickstart's run."""

import base64
import sys
import tempfile
from pathlib import Path

from model.generation.sampling import Sampling
from pretrain.export.use import open_trained
from pretrain.inference.continuation import Continuation, Settings
from pretrain.inference.text_page import records, write_page
from tests.browser.conftest import opened
from tests.runs import ROOT

OUT = ROOT / "docs" / "images" / "generate.png"
PROMPT = (
    "Return the number of items in the list. If the argument is not a string, then the value of the first element is "
    "used.\nThis function returns"
)
CHOSEN, WIDTH = 24, 1000


def main(run: Path) -> None:
    """Write it anew."""
    trained = open_trained(run)
    settings = Settings(Sampling(1.25, 0.6, 20), tokens=12, seed=2)
    continuation = Continuation(trained, [PROMPT], settings, recorded=True)
    list(continuation.pieces())
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder) / "profile") as browser:
        page = Path(folder) / "page.html"
        write_page(page, records(trained, continuation, attention=True))
        browser.look(WIDTH, dark=False)
        browser.open(page.as_uri())
        browser.run(f"choose({CHOSEN})")
        height = browser.run("document.querySelector('main').getBoundingClientRect().bottom + 20")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
        picture = browser.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
        )
        OUT.write_bytes(base64.b64decode(picture["data"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
