"""The ranks of a preflight together: who came, who hangs and where, and what they found.

Ranks meet at a store that rank 0 keeps, not in collectives: a rank that is missing or stuck is then named, and nothing
waits for it without an end. In each rank a thread does the checks; the main thread only listens, and so can answer for
a check that hangs in a driver. Rank 0's main thread leads from check to check and has the verdict.
"""

import json
import os
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from data_pipeline.errors import ConfigError, RunError
from pretrain.config.schema import Config
from pretrain.preflight import node
from pretrain.preflight.exchange import Exchange, Place
from pretrain.preflight.verdict import Finding, Level, Report, Verdict, brief, judge

POLL_SECONDS = 0.005
STAGES = {"node": "the checks of its node", "compute": "the matrix product", "network": "the exchange with the others"}


@dataclass(frozen=True)
class Limits:
    """Seconds that ranks get; beyond, those that are not done are named."""

    arrival: float = 120.0
    """From rank 0's start to the last rank's: importing torch on a thousand nodes from one file server takes long."""
    stage: float = 60.0
    answer: float = 5.0
    """To say where one is."""

    @property
    def total(self) -> float:
        """Beyond it, rank 0 itself is gone."""
        return self.arrival + 3 * self.stage + 2 * self.answer


class NoLeader(RunError):
    """Rank 0 cannot be reached, or is gone."""


