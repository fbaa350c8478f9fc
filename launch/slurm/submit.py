"""Submissions to Slurm: a run, a sweep or a chain of jobs, checked, from a copy of the code. Free of torch."""

import contextlib
import fcntl
import hashlib
import os
import shlex
import sys
import tempfile
import time as clock
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer

from data_pipeline.errors import ConfigError, RunError
from data_pipeline.files.atomic import DISK_ERRORS, disk_errors, named, open_lock, write_atomic
from launch.slurm import checks, client, render, snapshot
from launch.slurm import site as clusters
from launch.slurm.checks import Checked
from launch.slurm.exclude import avoided
from launch.slurm.site import Cluster
from pretrain.config import architecture
from pretrain.config.schema import Config, dump, load
from pretrain.run.checkpoint_folder import MANIFEST, step_path
from pretrain.run.job_records import JobFolder
from pretrain.run.provenance import SOURCE
from pretrain.run.run_folder import RunFolder

CLUSTER, CODE = "cluster.yaml", "code"
"""In a run's folder `slurm`: the site of its last submission, and a link to the snapshot that it runs."""
_ASKED = 100
"""Newest submissions of a run that Slurm is asked about."""


@dataclass(frozen=True)
class Order:
    """A submission as it was asked for."""

    configs: list[Config]
    """One; or of an array one an element, whose run folders have the same parent."""
    cluster: Cluster
    cluster_name: str
    command: list[str]
    array: bool = False
    chain: int = 1
    after: str | None = None
    options: Sequence[str] = ()
    """Of sbatch."""
    untracked_mib: float = 10.0
    code: Path | None = None
    """The snapshot to run; one of the code at hand unless given."""


@dataclass(frozen=True)
class Submission:
    """What would be submitted."""

    script: str
    configs: list[Config]
    code: Path
    findings: list[Checked] = field(default_factory=list)


def resubmit(run_dir: Path, nodes: str | None = None, cluster: str | None = None, time: str | None = None) -> list[str]:
    """Submit a run again as it was submitted last, with the code of then; returns the ids of the jobs.

    Raises:
        UserError: it never was; or as `duet submit`.
    """
    folder = JobFolder(run_dir)
    if not folder.config.is_file() or not (folder.path / CLUSTER).is_file():
        raise RunError(
            f"{run_dir}: was never submitted; `duet submit {shlex.quote(str(run_dir / 'config.yaml'))} --cluster NAME` "
            "does"
        )
    config = load([str(folder.config)])
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run_dir.absolute())})})
    last = folder.submissions()[-1:]
    name = cluster or (last[0]["cluster"] if last else str(folder.path / CLUSTER))
    where = site(cluster or str(folder.path / CLUSTER), nodes, time)
    code = (folder.path / CODE).resolve()
    if not code.is_dir():
        raise RunError(
            f"{code}: the code that the run was submitted with is gone; restore it, or go on with the code at hand: "
            f"duet submit {shlex.quote(str(folder.config))} --cluster {shlex.quote(name)}"
        )
    return place(Order([config], where, name, ["duet", *sys.argv[1:]], code=code))


def site(name: str, nodes: str | None = None, time: str | None = None) -> Cluster:
    """The site `name`, with what the command line says instead.

    Raises:
        ConfigError: there is none, or it cannot be so.
    """
    changes = {key: value for key, value in (("nodes", nodes), ("time", time)) if value is not None}
    found = clusters.load(name)
    return clusters.parse(found.model_dump() | changes, f"--cluster {name}") if changes else found


