"""A server that answers as the Hugging Face Hub does, for one dataset, out of a folder."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@contextmanager
def hub(folder: Path, repository: str = "me/mine") -> Iterator[str]:
    """The endpoint at which `hf://datasets/me/mine` is `folder`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": folder, "repository": repository}))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Hub(BaseHTTPRequestHandler):
    folder: Path
    repository: str

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, data = f"/api/datasets/{self.repository}", f"/datasets/{self.repository}/resolve/main/"
        if "broken" in path:
            self.close_connection = True  # and no answer
        elif path in (api, f"{api}/revision/main"):
            self._json({"id": self.repository, "sha": "0" * 40, "siblings": []})
        elif found := re.fullmatch(rf"{api}/tree/main(?:/(.*))?", path):
            below = self.folder / (found[1] or "")
            if below.is_dir():
                every = "recursive=true" in self.path.lower()
                self._json([self._entry(one) for one in sorted(below.rglob("*") if every else below.iterdir())])
            else:
                self.send_error(404)
        elif path.startswith(data) and (file := self.folder / path.removeprefix(data)).is_file():
            self._file(file.read_bytes())
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self._json([self._entry(self.folder / one) for one in asked if (self.folder / one).exists()])

    def _entry(self, path: Path) -> dict[str, object]:
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": kind, "path": str(path.relative_to(self.folder)), "oid": "1" * 40, "size": size}

    def _file(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        self._answer(206 if asked else 200, part, "application/octet-stream")

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), "application/json")

    def _answer(self, code: int, content: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nowhere."""
