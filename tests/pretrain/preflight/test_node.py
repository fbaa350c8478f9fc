"""What a node's own look makes of data at a URI, and of an MLflow server that is none."""

import hashlib
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config.schema import load
from pretrain.preflight.node import check_node
from pretrain.preflight.verdict import Report, judge
from tests.runs import SMALL, documented_architecture

NO_MASKS = "model.learned_dropout.enabled=false"


def looked_at(*args: str) -> Report:
    report = Report(0, "n0")
    check_node(load([*SMALL, *args]), report, 1, 1, lambda _: None)
    return report


def test_data_at_a_uri_are_read_through_the_cache(dataset: Path, tmp_path: Path) -> None:
    more = [f"run.dir={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}"]
    local, remote = looked_at(f"data.path={dataset}", *more), looked_at(f"data.path={dataset.as_uri()}", *more)
    assert remote.findings == []
    assert remote.same["fingerprint of the data"] == local.same["fingerprint of the data"]


def test_nodes_whose_architectures_differ_are_told_apart(dataset: Path, tmp_path: Path) -> None:
    file, text, reports = tmp_path / "gla.py", documented_architecture(), []
    for rank, source in enumerate((text, text, text + "\n")):
        file.write_text(source)
        args = (f"model.architecture={file}:GLA", NO_MASKS, f"data.path={dataset}", f"run.dir={tmp_path / 'run'}")
        reports.append(replace(looked_at(*args), rank=rank, node=f"n{rank}"))
    [reason] = judge(reports, 3).bad["n2"]
    one, other = (hashlib.sha256(source.encode()).hexdigest()[:12] for source in (text, text + "\n"))
    assert reason == f"source of GLA is {other}, but {one} on 2 of 3 nodes"


@pytest.mark.parametrize("port", ["", "99999"])
def test_what_is_no_mlflow_is_told_and_no_node_is_blamed(dataset: Path, tmp_path: Path, port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        if not port:
            threading.Thread(target=answer, daemon=True).start()
        uri = f"http://127.0.0.1:{port or server.getsockname()[1]}"
        args = [f"data.path={dataset}", f"run.dir={tmp_path / 'run'}", "tracking.mode=online", f"tracking.uri={uri}"]
        findings = looked_at(*args).findings
    assert [(finding.check, finding.level) for finding in findings] == [("tracking", "warning")]