def prepare(order: Order, *, dry_run: bool = False) -> Submission:
    """Check the order and write its script, in memory; with `dry_run` no file is touched for a moment either.

    Raises:
        UserError: what would stop the job at its start.
    """
    where = order.cluster
    python = where.python or ("python" if where.container or where.apptainer else sys.executable)
    findings = checks.check_site(where, python)
    configs = []
    for config in order.configs:
        checked, found = checks.check_data(config, later=order.after is not None)
        if "${" in dump(checked):
            raise ConfigError("a name with ${ would be taken for a reference when the job reads it; choose another")
        found += checks.check_folder(checked, clock.time() if dry_run else None)
        found += checks.check_nodes(checked, where) + checks.check_memory(checked, where)
        found += checks.check_mounts(checked, where) + checks.check_time(checked, where, order.chain)
        findings += [finding for finding in found if finding not in findings]
        configs.append(checked)
    first = configs[0].run_dir
    folder = first.parent if order.array else first
    code = order.code or snapshot.take(folder / "code", order.untracked_mib, dry_run=True)
    findings.append(Checked("code", str(code)))
    excluded = list(dict.fromkeys(node for config in configs for node in avoided(JobFolder(config.run_dir))))
    if excluded:
        findings.append(Checked("exclude", f"{', '.join(excluded)}: {first}/slurm/exclude.jsonl", warning=True))
    # An element knows its number only, in Slurm's pattern %a and in the shell: links lead from it to the run folders.
    links = _links(configs)
    logs = f"{render.plain(links)}/%a/logs/slurm-%A_%a.out"
    config_file = f"{shlex.quote(str(links))}/$SLURM_ARRAY_TASK_ID/slurm/config.yaml"
    script = render.render(
        render.template("pretrain"),
        render.JobScript(
            name=f"duet-{folder.name if order.array else configs[0].run.name}",
            cluster=where,
            cluster_name=order.cluster_name,
            folder=folder,
            log=logs if order.array else f"{render.plain(folder)}/logs/slurm-%j.out",
            python=python,
            variables={"DUET_CODE": str(code)},
            arguments=[config_file if order.array else shlex.quote(str(JobFolder(first).config))],
            array=f"0-{len(configs) - 1}" if order.array else None,
            exclude=excluded,
            options=[*_dependency(order.after), *order.options],
            before=_ends_at_once(configs[0]) if order.chain > 1 else (),
        ),
    )
    return Submission(script, configs, code, [*checks.check_environment(script), *findings])


def place(order: Order) -> list[str]:
    """Check the order, ask Slurm, write the run folders, submit; returns the ids of the jobs, and says them.

    Raises:
        UserError: nothing was submitted. When it was a later link of a chain that Slurm refused, the message names
            those that wait.
    """
    with contextlib.ExitStack() as locks:
        plan = prepare(order)
        for config in plan.configs:
            locks.enter_context(_alone(config.run_dir))
            _check_not_queued(config.run_dir)
        if order.after and client.job(order.after) is None:  # Slurm would take it for one that has succeeded
            raise ConfigError(f"--after {order.after}: Slurm knows no such job, or no longer")
        with tempfile.TemporaryFile("w") as script:  # without a name, so that nothing is left behind by a kill
            with named(Path(tempfile.gettempdir()) / "job.sbatch"):
                script.write(plan.script)
                script.flush()
            told = client.test_only(Path(f"/proc/{os.getpid()}/fd/{script.fileno()}"))
        findings = [*plan.findings, Checked("Slurm", told)]
        show(findings)
        return _write_and_submit(order, plan)


def show(findings: list[Checked]) -> None:
    """A line for each, on standard error."""
    width = max(len(finding.about) for finding in findings)
    for finding in findings:
        mark = "warning: " if finding.warning else ""
        typer.echo(f"{finding.about:<{width}}  {mark}{finding.text}", err=True)


