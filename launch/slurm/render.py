"""The batch script of a submission: two sections are written here, the life of the job is the shipped script's own."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import ConfigError
from duet_pretrain import SOURCE
from launch.slurm.site import Cluster

SECTIONS = ("# --- the job", "# --- the site", "# --- the life of the job")
_HEAD = "#!/bin/bash\n# Written by `duet submit`: the third section is that of slurm/pretrain.sbatch.\n\n"
_RULE = 119
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-")


@dataclass(frozen=True)
class JobScript:
    """What a script asks Slurm for, and what it starts."""

    name: str
    cluster: Cluster
    cluster_name: str
    folder: Path
    """Where the job runs."""
    log: str
    """Path of its output, with Slurm's patterns (`%j`); see `plain`."""
    python: str
    variables: Mapping[str, str]
    """What the life of the job is told: DUET_CODE, …"""
    arguments: Sequence[str]
    """Of the script; shell words, quoted (`shlex.quote`)."""
    array: str | None = None
    exclude: Sequence[str] = ()
    options: Sequence[str] = ()
    """Further ones of sbatch; the last word."""
    before: Sequence[str] = field(default=())
    """Lines of shell that decide whether anything is to be done at all."""


def template(name: str) -> str:
    """The shipped script `slurm/NAME.sbatch`."""
    return (SOURCE / "slurm" / f"{name}.sbatch").read_text(encoding="utf-8")


def render(text: str, job: JobScript) -> str:
    """The script `text` with the job's own first two sections; its defaults of the site stay behind ours."""
    defaults, life = sections(text)
    directives, ours = "\n".join(_directives(job)), "\n".join(_site(job))
    return f"{_HEAD}{_rule(SECTIONS[0])}\n{directives}\n\n{_rule(SECTIONS[1])}\n{ours}\n{defaults}{life}"


def sections(text: str) -> tuple[str, str]:
    """The second section without its title, and the third."""
    starts = [text.find(f"\n{title}") + 1 for title in SECTIONS]
    assert 0 < starts[0] < starts[1] < starts[2], f"the script lacks one of its sections: {', '.join(SECTIONS)}"
    return text[text.index("\n", starts[1]) + 1 : starts[2]], text[starts[2] :]


def plain(path: Path) -> str:
    """A path in an option that Slurm replaces patterns in (`%j`), without one.

    Raises:
        ConfigError: it holds a backslash, which no spelling protects there.
    """
    if "\\" in str(path):
        raise ConfigError(f"{path}: Slurm cannot write to a path with a backslash; choose another run.dir")
    return str(path).replace("%", "%%")


def directive(option: str) -> str:
    """One `#SBATCH` line. sbatch splits it at spaces but in quotes, where a backslash protects what follows.

    Raises:
        ConfigError: it holds a line's end.
    """
    if not option.isprintable():
        raise ConfigError(f"{option!r}: Slurm's options are one line of text; choose another name")
    if set(option) <= _PLAIN:
        return f"#SBATCH {option}"
    name, mark, value = option.partition("=") if "=" in option else ("", "", option)
    value = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH {name}{mark}"{value}"'


def _directives(job: JobScript) -> list[str]:
    cluster = job.cluster
    options = [f"--job-name={job.name}", f"--nodes={cluster.nodes}", f"--ntasks-per-node={cluster.ranks_per_node}"]
    options += [f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []
    options += [f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []
    options += [f"--mem={cluster.memory}"] if cluster.memory else []
    options += [f"--time={cluster.time}", f"--signal=B:USR1@{cluster.signal_lead}"]
    for name in ("partition", "account", "qos", "constraint"):
        options += [f"--{name}={value}"] if (value := getattr(cluster, name)) else []
    options += ["--exclusive"] if cluster.exclusive else []
    options += [f"--array={job.array}"] if job.array else []
    options += [f"--exclude={','.join(job.exclude)}"] if job.exclude else []
    options += ["--requeue" if cluster.requeue else "--no-requeue", "--open-mode=append"]
    options += [f"--chdir={job.folder}", f"--output={job.log}"]
    return [directive(option) for option in [*options, *cluster.sbatch, *job.options]]


def _site(job: JobScript) -> list[str]:
    """Assignments for the defaults that follow: what is set already, stays."""
    cluster = job.cluster
    lines = [f"module load {' '.join(map(shlex.quote, cluster.modules))}"] if cluster.modules else []
    values = {
        "DUET_PYTHON": job.python,
        "DUET_SETUP": cluster.setup or "",
        "DUET_CONTAINER": cluster.container or "",
        "DUET_MOUNTS": ",".join(cluster.mounts) if cluster.container else "",
        "DUET_APPTAINER": _apptainer(cluster),
        "DUET_STOP_LEAD": str(cluster.signal_lead),
        "DUET_PREFLIGHT": str(int(cluster.preflight)),
    }
    if cluster.scratch:
        values |= {"DUET_STAGE": cluster.scratch, "DUET_CACHE": cluster.scratch}
    lines += [f"# Of the site {job.cluster_name} and this submission; what they leave open is below."]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in (values | cluster.environment).items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.variables.items()]
    return [*lines, *job.before, f"set -- {' '.join(job.arguments)}", ""]


def _apptainer(cluster: Cluster) -> str:
    if not cluster.apptainer:
        return ""
    words = ["apptainer", "exec", *(["--nv"] if cluster.gpus_per_node else [])]
    return " ".join([*words, *(f"--bind {mount}" for mount in cluster.mounts), cluster.apptainer])


def _rule(title: str) -> str:
    return f"{title} {'-' * (_RULE - len(title) - 1)}"
