"""Slurm's commands: sbatch, squeue, scontrol, scancel, and sacct where it works. Free of torch.

Called without a shell and with a time limit, since a client that finds no controller tries again for a minute. Text is
parsed, not `--json`, which differs from version to version.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from data_pipeline.errors import UserError

SECONDS = 30.0
"""What a command may take."""
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip
"""States in which a job stays, unless somebody requeues it."""
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Of `SLURM_…` in the environment. The rest is of the job we may be inside of; what we submit would inherit it."""
OF_THE_SCRIPT = {
    "ARRAY_INX": "array", "CPUS_PER_TASK": "cpus-per-task", "GPUS": "gpus-per-node", "GPUS_PER_SOCKET": "gpus-per-node",
    "GPUS_PER_TASK": "gpus-per-node", "MEM_PER_CPU": "mem", "MEM_PER_GPU": "mem", "MEM_PER_NODE": "mem",
    "NO_REQUEUE": "requeue", "TIMELIMIT": "time", "ERROR": "output",
}  # fmt: skip
"""Options that `SBATCH_…` stands for, or would contradict, where its name is not the option's."""
NEVER = ("SBATCH_ARRAY_INX", "SBATCH_WAIT")
"""A run is one job, and nobody waits here for its end."""
FIELDS = (
    "JobArrayID", "JobID", "State", "NumNodes", "NodeList", "Partition", "UserName", "SubmitTime", "StartTime",
    "EndTime", "TimeLeft", "RestartCnt", "exit_code", "Reason",
)  # fmt: skip
SACCT_FIELDS = "JobID,JobIDRaw,State,NNodes,NodeList,Partition,User,Submit,Start,End,ExitCode"
PARTITIONS = object()
"""In place of an advice: names the partitions there are."""
HARDWARE = "ask for less; `sinfo -o '%P %D %c %m %G %l'` tells nodes, CPUs, MB, GPUs and longest time of each partition"
ADVICE: tuple[tuple[str, str | object], ...] = (
    ("invalid partition", PARTITIONS),
    ("more processors requested than permitted", f"too many nodes or CPUs: {HARDWARE}"),
    ("node count specification invalid", f"--nodes is more than the partition has: {HARDWARE}"),
    ("memory specification can not be satisfied", f"the memory is more than a node has: {HARDWARE}"),
    ("requested node configuration is not available", f"no node has so many GPUs, CPUs or so much memory: {HARDWARE}"),
    ("invalid --time specification", "write the time as HOURS:MINUTES:SECONDS or DAYS-HOURS"),
    ("requested time limit is invalid", "ask for less time; `sinfo -o '%P %l'` tells the longest of each partition"),
    ("invalid generic resource", "the cluster knows no GPUs of this name; `sinfo -o '%N %G'` tells what nodes have"),
    ("invalid node name", "`sinfo -N` lists the nodes"),
    ("invalid feature", "`sinfo -o '%N %f'` lists what --constraint may name"),
    ("reservation is invalid", "`scontrol show reservation` lists them"),
    ("job dependency problem", "write it as afterok:JOB, afterany:JOB or singleton"),
    ("invalid job array", "write it as 0-7, or 0-7%2 for two at a time"),
    ("invalid --signal", "write it as B:USR1@SECONDS"),
    ("unrecognized option", "`sbatch --help` lists the options"),
    ("does not look like a batch script", "its first line must be #!/bin/bash"),
    ("dos line breaks", "write the script with Unix line ends: `sed -i 's/\\r$//' SCRIPT`"),
    ("unable to open file", "the batch script is missing, or may not be read"),
    ("invalid account", "`sacctmgr show associations user=$USER` lists the accounts you may use"),
    ("invalid qos", "`sacctmgr show associations user=$USER format=account,qos` lists those you may use"),
    ("violates accounting/qos policy", "a limit of your account or QOS: fewer jobs, nodes or less time"),
    ("group not permitted", "the partition is not for your group: choose another"),
    ("invalid job id", "Slurm does not know the job, or no longer: it forgets jobs some minutes after their end"),
    ("munge", "authentication does not work on this machine: is it one of the cluster's?"),
    ("authentication", "authentication does not work on this machine: is it one of the cluster's?"),
    ("permission denied", "it is another user's: only its owner, or an administrator, may change a job"),
    ("presently disabled", "the job was submitted with --no-requeue, or the site forbids it: submit it again instead"),
    ("job is pending execution", "it waits in the queue already"),
    ("already completing or completed", "the job is ending; wait until it has"),
    ("cannot stat file", "the configuration is not where SLURM_CONF says"),
    ("configuration source", "this machine knows no cluster: log in on one of the cluster's, or set SLURM_CONF"),
    ("unable to contact", "the controller does not answer; running jobs go on. `scontrol ping` tells when it is back"),
    ("socket timed out", "the controller is busy; look with `squeue --me` before you submit again"),
)
"""(what Slurm says, in lower case; what to change)."""


class SlurmError(UserError):
    """Slurm refused, or cannot be asked."""