class Meeting:
    """What the ranks tell each other: JSON by topic, in a store that rank 0 keeps. Not for two threads at once."""

    def __init__(self, store: dist.TCPStore, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def post(self, topic: str, content: Any) -> None:
        """This rank's word, for rank 0."""
        self._store.set(f"{topic}/{self._rank}", json.dumps(content))
        self._store.add(f"{topic}/count", 1)

    def collect(self, topic: str, seconds: float) -> dict[int, Any]:
        """Every rank's word, by rank; without those that did not post in time."""
        end = time.monotonic() + seconds
        while not (all_came := self._store.add(f"{topic}/count", 0) == self._world_size) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        came = [rank for rank in range(self._world_size) if all_came or self._store.check([f"{topic}/{rank}"])]
        contents = self._store.multi_get([f"{topic}/{rank}" for rank in came])
        return {rank: json.loads(content) for rank, content in zip(came, contents, strict=True)}

    def tell(self, topic: str, content: Any) -> None:
        """Rank 0's word, for all."""
        self._store.set(topic, json.dumps(content))

    def hear(self, topic: str, seconds: float) -> Any:
        """Rank 0's word.

        Raises:
            NoLeader: it did not come in time, or rank 0 is gone.
        """
        try:
            self._store.wait([topic], timedelta(seconds=seconds))
            return json.loads(self._store.get(topic))
        except dist.DistError as error:
            raise NoLeader(f"no answer from rank 0 ({topic}): {brief(error)}") from None


def open_store(place: Place, limits: Limits) -> dist.TCPStore:
    """The store at MASTER_ADDR and MASTER_PORT; rank 0 keeps it.

    Raises:
        ConfigError: the variables are missing.
        NoLeader: rank 0 cannot be reached.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if place.world_size == 1:
        host, port = "127.0.0.1", "0"
    if not host or not port:
        raise ConfigError(
            f"{place.world_size} ranks, but MASTER_ADDR and MASTER_PORT do not say where they meet; "
            "export the first node's address and a free port"
        )
    try:
        return dist.TCPStore(
            host, int(port), is_master=place.rank == 0, wait_for_workers=False,
            timeout=timedelta(seconds=limits.arrival),
        )  # fmt: skip
    except (dist.DistError, RuntimeError) as error:
        raise NoLeader(f"{place.node}: rank 0 cannot be reached at {host}:{port}: {brief(error)}") from None


def preflight(
    config: Config, place: Place, store: dist.TCPStore, planned: Sequence[str] = (), limits: Limits = Limits()
) -> Verdict | None:
    """All checks; the verdict on rank 0, None on the others.

    Args:
        planned: the node of each rank where it is known beforehand: names that of a rank which never came.

    Raises:
        NoLeader: rank 0 is gone.
    """
    checks = _Checks(config, place, store, limits)
    meeting = Meeting(store, place.rank, place.world_size)
    meeting.post("arrived", {"node": place.node})
    threading.Thread(target=checks.run, name="preflight-checks", daemon=True).start()
    if place.rank == 0:
        return _Leader(meeting, checks, place.world_size, planned, limits).lead()
    if meeting.hear("end", limits.total) == "roll call":
        meeting.post("answer", asdict(checks.at))
    meeting.hear("verdict", limits.total)
    meeting.post("left", None)
    return None


@dataclass(frozen=True)
class Step:
    """What a rank is at."""

    number: int
    """Counted from its start."""
    name: str
    peer: int | None = None
    """The rank that it needs for this step, if it needs only one."""


class _Checks:
    """A rank's checks, in a thread of their own."""

    def __init__(self, config: Config, place: Place, store: dist.TCPStore, limits: Limits) -> None:
        self.at = Step(0, "the start")
        """What is being checked now."""
        self._config, self._place, self._limits = config, place, limits
        # A store is blocked while the main thread listens on it.
        self._store: dist.TCPStore = store.clone()  # type: ignore[attr-defined]
        self._report = Report(place.rank, place.node)

    def run(self) -> None:
        """Each stage when rank 0 says so."""
        meeting = Meeting(self._store, self._place.rank, self._place.world_size)
        stages = {"node": self._node, "compute": self._compute, "network": self._network}
        try:
            for name in STAGES:
                nodes = meeting.hear(f"go/{name}", self._limits.total)
                try:
                    stages[name](nodes)
                except Exception as error:  # the others' answers are wanted, too
                    traceback.print_exc()
                    # A peer that is gone breaks the exchange of many.
                    level: Level = "exchange" if name == "network" else "node"
                    self._report.findings.append(Finding(self.at.name, level, f"{self.at.name}: {brief(error)}"))
                meeting.post(name, asdict(self._report))
        except (NoLeader, dist.DistError):
            return  # the verdict fell before, and the main thread has heard it or will say that rank 0 is gone

    def _begin(self, name: str, peer: int | None = None) -> None:
        self.at = Step(self.at.number + 1, name, peer)

    def _node(self, nodes: list[str]) -> None:
        if self._place.local_rank == 0:
            place = self._place
            node.check_node(self._config, self._report, place.local_size, place.world_size, self._begin)

    def _compute(self, nodes: list[str]) -> None:
        self._begin("the matrix product")
        speeds = []
        for device in node.devices(self._place.local_rank, self._place.local_size):
            right, speed = node.multiply(device)
            speeds.append(speed)
            if not right:
                self._report.findings.append(Finding("matrix product", "node", f"wrong matrix product on {device}"))
        self._report.matmul_gflops = min(speeds)

    def _network(self, nodes: list[str]) -> None:
        if self._place.world_size > 1:
            # The leader's limits come first: it names who hangs.
            Exchange(self._report, self._place, self._begin).run(nodes, self._store, 2 * self._limits.total)


class _Leader:
    """Rank 0's main thread."""

    def __init__(
        self, meeting: Meeting, checks: _Checks, world_size: int, planned: Sequence[str], limits: Limits
    ) -> None:
        self._meeting, self._checks, self._world_size = meeting, checks, world_size
        self._planned, self._limits = planned, limits
        self._nodes: dict[int, str] = {}
        self._reports: dict[int, Report] = {}

    def lead(self) -> Verdict:
        """From check to check, up to a stage that not all ranks end; not into the network with a bad node."""
        since = time.monotonic()
        verdict = self._verdict()
        verdict.seconds = time.monotonic() - since
        self._meeting.tell("verdict", None)
        self._meeting.tell("end", "verdict")
        self._meeting.post("left", None)
        self._meeting.collect("left", self._limits.answer)  # the store ends with us
        return verdict

    def _verdict(self) -> Verdict:
        arrived = self._meeting.collect("arrived", self._limits.arrival)
        self._nodes = {rank: word["node"] for rank, word in arrived.items()}
        if missing := [rank for rank in range(self._world_size) if rank not in arrived]:
            return self._blame(dict.fromkeys(missing, f"did not come within {self._limits.arrival:g} s"))
        nodes = [self._nodes[rank] for rank in range(self._world_size)]
        for stage in STAGES:
            self._meeting.tell(f"go/{stage}", nodes)
            found = self._meeting.collect(stage, self._limits.stage)
            self._reports |= {rank: Report.of(content) for rank, content in found.items()}
            if len(found) < self._world_size:
                return self._call_roll(stage, set(found))
            verdict = judge((self._reports[rank] for rank in range(self._world_size)), self._world_size)
            if stage == "compute" and not verdict.good:
                break
        return verdict

    def _call_roll(self, stage: str, done: set[int]) -> Verdict:
        """Some ranks did not end a stage: ask all where they are."""
        self._meeting.tell("end", "roll call")
        self._meeting.post("answer", asdict(self._checks.at))
        answers = {rank: Step(**word) for rank, word in self._meeting.collect("answer", self._limits.answer).items()}
        if silent := [rank for rank in range(self._world_size) if rank not in answers]:
            return self._blame(dict.fromkeys(silent, f"does not answer any more, since {STAGES[stage]}"))
        late = {rank: step for rank, step in answers.items() if rank not in done}
        if stage == "network":
            return self._find_the_first(late)
        return self._blame({rank: self._hangs(step) for rank, step in late.items()})

    def _find_the_first(self, late: dict[int, Step]) -> Verdict:
        """Ranks that wait for each other: only those that are least far can be the cause."""
        least = min(step.number for step in late.values())
        first = {rank: step for rank, step in late.items() if step.number == least}
        links = [(step.peer, rank) for rank, step in first.items() if step.peer is not None]
        if not links and 2 * len(first) <= self._world_size:
            return self._blame({rank: self._hangs(step) for rank, step in first.items()})
        verdict = self._blame({})
        for sender, rank in links:
            verdict.exchange.append(
                f"rank {rank} on {self._nodes[rank]} waits for what rank {sender} on {self._nodes[sender]} sends"
            )
        if not links:
            verdict.exchange.append(f"all ranks are in {next(iter(first.values())).name}, and it does not end")
        return verdict

    def _hangs(self, step: Step) -> str:
        return f"hangs in {step.name}, for {self._limits.stage:g} s"

    def _blame(self, reasons: dict[int, str]) -> Verdict:
        """Beside what the reports that came already tell."""
        verdict = judge((self._reports[rank] for rank in sorted(self._reports)), self._world_size)
        nodes = {rank: self._node_of(rank) for rank in range(self._world_size)}
        verdict.nodes = list(dict.fromkeys(nodes.values()))
        for rank, reason in reasons.items():
            verdict.blame(nodes[rank], f"rank {rank} {reason}")
        return verdict

    def _node_of(self, rank: int) -> str:
        if rank in self._nodes:
            return self._nodes[rank]
        return self._planned[rank] if rank < len(self._planned) else f"the node of rank {rank}"
