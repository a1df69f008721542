"""Who waits for whom: the sentence is right, in threads and in real processes, and never said of a run that goes on."""

import mmap
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from course_utils import _status_file
from course_utils.processes import Run, StageError, start
from course_utils.schedules import Message
from course_utils.threads import Deadlock, run_in_threads
from course_utils.transports import Operation, TransferError, WaitTimeout, Worker
from course_utils.waits import KINDS, RankState, Snapshot, Verdict, Wait, names
from tests import hang_oracle
from tests.hang_oracle import expected, play, play_all, random_lists

for module in (sys.modules[__name__], hang_oracle):  # the workers need not import this file, and pytest with it
    cloudpickle.register_pickle_by_value(module)

IT_HUNG = 30.0  # seconds; nothing here takes nearly as long
not_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


# --- The sentence, from what is known -------------------------------------------------------------------------------


def waiting(rank: int, peer: int, what: str = "a letter", state: str = "waiting", **more: Any) -> RankState:
    wait = Wait(rank, peer, what, **more)
    return RankState(rank, state, seconds=wait.seconds, wait=wait)


def computing(rank: int, text: str = "", seconds: float = 0.0) -> RankState:
    return RankState(rank, "computing", text, seconds)


def ended(rank: int) -> RankState:
    return RankState(rank, "ended")


ACTIVATIONS, GRADIENTS = "the activations of micro-batch 3", "the gradients of micro-batch 0"

