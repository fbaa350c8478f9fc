"""What is decided when a job's ranks have ended, over all that can happen. On a real Slurm: tests/slurm."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.slurm import policy
from launch.slurm.policy import Action, Outcome, decide, diagnose
from pretrain.run.job_records import Failure, JobFolder, RankFailure
from pretrain.run.journal import Journal
from pretrain.run.lease import Lease
from pretrain.run.run_listing import End

REQUEUES = (Action.REQUEUE, Action.REQUEUE_AVOIDING)
CODES = st.sampled_from([0, 1, 2, 7, 134, 137, 138, 139, 143, 233]) | st.integers(1, 255)
NODES = st.sampled_from([(), ("n2",), ("n2", "n3")])


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    failure = Failure(
        "7",
        draw(st.integers(0, 5)),
        rc := draw(CODES),
        draw(st.sampled_from(["lost 1.2.3.4", "lost 5.6.7.8", "a bug"])),
        mistake=draw(st.booleans()),
        step=draw(st.none() | st.integers(1, 9)),
        rank=draw(st.none() | st.integers(0, 3)),
        host="n1",
        samples=draw(st.sampled_from([[], [8, 15]])),
        checkpoint=draw(st.none() | st.integers(1, 9)),
    )
    return Outcome(
        rc,
        draw(st.sampled_from(["none", "USR1", "TERM"])),
        wants_requeue=draw(st.booleans()),
        trained=draw(st.booleans()),
        kill_switch=draw(st.booleans()),
        failure=failure,
        dead_nodes=draw(NODES),
        newly_excluded=draw(NODES),
    )


@given(outcomes(), st.lists(outcomes(), max_size=5), st.integers(0, 4))
def test_what_must_never_happen(outcome: Outcome, earlier: list[Outcome], max_crashes: int) -> None:
    decision = decide(outcome, [o.failure for o in earlier if o.failure], max_crashes)
    again = decision.action in REQUEUES
    assert decision.reason
    assert not (again and outcome.signal == "TERM"), "would revive a cancelled job"
    assert not (again and outcome.kill_switch)
    assert not (again and outcome.rc == 0 and not outcome.wants_requeue), "it is done"
    mistake = outcome.rc != 0 and outcome.failure and outcome.failure.mistake
    assert not (again and mistake and not outcome.newly_excluded), "another try cannot mend it"
    assert outcome.rc == 0 or decision.action != Action.DONE, "a failure is told"
    if again and not (outcome.rc == 0 and outcome.trained):
        bad_nodes = bool(outcome.dead_nodes or outcome.newly_excluded)
        assert (decision.action == Action.REQUEUE_AVOIDING) == bad_nodes
    assert set(decision.nodes_to_exclude) <= set(outcome.dead_nodes)


@given(st.lists(outcomes(), max_size=60), st.integers(0, 4))
def test_requeues_without_progress_are_bounded(story: list[Outcome], max_crashes: int) -> None:
    """Whatever befalls a job start after start: what it is requeued for is progress, or one of a few times."""
    earlier: list[Failure] = []
    newest = fruitless = 0
    for restart, outcome in enumerate(story):
        assert outcome.failure
        if outcome.wants_requeue and outcome.trained and outcome.rc == 0:
            newest += 1  # that is what `trained` says
        newest = max(newest, outcome.failure.checkpoint or 0)
        failure = replace(outcome.failure, restart=restart, checkpoint=newest)
        before = max((f.checkpoint or 0 for f in earlier), default=-1)
        decision = decide(replace(outcome, failure=failure), earlier, max_crashes)
        if decision.action not in REQUEUES:
            return
        if outcome.rc or not outcome.trained:
            fruitless = 0 if newest > before else fruitless + 1
            earlier.append(failure)
            assert fruitless < max(max_crashes, 1)
            assert sum((f.checkpoint or 0) == newest for f in earlier) <= max_crashes


ENDS = st.builds(
    End, st.just(False), st.sampled_from(["signal 10", "signal 2", "kill switch"]), st.sampled_from([0, 130])
)


@given(outcomes(), st.lists(outcomes(), max_size=5), st.integers(0, 4), ENDS)
def test_a_recorded_end_counts_more_than_what_srun_returned(
    outcome: Outcome, earlier: list[Outcome], max_crashes: int, end: End
) -> None:
    failures = [o.failure for o in earlier if o.failure]
    finished = decide(replace(outcome, end=End(True, "all steps done", 0)), failures, max_crashes)
    assert finished.action == Action.DONE
    assert finished.nodes_to_exclude == ()
    decision = decide(replace(outcome, end=end), failures, max_crashes)
    if outcome.signal == "TERM":
        assert decision.action not in REQUEUES, "would revive a cancelled job"
    elif outcome.kill_switch:
        assert decision.action == (Action.DONE if end.code == 0 or outcome.rc == 0 else Action.STOP)
    elif outcome.wants_requeue and outcome.trained:
        assert decision.action == Action.REQUEUE
    elif not outcome.wants_requeue:
        assert decision.action == (Action.STOP if end.code and outcome.rc else Action.DONE)


def test_the_end_of_this_start_is_looked_for_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    command = [str(tmp_path), "--rc", "137"]
    for restart, (reason, code, action) in enumerate(
        [("signal 10", 0, Action.REQUEUE), ("all steps done", 0, Action.DONE), ("", 1, Action.REQUEUE)]
    ):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert policy.main(command) == Action.REQUEUE, "the end is not of this start"
        with Lease.acquire(tmp_path) as lease:
            journal = Journal(tmp_path / "metrics.jsonl", lease.attempt)
            journal.event("start", resumed_from=None)
            if reason == "signal 10":
                JobFolder(tmp_path).request_requeue(4, trained=4)
            if reason:
                status = "FINISHED" if reason == "all steps done" else "KILLED"
                journal.event("end", status=status, reason=reason, code=code)
            journal.close()
        assert policy.main([*command, "--max-crashes", "9"]) == action
    (tmp_path / "attempts" / "000003.json").write_text("{")
    assert policy.main([*command, "--max-crashes", "9"]) == Action.REQUEUE, "what is torn tells of no end"


@pytest.mark.parametrize(("rc", "action"), [("2", Action.STOP), ("0", Action.DONE)])
def test_a_run_folder_that_was_renamed_is_not_made_anew(tmp_path: Path, rc: str, action: Action) -> None:
    assert policy.main([str(tmp_path / "run"), "--rc", rc]) == action
    assert not list(tmp_path.iterdir())


@given(st.integers(1, 6))
def test_so_many_crashes_and_a_new_checkpoint_counts_anew(max_crashes: int) -> None:
    earlier: list[Failure] = []
    for checkpoint in (None, 10, 20):
        for _ in range(max_crashes):
            failure = Failure("7", len(earlier), 1, "x", checkpoint=checkpoint)
            assert decide(Outcome(1, failure=failure), earlier, max_crashes).action == Action.REQUEUE
            earlier.append(failure)
    failure = Failure("7", 99, 1, "x", checkpoint=20)
    decision = decide(Outcome(1, failure=failure), earlier, max_crashes)
    assert decision.action == Action.STOP
    assert f"{max_crashes + 1} failures since the checkpoint of step 20" in decision.reason


def test_the_same_failure_at_the_same_step_stops_with_a_diagnosis() -> None:
    first = Failure("7", 0, 1, "ValueError: at 0x7f01 after 3.2 s", step=12, rank=1, host="n2", samples=[96, 103])
    again = replace(first, restart=1, what="ValueError: at 0x7faa after 7.9 s", checkpoint=11)
    decision = decide(Outcome(1, failure=again), [first], 3)
    assert decision.action == Action.STOP
    for word in ("twice at step 12", "restart 0", "ValueError", "rank 1 on n2", "samples 96 to 103"):
        assert word in decision.reason
    for other in (replace(again, step=13), replace(again, what="TypeError"), replace(again, step=None)):
        assert decide(Outcome(1, failure=other), [first], 3).action == Action.REQUEUE


def test_a_killed_rank_is_the_cause_and_not_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    peer = RankFailure("7", 0, 0, "n1", "RuntimeError: connection closed by peer", step=5, samples=[32, 39], time=1)
    words = "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1\n"
    found = diagnose(Outcome(137), [peer], words, checkpoint=4, reached=4)
    assert (found.rank, found.host, found.what, found.step, found.samples) == (1, "n2", "Killed", 5, [32, 39])
    bug = replace(peer, rank=1, what="ValueError: x", host="n2", time=0)
    for said in ("", words, "srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n1: task 0: Killed\n"):
        found = diagnose(Outcome(143), [bug, peer], said, 4, 4)
        assert (found.rank, found.what, found.step) == (1, "ValueError: x", 5)
    assert diagnose(Outcome(137), [], "srun: error: n2: tasks 0-1: Killed\n", 4, 8).step == 9
    late = "srun: error: n1: task 0: Terminated\nsrun: error: n2: task 1: Segmentation fault (core dumped)\n"
    assert diagnose(Outcome(139), [peer], late, 4, 4).what == "Segmentation fault (core dumped)"
    assert "no rank said why" in diagnose(Outcome(7), [], "", None, None).what
    mistake = replace(peer, what="disk full", mistake=True, time=2)
    assert diagnose(Outcome(2), [bug, mistake], "", 4, 4).what == "disk full"


def test_from_the_files_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    log, folder = tmp_path / "log", JobFolder(tmp_path)
    dead = "srun: error: Task launch for StepId=7.0 failed on node n2: Communication connection failure\n"
    log.write_text(f"job 7 restart 0: start on n1 n2\n{dead}")
    command = [str(tmp_path), "--log", str(log), "--rc"]
    assert policy.main([*command, "233"]) == Action.REQUEUE_AVOIDING
    assert [line["node"] for line in folder.excluded()] == ["n2"]
    assert "n2 did not start its tasks; failure 1 of at most 3" in capsys.readouterr().out

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with open(log, "a") as file:  # what the start before said is no news
        file.write("job 7 restart 1: start on n1 n3\nsrun: error: n3: task 1: Segmentation fault\n")
    assert policy.main([*command, "139"]) == Action.REQUEUE
    assert [(f.restart, f.what, f.host) for f in folder.failures()] == [
        (0, "the launch failed", "n2"),
        (1, "Segmentation fault", "n3"),
    ]
    folder.request_requeue(4, trained=0)
    assert policy.main([*command, "0", "--signal", "USR1"]) == Action.REQUEUE
    assert policy.main([*command, "0", "--signal", "USR1"]) == Action.STOP
    folder.request_requeue(4, trained=4)
    assert policy.main([*command, "0", "--signal", "USR1"]) == Action.REQUEUE
    assert policy.main([*command, "143", "--signal", "TERM"]) == Action.STOP
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert policy.main([*command, "1"]) == Action.REQUEUE, "another job counts anew"
    folder.kill_switch.touch()
    assert policy.main([*command, "1"]) == Action.STOP
    assert policy.main([*command, "0"]) == Action.DONE
    assert [d["action"] for d in folder.decisions()] == [
        "REQUEUE_AVOIDING", "REQUEUE", "REQUEUE", "STOP", "REQUEUE", "STOP", "REQUEUE", "STOP", "DONE",
    ]  # fmt: skip
    assert json.loads((tmp_path / "slurm" / "decisions.jsonl").read_text().splitlines()[0])["reason"]


@pytest.mark.parametrize(("rc", "action"), [("0", Action.DONE), ("1", Action.STOP)])
def test_on_a_full_disk_a_run_that_is_over_is_over_and_a_failure_is_not_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rc: str, action: Action
) -> None:
    """It could not be counted."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("failures.jsonl", "decisions.jsonl"):
        (tmp_path / "slurm" / name).mkdir(parents=True)
    assert policy.main([str(tmp_path), "--rc", rc]) == action
    said, _ = capsys.readouterr()
    assert f"policy: this is not written down: {tmp_path}/slurm/" in said
    assert f"policy: {action.name.lower()}: " in said
