"""A site is described once, and a mistake in it is told before anything is submitted."""

from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import ConfigError
from launch.slurm.site import Cluster, dump, load, node_range, parse, seconds, shipped


@pytest.mark.parametrize("name", shipped())
def test_what_is_shipped_loads_and_survives_its_own_dump(name: str) -> None:
    cluster = load(name)
    assert cluster == load(f"cluster/{name}")
    assert parse(yaml.safe_load(dump(cluster)), "copy") == cluster


def test_a_path_then_the_users_own_then_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load("local").partition == "main"
    own = tmp_path / "duet" / "cluster"
    own.mkdir(parents=True)
    (own / "local.yaml").write_text("partition: mine\ntime: 12:30:00\n")
    assert load("local").time == "12:30:00", "no number of seconds"
    assert load("local").partition == load("cluster/local").partition == "mine"
    assert load(str(own / "local.yaml")).partition == "mine"
    with pytest.raises(ConfigError, match=r"--cluster locla: no such .* did you mean local\? there are: gpu, local; "):
        load("locla")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parition: x", "unknown key parition; nearest valid key: partition"),
        ("partition: a b", "partition: expected one word"),
        ("python: ''", "python: expected one line"),
        ("python: my python", "python: expected one word"),
        ("setup: |\n  a\n  b\n", "setup: expected one line"),
        ("nodes: 8-2", "nodes: '8-2' is not a number of nodes"),
        ("nodes: 0", "nodes: '0' is not a number of nodes"),
        ("time: soon", "time: 'soon' is not a time limit"),
        ("time: '0'", "time: '0' is no time at all"),
        ("time: '4'", "signal_lead: 300 s is the whole time: 4 or more"),
        ("environment: {A-B: 1}", "environment: 'A-B' is not the name of a variable"),
        ("sbatch: [hold]", "sbatch: 'hold' is not an option"),
        ("tasks_per_node: 2", "tasks_per_node is for gpus_per_node: 0"),
        ("{container: a, apptainer: b}", "a job runs in one of them"),
        ("mounts: [/a]", "mounts are for a container"),
        ("gpus_per_node: many", "gpus_per_node: Input should be a valid integer"),
        ("gpus_per_node: true", "gpus_per_node: Input should be a valid integer"),
        ("[1]", "expected keys and values"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_mistake_is_told_with_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(str(file))
    assert message in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("30", 1800), ("1:30", 90), ("1:00:00", 3600), ("2-0", 172800), ("1-1:30", 91800), ("1-0:0:5", 86405)],
)
def test_times_are_those_of_slurm(time: str, expected: int) -> None:
    assert seconds(time) == expected


def test_nodes_and_ranks() -> None:
    assert node_range("4") == (4, 4)
    assert node_range("2-8") == (2, 8)
    assert [Cluster(gpus_per_node=g, tasks_per_node=t).ranks_per_node for g, t in ((8, None), (0, 2), (0, None))] == [
        8,
        2,
        1,
    ]