# What is known; kind, ranks and culprit of the verdict; the sentence.
VERDICTS: dict[str, tuple[list[RankState], str, tuple[int, ...], int | None, str]] = {
    "two in a circle": (
        [waiting(0, 1, GRADIENTS, seconds=4.1), waiting(1, 0, ACTIVATIONS, seconds=2.0)],
        *("deadlock", (0, 1), None),
        "stage 0 waits for the gradients of micro-batch 0 from stage 1 (for 4.1 s); stage 1 waits for the activations "
        "of micro-batch 3 from stage 0: both wait, this is a deadlock",
    ),
    "three in a circle, and one who waits for it": (
        [waiting(0, 3, seconds=9.0), waiting(1, 2), waiting(2, 3, sends=True), waiting(3, 1)],
        *("deadlock", (1, 2, 3), None),
        "stage 1 waits for a letter from stage 2; stage 2 waits for stage 3 to take a letter; stage 3 waits for a "
        "letter from stage 1: all of them wait, this is a deadlock",
    ),
    "a circle of which one has given up and one has lost its peer": (
        [waiting(0, 1, state="gave up", seconds=2.0), waiting(1, 0, state="lost", seconds=2.0)],
        *("deadlock", (0, 1), None),
        "stage 0 waits for a letter from stage 1 (for 2.0 s); stage 1 waits for a letter from stage 0: both wait, this "
        "is a deadlock",
    ),
    "one alone": ([waiting(0, 0)], "deadlock", (0,), None, "stage 0 waits for a letter from stage 0: it waits for "
                  "itself, this is a deadlock"),
    "a circle with a message under way": (
        [waiting(0, 1, GRADIENTS, seconds=4.1, under_way=0.0), waiting(1, 0, ACTIVATIONS, seconds=2.0)],
        *("message under way", (1, 0), None),
        "a message is under way: the gradients of micro-batch 0 from stage 1 to stage 0",
    ),
    "a message that does not arrive": (
        [ended(0), waiting(1, 0, ACTIVATIONS, seconds=2.0, under_way=1.9)],
        *("message under way", (0, 1), None),
        "a message is under way: the activations of micro-batch 3 from stage 0 to stage 1, for 1.9 s now: it is large "
        "and the line slow, or what `isend` returned on stage 0 was not kept until it was waited for",
    ),
    "a send to one that has begun to receive": (
        [waiting(0, 1, ACTIVATIONS, sends=True, under_way=0.0), computing(1)],
        *("message under way", (0, 1), None),
        "a message is under way: the activations of micro-batch 3 from stage 0 to stage 1",
    ),
    "a slow one": (
        [waiting(0, 1, seconds=5.0), waiting(1, 2, seconds=6.0), computing(2, "B of micro-batch 5", 7.0)],
        *("slow", (2,), 2),
        "stage 2 is slow: everyone waits for it, it has been in B of micro-batch 5 for 7.0 s",
    ),
    "a slow one for whom one waits": (
        [waiting(0, 1, seconds=5.0), computing(1, seconds=7.0), computing(2)],
        *("slow", (1,), 1),
        "stage 1 is slow: stage 0 waits for it, it has been computing for 7.0 s",
    ),
    "two slow ones: the one for whom others have waited longest": (
        [waiting(0, 1, seconds=5.0), computing(1, seconds=7.0), waiting(2, 3, seconds=6.0), computing(3, seconds=6.0)],
        *("slow", (3,), 3),
        "stage 3 is slow: stage 2 waits for it, it has been computing for 6.0 s",
    ),
    "everyone but those that have ended": (
        [ended(0), waiting(1, 3, seconds=2.0), waiting(2, 3), computing(3, "F of micro-batch 1", 3.0)],
        *("slow", (3,), 3),
        "stage 3 is slow: everyone waits for it, it has been in F of micro-batch 1 for 3.0 s",
    ),
    "whoever waits for a message under way does not wait for its sender": (
        [waiting(0, 1, seconds=3.0), waiting(1, 2, under_way=0.1), computing(2, "", 3.0), waiting(3, 2, seconds=2.0)],
        *("slow", (2,), 2),
        "stage 2 is slow: stage 3 waits for it, it has been computing for 3.0 s",
    ),
    "not slow yet": (
        [waiting(0, 1, seconds=0.9), computing(1, "F of micro-batch 1", 9.0)],
        *("running", (0, 1), None),
        "stage 1 computes, stage 0 waits",
    ),
    "one that has ended": (
        [waiting(0, 2, seconds=1.5), waiting(1, 0, sends=True, seconds=2.0), ended(2)],
        *("abandoned", (2,), 2),
        "stage 1 waits for stage 0 to take a letter (for 2.0 s); stage 0 waits for a letter from stage 2, but stage 2 "
        "has ended: it will never send",
    ),
    "one that has ended and does not receive": (
        [ended(0), waiting(1, 0, sends=True)],
        *("abandoned", (0,), 0),
        "stage 1 waits for stage 0 to take a letter, but stage 0 has ended: it will never receive",
    ),
    "a killed one": (
        [
            waiting(0, 1, state="lost"),
            RankState(1, "died", "B of micro-batch 5", 7.0, how="killed by signal 9"),
            waiting(2, 1, state="lost"),
        ],
        *("crashed", (1,), 1),
        "stage 1's process ended (killed by signal 9) while it was in B of micro-batch 5; stages 0 and 2 failed "
        "because of that",
    ),
    "one killed in a wait, before the others know": (
        [waiting(0, 1), RankState(1, "died", wait=Wait(1, 2, "a letter", seconds=0.4), how="exit 3"), computing(2)],
        *("crashed", (1,), 1),
        "stage 1's process ended (exit 3) while it waited 0.4 s for a letter from stage 2; stage 0 waits for it",
    ),
    "an exception": (
        [waiting(0, 1, state="lost"), RankState(1, "failed", how="ValueError: no"), waiting(2, 0), ended(3)],
        *("failed", (1,), 1),
        "stage 1 failed: ValueError: no; stage 0 failed because of that; stage 2 waits for it",
    ),
    "a process that died comes before an exception": (
        [RankState(0, "failed", how="OSError"), RankState(1, "died", how="exit code 1")],
        *("crashed", (1,), 1),
        "stage 1's process ended (exit code 1) while it computed; stage 0 failed because of that",
    ),
    "a stopped process": (
        [waiting(0, 1), RankState(1, "frozen", "B of micro-batch 5"), waiting(2, 1)],
        *("stands still", (1,), 1),
        "stage 1 stands still: its process is stopped (SIGSTOP), everyone waits for it, it was in B of micro-batch 5",
    ),
    "a stopped process for which nobody waits": (
        [RankState(0, "frozen", wait=Wait(0, 1, "a letter")), computing(1)],
        *("stands still", (0,), 0),
        "stage 0 stands still: its process is stopped (SIGSTOP), it waited for a letter from stage 1",
    ),
    "a lost connection": (
        [waiting(0, 1, state="lost", seconds=0.3), computing(1, "F of micro-batch 0", 0.3), waiting(2, 0)],
        *("lost", (1,), 1),
        "stage 0 lost its connection to stage 1 while it waited 0.3 s for a letter from stage 1",
    ),
    "a run that goes on": (
        [computing(0), ended(1), RankState(2, "starting"), computing(3), waiting(4, 0)],
        *("starting", (0, 1, 2, 3, 4), None),
        "stage 2 is starting, stages 0 and 3 compute, stage 4 waits, stage 1 has ended",
    ),
    "the end": ([ended(0), ended(1), ended(2)], "finished", (0, 1, 2), None, "stages 0, 1 and 2 have ended"),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict(case: str) -> None:
    states, kind, ranks, culprit, sentence = VERDICTS[case]
    verdict = Snapshot(states).verdict
    assert str(verdict) == sentence
    assert (verdict.kind, verdict.ranks, verdict.culprit) == (kind, ranks, culprit) and kind in KINDS
    assert str(Snapshot(states, noun="rank").verdict) == sentence.replace("stage", "rank")


def test_what_a_queue_holds_up() -> None:
    """Rank 0's message is behind another one of its own; that one's other side is behind another in rank 1's queue."""
    own_head, head = Wait(0, 1, "letter 1"), Wait(1, 2, "letter 2", sends=True)
    wait = Wait(0, 2, "letter 3", seconds=1.0, ahead=own_head)
    own_head.ahead = head
    verdict = Snapshot([RankState(0, "waiting", wait=wait), computing(1), ended(2)]).verdict
    assert str(verdict) == (
        "stage 0 waits for letter 3 from stage 2 (for 1.0 s), behind another in its queue; stage 0 waits for letter 1 "
        "from stage 1, which is behind another in stage 1's queue; stage 1 waits for stage 2 to take letter 2, but "
        "stage 2 has ended: it will never receive"
    )


def test_a_snapshot_has_a_line_for_every_rank() -> None:
    states = [
        waiting(0, 1, ACTIVATIONS, seconds=2.0),
        computing(1, "B of micro-batch 5", 3.0),
        computing(2),
        RankState(3, "starting", seconds=1.0),
        waiting(4, 1, state="gave up", seconds=2.0),
        waiting(5, 1, state="lost"),
        ended(6),
        RankState(7, "failed", how="ValueError: no"),
        RankState(8, "died", how="exit code 1"),
        RankState(9, "frozen", "F of micro-batch 1"),
    ]
    snapshot = Snapshot(states, more="and more")
    assert repr(snapshot).splitlines() == [
        "stage 8's process ended (exit code 1) while it computed; stages 4, 5 and 7 failed because of that",
        "  stage 0 waits for the activations of micro-batch 3 from stage 1 (for 2.0 s)",
        "  stage 1 is in B of micro-batch 5 (for 3.0 s)",
        "  stage 2 computes",
        "  stage 3 is starting (for 1.0 s)",
        "  stage 4 gave up: it waited 2.0 s for a letter from stage 1",
        "  stage 5 lost its connection while it waited for a letter from stage 1",
        "  stage 6 has ended",
        "  stage 7 failed: ValueError: no",
        "  stage 8 died (exit code 1) while it computed",
        "  stage 9 stands still while it was in F of micro-batch 1",
        "and more",
    ]


def test_a_run_that_was_stopped_and_one_that_has_failed() -> None:
    stopped = Snapshot([waiting(0, 1, seconds=3.0), computing(1, seconds=3.0)], end="stopped").verdict
    assert (stopped.kind, stopped.culprit) == ("stopped", None)
    assert str(stopped).startswith("the run was stopped; at that moment: stage 1 is slow: stage 0 waits for it, it has")
    failed = Snapshot([waiting(0, 1), RankState(1, "failed", how="OSError"), computing(2), ended(3)], end="failed")
    assert str(failed.verdict) == "stage 1 failed: OSError; stages 0 and 2 failed because of that"


def test_names() -> None:
    assert [names("rank", ranks) for ranks in ([1], [0, 2], [3, 4, 5])] == [
        "rank 1",
        "ranks 0 and 2",
        "ranks 3, 4 and 5",
    ]


@st.composite
def snapshots(draw: st.DrawFn) -> list[RankState]:
    num_ranks = draw(st.integers(1, 6))
    states = []
    for rank in range(num_ranks):
        kind = draw(st.sampled_from(["waiting", "waiting", "waiting", "under way", "computing", "ended"]))
        if kind in ("waiting", "under way"):
            peer, sends = draw(st.integers(0, num_ranks - 1)), draw(st.booleans())
            states.append(waiting(rank, peer, sends=sends, seconds=2.0, under_way=0.0 if kind != "waiting" else None))
        else:
            states.append(RankState(rank, kind))
    return states


@given(snapshots())
def test_a_deadlock_is_a_circle_and_everything_else_has_an_end(states: list[RankState]) -> None:
    """Said of a rank if and only if going from wait to wait leads back to it; checked by counting steps."""
    verdict = Snapshot(states).verdict

    def after(rank: int, steps: int) -> int | None:
        for _ in range(steps):
            wait = states[rank].wait
            if wait is None or wait.under_way is not None:
                return None
            rank = wait.peer
        return rank

    circular = {rank for rank in range(len(states)) if any(after(rank, n) == rank for n in range(1, len(states) + 1))}
    assert (verdict.kind == "deadlock") == bool(circular)
    if circular:
        assert set(verdict.ranks) <= circular
        assert {states[rank].wait.peer for rank in verdict.ranks} == set(verdict.ranks)  # type: ignore[union-attr]
    else:
        ends = {after(rank, n) for rank in range(len(states)) for n in range(1, len(states) + 1)} - {None}
        assert (verdict.kind == "abandoned") == any(states[rank].state == "ended" for rank in ends)  # type: ignore[index]


# --- What each rank writes down -------------------------------------------------------------------------------------


def operation(kind: str, rank: int, peer: int, label: object = "a letter", control: bool = False) -> Operation:
    return Operation(kind, rank, peer, label, torch.zeros(1), control)


def test_the_status_file_tells_what_each_rank_does(tmp_path: Path) -> None:
    path = tmp_path / "status"
    _status_file.create(path, 3)
    record = _status_file.StatusRecord(path, 1, 3)
    receive = operation("recv", 1, 0, Message(0, 1, 3))
    record.issued(receive)
    record.waiting(receive)
    (first, second, third), noun = _status_file.read(path, 3)
    assert (first.state, second.state, third.state, noun) == ("starting", "waiting", "starting", "stage")
    assert second.wait is not None and second.blocked is second.wait
    assert (second.wait.peer, second.wait.sends, second.wait.what) == (0, False, "the activations of micro-batch 3")
    assert 0 <= second.wait.seconds < IT_HUNG and second.wait.under_way is None
    record.computing("é" * 1000)  # cut in the middle of a letter
    state = _status_file.read(path, 3)[0][1]
    assert state.state == "computing" and state.text.startswith("éééé") and len(state.text) < 256
    record.waiting(receive)
    record.computing()  # what it did before
    assert _status_file.read(path, 3)[0][1].text == state.text
    record.computing("")
    assert _status_file.read(path, 3)[0][1].text == ""
    record.ended()
    assert [other.state for other in _status_file.read(path, 3)[0]] == ["starting", "ended", "starting"]


@pytest.mark.parametrize("kind, partner", [("send", "recv"), ("recv", "send")])
@pytest.mark.parametrize("control", [False, True])
def test_a_wait_is_met_by_the_partner_of_the_same_number(
    tmp_path: Path, kind: str, partner: str, control: bool
) -> None:
    path = tmp_path / "status"
    _status_file.create(path, 3)
    records = [_status_file.StatusRecord(path, rank, 3) for rank in range(3)]
    mine = [operation(kind, 2, 1, control=control) for _ in range(3)]
    for one in mine:
        records[2].issued(one)

    def is_met(one: Operation) -> bool:
        records[2].waiting(one)
        wait = _status_file.read(path, 3)[0][2].wait
        assert wait is not None
        return wait.under_way is not None

    records[1].issued(operation(kind, 1, 2, control=control))  # the same direction of its own
    records[1].issued(operation(partner, 1, 2, control=not control))  # another group
    records[1].issued(operation(partner, 1, 0, control=control))  # another peer
    records[0].issued(operation(partner, 0, 2, control=control))  # another rank
    assert [is_met(one) for one in mine] == [False, False, False]
    records[1].issued(operation(partner, 1, 2, control=control))
    records[1].issued(operation(partner, 1, 2, control=control))
    assert [is_met(one) for one in mine] == [True, True, False]
    time.sleep(0.02)
    records[2].waiting(mine[0])
    wait = _status_file.read(path, 3)[0][2].wait
    assert wait is not None and wait.under_way is not None and wait.under_way >= 0.02 > wait.seconds


def test_a_wait_that_was_given_up_keeps_its_time(tmp_path: Path) -> None:
    path = tmp_path / "status"
    _status_file.create(path, 2)
    record = _status_file.StatusRecord(path, 0, 2)
    receive = operation("recv", 0, 1)
    record.issued(receive)
    record.waiting(receive)
    time.sleep(0.05)
    record.gave_up(receive)
    state = _status_file.read(path, 2)[0][0]
    assert state.state == "gave up" and state.wait is not None and state.wait.seconds >= 0.05
    other = operation("recv", 0, 1, "another")
    record.issued(other)
    record.gave_up(other)  # not waited for: its connection was lost before
    state = _status_file.read(path, 2)[0][0]
    assert state.wait is not None and state.wait.what == "another" and state.wait.seconds < 0.05


def test_messages_between_stages_of_other_numbers_are_told_of_ranks(tmp_path: Path) -> None:
    path = tmp_path / "status"
    _status_file.create(path, 2)
    record = _status_file.StatusRecord(path, 1, 2)
    record.issued(operation("recv", 1, 0, Message(0, 1, 3)))
    record.computing()
    assert _status_file.read(path, 2)[1] == "stage"
    record.issued(operation("send", 1, 0, Message(1, 2, 3)))  # stage 2 is on rank 0
    record.computing()
    assert _status_file.read(path, 2)[1] == "rank"


def test_a_record_is_read_again_if_its_writer_has_come_round(tmp_path: Path) -> None:
    """Between the two looks of the reader: two more changes, of which the second is under way in the place it reads."""
    path = tmp_path / "status"
    _status_file.create(path, 2)
    record = _status_file.StatusRecord(path, 1, 2)
    record.computing("F of micro-batch 1")

    class Overtaken(mmap.mmap):
        times = 0

        def __getitem__(self, place: Any) -> Any:
            data = super().__getitem__(place)
            self.times += 1
            if self.times == 1:
                record.computing("F of micro-batch 2")
                record.computing("F of micro-batch 3")
                return data[:40] + super().__getitem__(place)[40:]
            return data

    with path.open("rb") as file, Overtaken(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        size = len(mapped) // 2
        _, text, _ = _status_file.read_record(mapped, size, size)
    assert text == "F of micro-batch 3" and mapped.times == 2


def test_a_record_is_whole_at_every_moment(tmp_path: Path) -> None:
    """Read while a process of its own changes it as fast as it can: the numbers in it belong together."""
    path = tmp_path / "status"
    _status_file.create(path, 8)
    code = f"""if True:
        from pathlib import Path
        from tests.test_waits import operation
        from course_utils._status_file import StatusRecord
        record = StatusRecord(Path({str(path)!r}), 3, 8)
        operations = [operation("send" if n % 2 else "recv", 3, n % 8, n * f"{{n}} ") for n in range(60)]
        while True:
            for n, one in enumerate(operations):
                one.number = n
                record.waiting(one)
                record.computing(n * f"{{n}} ")
    """
    writer = subprocess.Popen([sys.executable, "-c", code])
    seen: Counter[str] = Counter()
    try:
        give_up = time.monotonic() + 4 * IT_HUNG  # it imports torch first
        while min(seen["waiting"], seen["computing"]) < 1500:
            assert time.monotonic() < give_up and writer.poll() is None
            state = _status_file.read(path, 8)[0][3]
            seen[state.state] += 1
            text = state.wait.what if state.wait else state.text
            numbers = set(map(int, text.split()))
            assert len(numbers) <= 1
            if numbers:
                number = numbers.pop()
                assert text == number * f"{number} "
                assert state.wait is None or (state.wait.peer, state.wait.sends) == (number % 8, bool(number % 2))
    finally:
        writer.kill()
        writer.wait()


def test_a_writer_that_dies_in_the_middle_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status"
    _status_file.create(path, 2)
    record = _status_file.StatusRecord(path, 1, 2)
    record.computing("F of micro-batch 7")

    class Dies:
        size = _status_file.HEAD.size

        @staticmethod
        def pack_into(buffer: Any, place: int, *values: Any) -> None:
            buffer[place : place + 20] = b"\xff" * 20
            raise KeyboardInterrupt

    real = _status_file.HEAD
    monkeypatch.setattr(_status_file, "HEAD", Dies)
    with pytest.raises(KeyboardInterrupt):
        record.computing("B of micro-batch 7")
    monkeypatch.setattr(_status_file, "HEAD", real)
    state = _status_file.read(path, 2)[0][1]
    assert (state.state, state.text) == ("computing", "F of micro-batch 7")


def test_writing_down_a_message_costs_microseconds(tmp_path: Path) -> None:
    """All that a message adds: counted, waited for, and computing again."""
    path = tmp_path / "status"
    _status_file.create(path, 4)
    record, one = _status_file.StatusRecord(path, 1, 4), operation("recv", 1, 0, Message(0, 1, 3))

    def message() -> None:
        record.issued(one)
        record.waiting(one)
        record.computing()

    assert min(timeit.repeat(message, number=200, repeat=20)) / 200 < 50e-6


# --- Threads, an oracle and real processes agree --------------------------------------------------------------------


def check(verdict: Verdict | None, lists: hang_oracle.Lists) -> str:
    """AssertionError if a verdict is not the oracle's. Returns its kind."""
    outcome = expected(lists)
    if verdict is None:
        assert outcome.is_fine, (lists, outcome)
        return "fine"
    if verdict.kind == "deadlock":
        assert frozenset(verdict.ranks) in outcome.circles, (lists, outcome, verdict)
    else:
        assert verdict.kind == "abandoned" and verdict.culprit in outcome.left_behind, (lists, outcome, verdict)
    return verdict.kind


def test_the_oracle_knows_what_everybody_knows() -> None:
    step = hang_oracle.Step
    receive_first = [[step("recv", 1), step("send", 1)], [step("recv", 0), step("send", 0)]]
    send_first = [[step("send", 1), step("recv", 1)], [step("send", 0), step("recv", 0)]]
    for lists in (receive_first, send_first):
        assert expected(lists).circles == {frozenset({0, 1})}
    assert expected([[step("isend", 1), step("recv", 1)], [step("isend", 0), step("recv", 0)]]).is_fine
    assert expected([[step("recv", 1)], []]).left_behind == {1}
    assert expected([[step("isend", 1)], []]).left_behind == {1}
    assert expected([[step("isend", 1), step("leave")], []]).is_fine
    assert expected([[step("recv", 1)], [step("send", 0, True)]]).circles  # one for the control group


def test_threads_agree_with_the_oracle_on_2000_random_lists() -> None:
    rng = random.Random(1)
    kinds: Counter[str] = Counter()
    for _ in range(2000):
        lists, verdict = random_lists(rng), None
        hang_oracle.KEPT.clear()
        try:
            run_in_threads(play, len(lists), lists, limit=IT_HUNG)
        except Deadlock as deadlock:
            verdict = deadlock.verdict
            assert str(verdict) == str(deadlock)
        kinds[check(verdict, lists)] += 1
    assert min(kinds[kind] for kind in ("fine", "deadlock", "abandoned")) > 200


def verdict_of(run: Run) -> Verdict | None:
    """None for a run that ends well; else what its status says as soon as it says that it hangs."""
    while True:
        verdict = run.status().verdict
        if verdict.kind in ("deadlock", "abandoned"):
            return verdict
        try:
            run.result(timeout=0.005)
            return None
        except TimeoutError:
            continue


@pytest.mark.slow
@pytest.mark.processes
def test_real_processes_agree_with_the_oracle_on_50_random_lists() -> None:
    """The status is looked at all the time: of no run that goes on does it say that it hangs."""
    rng = random.Random(2)
    drawn = [random_lists(rng) for _ in range(50)]
    in_one_run = [lists for lists in drawn if expected(lists).is_fine and expected(lists).is_complete]
    with start(play_all, max(map(len, in_one_run)), in_one_run, wait_limit=IT_HUNG, limit=IT_HUNG) as run:
        assert verdict_of(run) is None
    kinds = Counter(fine=len(in_one_run))
    for lists in drawn:
        if lists not in in_one_run:
            with start(play, len(lists), lists, wait_limit=IT_HUNG, limit=IT_HUNG) as run:
                kinds[check(verdict_of(run), lists)] += 1
    assert min(kinds[kind] for kind in ("fine", "deadlock", "abandoned")) > 5 and kinds.total() == 50


@pytest.mark.processes
def test_the_error_of_a_wait_that_ran_out_agrees_too() -> None:
    rng = random.Random(3)
    hanging = [lists for lists in (random_lists(rng) for _ in range(30)) if not expected(lists).is_fine][:4]
    runs = [start(play, len(lists), lists, wait_limit=2.0, limit=IT_HUNG) for lists in hanging]
    for run, lists in zip(runs, hanging, strict=True):
        with run, pytest.raises(StageError) as caught:
            run.result()
        assert caught.value.kind == "timeout" and str(caught.value).startswith(str(caught.value.verdict))
        assert caught.value.rank == (caught.value.verdict.culprit)
        check(caught.value.verdict, lists)


# --- Real processes: the status of a run, and the error in the end --------------------------------------------------


@contextmanager
def begun(fn: Callable, world_size: int, *args: Any, **options: Any) -> Iterator[Run]:
    """A run whose stages have all said that they have begun."""
    with start(fn, world_size, *args, **{"limit": IT_HUNG, **options}) as run:
        events = run.events()
        for _ in range(world_size):
            next(events)
        yield run


def until(run: Run, kind: str = "", waiting: tuple[int, ...] = ()) -> Snapshot:
    """The first status with a verdict of this kind, or any, in which these ranks wait."""
    give_up = time.monotonic() + IT_HUNG
    while True:
        snapshot = run.status()
        if kind in ("", snapshot.verdict.kind) and all(snapshot.states[rank].state == "waiting" for rank in waiting):
            return snapshot
        assert time.monotonic() < give_up, snapshot
        time.sleep(0.005)


def error_of(run: Run) -> StageError:
    with pytest.raises(StageError) as caught:
        run.result()
    return caught.value


def receive(worker: Worker, peer: int, label: object) -> None:
    worker.transport.wait(worker.transport.irecv(torch.zeros(1), peer, label))


def in_a_circle(worker: Worker) -> None:
    """Stages 0 and 1 wait for each other, stage 3 for stage 1; stage 2 computes."""
    worker.emit("begun")
    if worker.rank == 2:
        time.sleep(IT_HUNG)
    elif worker.rank == 3:
        receive(worker, 1, "a letter")
    else:
        receive(worker, 1 - worker.rank, Message(1 - worker.rank, worker.rank, 3 * worker.rank))


DEADLOCK = (
    r"stage 0 waits for the gradients of micro-batch 0 from stage 1( \(for \d+\.\d s\))?; stage 1 waits for the "
    r"activations of micro-batch 3 from stage 0: both wait, this is a deadlock"
)


@pytest.mark.processes
def test_a_deadlock_seen_from_another_thread_and_then_by_its_error() -> None:
    with begun(in_a_circle, 4, wait_limit=1.5) as run:
        seen: list[Snapshot] = []

        thread = threading.Thread(target=lambda: seen.append(until(run, "deadlock", waiting=(0, 1, 3))))
        thread.start()
        error = error_of(run)
        thread.join()
    (snapshot,) = seen
    first, *lines = str(snapshot).splitlines()
    assert re.fullmatch(DEADLOCK, first) and snapshot.verdict.ranks == (0, 1)
    assert [re.sub(r" \(for \d+\.\d s\)", "", line) for line in lines] == [
        "  stage 0 waits for the gradients of micro-batch 0 from stage 1",
        "  stage 1 waits for the activations of micro-batch 3 from stage 0",
        "  stage 2 computes",
        "  stage 3 waits for a letter from stage 1",
    ]
    assert snapshot.states[0].seconds < 1.5  # before the wait ran out
    assert (error.kind, error.rank) == ("timeout", None) and re.match(DEADLOCK + "\n\nstage [013] failed: ", str(error))
    assert cloudpickle.loads(cloudpickle.dumps(error)).verdict == error.verdict
    assert re.fullmatch(DEADLOCK, str(run.status().verdict))


def one_is_slow(worker: Worker) -> None:
    worker.emit("begun")
    if worker.rank == 2:
        worker.transport.computing("B of micro-batch 5")
        receive(worker, 1, "what it needs for that")
        time.sleep(IT_HUNG)
    if worker.rank == 1:
        worker.transport.wait(worker.transport.isend(torch.zeros(1), 2, "what it needs for that"))
    receive(worker, worker.rank + 1, "a letter")


@pytest.mark.processes
@pytest.mark.parametrize("options", [{"wait_limit": 1.5}, {"limit": 3.0}], ids=str)
def test_the_slow_stage_is_the_one_to_blame(options: dict[str, float]) -> None:
    sentence = r"stage 2 is slow: everyone waits for it, it has been in B of micro-batch 5 for \d\.\d s"
    with begun(one_is_slow, 3, **options) as run:
        assert re.fullmatch(sentence, str(until(run, "slow").verdict))
        error = error_of(run)
    assert (error.rank, error.kind) == (2, "timeout" if "wait_limit" in options else "limit")
    assert re.match(sentence + "\n\n", str(error))
    assert re.search(r"\nstage 2 is in B of micro-batch 5 \(for \d\.\d s\)$", str(error))


@pytest.mark.processes
@not_on_windows
def test_a_killed_stage() -> None:
    def one_dies(worker: Worker) -> None:
        worker.emit("begun")
        if worker.rank == 1:
            worker.transport.computing("B of micro-batch 5")
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        receive(worker, 1, "a letter")

    with begun(one_dies, 3) as run:
        error = error_of(run)
    sentence = (
        "stage 1's process ended (killed by signal 9) while it was in B of micro-batch 5; "
        "stages 0 and 2 failed because of that"
    )
    assert (error.rank, error.kind) == (1, "died")
    assert str(error).startswith(f"{sentence}\n\nstage 1 failed: its process was killed by SIGKILL; the system does so")
    assert error.verdict is not None and error.verdict.kind == "crashed"
    assert str(run.status()).splitlines()[0] == sentence


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_stage_that_stands_still() -> None:
    def one_is_stopped(worker: Worker) -> None:
        worker.emit("begun")
        if worker.rank == 1:
            worker.transport.computing("F of micro-batch 2")
            os.kill(os.getpid(), signal.SIGSTOP)
        receive(worker, 1, "a letter")

    with begun(one_is_stopped, 2, wait_limit=1.0) as run:
        snapshot = until(run, "stands still", waiting=(0,))
        stacks = run.stacks()
        error = error_of(run)
    assert stacks[1].startswith("no stack: it has not answered within 1 s") and "in receive" in stacks[0]
    assert error.rank == snapshot.verdict.culprit == 1
    assert str(error).startswith(
        "stage 1 stands still: its process is stopped (SIGSTOP), stage 0 waits for it, it was in F of micro-batch 2\n\n"
    )


@pytest.mark.processes
def test_a_message_that_was_not_kept() -> None:
    """What `isend` returns has to be kept until the message is through; torch forgets it otherwise."""

    def careless(worker: Worker) -> None:
        worker.emit("begun")
        if worker.rank == 0:
            worker.transport.isend(torch.zeros(1), 1, "a letter")
            time.sleep(IT_HUNG)
        time.sleep(0.3)
        receive(worker, 0, "a letter")

    with begun(careless, 2, wait_limit=1.0) as run:
        error = error_of(run)
    assert (error.kind, error.rank) == ("timeout", None)
    assert re.match(
        r"a message is under way: a letter from stage 0 to stage 1, for 1\.\d s now: it is large and the line slow, or "
        r"what `isend` returned on stage 0 was not kept until it was waited for\n\nstage 1 failed: WaitTimeout: ",
        str(error),
    )


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_lost_connection() -> None:
    def one_hangs_up(worker: Worker) -> None:
        worker.emit("begun")
        if worker.rank == 1:
            time.sleep(0.2)
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        connection.shutdown(socket.SHUT_RDWR)
            time.sleep(IT_HUNG)
        receive(worker, 1, "a letter")

    with begun(one_hangs_up, 2) as run:
        error = error_of(run)
    assert (error.kind, error.rank) == ("closed", 1)
    assert re.match(
        r"stage 0 lost its connection to stage 1 while it waited( \d\.\d s)? for a letter from stage 1\n\n"
        r"stage 0 failed: PeerLost: stage 0 lost stage 1 while it waited for a letter from stage 1\n",
        str(error),
    )
    assert "at that moment:\nstage 1 computes" in str(error)


@pytest.mark.processes
def test_with_several_stages_on_a_rank_one_speaks_of_ranks() -> None:
    def looped(worker: Worker) -> None:
        worker.emit("begun")
        receive(worker, 1 - worker.rank, Message(2, 1, 0) if worker.rank else Message(1, 2, 0))

    sentence = (
        r"rank 0 waits for the activations of micro-batch 0 from rank 1( \(for \d\.\d s\))?; "
        r"rank 1 waits for the gradients of micro-batch 0 from rank 0: both wait, this is a deadlock"
    )
    with begun(looped, 2, wait_limit=1.0) as run:
        assert re.fullmatch(sentence, str(until(run, "deadlock").verdict))
        error = error_of(run)
    assert re.match(sentence + r"\n\nrank \d failed: \w+: rank \d ", str(error)) and "stage" not in str(error)
    with pytest.raises(Deadlock) as caught:
        run_in_threads(looped, 2)
    assert re.fullmatch(sentence, str(caught.value))


@pytest.mark.processes
def test_a_stage_that_has_survived_its_time_out_computes() -> None:
    def patient(worker: Worker) -> None:
        if worker.rank == 0:
            try:
                receive(worker, 1, "what never comes")
            except WaitTimeout:
                worker.emit("begun")
        else:
            time.sleep(0.5)
            worker.emit("begun")
        time.sleep(IT_HUNG)

    with begun(patient, 2, wait_limit=0.2) as run:
        assert [state.state for state in run.status().states] == ["computing", "computing"]


@pytest.mark.processes
def test_a_time_out_that_was_none_of_the_transports() -> None:
    """Of such a wait nothing is known but who waited."""

    def directly(worker: Worker) -> None:
        if worker.rank == 0:
            torch.distributed.recv(torch.zeros(1), 1)
        time.sleep(IT_HUNG)

    with start(directly, 2, wait_limit=0.5, limit=IT_HUNG) as run:
        error = error_of(run)
    assert (error.rank, error.kind) == (0, "timeout")
    assert re.match(r"stage 0 failed: \w+: .*[Tt]imed out", str(error))
    assert "at that moment:\nstage 1 computes (for 0." in str(error)


def busy(worker: Worker) -> None:
    """Messages go round as fast as they can."""
    worker.emit("begun")
    transport, before, after = worker.transport, (worker.rank - 1) % 3, (worker.rank + 1) % 3
    for number in range(2500):
        transport.computing(f"round {number}")
        operations = [
            transport.irecv(torch.zeros(1), before, "a letter"),
            transport.isend(torch.zeros(1), after, "a letter"),
        ]
        for operation in operations if worker.rank else reversed(operations):
            transport.wait(operation)


@pytest.mark.processes
def test_a_run_that_goes_on_is_never_said_to_hang() -> None:
    with begun(busy, 3) as run:
        kinds = Counter(run.status().verdict.kind for _ in iter(run._watcher.done.is_set, True))
        run.result()
    assert sum(kinds.values()) > 100
    assert set(kinds) <= {"running", "message under way", "finished", "slow"}, kinds


@pytest.mark.processes
def test_the_status_before_the_start_and_after_the_end() -> None:
    run = start(lambda worker: worker.rank, 2, limit=IT_HUNG)
    assert run.status().verdict.kind in ("starting", "running", "finished")
    run.result()
    assert str(run.status(stacks=True)).splitlines()[:3] == [
        "stages 0 and 1 have ended",
        "  stage 0 has ended",
        "  stage 1 has ended",
    ]
    assert run.stacks() == {rank: "no stack: it is starting, or has ended" for rank in (0, 1)}
    with begun(one_is_slow, 3) as run:
        assert run.status().verdict.kind != "stopped"
    assert str(run.status().verdict).startswith("the run was stopped; at that moment: ")

    def one_fails(worker: Worker) -> None:
        worker.emit("begun")
        if worker.rank == 1:
            raise ValueError("no\nsecond line")
        receive(worker, 1, "a letter")

    with begun(one_fails, 2) as run:
        error = error_of(run)
    assert str(error).startswith("stage 1 failed: ValueError: no\nsecond line\n\nTraceback") and error.rank == 1
    assert str(run.status().verdict) == "stage 1 failed: ValueError: no; stage 0 failed because of that"
    assert error.verdict is not None and (error.verdict.kind, error.verdict.culprit) == ("failed", 1)

    def complain(line: str) -> None:
        raise LookupError(line)

    run = start(lambda worker: (print("x"), time.sleep(IT_HUNG)), 1, output=complain)
    with pytest.raises(LookupError):
        run.result()
    assert run.status().verdict.kind == "stopped"


def stuck(worker: Worker) -> None:
    worker.emit("begun")
    if worker.rank == 0:
        receive(worker, 1, "a letter")
    elif worker.rank == 1:
        sleep_well()
    else:
        sum(range(10**12))  # a loop in C that never lets go of the interpreter


def sleep_well() -> None:
    time.sleep(IT_HUNG)


@pytest.mark.processes
@not_on_windows
def test_the_stack_of_every_stage() -> None:
    with begun(stuck, 3) as run:
        until(run, waiting=(0,))
        expected_calls = [["wait", "receive", "stuck"], ["sleep_well", "stuck"], ["stuck"]]
        give_up = time.monotonic() + IT_HUNG
        while True:  # some may be on their way there
            began = time.monotonic()
            stacks = run.stacks()
            assert time.monotonic() - began < 5
            if [re.findall(r" in (\w+)$", stack, re.M) for stack in stacks.values()] == expected_calls:
                break
            assert time.monotonic() < give_up, stacks
        status = run.status(stacks=True)
        line = stuck.__code__.co_firstlineno + 7
        assert stacks[2] == f'  File "{__file__}", line {line} in stuck'
        assert f"\nstage 1:\n{stacks[1]}\nstage 2:\n{stacks[2]}" in str(status)
        assert run.status().verdict.kind in ("running", "slow")  # none of them is the worse for it


@pytest.mark.processes
@not_on_windows
def test_a_stage_that_starts_is_not_killed_by_being_asked() -> None:
    """The signal ends a process that is not ready for it."""
    with start(lambda worker: worker.rank, 3, limit=IT_HUNG) as run:
        while not run._watcher.done.is_set():
            run.stacks()
        assert run.result() == [0, 1, 2]


def test_the_time_of_a_wait_does_not_count_as_computing() -> None:
    def late(worker: Worker) -> None:
        if worker.rank == 1:
            receive(worker, 0, "a letter")
            time.sleep(0.8)
        else:
            time.sleep(0.3)
            worker.transport.wait(worker.transport.isend(torch.zeros(1), 1, "a letter"))
            receive(worker, 1, "an answer")

    with pytest.raises(WaitTimeout, match=r"^stage 1 is slow: stage 0 waits for it, it has been computing for 0.4 s;"):
        run_in_threads(late, 2, limit=0.4)


def test_threads_and_processes_use_the_same_words() -> None:
    """In threads the sentence of a wait that ran out begins like that of real processes."""

    def late(worker: Worker) -> None:
        if worker.rank == 2:
            worker.transport.computing("B of micro-batch 5")
            time.sleep(0.4)
        else:
            receive(worker, worker.rank + 1, "a letter")

    with pytest.raises(TransferError) as caught:
        run_in_threads(late, 3, limit=0.2)
    assert re.match(
        r"stage 2 is slow: everyone waits for it, it has been in B of micro-batch 5 for 0.2 s; stage [01] waits for a "
        r"letter from stage [12]: given up after 0.2 s$",
        str(caught.value),
    )
