"""`duet submit` on a real Slurm. The trainer is a stand-in that writes down what it was given, but everything else of
the code is the real one, in a checkout of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from data_pipeline.errors import RunError, UserError
from launch.cli import app
from launch.slurm.submit import resubmit
from pretrain.run.job_records import JobFolder
from pretrain.run.provenance import MODULE, PACKAGES
from tests.runs import CHARACTERS, ROOT, SMALL
from tests.slurm.cluster import Cluster
from tests.slurm.processes import wait_until

ENDED = ("COMPLETED", "FAILED", "CANCELLED")
STANDIN = '''"""Says what it was given; with train.keep_every it leaves a checkpoint so many steps on."""

import json
import os
import sys
import time
from pathlib import Path

from pretrain.run import provenance
from pretrain.config.schema import load
from pretrain.run.run_folder import RunFolder

VERSION = "first"
config = load(sys.argv[1:])
names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "MOTTO")
facts = {name: os.environ.get(name) for name in names}
facts |= {"version": VERSION, "seed": config.run.seed, "source": str(provenance.SOURCE)}
facts["tags"] = provenance.record(config.run_dir / "code", 1 + int(facts["SLURM_PROCID"]))
with open(config.run_dir / "ranks.jsonl", "a") as file:
    file.write(json.dumps(facts) + "\\n")
if config.train.keep_every and facts["SLURM_PROCID"] == "0":
    step = max(RunFolder(config.run_dir).saved_steps(), default=0) + config.train.keep_every
    manifest = config.run_dir / "checkpoints" / f"step-{step:09d}" / "manifest.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.touch()
while Path("wait").exists():
    time.sleep(0.02)
'''


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of this code with the stand-in for a trainer."""
    root = tmp_path_factory.mktemp("checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / MODULE, root)
    (root / ".gitignore").write_text("__pycache__/\n")
    (root / "pretrain" / "__main__.py").write_text(STANDIN)
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", "-C", root, *command.split()], check=True)
    return root


@pytest.fixture
def checkout(committed: Path) -> Path:
    subprocess.run(["git", "-C", committed, "checkout", "-q", "."], check=True)
    return committed


@pytest.fixture(autouse=True)
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Slurm's commands mean the test cluster, and the test stands in an empty folder."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(dataset: Path) -> list[str]:
    return [CHARACTERS, "model/tiny", "run/quickstart", *SMALL, f"data.path={dataset}", "run.name=first"]


Submit = Callable[..., str]


@pytest.fixture
def submit(checkout: Path, run: list[str]) -> Submit:
    """Submit from the checkout; the first job's id."""

    def by_command(*arguments: str, site: str = "local") -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch.cli", "submit", *run, "--cluster", site, *arguments],
            env=os.environ | {"PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1].removesuffix(":")

    return by_command


def in_process(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["submit", *arguments], catch_exceptions=False)
    return done.output


def site(**changes: Any) -> str:
    """A site of the test cluster, in the folder where the test stands."""
    local = yaml.safe_load((ROOT / "configs" / "cluster" / "local.yaml").read_text())
    Path("site.yaml").write_text(yaml.safe_dump(local | changes))
    return "site.yaml"


def ranks(run_dir: Path = Path("runs/first")) -> list[dict[str, Any]]:
    lines = (run_dir / "ranks.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda facts: (facts["SLURM_JOB_ID"], int(facts["SLURM_PROCID"])))


def ended(cluster: Cluster, job: str, log: Path) -> str:
    """Wait for a job that is to succeed; its log."""
    state = cluster.wait_for_job(job, *ENDED, seconds=60)
    text = log.read_text() if log.exists() else f"no {log}"
    assert state["JobState"] == "COMPLETED", text
    return text


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({"partition": "nosuch"}, (), "choose one of high, main"),
        ({}, ("--nodes", "8"), "--nodes is more than the partition has"),
        ({"cpus_per_task": 99}, (), "sinfo -o"),
        ({"memory": "9000G"}, (), "the memory is more than a node has|no node has so many"),
        ({}, ("--time", "9-0"), "ask for less time"),
        ({}, ("--time", "abc"), "'abc' is not a time limit"),
        ({"gpus_per_node": 8, "tasks_per_node": None}, (), "no node has so many GPUs"),
        ({}, ("--sbatch=--gres=foo:1",), "no GPUs of this name"),
        ({}, ("--sbatch=-wn77",), "`sinfo -N` lists the nodes"),
        ({"constraint": "x"}, (), "what --constraint may name"),
        ({}, ("--sbatch=--reservation=x",), "scontrol show reservation"),
        ({}, ("--sbatch=--dependency=bogus:1",), "afterok:JOB"),
        ({}, ("--sbatch=--array=1-0",), "write it as 0-7"),
        ({}, ("--sbatch=--signal=FOO@60",), "B:USR1@SECONDS"),
        ({}, ("--sbatch=--nosuchflag",), "`sbatch --help` lists the options"),
        ({}, ("--after", "99999"), "--after 99999: Slurm knows no such job"),
        ({}, ("--after", "bogus"), "--after bogus: expected the number of a job"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_mistake_is_one_clear_line(
    cluster: Cluster, run: list[str], changes: dict[str, Any], options: tuple[str, ...], told: str
) -> None:
    with pytest.raises(UserError, match=told) as refused:
        in_process(*run, "batch.tokens=4096", "--cluster", site(**changes), *options)
    assert "\n" not in str(refused.value)
    assert not cluster.run("squeue", "-h")
    assert not Path("runs/first/slurm/job.sbatch").exists()
    assert not Path("runs/first/code").exists()


def test_a_job_gets_what_it_was_submitted_with(cluster: Cluster, submit: Submit, checkout: Path) -> None:
    """A GPU for each rank, as many nodes as can share the batch, its variables, and its log, in a hostile folder."""
    where = site(gpus_per_node=2, tasks_per_node=None, environment={"MOTTO": "it's $HOME", "OMP_NUM_THREADS": 1})
    run_dir = Path("runs", 'it\'s #1 & 100%j "done"; $HOME')
    job = submit(f"run.dir={json.dumps(str(run_dir))}", "--nodes", "2-3", site=where)
    log = ended(cluster, job, run_dir / "logs" / f"slurm-{job}.out")
    assert "3 nodes cannot share the batch: idle are n3" in log
    assert "start on n1 n2, 4 ranks" in log
    found = ranks(run_dir)
    assert [(f["SLURM_PROCID"], f["SLURMD_NODENAME"], f["SLURM_LOCALID"]) for f in found] == [
        ("0", "n1", "0"), ("1", "n1", "1"), ("2", "n2", "0"), ("3", "n2", "1"),
    ]  # fmt: skip
    assert {f["CUDA_VISIBLE_DEVICES"] for f in found} == {"0,1"}
    assert {f["MOTTO"] for f in found} == {"it's $HOME"}
    assert {f["tags"]["slurm/job_id"] for f in found} == {job}
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert {f["tags"]["git/commit"] for f in found} == {commit}
    [record] = JobFolder(run_dir).submissions()
    assert (record["job"], record["cluster"], record["nodes"]) == (job, str(Path("site.yaml").absolute()), "2-3")
    assert record["command"][:2] == ["duet", "submit"]


def test_edits_after_the_submission_reach_neither_the_job_nor_its_requeues(
    cluster: Cluster, submit: Submit, checkout: Path
) -> None:
    trainer = checkout / "pretrain" / "__main__.py"
    trainer.write_text(trainer.read_text().replace('"first"', '"edited before"'))
    job = submit("--sbatch=--hold", site=site(tasks_per_node=1))
    trainer.write_text(trainer.read_text().replace('"edited before"', '"edited after"'))
    Path("runs/first/wait").touch()
    cluster.run("scontrol", "release", job)
    log = Path(f"runs/first/logs/slurm-{job}.out")
    wait_until(lambda: Path("runs/first/ranks.jsonl").exists() and len(ranks()) == 1, 60, "the first start")
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: cluster.job(job)["JobState"] == "PENDING", 30, "the requeue")
    Path("runs/first/wait").unlink()
    cluster.start_now(job)
    assert ended(cluster, job, log).count("start on") == 2
    found = ranks()
    assert [f["version"] for f in found] == ["edited before"] * 2
    assert [f["tags"]["git/changed_files"] for f in found] == ["1"] * 2
    [snapshot] = Path("runs/first/code").glob("snapshot-*")
    assert {f["source"] for f in found} == {str(snapshot.absolute())}
    again = resubmit(Path("runs/first"))
    ended(cluster, again[0], Path(f"runs/first/logs/slurm-{again[0]}.out"))
    assert {f["version"] for f in ranks()[2:]} == {"edited before"}, "a resumed run has another code"
    assert len(ranks()) == 2 + 1


def test_the_snapshot_runs_whatever_the_environment_of_sbatch_says(
    cluster: Cluster, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job on two nodes, with its own size and signal; each rank with the script's environment and the snapshot."""
    for name, value in {
        "SBATCH_EXPORT": "NONE", "SBATCH_ARRAY_INX": "0-1", "SBATCH_WAIT": "1", "SBATCH_SIGNAL": "TERM@1",
        "SBATCH_NO_REQUEUE": "1", "SBATCH_TIMELIMIT": "1", "SBATCH_OUTPUT": "/nowhere/log", "SBATCH_MEM_PER_CPU": "7G",
        "SBATCH_COMMENT": "kept", "SRUN_CPUS_PER_TASK": "64", "SLURM_WORKING_DIR": "/nowhere",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    where = site(tasks_per_node=1, environment={"MOTTO": "mine"}, memory="600M", signal_lead=60)
    job = submit("--nodes", "2", site=where)
    ended(cluster, job, Path(f"runs/first/logs/slurm-{job}.out"))
    found = ranks()
    assert [(f["SLURM_JOB_ID"], f["SLURMD_NODENAME"], f["MOTTO"]) for f in found] == [
        (job, "n1", "mine"), (job, "n2", "mine"),
    ]  # fmt: skip
    [snapshot] = Path("runs/first/code").glob("snapshot-*")
    assert {f["source"] for f in found} == {str(snapshot.absolute())}
    facts = cluster.job(job)
    assert (facts["Requeue"], facts["MinMemoryNode"]) == ("1", "600M")
    assert facts["TimeLimit"] != "00:01:00"


def test_a_job_that_would_run_other_code_than_the_snapshot_fails(cluster: Cluster, submit: Submit) -> None:
    """Here the interpreter drops PYTHONPATH, as the image of a container may overrule it."""
    Path("python").write_text(f'#!/bin/bash\nexport PYTHONPATH={ROOT}\nexec {sys.executable} "$@"\n')
    Path("python").chmod(0o755)
    job = submit(site=site(tasks_per_node=1, python=str(Path("python").absolute())))
    assert cluster.wait_for_job(job, *ENDED, seconds=60)["JobState"] == "FAILED"
    [snapshot] = Path("runs/first/code").glob("snapshot-*")
    log = Path(f"runs/first/logs/slurm-{job}.out").read_text()
    assert f"error: the code of this job is {snapshot.absolute()}, but that in {ROOT} runs" in log
    assert not Path("runs/first/ranks.jsonl").exists()


def test_a_sweep_is_one_array_with_a_folder_for_each_element(cluster: Cluster, submit: Submit) -> None:
    sweep = Path("runs", "a=b, été")
    first = submit(
        f"run.dir={json.dumps(str(sweep), ensure_ascii=False)}", "--array", "run.seed=7,8", site=site(tasks_per_node=1)
    )
    array = first.removesuffix("_0")
    for number, seed in enumerate((7, 8)):
        run_dir = sweep / f"seed-{seed}"
        log = ended(cluster, f"{array}_{number}", run_dir / "logs" / f"slurm-{array}_{number}.out")
        assert f"run {run_dir.absolute()}" in log
        assert {f["seed"] for f in ranks(run_dir)} == {seed}
        [record] = JobFolder(run_dir).submissions()
        assert (record["job"], record["array"]) == (f"{array}_{number}", f"{number} of 0-1")
        assert {f["source"] for f in ranks(run_dir)} == {str(next((sweep / "code").absolute().glob("snapshot-*")))}


def test_a_chain_goes_on_until_the_run_is_finished(cluster: Cluster, submit: Submit) -> None:
    where = site(requeue=False, tasks_per_node=1)
    first = submit("--chain", "3", "train.steps=4", "train.keep_every=2", site=where)
    links = [record["job"] for record in JobFolder(Path("runs/first")).submissions()]
    assert links[0] == first
    logs = [ended(cluster, link, Path(f"runs/first/logs/slurm-{link}.out")) for link in links]
    assert ["start on" in log for log in logs] == [True, True, False]
    assert "nothing is left for this link of the chain" in logs[2]


def test_a_second_submission_names_the_job_that_waits(cluster: Cluster, submit: Submit, run: list[str]) -> None:
    job = submit("--sbatch=--hold")
    before = Path("runs/first/slurm/config.yaml").read_text()
    with pytest.raises(
        RunError, match=rf"job {job} is PENDING .*JobHeldUser.* for this run folder already.* duet cancel"
    ):
        in_process(*run, "run.seed=5", "--cluster", "local")
    with pytest.raises(RunError, match=rf"job {job} is PENDING"):
        resubmit(Path("runs/first"))
    assert Path("runs/first/slurm/config.yaml").read_text() == before, "what the waiting job will train was changed"
    cluster.run("scancel", job)
    wait_until(lambda: cluster.job(job)["JobState"] == "CANCELLED", 30, "the end")
    records = Path("runs/first/slurm/jobs.jsonl")  # which cannot be written: no command would find the next job
    records.rename("jobs.jsonl")
    records.mkdir()
    with pytest.raises(RunError, match=r"jobs.jsonl: .*, so job \d+ is taken back; make room") as refused:
        resubmit(Path("runs/first"))
    lost = str(refused.value).split("so job ")[1].split()[0]
    wait_until(lambda: cluster.job(lost)["JobState"] == "CANCELLED", 30, "the end")
    records.rmdir()
    Path("jobs.jsonl").rename(records)
    assert submit("run.seed=5", "--sbatch=--hold") not in (job, lost)


def test_one_after_another_job(cluster: Cluster, submit: Submit) -> None:
    Path("fails.sh").write_text("#!/bin/bash\nexit 3\n")
    failed = cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "fails.sh").strip()
    job = submit("--after", failed)
    cluster.run("scontrol", "release", failed)
    assert cluster.wait_for_job(job, *ENDED)["JobState"] == "CANCELLED", "it would wait for ever"


def test_an_evaluation_is_a_job_of_its_own(cluster: Cluster) -> None:
    """The real one runs in the drill of docs/slurm.md."""
    Path("python").write_text('#!/bin/bash\necho $SLURM_NTASKS "$@" $PYTHONPATH $DUET_ONLY_CODE\n')
    Path("python").chmod(0o755)
    text = (ROOT / "slurm" / "evaluate.sbatch").read_text()
    Path("evaluate.sbatch").write_text(
        text.replace("set -uo", "export SLURM_EXPORT_ENV=NONE SLURM_MEM_PER_CPU=7\nset -uo")
    )
    values = {"DUET_PYTHON": str(Path("python").absolute()), "DUET_CODE": "/the/code", "PYTHONPATH": ""}
    command = ["sbatch", "--parsable", "--gpus-per-node=0", "--output=log", "evaluate.sbatch"]
    done = subprocess.run([*command, "run 1", "--step", "3"], env=os.environ | values, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        ended(cluster, done.stdout.strip(), Path("log"))
        == "1 -P -m launch.cli eval run 1 --step 3 /the/code /the/code\n"
    )
