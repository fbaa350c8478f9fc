"""What is submitted is checked first, quoted whatever its name, and a dry run leaves nothing behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError, DataError, RunError, UserError
from launch.cli import app
from launch.slurm import checks, render
from launch.slurm import site as cluster
from launch.slurm.site import Cluster
from launch.slurm.submit import _ends_at_once
from launch.slurm.sweep import expand
from pretrain.config.schema import Config, load
from pretrain.run.job_records import Failure, JobFolder
from pretrain.run.journal import Journal
from pretrain.run.lease import Lease
from pretrain.run.run_folder import RunFolder
from tests.runs import CHARACTERS, ROOT, SMALL

GOLDEN = Path(__file__).parents[1] / "golden"
EVERYTHING = Cluster(
    partition="gpu",
    account="p0123",
    qos="long",
    constraint="a100&nvlink",
    time="2-0",
    nodes="2-8",
    gpus_per_node=4,
    gpu_memory_gib=40,
    cpus_per_task=16,
    memory="480G",
    exclusive=True,
    container="/images/duet+torch.sqsh",
    mounts=["/shared", "/data:/mnt/data"],
    modules=["cuda/12.8", "nccl"],
    setup="/shared/it's mine/setup.sh",
    scratch="/local disk",
    requeue=False,
    signal_lead=600,
    preflight=True,
    sbatch=["--reservation=friday", "--comment=nightly run #3"],
    environment={"NCCL_SOCKET_IFNAME": "ib0", "MOTTO": "it's $HOME"},
)


def job(site: Cluster, name: str, folder: str = "/shared/runs/first") -> render.JobScript:
    return render.JobScript(
        name="duet-first",
        cluster=site,
        cluster_name=name,
        folder=Path(folder),
        log=f"{render.plain(Path(folder))}/logs/slurm-%j.out",
        python="python",
        variables={"DUET_CODE": f"{folder}/code/snapshot-0123"},
        arguments=["/shared/runs/first/slurm/config.yaml"],
        exclude=["n3", "n7"],
        options=["--hold"],
    )


@pytest.mark.parametrize(("name", "site"), [("local", cluster.load("local")), ("everything", EVERYTHING)])
def test_the_script_of_a_site(name: str, site: Cluster) -> None:
    """Written anew with DUET_GOLDEN=write."""
    text = render.template("pretrain")
    defaults, life = render.sections(text)
    script = render.render(text, job(site, name))
    assert script.endswith(defaults + life), "the life of the job is not the shipped one"
    ours = script.removesuffix(defaults + life)
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("DUET_GOLDEN") == "write":
        golden.write_text(ours)
    assert ours == golden.read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


TEXT = st.text(st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=30)


@settings(max_examples=25, deadline=None)
@given(value=TEXT, argument=TEXT)
def test_the_shell_gets_every_value_as_it_was(value: str, argument: str) -> None:
    import shlex
    from dataclasses import replace

    site = Cluster(environment={"MOTTO": value if value.strip() and value.isprintable() else "x"})
    order = replace(job(site, "x"), variables={"DUET_CODE": value}, arguments=[shlex.quote(argument)])
    lines = "\n".join(render._site(order))
    show = 'printf \'%s\\0\' "$DUET_CODE" "$MOTTO" "$#" "$1"'
    done = subprocess.run(["bash", "-c", f"{lines}\n{show}"], capture_output=True, check=True)
    assert done.stdout.decode().split("\0") == [value, site.environment["MOTTO"], "1", argument, ""]


def test_what_slurm_cannot_be_told_is_refused() -> None:
    with pytest.raises(ConfigError, match="one line of text"):
        render.directive("--comment=a\n#SBATCH --nodes=99")
    with pytest.raises(ConfigError, match="a path with a backslash"):
        render.plain(Path("/runs/a\\b"))


@pytest.fixture
def small(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a run in an empty folder, where the test stands."""
    monkeypatch.chdir(tmp_path)
    return [CHARACTERS, "model/tiny", "run/quickstart", *SMALL, f"data.path={dataset}", "run.name=first"]


def checked(arguments: list[str]) -> Config:
    return checks.check_data(load(arguments), later=False)[0]


