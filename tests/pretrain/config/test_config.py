"""The configuration: stacking, overrides, and errors that name the way on."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from pretrain.config.layers import presets
from pretrain.config.schema import Config, differences, dump, load


def test_later_files_win_and_overrides_win_over_files_wherever_they_stand(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("train: {steps: 7, log_every: 3}\noptimizer: {lr: 3e-4}\n")
    second.write_text("train: {steps: 9}\n")
    config = load(["train.eval_every=5", str(first), str(second)])
    assert (config.train.steps, config.train.log_every, config.train.eval_every) == (9, 3, 5)
    assert config.optimizer.lr == 3e-4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["optimizer.lrr=1"], "command line: unknown key optimizer.lrr; nearest valid key: optimizer.lr"),
        (["modle.width=3"], "nearest valid key: model"),
        (["model.learned_dropout.l1.wieght=1"], "nearest valid key: model.learned_dropout.l1.weight"),
        (["data.sources.a.path=x"], "nearest valid key: data.sources.a.paths"),
        (["train.steps=many"], "train.steps"),
        (["train.steps=0"], "greater than or equal to 1"),
        (["batch.tokens=1000"], "nearest: 768 or 1024"),
        (["model.width=130"], "heads=4 does not divide width=130"),
        (["engine.zero_stage=0"], "use engine.zero_stage=1"),
        (["run.name=../x"], "run.name"),
        (["optimizer.betas=[2,3]"], "optimizer.betas.0"),
        (["optimizer.lr=.inf"], "optimizer.lr"),
        (["tracking.uri=ftp://host"], "expected http://HOST:PORT"),
        (["nowhere.yaml"], "nowhere.yaml: no such file or preset"),
        (["model/tinny"], "did you mean model/tiny"),
        (["run.dir=~/x"], "use $HOME"),
        (['run.dir="a\\nb"'], r"'a\nb' holds a character that cannot be printed"),
        (["data.weights.\udcff=1"], r"'\udcff' is not UTF-8"),
        (["run.dir=a\udcff"], "unacceptable character"),
    ],
)
def test_mistakes_name_key_place_and_way_on(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(args)
    assert message in str(caught.value)


BOMB = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 13))
"""Of 13 lines aliases make 10^12 values."""


@pytest.mark.parametrize(
    "text",
    [
        *("train: {steps: 1}\ntrain: {steps: 2}\n", "train: [", "- a\n", "42\n", "a: &a [*a]\n", BOMB),
        *("\ttrain: 1\n", "a: " + "[" * 5000, 'run: {dir: "\\ud800"}', "run: {name: '${run.dir}', dir: '${run.name}'}"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad.yaml|configuration: "):
        load([str(file)])


def test_an_override_may_be_longer_than_a_name() -> None:
    paths = ["x" * 200, "y" * 200]
    assert load([f"data.sources.a.paths=[{','.join(paths)}]"]).data.sources["a"].paths == paths


def test_the_file_of_an_unknown_key_is_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("train: {steps: 1}\n")
    bad.write_text("train: {step: 1}\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: unknown key train\.step; nearest valid key: train\.steps"):
        load([str(bad), str(good)])


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid(name: str) -> None:
    load([name, "data.sources.text.paths=[x.txt]"] if name == "data/characters" else [name])


def test_a_validation_has_a_thirty_second_of_the_tokens_unless_it_is_told_otherwise() -> None:
    given = ["model.context=64", "batch.tokens=2048", "train.eval_every=30"]
    windows = {
        "": 30,
        "model.context=100 batch.tokens=2K": 19,
        "train.eval_every=1 batch.tokens=128": 1,
        "train.eval_tokens=1K": 16,
        "train.eval_tokens=65": 2,
        "train.eval_tokens=all": None,
    }
    for more, number in windows.items():
        assert load([*given, *more.split()]).eval_windows == number, more
    with pytest.raises(ConfigError, match="train.eval_tokens"):
        load(["train.eval_tokens=0"])
    with pytest.raises(ConfigError, match="train.eval_tokens"):
        load(["train.eval_tokens=some"])


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    config = load(["model/tiny", "run/quickstart", "data.sources.x.paths=[a, b]"])
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert load([str(file)]) == config
    assert differences(config, config) == {}


def test_differences_name_dotted_keys() -> None:
    assert differences(Config(), load(["optimizer.lr=1.0", "run.seed=1"])) == {
        "optimizer.lr": (9e-4, 1.0),
        "run.seed": (1337, 1),
    }


@given(sequences=st.integers(1, 96), world=st.integers(1, 16), micro=st.integers(1, 32))
def test_batch_layout_is_exact_or_an_error_that_names_one(sequences: int, world: int, micro: int) -> None:
    config = load([f"batch.tokens={sequences * 256}", f"batch.micro_batch={micro}"])
    if sequences % world == 0 and (sequences // world) % micro == 0:
        size, accumulation = config.micro_batches(world)
        assert size * accumulation * world == sequences
        assert size == micro
    else:
        with pytest.raises(ConfigError, match=r"(nearest that do|ranks that can): \d"):
            config.micro_batches(world)


def test_the_config_of_a_run_folder_means_that_folder(tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(load(["run.name=a", "run.dir=/elsewhere/a"])))
    (folder / "run.json").write_text("{}")
    assert load([str(folder / "config.yaml")]).run_dir == folder
    assert load([str(folder / "config.yaml"), "run.name=b"]).run_dir == Path("runs/b")
    assert load([str(folder / "config.yaml"), "run.name=b", "run.dir=c"]).run_dir == Path("c")


def test_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        load(["tracking.uri=http://me:geheim@host"])
    assert "geheim" not in str(caught.value)
    for key in ("data.path=%s", "data.sources.mine.paths=[%s]", "data.split={rule: given, files: [%s]}"):
        with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as caught:
            load([key % "s3://KEY:geheim@bucket/data"])
        assert "geheim" not in str(caught.value)
