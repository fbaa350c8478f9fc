import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import DataError
from data_pipeline.ingest.readers import ReadCounts, read_jsonl
from launch.commands.data import app
from tests.data_pipeline.conftest import REPOSITORY, contents, prose

PRESETS = REPOSITORY / "configs" / "data"


def duet_data(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None:
        raise done.exception
    return done.output


def test_from_text_to_a_verified_dataset(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(prose(4000))
    folder = tmp_path / "dataset"
    args = [
        str(PRESETS / "characters.yaml"),
        f"data.sources.text.paths=[{tmp_path / 'text.txt'}]",
        f"data.path={folder}",
    ]
    planned = duet_data("build", *args, "--dry-run")
    assert "text.txt" in planned
    assert f"write  {folder}/manifest.json (last)" in planned
    assert not folder.exists()
    trained = duet_data("tokenizer", *args)
    assert "type char" in trained
    assert "coverage       100.0000%" in trained
    built = duet_data("build", *args)
    assert "order-0 entropy" in built
    before = contents(folder)
    assert "nothing to do" in duet_data("build", *args)
    assert contents(folder) == before
    assert "all hashes match" in duet_data("verify", str(folder))
    inspected = duet_data("inspect", str(folder), "--samples", "1")
    assert prose(4000)[:50] in inspected
    assert "tokens a document" in inspected
    with pytest.raises(DataError, match="is not a dataset"):
        duet_data("verify", str(tmp_path))


def test_lost_characters_are_reported_loudly(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc\n" * 1000 + "xyz")
    built = duet_data(
        "build",
        str(PRESETS / "characters.yaml"),
        f"data.sources.text.paths=[{tmp_path / 'text.txt'}]",
        f"data.path={tmp_path / 'd'}",
    )
    assert "WARNING      validation: 1 tokens" in built


def test_the_documentation_of_python_is_a_corpus(tmp_path: Path) -> None:
    out = tmp_path / "docs" / "python-docs.jsonl.zst"
    assert "documents" in duet_data("collect", str(out))
    documents = read_jsonl(str(out), "text", "strict", ReadCounts())
    texts = ["".join(document.chunks(ReadCounts())) for document in documents]
    assert len(texts) == len(set(texts)) > 300
    assert 500_000 < sum(len(text.encode()) for text in texts) < 5_000_000
    assert any("The class to which a class instance belongs." in text for text in texts)
    with pytest.raises(DataError, match=r"must end in \.jsonl\.zst"):
        duet_data("collect", str(tmp_path / "docs.txt"))
    dataset = tmp_path / "d"
    built = duet_data(
        "build",
        str(PRESETS / "python-docs.yaml"),
        f"data.sources.python.paths=[{out}]",
        f"data.path={dataset}",
        "data.tokenizer.vocab_size=1000",
        "data.tokenizer.sample_bytes=300000",
    )
    assert "vocabulary 1000" in built
    assert "all hashes match" in duet_data("verify", str(dataset))


@pytest.mark.parametrize("command", ["collect", "tokenizer", "build", "inspect", "verify", "plan", "locate"])
def test_every_command_has_an_example(command: str) -> None:
    assert f"duet data {command}" in duet_data(command, "--help").replace("\n", " ")


def test_login_nodes_need_no_heavy_imports() -> None:
    program = "import sys, launch.commands.data\n"
    program += "print({'torch', 'pyarrow', 'mlflow', 'numpy', 'sentencepiece'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_build_does_not_import_pandas(tmp_path: Path) -> None:
    """pyarrow's own ways from and to numpy do, which takes each process as long as some MB of text."""
    built = tmp_path / "built"
    words = ["data/characters", f"data.sources.text.paths=[{REPOSITORY / 'LICENSE'}]", f"data.path={built}"]
    program = f"import sys\nsys.argv = {['duet', 'data', 'build', *words, '--processes', '1']}\n"
    program += "from launch.cli import main\ntry:\n    main()\nfinally:\n    print('pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (built / "manifest.json").is_file(), done.stderr
    assert done.stdout.splitlines()[-1] == "False", done.stdout
