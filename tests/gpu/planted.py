"""Parts for the tests of the runner."""

import time
from collections.abc import Iterator

from tests.gpu.setting import Row, Setting


def right(setting: Setting) -> Iterator[Row]:
    count = setting.folder / "right"
    count.write_text(f"{count.read_text()}again" if count.exists() else "once")
    yield Row("as it must be", 1.0, 1.0, unit="of one", note=setting.device)


def wrong(setting: Setting) -> Iterator[Row]:
    yield Row("right", 0.0, 0.0)
    yield Row("planted", 2.0, 1.0)


def raises(setting: Setting) -> Iterator[Row]:
    yield Row("before", 0.0)
    raise RuntimeError("planted")


def hangs(setting: Setting) -> Iterator[Row]:
    yield Row("before", 0.0)
    time.sleep(600)
