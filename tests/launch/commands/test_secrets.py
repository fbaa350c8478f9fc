"""No secret in a URI is accepted anywhere, or repeated; what a site's environment holds is its owner's alone."""

import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import ConfigError, RunError
from data_pipeline.secret import has_secret, is_secret_name, redact
from launch import cli
from launch.slurm import client
from launch.slurm import site as sites
from launch.slurm.submit import Order, place, site
from pretrain.config.schema import load
from pretrain.study.spec import load_study
from tests.runs import SMALL

CANARY = "c4nary"
SECRETS = [
    "s3://KEY:c4nary@bucket/x",
    "s3://KEY:c4n/c4nary+x@bucket/x",
    "S3://c4nary@bucket",
    "https://c4nary@host/x",
    "https://me:1234c4nary@host:5000/",
    "https://me:p@c4nary@host/",
    "https://host/x?a=1&token=c4nary",
    "https://host/x?X-Amz-Signature=c4nary&a=1",
    "https://host/x?a=1;sig=c4nary",
    "https://host/#access_token=c4nary",
    "s3://bucket/x?secret_key=c4nary",
    "gs://bucket/x?GoogleAccessId=a&AWSAccessKeyId=c4nary",
    "https://host/?next=https%3A%2F%2Fme%3Ac4nary%40other",
    "abfs://container:c4nary@account.dfs.core.windows.net/x",
    "simplecache::s3://KEY:c4nary@bucket/x",
    "postgresql+psycopg2://me:c4nary@host/mlflow",
    "host/x?api-key=c4nary",
]
PLACES = [
    "http://127.0.0.1:5000",
    "http://host:8080/path@v2",
    "http://[::1]:5000/x@y",
    "sqlite:////home/u@x/mlflow.db",
    "sqlite:///u@x/mlflow.db",
    "abfs://container@account.dfs.core.windows.net/x",
    "hdfs://user@node:8020/x",
    "docker://user@registry.example#image",
    "runs/a@9000",
    "/data/key=1/part-?.jsonl",
    "s3://bucket/a@b?region=eu&endpoint_override=localhost:9000",
]


@pytest.mark.parametrize("uri", SECRETS)
def test_what_a_secret_looks_like(uri: str) -> None:
    assert has_secret(uri)
    shown = redact(f"GET {uri} failed (see https://example.org/x)")
    assert CANARY not in shown
    assert shown.startswith("GET ")
    assert "example.org" in shown
    assert not has_secret(redact(uri))


@pytest.mark.parametrize("place", PLACES)
def test_what_no_secret_looks_like(place: str) -> None:
    assert redact(place) == place


def test_names_of_secrets() -> None:
    secret = [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_ACCESS_KEY_ID",
        "MLFLOW_TRACKING_PASSWORD",
        "X-Amz-Security-Token",
        "sig",
    ]
    assert all(map(is_secret_name, secret))
    assert not any(map(is_secret_name, ["NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "region"]))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_refuses_a_secret_names_itself_and_repeats_nothing(tmp_path: Path) -> None:
    keys = [*leaves(load(["data.sources.mine.paths=[x]"]).model_dump(mode="json")), "data.nonsense"]
    assert {"run.dir", "run.start_from", "data.cache", "data.tokenizer.model", "tracking.uri"} <= set(keys)
    file = tmp_path / "config.yaml"
    for number, key in enumerate(keys):
        uri = SECRETS[number % len(SECRETS)]
        section, *rest = key.split(".")
        tree: Any = [uri] if number % 2 else uri
        for name in reversed(rest):
            tree = {name: tree}
        file.write_text(yaml.safe_dump({section: tree}))
        for arguments in ([f"{key}={uri}"], [f"{key}=[x,'{uri}"], [str(file)]):
            with pytest.raises(ConfigError, match=re.escape(key)) as refused:
                load(arguments)
            assert CANARY not in str(refused.value)
            assert "AWS_ACCESS_KEY_ID" in str(refused.value)


def test_a_secret_by_reference_and_in_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", SECRETS[0])
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"data": {"weights": {SECRETS[0]: 1}}}))
    for argument in ("data.split.files=[x,'${oc.env:PLACE}']", str(tmp_path / "x.yaml")):
        with pytest.raises(ConfigError, match="data") as refused:
            load([argument])
        assert CANARY not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "model/tiny", "run.dir=URI"], "run.dir"),
        (["train", "--from", "URI", "run.name=b"], "--from"),
        (["train", "--from=URI@7"], "--from"),
        (["data", "build", "URI"], "argument 3"),
        (["submit", "x.yaml", "--cluster", "gpu", "--array", "data.path=URI"], "data.path"),
        (["submit", "x.yaml", "--cluster", "gpu", "--sbatch=--comment=URI"], "--sbatch"),
        (["report", "runs/a", "--out", "URI"], "--out"),
        (["eval", "URI"], "argument 2"),
        (["track", "sync", "URI"], "argument 3"),
        (["generate", "runs/a", "--prompt", "x", "--html", "URI"], "--html"),
        (["no-such-command", "--no-such-option", "URI"], "--no-such-option"),
    ],
    ids=" ".join,
)
def test_every_command_refuses_it(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["duet", *(argument.replace("URI", SECRETS[0]) for argument in arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err
    assert f"{named}: " in said.err


def test_a_prompt_is_any_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["duet", "generate", "/nowhere", "--prompt", SECRETS[0], f"--stop={SECRETS[1]}"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "/nowhere" in capsys.readouterr().err


def test_a_site_and_a_study_with_a_secret(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    for tree in ({"container": SECRETS[0]}, {"setup": SECRETS[6]}, {"environment": {"A_TOKEN": [CANARY]}}):
        file.write_text(yaml.safe_dump(tree))
        with pytest.raises(ConfigError, match=next(iter(tree))) as refused:
            sites.load(str(file))
        assert CANARY not in str(refused.value)
    file.write_text(yaml.safe_dump({"name": "x", "config": [f"data.path={SECRETS[0]}"], "sections": {}}))
    with pytest.raises(ConfigError, match="config") as refused:
        load_study(file)
    assert CANARY not in str(refused.value)


def test_what_a_library_says_is_shown_without_it() -> None:
    assert CANARY not in str(RunError(f"no way to {SECRETS[0]}, {SECRETS[6]}"))


def test_a_sites_environment_is_its_owners_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "test_only", lambda script: "would start")
    monkeypatch.setattr(client, "jobs", lambda ids: {})
    monkeypatch.setattr(client, "submit", lambda script, options: "1")
    own = {
        "gpus_per_node": 0,
        "environment": {"A_TOKEN": CANARY, "PROXY": f"http://me:{CANARY}@proxy", "PLAIN": "seen"},
    }
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump(own))
    run_dir = tmp_path / "runs" / "a"
    arguments = [*SMALL, f"data.path={dataset}", f"run.dir={run_dir}"]
    monkeypatch.setattr(sys, "argv", ["duet", "submit", *arguments, "--cluster", str(file), "--dry-run"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err
    assert "PLAIN=seen" in said.out
    (code := tmp_path / "code").mkdir()
    place(Order([load(arguments)], site(str(file)), str(file), ["duet", "submit"], code=code))
    holding = [found for found in run_dir.rglob("*") if found.is_file() and CANARY.encode() in found.read_bytes()]
    assert sorted(found.name for found in holding) == ["cluster.yaml", "job.sbatch"]
    assert {stat.S_IMODE(found.stat().st_mode) for found in holding} == {0o600}
