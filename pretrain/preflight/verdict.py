"""What the ranks of a preflight found, judged: bad nodes, what all nodes share, what is worth a warning. Free of torch.

A fault that every node reports is none of a node: the data are missing, the disk is full, the configuration is wrong.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

SLOW, BAD_SLOW = 2.0, 5.0
"""How many times slower than the median a rank's matrix product may be before it is told, and before it is bad."""
SLOW_LINK = 3.0
"""The same for a link between two ranks, which is only told: either end may be the cause."""
SLOW_DISK = 10.0
"""The same for writing into the run folder, which is only told: nodes disturb each other there."""
SKEW_SECONDS, BAD_SKEW_SECONDS = 1.0, 60.0
"""How far a node's clock may be from the others'; beyond the second, credentials and file dates fail."""
Level = Literal["node", "place", "exchange", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    `node`: the machine's fault. `place`: of a file system or of the data, as this node sees them. `exchange`: the group
    failed, and this end need not be the cause. `warning`: training works.
    """

    check: str
    level: Level
    text: str


@dataclass(frozen=True)
class Link:
    """What went from one rank to another, measured where it arrived."""

    sender: int
    receiver: int
    gib_s: float


@dataclass
class Report:
    """What one rank found; travels as JSON."""

    rank: int
    node: str
    findings: list[Finding] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)
    """What must be equal on all nodes: versions, hashes."""
    matmul_gflops: float | None = None
    write_mib_s: float | None = None
    links: list[Link] = field(default_factory=list)
    all_reduce_gib_s: float | None = None
    clock: tuple[float, float] | None = None
    """Bounds of this rank's clock minus rank 0's, in seconds."""

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Report":
        """The opposite of `asdict`."""
        made = cls(**content)
        made.findings = [Finding(**finding) for finding in content["findings"]]
        made.links = [Link(**link) for link in content["links"]]
        return made


@dataclass
class Verdict:
    """What a preflight comes to."""

    nodes: list[str]
    """Of the job, in rank order, as far as they are known."""
    num_ranks: int
    bad: dict[str, list[str]] = field(default_factory=dict)
    """Reasons, by node."""
    shared: list[str] = field(default_factory=list)
    """What is wrong everywhere alike: the user's to mend."""
    exchange: list[str] = field(default_factory=list)
    """The group failed, and no node can be named."""
    warnings: list[str] = field(default_factory=list)
    measured: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether training may begin."""
        return not (self.bad or self.shared or self.exchange)

    def blame(self, node: str, reason: str) -> None:
        """Say that a node is bad."""
        self.bad.setdefault(node, []).append(reason)


def brief(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def judge(reports: Iterable[Report], num_ranks: int) -> Verdict:
    """The verdict over the reports that came, in rank order."""
    reports = list(reports)
    verdict = Verdict(list(dict.fromkeys(report.node for report in reports)), num_ranks)
    _judge_findings(reports, verdict)
    _judge_sameness(reports, verdict)
    _judge_matmul(reports, verdict)
    _judge_writing(reports, verdict)
    _judge_links(reports, verdict)
    _judge_clocks(reports, verdict)
    return verdict


def _judge_findings(reports: list[Report], verdict: Verdict) -> None:
    found: dict[str, list[tuple[Report, Finding]]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.level == "warning":
                verdict.warnings.append(f"{report.node}: {finding.text}")
            else:
                found.setdefault(finding.check, []).append((report, finding))
    for same in found.values():
        everywhere = {report.node for report, _ in same} == set(verdict.nodes)
        first, finding = same[0]
        if finding.level == "exchange":
            verdict.exchange.append(f"{first.node}: {finding.text}")
        elif everywhere and (len(verdict.nodes) > 1 or finding.level == "place"):
            verdict.shared.append(finding.text if finding.level == "place" else f"on every node: {finding.text}")
        else:
            for report, finding in same:
                verdict.blame(report.node, finding.text)


def _judge_sameness(reports: list[Report], verdict: Verdict) -> None:
    for name in dict.fromkeys(name for report in reports for name in report.same):
        values = {report.node: report.same[name] for report in reports if name in report.same}
        # Of two that are as frequent, the first: that of rank 0's node, from which the job was started.
        [(usual, count)] = Counter(values.values()).most_common(1)
        for node, value in values.items():
            if value != usual:
                verdict.blame(node, f"{name} is {value}, but {usual} on {count} of {len(values)} nodes")


def _judge_matmul(reports: list[Report], verdict: Verdict) -> None:
    speeds = {report.rank: report.matmul_gflops for report in reports if report.matmul_gflops is not None}
    if not speeds:
        return
    usual = median(speeds.values())
    for report in reports:
        if (speed := speeds.get(report.rank, usual)) * SLOW >= usual:
            continue
        text = f"rank {report.rank} multiplies at {speed:,.0f} GFLOP/s, the median is {usual:,.0f}"
        if speed * BAD_SLOW < usual:
            verdict.blame(report.node, text)
        else:
            verdict.warnings.append(f"{report.node}: {text}")
    slowest = min(speeds, key=speeds.__getitem__)
    node = next(report.node for report in reports if report.rank == slowest)
    verdict.measured["matrix product"] = (
        f"median {usual:,.0f} GFLOP/s a rank, slowest {speeds[slowest]:,.0f} (rank {slowest} on {node})"
    )


def _judge_writing(reports: list[Report], verdict: Verdict) -> None:
    speeds = {report.node: report.write_mib_s for report in reports if report.write_mib_s is not None}
    if not speeds:
        return
    usual = median(speeds.values())
    slowest = min(speeds, key=speeds.__getitem__)
    verdict.measured["write and fsync"] = (
        f"median {usual:,.0f} MiB/s a node, slowest {speeds[slowest]:,.0f} ({slowest})"
    )
    for node, speed in speeds.items():
        if speed * SLOW_DISK < usual:
            verdict.warnings.append(
                f"{node}: writes {speed:,.1f} MiB/s into the run folder, the median is {usual:,.0f}"
            )


def _judge_links(reports: list[Report], verdict: Verdict) -> None:
    nodes = {report.rank: report.node for report in reports}
    links = [link for report in reports for link in report.links]
    for title, group in (
        ("links between nodes", [link for link in links if nodes[link.sender] != nodes[link.receiver]]),
        ("links within a node", [link for link in links if nodes[link.sender] == nodes[link.receiver]]),
    ):
        if not group:
            continue
        usual = median(link.gib_s for link in group)
        slowest = min(group, key=lambda link: link.gib_s)
        name = (
            f"rank {slowest.sender} on {nodes[slowest.sender]} to rank {slowest.receiver} on {nodes[slowest.receiver]}"
        )
        verdict.measured[title] = f"median {usual:.2f} GiB/s, slowest {slowest.gib_s:.2f} ({name})"
        if slowest.gib_s * SLOW_LINK < usual:
            verdict.warnings.append(f"slow link, {name}: {slowest.gib_s:.3f} GiB/s, the median is {usual:.2f}")
    if speeds := [report.all_reduce_gib_s for report in reports if report.all_reduce_gib_s is not None]:
        verdict.measured["all-reduce"] = f"{min(speeds):.2f} GiB/s"


def _judge_clocks(reports: list[Report], verdict: Verdict) -> None:
    bounds = {report.node: report.clock for report in reports if report.clock is not None}
    if not bounds:
        return
    usual = median((low + high) / 2 for low, high in bounds.values())
    widest = 0.0
    for node, (low, high) in bounds.items():
        # What is certain: the end of the interval that is nearer to the others.
        off = max(low - usual, usual - high, 0.0)
        widest = max(widest, off)
        text = f"its clock is {off:.1f} s {'ahead of' if low > usual else 'behind'} the other nodes'"
        if off > BAD_SKEW_SECONDS:
            verdict.blame(node, text)
        elif off > SKEW_SECONDS:
            verdict.warnings.append(f"{node}: {text}")
    uncertain = max(high - low for low, high in bounds.values()) / 2
    verdict.measured["clocks"] = f"within {1e3 * (widest + uncertain):.1f} ms"
