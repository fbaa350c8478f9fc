"""A real Slurm of several nodes on this machine, for tests: munged, slurmctld and a slurmd for each node.

Needs Debian's slurm-wlm and munge (`make system-deps`), no root and no systemd. Everything lies in one folder and binds
loopback; its processes are ended by pid. By hand:

    python -m tests.slurm.cluster up --nodes 4      prints what to export
    python -m tests.slurm.cluster down
"""

import argparse
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.ports import free_ports
from tests.slurm.processes import (
    MARK,
    alive,
    daemons,
    descendants,
    kill_and_wait,
    open_logs,
    signal_all,
    stepds,
    tasks,
    wait_until,
)

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
SEARCH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
FAKE_GPUS = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "kmsg")
"""Any character device serves: Slurm counts them, and numbers CUDA_VISIBLE_DEVICES by their position."""
CONFIG = """\
ClusterName={name}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# What a requeued job waits unless a test ends its wait, and how late a node may begin what it is told.
AuthInfo=socket={folder}/munge/sock,cred_expire=30
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
# Nodes may have more processors and memory than the machine.
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
AccountingStorageType=accounting_storage/none
EnforcePartLimits=ALL
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=6
TCPTimeout=2
MessageTimeout=10
KillWait={kill_wait}
InactiveLimit=0
# Ended jobs stay visible to `scontrol show job`.
MinJobAge=3600
UnkillableStepTimeout=30
"""
NODE = (
    "NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} Sockets=1 CoresPerSocket={cpus} "
    "ThreadsPerCore=1 RealMemory=64000 {gpus} State=UNKNOWN\n"
)
PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=1-0 DefaultTime=30 PriorityTier=1 GraceTime={grace} State=UP
PartitionName=high Nodes=ALL MaxTime=1-0 DefaultTime=30 PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> list[str]:
    """Programs of Slurm that this machine lacks."""
    return [program for program in PROGRAMS if not shutil.which(program, path=SEARCH)]