def submit(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["submit", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_dry_run_needs_neither_slurm_nor_torch_and_leaves_nothing(small: list[str], tmp_path: Path) -> None:
    blocked = "import sys\nfor name in ('torch', 'mlflow', 'pyarrow', 'deepspeed', 'sentencepiece', 'matplotlib'):\n"
    blocked += "    sys.modules[name] = None\n"
    arguments = ["duet", "submit", *small, "--cluster", "gpu", "--dry-run"]
    program = f"{blocked}sys.argv = {arguments!r}\nfrom launch.cli import main\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT), "SLURM_CONF": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert f"#SBATCH --output={tmp_path}/runs/first/logs/slurm-%j.out\n" in done.stdout
    for told in ("tokens, fingerprint", "runs/first (new)", "1 node(s) x 8 rank(s) x 1 x 1 sequences", "a GPU has 80"):
        assert told in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_paths_do_not_depend_on_where_one_stands(small: list[str], tmp_path: Path) -> None:
    config = checked([*small, "tracking.mode=online", "tracking.uri=sqlite:///x/mlflow.db"])
    assert config.run.dir == f"{tmp_path}/runs/first"
    assert config.tracking.uri == f"sqlite:///{tmp_path}/x/mlflow.db"
    assert config.model.vocab_size


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ("3", "numbers of nodes that can: 2 or 4"),
        ("5-7", "numbers of nodes that can: 4 or 8"),
        ("64", "numbers of nodes that can: 8"),
    ],
)
def test_nodes_that_cannot_share_the_batch(small: list[str], nodes: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        submit(*small, "batch.tokens=256", "--cluster", "local", "--dry-run", "--nodes", nodes)


def test_so_many_nodes_are_refused_at_once(small: list[str]) -> None:
    with pytest.raises(ConfigError, match="not a number of nodes"):
        submit(*small, "--cluster", "local", "--dry-run", "--nodes", "1-9999999999")


def test_a_range_says_what_would_be_idle(small: list[str]) -> None:
    told = submit(*small, "batch.tokens=256", "--cluster", "local", "--dry-run", "--nodes", "2-4")
    assert "at most 4 node(s) x 2 rank(s) x 1 x 2 sequences; of 3 nodes some would be idle" in told
    assert "#SBATCH --nodes=2-4\n" in told


def test_data_that_are_not_there(small: list[str], dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a dataset"):
        submit(*small, "data.path=nowhere", "--cluster", "local", "--dry-run")
    assert "no dataset yet" in submit(*small, "data.path=nowhere", "--cluster", "local", "--dry-run", "--after", "7")
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", dataset, copy], check=True)
    shard = next(copy.rglob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard .* bytes, the manifest says"):
        submit(*small, "data.path=copy", "--cluster", "local", "--dry-run")
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        submit(*small, "data.path=copy", "--cluster", "local", "--dry-run")


def test_data_at_a_uri(small: list[str], dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a copy"
    subprocess.run(["cp", "-r", dataset, copy], check=True)
    given = [*small, f"data.path={copy.as_uri()}", "data.cache=cache"]
    config = checked(given)
    assert (config.data.path, config.data.cache) == (copy.as_uri(), f"{tmp_path}/cache")
    assert config.model.vocab_size
    next(copy.rglob("*.arrow")).unlink()
    with pytest.raises(DataError, match="is missing"):
        checked(given)
    later, _ = checks.check_data(load([*small, "data.path=s3://bucket/later"]), later=True)
    assert later.data.path == "s3://bucket/later"


def test_an_origin_has_its_absolute_path_though_the_data_are_not_there_yet(small: list[str], tmp_path: Path) -> None:
    folder = begun(small)
    given = [*small, "run.name=next", "run.start_from=runs/first@100", "data.path=later"]
    later, _ = checks.check_data(load(given), later=True)
    assert later.run.start_from == f"{folder.path}@100"


def begun(arguments: list[str], saved: int = 100, fingerprint: str = "") -> RunFolder:
    """A run folder with a journal and a checkpoint, as a run of these arguments leaves them."""
    config = checked(arguments)
    folder = RunFolder(config.run_dir)
    manifest = folder.checkpoints / f"step-{saved:09d}" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    folder.claim(config, {"fingerprint": fingerprint, "path": config.data.path})
    folder.describe(world_size=4)
    journal = Journal(folder.journal, 1)
    for step in (90, 100):
        journal.metrics(step, {"loss/train": 1.0, "time/step_ms": 9000.0, "time/tokens_per_second": 1.0})
    journal.metrics(100, {"time/checkpoint_ms": 80_000.0})
    journal.close()
    return folder


def test_another_dataset_than_the_runs_own(small: list[str]) -> None:
    begun(small, fingerprint="another")
    with pytest.raises(RunError, match="this run was trained on dataset another"):
        submit(*small, "--cluster", "local", "--dry-run")


def test_time_and_lead_are_held_beside_what_was_measured(small: list[str], dataset: Path) -> None:
    from data_pipeline.storage.manifest import Manifest

    arguments = [*small, "train.steps=1100"]
    folder = begun(arguments, fingerprint=Manifest.load(dataset).fingerprint)
    told = submit(*arguments, "--cluster", "local", "--nodes", "1", "--dry-run")
    # 1,000 steps of 9 s on 4 ranks: on 2 ranks 18,000 s; 29 min a start.
    assert "1,000 steps of 18 s are left, 5h00m, so 11 start(s) (measured on 4 ranks)" in told
    assert "warning: 60 s before the end the run is told to save, and a step with a save took 98 s" in told
    assert "signal_lead of 147" in told
    site = folder.path.parent / "site.yaml"
    site.write_text(cluster.dump(cluster.load("local")).replace("requeue: true", "requeue: false"))
    assert "does not requeue: --chain 11" in submit(*arguments, "--cluster", str(site), "--nodes", "1", "--dry-run")
    assert "--chain" not in submit(*arguments, "--cluster", str(site), "--nodes", "1", "--chain", "11", "--dry-run")
    with pytest.raises(RunError, match=r"finished: its newest checkpoint is of step 100, train\.steps=100"):
        checks.check_folder(load([*small, "train.steps=100"]), None)
    (folder.path / "slurm").mkdir()
    (folder.path / "slurm" / "stop").touch()
    with pytest.raises(RunError, match="the kill switch is there"):
        submit(*arguments, "--cluster", "local", "--dry-run")


def test_a_run_folder_that_somebody_owns(small: list[str], tmp_path: Path) -> None:
    with (
        Lease.acquire(tmp_path / "runs" / "first"),
        pytest.raises(RunError, match=rf"another start owns this run folder \(attempt 1: process {os.getpid()} on"),
    ):
        submit(*small, "--cluster", "local", "--dry-run")


def test_what_does_not_fit_a_gpu(small: list[str], tmp_path: Path) -> None:
    big = [*small, "model.width=2048", "model.layers=12", "engine.precision=bf16"]
    site = tmp_path / "site.yaml"
    site.write_text("gpus_per_node: 4\ngpu_memory_gib: 12")
    with pytest.raises(ConfigError, match=r"a GPU has 12 GiB\. What would fit: engine\.zero_stage=3, "):
        submit(*big, "--cluster", str(site), "--dry-run")
    site.write_text("gpus_per_node: 4\ngpu_memory_gib: 24")
    assert "a GPU has 24 GiB" in submit(*big, "--cluster", str(site), "--dry-run")
    site.write_text("gpus_per_node: 4")
    assert "gpu_memory_gib of the site is not known" in submit(*big, "--cluster", str(site), "--dry-run")


@pytest.mark.parametrize("key", ["setup", "container", "apptainer"])
def test_what_a_site_names_is_there(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: /nowhere/x is not there"):
        checks.check_site(Cluster().model_copy(update={key: "/nowhere/x"}), "python")
    with pytest.raises(ConfigError, match="is no program here"):
        checks.check_site(Cluster(), "/nowhere/python")


def test_what_a_container_or_the_surroundings_change_is_told(
    small: list[str], tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(f"gpus_per_node: 0\ncontainer: image\nmounts: ['{dataset}', '{tmp_path}:/elsewhere']")
    for name, value in {"PARTITION": "other", "NO_REQUEUE": "1", "TIMELIMIT": "5", "ARRAY_INX": "0-1"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    told = submit(*small, "--cluster", str(site), "--dry-run")
    assert f"{tmp_path}/runs/first: in none of the mounts" in told
    assert f"{dataset}: in none of the mounts" not in told
    assert "SBATCH_PARTITION=other of the environment goes to sbatch: the script does not say" in told
    for name in ("NO_REQUEUE=1", "TIMELIMIT=5", "ARRAY_INX=0-1"):
        assert f"SBATCH_{name} of the environment is left out: the script decides" in told
    site.write_text("gpus_per_node: 0\npartition: mine")
    told = submit(*small, "--cluster", str(site), "--dry-run")
    assert "SBATCH_PARTITION=other of the environment is left out: the script decides" in told


@pytest.mark.parametrize(("finished", "mistake", "goes_on"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_later_links_of_a_chain_end_at_once(small: list[str], finished: int, mistake: int, goes_on: bool) -> None:
    config = load([*small, 'run.dir="it\'s here"', "train.steps=7"])
    folder = JobFolder(config.run_dir)
    folder.failed(Failure("1", 0, 2, "of an earlier submission", mistake=True))
    lines = "\n".join(_ends_at_once(config))
    folder.failed(Failure("2", 0, 1, "a crash", mistake=bool(mistake)))
    if finished:
        (config.run_dir / "checkpoints" / "step-000000007").mkdir(parents=True)
        (config.run_dir / "checkpoints" / "step-000000007" / "manifest.json").touch()
    done = subprocess.run(["bash", "-c", f"{lines}\necho goes on"], capture_output=True, text=True)
    assert (done.stdout == "goes on\n") == goes_on
    assert done.returncode == mistake


def test_a_sweep_has_a_folder_for_each_combination(small: list[str]) -> None:
    found = expand(small, ["optimizer.betas=[0.9,0.95],[0.8,0.9]", "run.seed=1,2"])
    assert [(c.run.name, c.run.dir, c.optimizer.betas, c.run.seed) for c in found[:3]] == [
        ("first-betas-0.9-0.95_seed-1", "runs/first/betas-0.9-0.95_seed-1", (0.9, 0.95), 1),
        ("first-betas-0.9-0.95_seed-2", "runs/first/betas-0.9-0.95_seed-2", (0.9, 0.95), 2),
        ("first-betas-0.8-0.9_seed-1", "runs/first/betas-0.8-0.9_seed-1", (0.8, 0.9), 1),
    ]


def test_two_sweeps_under_one_name_do_not_share_the_numbers_of_their_elements(small: list[str]) -> None:
    logs = [
        re.findall(r"--output=(\S+)", submit(*small, "--cluster", "local", "--dry-run", "--array", f"run.seed={seeds}"))
        for seeds in ("1,2", "2,1", "3,4", "1,2")
    ]
    assert logs[0] == logs[3]
    assert len({log for [log] in logs}) == 3


@pytest.mark.parametrize(
    ("array", "told"),
    [
        ("run.seed", "expected KEY=VALUE,VALUE"),
        ("run.seed=1,", "expected KEY=VALUE,VALUE"),
        ("run.seed=1,1", "two runs would be called seed-1"),
        ("run.name=a,b", "a name and a folder of its own"),
        ("run.sede=1,2", "unknown key run.sede"),
        (f"run.seed={','.join(map(str, range(1001)))}", "at most 1000"),
    ],
)
def test_mistakes_in_a_sweep(small: list[str], array: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        submit(*small, "--cluster", "local", "--dry-run", "--array", array)


def test_nodes_to_avoid_are_told_to_slurm(small: list[str], tmp_path: Path) -> None:
    JobFolder(tmp_path / "runs" / "first").exclude("n3", "ECC errors")
    told = submit(*small, "--cluster", "local", "--dry-run")
    assert "#SBATCH --exclude=n3\n" in told


def test_a_name_that_the_job_would_read_otherwise_is_refused(small: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"\$\{"):
        submit(*small, "run.dir='runs/${run'", "--cluster", "local", "--dry-run")


def test_nodes_left_out_by_the_submission_outlive_a_controller_that_does_not_answer() -> None:
    """The lines of the batch script that ask for them, before the list is renewed."""
    lines = (ROOT / "slurm" / "pretrain.sbatch").read_text().splitlines()
    asked = [line for line in lines if line.startswith(("about()", "job=$(", "excluded=$("))]
    about, first, again, excluded = asked
    program = f"""SLURM_JOB_ID=7; timeout() {{ shift; "$@"; }}; {about}
        scontrol() {{ echo "JobId=7 JobState=RUNNING ExcNodeList=n[4-5] Restarts=1"; }}; {first}
        scontrol() {{ return 1; }}; {again}
        {excluded}; echo "$excluded" """
    assert subprocess.run(["bash", "-c", program], capture_output=True, text=True).stdout == "n[4-5]\n"