@dataclass(frozen=True)
class Job:
    """What Slurm knows of a job, or of one element of an array. Times in seconds since the epoch; None: not known."""

    id: str
    """JOB, or JOB_ELEMENT in an array."""
    number: str
    """What SLURM_JOB_ID is inside: an element that has started has one of its own."""
    state: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, TIMEOUT, …"""
    node_count: int
    nodes: str
    """As Slurm writes them, such as n[1-4]; empty before the start."""
    partition: str
    user: str
    submitted: float | None
    start: float | None
    """Of a waiting job: when Slurm expects it to start."""
    end: float | None
    """Of a running job: when its time is over."""
    time_left: float | None
    """In seconds; None without a limit."""
    restarts: int | None
    exit_code: int | None
    """Above 128: ended by a signal."""
    reason: str
    """Why it waits or failed; empty when there is none."""

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs or waits any more."""
        return self.state in ENDED

    @property
    def waiting(self) -> bool:
        """Whether it is in the queue."""
        return self.state in WAITING


def available() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def submit(script: Path, options: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
    """Submit a batch script; the job's id. What Slurm warns of goes to standard error.

    Raises:
        SlurmError: it refused.
    """
    text = script.read_text() if script.is_file() else ""  # sbatch says better what is missing
    done = _checked("sbatch", "--parsable", *options, str(script), *arguments, without=overruled(text))
    sys.stderr.write(done.stderr)
    return done.stdout.strip().split(";")[0]


def test_only(script: Path, options: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
    """What Slurm would do with a script: when it would start, and where. Submits nothing.

    Raises:
        SlurmError: it would refuse.
    """
    done = _checked("sbatch", "--test-only", *options, str(script), *arguments, without=overruled(script.read_text()))
    # The number is one that no job gets.
    return "\n".join(re.sub(r"^Job \d+ ", "", line) for line in _said(done.stderr + done.stdout))


def overruled(script: str) -> list[str]:
    """`SBATCH_…` of the environment that sbatch does not see: it would put them before what a script says itself."""
    said = {name.removeprefix("no-") for name in re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)}

    def option(name: str) -> str:
        word = name.removeprefix("SBATCH_")
        return OF_THE_SCRIPT.get(word, word.lower().replace("_", "-"))

    ours = (name for name in os.environ if name.startswith("SBATCH_"))
    return sorted(name for name in ours if name in NEVER or option(name) in said)


def job(job_id: str) -> Job | None:
    """One job, from sacct when the controller has forgotten it; None when nobody knows it.

    Raises:
        SlurmError: Slurm cannot be asked.
    """
    return jobs([job_id]).get(job_id) or remembered([job_id]).get(job_id)


def jobs(job_ids: Iterable[str]) -> dict[str, Job]:
    """Those of the jobs that the controller knows, by the ids given. An array's id brings all its elements by theirs.

    Raises:
        SlurmError: Slurm cannot be asked.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    layout = ",".join(f"{name}:|" for name in FIELDS[:-1]) + f",{FIELDS[-1]}:"
    done = _call("squeue", "--noheader", "--all", "--array", "--states=all", "-O", layout, f"--jobs={','.join(wanted)}")
    if done.returncode:
        if "invalid job id specified" in done.stderr.lower():  # only when it is the one that was asked for
            return {}
        raise _refusal("squeue", done.stderr)
    return _by_id(_parse_squeue(line) for line in done.stdout.splitlines() if line.strip())


def remembered(job_ids: Iterable[str]) -> dict[str, Job]:
    """What the accounting knows of jobs that have ended; nothing where there is none."""
    wanted = sorted(set(job_ids))
    if not wanted or not shutil.which("sacct"):
        return {}
    done = _call("sacct", "-X", "-n", "-P", f"--format={SACCT_FIELDS}", f"--jobs={','.join(wanted)}")
    if done.returncode:  # a site may well do without: the controller's word is enough
        return {}
    return _by_id(_parse_sacct(line) for line in done.stdout.splitlines() if line.count("|") == 10)


def cancel(job_id: str) -> None:
    """End a job: SIGTERM, and SIGKILL some 30 s later. One that Slurm does not know is no error.

    Raises:
        SlurmError: it refused.
    """
    _checked("scancel", job_id)


def requeue(job_id: str) -> None:
    """End a running job and queue it again, or queue one again that has ended.

    Raises:
        SlurmError: it refused.
    """
    _checked("scontrol", "requeue", job_id)


def signal(job_id: str, name: str) -> None:
    """Send a signal, such as USR1, to the batch script alone.

    Raises:
        SlurmError: it refused, or the job does not run.
    """
    _checked("scancel", "--batch", f"--signal={name}", job_id)


def update(job_id: str, **values: str) -> None:
    """Change a job, for instance `starttime="now"`.

    Raises:
        SlurmError: it refused.
    """
    _checked("scontrol", "update", f"jobid={job_id}", *(f"{name}={value}" for name, value in values.items()))


def output(job_id: str) -> Path | None:
    """Where a job writes its log; None when the controller does not know the job.

    Raises:
        SlurmError: Slurm cannot be asked.
    """
    done = _call("scontrol", "show", "job", "--oneliner", job_id)
    if done.returncode and "invalid job id" not in done.stderr.lower():
        raise _refusal("scontrol", done.stderr)
    found = re.search(r" StdOut=(.*?)(?: \w+=|\s*$)", done.stdout, re.MULTILINE)
    return Path(found[1]) if found else None


def hostnames(nodes: str) -> list[str]:
    """n[1-3] as n1, n2, n3."""
    return _checked("scontrol", "show", "hostnames", nodes).stdout.split() if nodes else []


def partitions() -> list[str]:
    """Names of the partitions."""
    return sorted(set(_checked("sinfo", "--noheader", "-o", "%R").stdout.split()))


def _call(program: str, *arguments: str, without: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    if not shutil.which(program):
        raise SlurmError(
            f"{program}: no such program here; log in on a machine of the cluster (some sites need `module load slurm`)"
        )
    conf = os.environ.get("SLURM_CONF")
    if conf and not Path(conf).exists():  # every program would look for it for a minute
        raise SlurmError(f"SLURM_CONF={conf}: no such file; set it to the cluster's slurm.conf, or unset it")
    command = [program, *arguments]
    try:
        return subprocess.run(
            command,
            env=_environment(without),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        twice = "; look with `squeue --me` before you submit again" if program == "sbatch" else ""
        told = _advised(said) or "`scontrol ping` tells whether the controller is up"
        raise SlurmError(f"{program}: no answer in {SECONDS:.0f} s{twice}. {told}") from None


def _checked(program: str, *arguments: str, without: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    done = _call(program, *arguments, without=without)
    if done.returncode:
        raise _refusal(program, done.stderr)
    return done


def _refusal(program: str, stderr: str) -> SlurmError:
    return SlurmError(f"{program}: {_advised(stderr) or 'failed, and did not say why'}")


def _advised(stderr: str) -> str:
    """On one line what Slurm said, and what to change."""
    said = "; ".join(_said(stderr))
    for text, advice in ADVICE:
        if text in said.lower():
            if advice is PARTITIONS:
                advice = f"choose one of {', '.join(partitions())}"
            return f"{said}: {advice}"
    return said


def _said(stderr: str) -> list[str]:
    """Lines without the program's name in front, none twice."""
    lines = (re.sub(r"^(\w+: )?(error: |fatal: )?", "", line).strip() for line in stderr.splitlines())
    return list(dict.fromkeys(line for line in lines if line))


def _environment(without: Sequence[str]) -> dict[str, str]:
    """Without what would change what Slurm's commands print, and what srun does in a job that inherits it."""
    ours = os.environ.items()
    return {
        name: value
        for name, value in ours
        if name in KEPT
        or not (name in without or name.startswith(("SLURM_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")))
    }


def _parse_squeue(line: str) -> Job:
    values = dict(zip(FIELDS, line.split("|", len(FIELDS) - 1), strict=True))
    return Job(
        id=values["JobArrayID"],
        number=values["JobID"],
        state=values["State"],
        node_count=_count(values["NumNodes"]) or 0,
        nodes=values["NodeList"],
        partition=values["Partition"],
        user=values["UserName"],
        submitted=_time(values["SubmitTime"]),
        start=_time(values["StartTime"]),
        end=_time(values["EndTime"]),
        time_left=_seconds(values["TimeLeft"]),
        restarts=_count(values["RestartCnt"]),
        exit_code=_exit_code(values["exit_code"]),
        reason="" if (reason := values["Reason"].strip()) == "None" else reason,
    )


def _parse_sacct(line: str) -> Job:
    job_id, number, state, count, nodes, partition, user, submitted, start, end, exit_code = line.split("|")
    return Job(
        id=job_id,
        number=number,
        state=state.split()[0],  # CANCELLED by 1000
        node_count=_count(count) or 0,
        nodes="" if nodes == "None assigned" else nodes,
        partition=partition,
        user=user,
        submitted=_time(submitted),
        start=_time(start),
        end=_time(end),
        time_left=None,
        restarts=None,
        exit_code=_exit_code(exit_code),
        reason="",
    )


def _by_id(found: Iterable[Job]) -> dict[str, Job]:
    """An element of an array, too, by the number that it has inside."""
    known = list(found)
    return {one.number: one for one in known} | {one.id: one for one in known}


def _count(text: str) -> int | None:
    digits = re.match(r"\d+", text.strip())
    return int(digits[0]) if digits else None


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:  # N/A, Unknown
        return None


def _seconds(text: str) -> float | None:
    """3-04:05:06, 04:05:06, 05:06; UNLIMITED, INVALID and NOT_SET are None."""
    days, _, clock = text.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or not (days or "0").isdigit():
        return None
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return float(seconds + 86400 * int(days or 0))


def _exit_code(text: str) -> int | None:
    """Of squeue a wait status, of sacct CODE:SIGNAL; a signal as a shell tells it."""
    code, colon, by = text.strip().partition(":")
    if not code.isdigit() or (colon and not by.isdigit()):
        return None
    number, end = (int(code), int(by)) if colon else (int(code) >> 8, int(code) & 0x7F)
    return 128 + end if end else number