class Cluster:
    """Nodes n1, n2, …; partitions `main` and, with preemption over it, `high`."""

    def __init__(
        self, folder: Path, *, nodes: int = 4, cpus: int = 4, gpus: int = 0, grace: int = 0, kill_wait: int = 30
    ):
        """Starts nothing yet. `cpus` and fake `gpus` are of each node; `grace` and `kill_wait` in seconds."""
        self.folder = folder
        self.name = "duet" + hashlib.sha1(str(folder).encode()).hexdigest()[:8]
        """Unique to the folder; tasks have it in their environment."""
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self._cpus, self._gpus, self._grace, self._kill_wait = cpus, gpus, grace, kill_wait

    @property
    def environment(self) -> dict[str, str]:
        """The caller's, without what an outer Slurm put there; points Slurm's commands at this cluster."""
        # Without a job's own, nor what a test in this process left of a rank's place.
        others = ("SLURM_", "SBATCH_", "SRUN_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "MASTER_")
        kept = {name: v for name, v in os.environ.items() if not name.startswith(others)}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH}

    def up(self) -> None:
        """Start all daemons and wait until every node is idle; an earlier cluster in the folder is ended first."""
        self.down()
        for sub in ("munge", "state", "run", "log", "spool"):
            (self.folder / sub).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for old in (self.folder / "log").iterdir():
            old.unlink()
        self._configure()
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._start(
            "munged", "munged", "-F", f"--socket={munge}/sock", f"--key-file={key}", f"--pid-file={munge}/pid",
            f"--seed-file={munge}/seed", f"--log-file={munge}/log",
        )  # fmt: skip
        wait_until((munge / "sock").exists, 60, "munged")
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for node in self.nodes:
            self._start_slurmd(node)
        wait_until(
            lambda: self.node_states() == ["idle"] * len(self.nodes), 120, f"all nodes idle; see {self.folder}/log"
        )

    def down(self) -> None:
        """Steps and tasks by SIGKILL, daemons by SIGTERM and after 5 s SIGKILL; `log/` stays."""
        kill_and_wait([*stepds(self.folder), *tasks(self.name)])
        ours = daemons(self.folder)
        signal_all(ours, signal.SIGTERM)
        try:
            wait_until(lambda: not any(map(alive, ours)), 5, "the daemons' end")
        except TimeoutError:
            kill_and_wait(ours)
        kill_and_wait([*stepds(self.folder), *tasks(self.name), *daemons(self.folder)])  # started meanwhile
        for sub in ("munge", "state", "spool", "run"):
            shutil.rmtree(self.folder / sub, ignore_errors=True)

    def run(
        self, *command: str, timeout: float = 60, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> str:
        """One of Slurm's commands, with `environment` beside the caller's; its output.

        Raises:
            AssertionError: it failed; with what it said.
        """
        variables = self.environment | dict(environment or {})
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job: JobState, Restarts, ExitCode, Reason, …"""
        words = self.run("scontrol", "show", "job", "-o", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, job_id: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Until the job is in one of the states; what `job` says then."""
        wait_until(lambda: self.job(job_id)["JobState"] in states, seconds, f"job {job_id} {' or '.join(states)}")
        return self.job(job_id)

    def start_now(self, job_id: str) -> None:
        """Ends the wait of a requeued job; it must have ended on its nodes."""
        # A start within the second of the requeue has a credential that the nodes hold for revoked: the job fails.
        self.run("scontrol", "update", f"jobid={job_id}", "starttime=now+1", check=False)

    def cancel_all(self) -> None:
        """Cancel every job and wait until the nodes are idle and nothing of the jobs is alive."""
        self.run("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name)
        wait_until(lambda: not self.run("squeue", "-h").strip(), 60, "the end of all jobs")
        kill_and_wait(tasks(self.name))

    def node_states(self) -> list[str]:
        """In the order of `nodes`."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).splitlines()
        states = dict(line.split() for line in lines)
        return [states.get(node, "absent") for node in self.nodes]

    def kill_node(self, node: str, *, tell: bool = True) -> None:
        """SIGKILL slurmd, steps and tasks of a node; unless `tell`, the controller finds out by itself in some 25 s."""
        mine = [pid for pid in stepds(self.folder) if f"slurmd-{node}.log" in open_logs(pid, self.folder)]
        kill_and_wait([*self._slurmd(node), *mine, *descendants(mine)])
        if tell:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=drill")

    def start_nodes(self, *nodes: str) -> None:
        """The opposite of `kill_node`, for those that need it; all of them unless named."""
        wanted = nodes or tuple(self.nodes)
        there = {log for pid in daemons(self.folder) for log in open_logs(pid, self.folder)}
        for node in wanted:
            if f"slurmd-{node}.log" not in there:
                self._start_slurmd(node)

        def ready() -> bool:
            states = dict(zip(self.nodes, self.node_states(), strict=True))
            for node in wanted:
                if states[node].startswith(("down", "drain")):
                    self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            return all(states[node] in ("idle", "mixed", "allocated") for node in wanted)

        wait_until(ready, 120, f"{wanted} back")

    def restart_controller(self) -> None:
        """By SIGTERM, so that it saves its state: SIGKILL right after a submission loses the job."""
        pid = int((self.folder / "run" / "slurmctld.started").read_text())
        signal_all([pid], signal.SIGTERM)
        wait_until(lambda: not alive(pid), 60, "slurmctld's end")
        self._start("slurmctld", "slurmctld", "-D")
        wait_until(lambda: "UP" in self.run("scontrol", "ping", check=False), 60, "slurmctld")

    def _configure(self) -> None:
        ports = free_ports(len(self.nodes) + 1)
        user = pwd.getpwuid(os.getuid()).pw_name
        text = CONFIG.format(name=self.name, folder=self.folder, user=user, ports=ports, kill_wait=self._kill_wait)
        gpus = f"Gres=gpu:{self._gpus}" if self._gpus else ""
        for node, port in zip(self.nodes, ports[1:], strict=True):
            (self.folder / "spool" / node).mkdir(exist_ok=True)
            text += NODE.format(node=node, port=port, cpus=self._cpus, gpus=gpus)
        (self.folder / "slurm.conf").write_text(text + PARTITIONS.format(grace=self._grace))
        devices = [f"/dev/{name}" for name in FAKE_GPUS if Path("/dev", name).is_char_device()]
        lines = [f"NodeName={','.join(self.nodes)} Name=gpu File={device}\n" for device in devices[: self._gpus]]
        (self.folder / "gres.conf").write_text("".join(lines))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "plugstack.conf").touch()

    def _start_slurmd(self, node: str) -> None:
        self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def _slurmd(self, node: str) -> list[int]:
        return [pid for pid in daemons(self.folder) if f"slurmd-{node}.log" in open_logs(pid, self.folder)]

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            process = subprocess.Popen(
                command,
                env=self.environment | {MARK: str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        (self.folder / "run" / f"{name}.started").write_text(str(process.pid))


def main() -> None:
    """Up and down by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["up", "down"])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / f"duet-slurm-{os.getuid()}")
    for option, default in (("nodes", 4), ("cpus", 4), ("gpus", 0), ("grace", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args()
    cluster = Cluster(given.dir.absolute(), nodes=given.nodes, cpus=given.cpus, gpus=given.gpus, grace=given.grace)
    if given.command == "down":
        cluster.down()
    else:
        cluster.up()
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf")


if __name__ == "__main__":
    main()