def _write_and_submit(order: Order, plan: Submission) -> list[str]:
    if order.code is None:
        code = snapshot.take(plan.code.parent, order.untracked_mib)
        if code != plan.code:
            raise RunError(f"{SOURCE}: the code was changed while it was being submitted; submit again")
    for number, config in enumerate(plan.configs):
        run_dir, folder = config.run_dir, JobFolder(config.run_dir)
        with disk_errors(run_dir, RunError):
            RunFolder(run_dir).logs.mkdir(exist_ok=True)
            architecture.keep(config.model, run_dir)
            write_atomic(folder.path / CLUSTER, clusters.dump(order.cluster), private=True)
            write_atomic(folder.config, dump(config))
            write_atomic(folder.script, plan.script, private=True)
            _link(folder.path / CODE, plan.code)
            if order.array:
                _link(_links(plan.configs) / str(number), run_dir)
    jobs: list[str] = []
    for _ in range(order.chain):
        dependency = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        try:
            jobs.append(client.submit(JobFolder(plan.configs[0].run_dir).script, dependency))
        except client.SlurmError as error:
            if jobs:
                raise client.SlurmError(f"{error}; the links before it wait: {', '.join(jobs)}") from error
            raise
        names = [f"{jobs[-1]}_{number}" if order.array else jobs[-1] for number in range(len(plan.configs))]
        with _taken_back(jobs):
            for number, (name, config) in enumerate(zip(names, plan.configs, strict=True)):
                array = f"{number} of 0-{len(names) - 1}" if order.array else None
                folder = JobFolder(config.run_dir)
                folder.submitted(name, order.cluster_name, order.cluster.nodes, order.command, array)
        for name, config in zip(names, plan.configs, strict=True):
            typer.echo(f"job {name}: {config.run_dir}")
    return jobs


@contextlib.contextmanager
def _taken_back(jobs: list[str]) -> Iterator[None]:
    """The last job, if it cannot be written down: no command would find it, and the next submission not refuse to be
    a second one.

    Raises:
        RunError: it was; or was to be, and Slurm refuses.
    """
    try:
        yield
    except OSError as error:
        *before, job = jobs
        what = f"{error.filename}: {DISK_ERRORS.get(error.errno or 0, error)}, so job {job} is"
        wait = f"; the links before it wait: {', '.join(before)}" if before else ""
        try:
            client.cancel(job)
        except client.SlurmError as refused:
            raise RunError(f"{what} not written down, nor taken back ({refused}): scancel {job}{wait}") from error
        raise RunError(f"{what} taken back; make room, and submit again{wait}") from error


def _check_not_queued(run_dir: Path) -> None:
    """Raises RunError while a job that was submitted for the run folder waits or runs; names it."""
    submitted = {str(record["job"]): record for record in JobFolder(run_dir).submissions() if "job" in record}
    for job in client.jobs(list(submitted)[-_ASKED:]).values():
        if not job.ended:
            where = f" on {job.nodes}" if job.nodes else f" ({job.reason})" if job.reason else ""
            raise RunError(
                f"{run_dir}: job {job.id} is {job.state}{where} for this run folder already; wait for it, or end it: "
                f"duet cancel {shlex.quote(str(run_dir))}"
            )


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Of two submissions for one run folder at the same time the second is refused."""
    folder = JobFolder(run_dir).path
    with disk_errors(run_dir, RunError):
        folder.mkdir(parents=True, exist_ok=True)
        file = open_lock(folder / ".submitting")  # what is done under the lock has errors of its own
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{run_dir}: another `duet submit` is at work on this run folder") from None
        yield


def _links(configs: list[Config]) -> Path:
    """Of a sweep: the folder of links, by element, to its run folders. Another set of runs has another one."""
    names = "\0".join(config.run_dir.name for config in configs)
    return configs[0].run_dir.parent / "slurm" / hashlib.sha256(names.encode()).hexdigest()[:8]


def _dependency(after: str | None) -> list[str]:
    return [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []


def _ends_at_once(config: Config) -> list[str]:
    """For the links of a chain: nothing is left to do once the run is finished, or has made a mistake of its user's."""
    last = step_path(config.run_dir / "checkpoints", config.train.steps) / MANIFEST
    failures = config.run_dir / "slurm" / "failures.jsonl"
    known = len(failures.read_bytes().splitlines()) if failures.is_file() else 0
    finished, failed = shlex.quote(str(last)), shlex.quote(str(failures))
    return [
        f"[ ! -e {finished} ] || {{ echo 'the run is finished: nothing is left for this link of the chain'; exit 0; }}",
        f"tail -n +{known + 1} {failed} 2>/dev/null | grep -q '\"mistake\": true' &&",
        "    { echo 'an earlier link failed, and another try cannot mend that: see slurm/failures.jsonl'; exit 1; }",
    ]


def _link(link: Path, target: Path) -> None:
    """A relative one, so that the folder can be moved; replaced at once."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)
