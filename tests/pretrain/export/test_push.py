"""`duet push` against a stand-in for the hub: its routes as huggingface_hub calls them, and what they keep."""

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError, RunError
from launch.cli import app
from pretrain.export.hugging_face.card import LICENSE
from pretrain.export.hugging_face.push import push

TOKEN = "hf_of-the-test"


class Hub(ThreadingHTTPServer):
    """Repositories, as the commits and the large files in them are sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Route)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.files: dict[str, dict[str, bytes]] = {}


class Route(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, found: Any, code: int = 200) -> None:
        content = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/large/")
        self.server.large[self.path.removeprefix("/large/")] = content
        self._answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        if "/large/" not in self.path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        route = self.path.partition("?")[0].removeprefix("/api/")
        if route == "repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            hub.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
            return self._answer({"url": f"{hub.address}/{name}"})
        if route == "validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if "/preupload/" in route:
            modes = [
                {
                    "path": f["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if f["path"].endswith("tensors") else "regular",
                }
                for f in json.loads(body)["files"]
            ]
            return self._answer({"files": modes})
        if route.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            objects = [one | {"actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}} for one in wanted]
            return self._answer({"transfer": "basic", "objects": objects})
        assert "/commit/" in route, route
        name = route.removeprefix("models/").partition("/commit/")[0]
        files = hub.files.setdefault(name, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
        return self._answer({"commitUrl": f"{hub.address}/{name}/commit/1", "commitOid": "1"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


def test_what_a_dry_run_names_goes_and_nothing_else(hub: Hub, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "exported")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "modeling_duet.pyc").write_bytes(b"none of it")
    words = ["push", str(folder), "me/mine"]
    told = CliRunner().invoke(app, [*words, "--dry-run"], catch_exceptions=False)
    assert "README.md does not say under which licence" in told.stderr
    assert not hub.files and not hub.private
    card = (folder / "README.md").read_text()
    assert LICENSE in card
    (folder / "README.md").write_text(card.replace(LICENSE, "CC0"))
    done = CliRunner().invoke(app, [*words, "--private"], catch_exceptions=False)
    assert done.stdout.strip() == f"{hub.address}/me/mine/commit/1"
    assert "licence" not in done.stderr
    assert hub.private == {"me/mine": True}
    assert hub.files["me/mine"] == {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert {line.split()[1] for line in told.stdout.splitlines()[:-1]} == hub.files["me/mine"].keys()


def test_who_may_not_push_and_what_is_no_model_is_said(
    hub: Hub, exported: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"this is a run folder, and an export is wanted|`duet checkpoint export RUN"):
        push(run, "me/mine", private=False)
    with pytest.raises(ConfigError, match="a repository is called NAME/MODEL"):
        push(exported, "me/mine/more", private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_of-somebody")
    with pytest.raises(RunError, match="(?s)me/mine: not uploaded: .*401.*hf auth login"):
        push(exported, "me/mine", private=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="(?s)me/mine: not uploaded: .*offline"):
        push(exported, "me/mine", private=False)
    assert not hub.files
