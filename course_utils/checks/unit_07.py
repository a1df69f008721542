"""Exercises of unit 07: the stash in bytes from memory, the price of unequal stages, and the bubble of a trace."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from course_utils.checks.report import Wrong
from course_utils.checks.tasks import Mistake, Task, compare
from course_utils.checks.values import numbers_of, plain
from course_utils.memory import predict_stash
from course_utils.schedules import Schedule, gpipe, looped, naive, one_f_one_b, parse
from course_utils.simulation import kept, peak_stash, simulate
from course_utils.timeline import Timeline, from_profiler

# --- peak_bytes -------------------------------------------------------------------------------------------------------


class Stash(NamedTuple):
    """A schedule, and for each stage the bytes of the graph of each micro-batch."""

    name: str
    text: str
    rank_of_stage: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"{self.name}, {' | '.join(self.text.splitlines())}, and graphs of {list(map(list, self.sizes))} bytes"

    @property
    def schedule(self) -> Schedule:
        return parse(self.text, self.rank_of_stage)


def draw_stashes(draw: random.Random) -> list[Stash]:
    turns = parse("0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3\n1F0,1B0,1F1,1B1,1F2,1F3,1B2,1B3")
    schedules = {
        "GPipe": gpipe(2, 3),
        "naive": naive(3, 4),
        "1F1B": one_f_one_b(3, 5),
        "1F1B with M < K": one_f_one_b(4, 2),
        "a schedule without a name": turns,
        "two stages per rank": looped(2, 2, 3),
        "one stage": gpipe(1, draw.randint(1, 4)),
    }

    def sizes(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
        row = range(schedule.num_micro_batches)
        return tuple(tuple(draw.randint(1, 99) for _ in row) for _ in range(schedule.num_stages))

    # On one rank, stage 1 is at its fullest when stage 0 is not.
    one_rank = "0F0,0F1,1F0,1B0,0B0,1F1,1B1,0B1"
    growing = (tuple(draw.randint(1, 99) for _ in range(2)), (draw.randint(1, 40), draw.randint(50, 99)))
    return [
        *(Stash(name, s.to_text(), tuple(s.rank_of_stage), sizes(s)) for name, s in schedules.items()),
        Stash("two stages on one rank", one_rank, (0, 0), growing),
    ]


def attempt_stash(answer: Callable, stash: Stash) -> Any:
    return numbers_of(answer(stash.schedule, [list(row) for row in stash.sizes]))


def moments(stash: Stash, rank: int) -> Iterator[list[tuple[int, int]]]:
    """After each action of a rank the pairs (stage, micro-batch) whose forward is done and whose backward is not."""
    row = stash.schedule.actions[rank]
    for end in range(1, len(row) + 1):
        begun, ended = ({action[1:] for action in row[:end] if action.kind == kind} for kind in "FB")
        yield sorted(begun - ended)


def ranks_of(stash: Stash) -> range:
    return range(stash.schedule.num_ranks)


def bytes_at(stash: Stash, pairs: Sequence[tuple[int, int]]) -> int:
    return sum(stash.sizes[stage][m] for stage, m in pairs)


def right_peaks(stash: Stash) -> list[int]:
    return [max(bytes_at(stash, pairs) for pairs in moments(stash, rank)) for rank in ranks_of(stash)]


def after_backwards(stash: Stash) -> list[int]:
    peaks = []
    for rank in ranks_of(stash):
        row = stash.schedule.actions[rank]
        pairs = [now for action, now in zip(row, moments(stash, rank), strict=True) if action.kind == "B"]
        peaks.append(max(bytes_at(stash, now) for now in pairs))
    return peaks


def newest_freed(stash: Stash) -> list[int]:
    """The peaks if each backward freed the newest graph."""
    peaks = []
    for row in stash.schedule.actions:
        graphs: list[int] = []
        peak = 0
        for action in row:
            if action.kind == "F":
                graphs.append(stash.sizes[action.stage][action.micro_batch])
            else:
                graphs.pop()
            peak = max(peak, sum(graphs))
        peaks.append(peak)
    return peaks


def stages_apart(stash: Stash) -> list[int]:
    def peak(rank: int, stage: int) -> int:
        return max(bytes_at(stash, [pair for pair in pairs if pair[0] == stage]) for pairs in moments(stash, rank))

    return [sum(peak(rank, stage) for stage in stash.schedule.stages_of(rank)) for rank in ranks_of(stash)]


def times_largest(stash: Stash) -> list[int]:
    largest = [max(max(stash.sizes[k]) for k in stash.schedule.stages_of(rank)) for rank in ranks_of(stash)]
    return [number * size for number, size in zip(peak_stash(stash.schedule), largest, strict=True)]


STASHES = (
    Mistake(
        "micro-batches, not bytes",
        "These are numbers of graphs; bytes are asked for.",
        lambda stash: peak_stash(stash.schedule),
    ),
    Mistake(
        "the end instead of the peak",
        "This is what is left when the step is over.",
        lambda stash: [bytes_at(stash, list(moments(stash, rank))[-1]) for rank in ranks_of(stash)],
    ),
    Mistake(
        "looked at after backwards only",
        "This is the most that is kept after a backward. There is more just before it.",
        after_backwards,
    ),
    Mistake(
        "nothing freed",
        "These are the bytes of all forwards. A backward frees what its forward has left.",
        lambda stash: [
            bytes_at(stash, [action[1:] for action in row if action.kind == "F"]) for row in stash.schedule.actions
        ],
    ),
    Mistake(
        "the newest graph freed",
        "Each backward freed the graph that was made last; it needs, and frees, that of its own micro-batch.",
        newest_freed,
    ),
    Mistake(
        "number times the largest",
        "The highest number of graphs was multiplied by the largest; they differ in size.",
        times_largest,
    ),
    Mistake(
        "one peak for all ranks",
        "Every rank got the highest peak of all. Each has its own memory.",
        lambda stash: [max(right_peaks(stash))] * len(right_peaks(stash)),
    ),
    Mistake(
        "peaks of stages added",
        "The peaks of a rank's stages were added up, but they need not fall on one moment.",
        stages_apart,
    ),
)


def judge_stashes(cases: Sequence[Stash], came: Sequence[Any]) -> str:
    compare(cases, came, right_peaks, STASHES, what="the peaks of the ranks in bytes:")
    return f"{len(cases)} schedules, among them 1F1B with M < K, and ranks with two stages: to the byte on every rank."


# --- time_and_bubble --------------------------------------------------------------------------------------------------


class Costs(NamedTuple):
    """What a micro-batch takes in each stage, and a message between two of them; M micro-batches."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    transfer: int
    M: int

    def __str__(self) -> str:
        return f"forward {list(self.forward)}, backward {list(self.backward)}, transfer {self.transfer}, M={self.M}"


FEW = 40  # micro-batches that a simulation has time for


def draw_costs(draw: random.Random) -> list[Costs]:
    fixed = [
        Costs((1, 1, 1, 1), (2, 2, 2, 2), 0, 8),
        Costs((1, 1, 3, 1), (2, 2, 6, 2), 0, 4),
        Costs((5, 1, 2), (1, 7, 3), 0, 2),
        Costs((4,), (9,), 3, 6),
        Costs((2, 3, 1, 2, 4), (6, 1, 2, 2, 3), 2, 1),
    ]
    drawn = []
    for M in (2, 7, 16, FEW, 10**9):
        K = draw.randint(2, 6)
        forward, backward = (tuple(draw.randint(1, 20) for _ in range(K)) for _ in "FB")
        drawn.append(Costs(forward, backward, draw.randint(1, 9), M))
    return [*fixed, *drawn]


def attempt_costs(answer: Callable, costs: Costs) -> Any:
    came = answer(list(costs.forward), list(costs.backward), costs.transfer, costs.M)
    return numbers_of(came)


def simulated(costs: Costs, M: int) -> Timeline:
    return simulate(gpipe(len(costs.forward), M), costs.forward, costs.backward, costs.transfer)


def work(costs: Costs) -> int:
    """What the micro-batches take in all stages, waits left out."""
    return costs.M * (sum(costs.forward) + sum(costs.backward))


def right_costs(costs: Costs) -> list[float]:
    """By simulation. With many micro-batches each further one takes as long as the one before: it is continued."""
    if costs.M <= FEW:
        step = simulated(costs, costs.M)
        return [step.makespan, step.bubble_of_total]
    almost, last = (simulated(costs, M).makespan for M in (FEW - 1, FEW))
    seconds = last + (costs.M - FEW) * (last - almost)
    return [seconds, 1 - work(costs) / (len(costs.forward) * seconds)]


def time_of(gives: Callable[[list[int], list[int], int, int, int], float]) -> Callable[[Costs], float]:
    """gives: (forward, backward, transfer, K, M) -> a time."""
    return lambda c: gives(list(c.forward), list(c.backward), c.transfer, len(c.forward), c.M)


TIMES = (
    Mistake(
        "all as slow as the slowest",
        "Every stage was taken to be as slow as the slowest. A micro-batch passes the other stages faster.",
        time_of(lambda f, b, t, K, M: (M + K - 1) * (max(f) + max(b)) + 2 * (K - 1) * t),
    ),
    Mistake(
        "all as fast as the mean",
        "Every stage was taken to be as fast as their mean. A line of stages moves at the pace of the slowest.",
        time_of(lambda f, b, t, K, M: (M + K - 1) * (sum(f) + sum(b)) / K + 2 * (K - 1) * t),
    ),
    Mistake(
        "one slowest stage for both directions",
        "The pace was set by the stage whose forward and backward together take longest. All forwards come first: each "
        "direction has a slowest stage of its own.",
        time_of(
            lambda f, b, t, K, M: (
                sum(f) + sum(b) + (M - 1) * max(x + y for x, y in zip(f, b, strict=True)) + 2 * (K - 1) * t
            )
        ),
    ),
    Mistake(
        "one micro-batch too many",
        "The slowest stage was counted for M micro-batches besides the way of one through all stages, which has one.",
        time_of(lambda f, b, t, K, M: sum(f) + sum(b) + M * (max(f) + max(b)) + 2 * (K - 1) * t),
    ),
    Mistake(
        "K and M swapped",
        "K and M are swapped.",
        time_of(lambda f, b, t, K, M: sum(f) + sum(b) + (K - 1) * (max(f) + max(b)) + 2 * (M - 1) * t),
    ),
    Mistake(
        "one micro-batch at a time",
        "That is the time of naive, one micro-batch after the other.",
        time_of(lambda f, b, t, K, M: M * (sum(f) + sum(b) + 2 * (K - 1) * t)),
    ),
    Mistake(
        "messages forgotten",
        "The messages take time too.",
        time_of(lambda f, b, t, K, M: sum(f) + sum(b) + (M - 1) * (max(f) + max(b))),
    ),
    Mistake(
        "messages of one direction",
        "Only the messages of one direction were counted; gradients travel as well.",
        time_of(lambda f, b, t, K, M: sum(f) + sum(b) + (M - 1) * (max(f) + max(b)) + (K - 1) * t),
    ),
    Mistake(
        "K messages each way",
        "A message was counted for every stage; between K stages there are fewer borders.",
        time_of(lambda f, b, t, K, M: sum(f) + sum(b) + (M - 1) * (max(f) + max(b)) + 2 * K * t),
    ),
    Mistake(
        "every message waited for",
        "The messages of all micro-batches were counted. While one is under way, the stages compute.",
        time_of(lambda f, b, t, K, M: sum(f) + sum(b) + (M - 1) * (max(f) + max(b)) + 2 * M * (K - 1) * t),
    ),
)

BUBBLES = (
    Mistake(
        "of the ideal time",
        "The time is right. This bubble is a share of the time in which the ranks compute; of all their time is asked.",
        lambda c: len(c.forward) * right_costs(c)[0] / work(c) - 1,
    ),
    Mistake(
        "the formula of equal stages",
        "The time is right. This bubble is (K-1)/(M+K-1), that of equal stages and free messages.",
        lambda c: (len(c.forward) - 1) / (c.M + len(c.forward) - 1),
    ),
    Mistake(
        "the formula of equal stages, of the ideal time",
        "The time is right. This bubble is (K-1)/M, that of equal stages and free messages, of the ideal time.",
        lambda c: (len(c.forward) - 1) / c.M,
    ),
    Mistake(
        "the share of work",
        "The time is right. What came is the share in which the ranks compute, the bubble is the rest.",
        lambda c: 1 - right_costs(c)[1],
    ),
    Mistake(
        "in percent",
        "The time is right. The bubble is asked as a share, from 0 to 1.",
        lambda c: 100 * right_costs(c)[1],
    ),
)


def judge_costs(cases: Sequence[Costs], came: Sequence[Any]) -> str:
    for costs, value in zip(cases, came, strict=True):
        if not isinstance(value, list) or len(value) != 2:
            forgotten = " Is a `return` missing?" if value is None else ""
            raise Wrong(f"With {costs}: expected two numbers, time and bubble, came {value}.{forgotten}")
    times, bubbles = ([value[place] for value in came] for place in (0, 1))
    compare(cases, as_floats(times), lambda c: right_costs(c)[0], TIMES, tolerance=1e-9, what="the time:")
    compare(cases, as_floats(bubbles), lambda c: right_costs(c)[1], BUBBLES, tolerance=1e-9, what="the bubble:")
    return (
        f"{len(cases)} pipelines, with M < K, with a slow stage, with messages that take time: as the simulation has "
        "it, and for a billion micro-batches too."
    )


def as_floats(values: Sequence[Any]) -> list[Any]:
    return [float(value) if type(value) is int else value for value in values]


# --- bubble_of_trace --------------------------------------------------------------------------------------------------

Event = tuple[int, str, int, int]  # (rank, name, start, end)
COMPUTING = ("aten::", "autograd::")


class Trace(NamedTuple):
    """Events of some ranks; drawn from a seed if there are none given."""

    num_ranks: int
    given: tuple[Event, ...] = ()
    M: int = 0
    seed: int = 0

    def __str__(self) -> str:
        if self.given:
            return f"num_ranks={self.num_ranks} and the events {list(self.given)}"
        return f"make_trace(Trace(num_ranks={self.num_ranks}, M={self.M}, seed={self.seed}))"


NESTED = Trace(
    1,
    (
        (0, "Forward 0", 0, 20),
        (0, "gloo:recv", 0, 6),
        (0, "aten::linear", 6, 16),
        (0, "aten::t", 7, 8),
        (0, "aten::addmm", 8, 15),
    ),
)
IDLE_RANK = Trace(3, ((0, "aten::mm", 105, 110), (1, "aten::mm", 100, 120), (1, "Forward 0", 100, 140)))
OTHER_THREAD = Trace(
    2,
    (
        (1, "autograd::engine::evaluate_function: MmBackward0", 30, 50),
        (0, "aten::mm", 10, 30),
        (0, "gloo:send", 25, 45),
        (1, "aten::copy_", 45, 60),
        (1, "gloo:recv", 10, 30),
    ),
)


def draw_traces(draw: random.Random) -> list[Trace]:
    drawn = [Trace(K, (), M, draw.randrange(1000)) for K, M in ((2, 3), (3, 4), (4, 2), (2, 6))]
    return [NESTED, IDLE_RANK, OTHER_THREAD, *drawn]


def make_trace(trace: Trace) -> list[Event]:
    """The events of a step, (rank, name, start, end) in microseconds of one clock, in no order."""
    if trace.given:
        return list(trace.given)
    draw = random.Random(trace.seed)
    events: list[Event] = []
    for rank in range(trace.num_ranks):
        now = 1000 + draw.randint(0, 30) * rank
        for mark in [f"{kind} {m}" for kind in ("Forward", "Backward") for m in range(trace.M)]:
            begin, arrived = now, now + draw.randint(2, 25)
            events.append((rank, "gloo:recv", begin - draw.randint(0, 8), arrived))
            now = arrived
            for _ in range(draw.randint(1, 3)):
                now = add_operator(draw, events, rank, mark, now) + draw.randint(0, 4)
            events.append((rank, mark, begin, now))
            events.append((rank, "gloo:send", now, now + draw.randint(1, 20)))
            now += draw.randint(1, 5)
    draw.shuffle(events)
    return events


def add_operator(draw: random.Random, events: list[Event], rank: int, mark: str, start: int) -> int:
    """One operator, others inside it, and now and then one of another thread that overlaps; returns the end."""
    end = start + draw.randint(8, 25)
    backward = mark.startswith("Backward")
    name = "autograd::engine::evaluate_function: AddmmBackward0" if backward else "aten::linear"
    events.append((rank, name, start, end))
    inner = start + draw.randint(0, 2)
    events.append((rank, "aten::t", inner, inner + 1))
    events.append((rank, "aten::mm" if backward else "aten::addmm", inner + 2, end - draw.randint(0, 3)))
    if draw.random() < 0.5:
        late = end + draw.randint(1, 6)
        events.append((rank, "aten::copy_", end - draw.randint(1, 5), late))
        end = late
    return end


def attempt_trace(answer: Callable, trace: Trace) -> Any:
    return plain(answer(make_trace(trace), trace.num_ranks))


def covered(events: Sequence[Event], names: tuple[str, ...] = COMPUTING) -> int:
    """Microseconds in which at least one of these runs, by marking each of them."""
    chosen = [event for event in events if event[1].startswith(names)]
    if not chosen:
        return 0
    first = min(start for _, _, start, _ in chosen)
    marked = np.zeros(max(end for *_, end in chosen) - first, dtype=bool)
    for _, _, start, end in chosen:
        marked[start - first : end - first] = True
    return int(marked.sum())


def by_rank(trace: Trace) -> list[list[Event]]:
    events = make_trace(trace)
    return [[event for event in events if event[0] == rank] for rank in range(trace.num_ranks)]


def span(events: Sequence[Event]) -> int:
    return max(end for *_, end in events) - min(start for _, _, start, _ in events)


def right_bubble(trace: Trace) -> float:
    busy = sum(covered(events) for events in by_rank(trace))
    return 1 - busy / (trace.num_ranks * span(make_trace(trace)))


def bubble_with(busy: Callable[[list[Event]], float]) -> Callable[[Trace], float]:
    """The bubble of an answer that finds another time of work in the events of a rank."""
    return lambda trace: 1 - sum(map(busy, by_rank(trace))) / (trace.num_ranks * span(make_trace(trace)))


def summed(events: Sequence[Event]) -> int:
    return sum(end - start for _, name, start, end in events if name.startswith(COMPUTING))


def own_spans(trace: Trace) -> float:
    rows = [events for events in by_rank(trace) if events]
    return sum(1 - covered(events) / span(events) for events in rows) / len(rows)


def last_end_forgets(events: Sequence[Event]) -> float:
    """The time of work if the end of the newest event replaces a later one."""
    busy, until = 0.0, -float("inf")
    for _, name, start, end in sorted(events, key=lambda event: event[2:]):
        if name.startswith(COMPUTING):
            busy += max(0.0, end - max(start, until))
            until = end
    return busy


TRACES = (
    Mistake(
        "durations added",
        "The durations of all operators were added up; nested and overlapping ones count twice that way.",
        bubble_with(summed),
    ),
    Mistake(
        "waits counted as work",
        "The marks Forward and Backward were counted as work, with the waits inside them.",
        bubble_with(lambda events: covered(events, (*COMPUTING, "Forward", "Backward"))),
    ),
    Mistake(
        "messages counted as work",
        "Messages under way were counted as work.",
        bubble_with(lambda events: covered(events, (*COMPUTING, "gloo:"))),
    ),
    Mistake(
        "everything counted as work",
        "Every event was counted as work, waits and messages too.",
        bubble_with(lambda events: covered(events, ("",))),
    ),
    Mistake(
        "backwards left out",
        "What autograd does was not counted as work.",
        bubble_with(lambda events: covered(events, ("aten::",))),
    ),
    Mistake(
        "the mean of the ranks' own spans",
        "Each rank was measured from its own first event to its own last, and the shares averaged. The time before and "
        "after is idle too.",
        own_spans,
    ),
    Mistake(
        "of the ideal time",
        "This is the idle time divided by the time of work; of all the ranks' time is asked.",
        lambda trace: right_bubble(trace) / (1 - right_bubble(trace)),
    ),
    Mistake(
        "the share of work",
        "This is the share in which the ranks compute; the bubble is the rest.",
        lambda trace: 1 - right_bubble(trace),
    ),
    Mistake(
        "ranks mixed up",
        "Work of several ranks at one moment was counted once.",
        lambda trace: 1 - covered(make_trace(trace)) / (trace.num_ranks * span(make_trace(trace))),
    ),
    Mistake(
        "one rank's time",
        "The work of all ranks was divided by the time of a single one.",
        lambda trace: 1 - sum(map(covered, by_rank(trace))) / span(make_trace(trace)),
    ),
    Mistake(
        "ranks without events left out",
        "A rank without any event was left out, though it is idle all the time.",
        lambda trace: (
            1 - sum(map(covered, by_rank(trace))) / (sum(map(bool, by_rank(trace))) * span(make_trace(trace)))
        ),
    ),
    Mistake(
        "the inner end counts",
        "After an event inside another one the rest of the outer one was counted wrongly.",
        bubble_with(last_end_forgets),
    ),
    Mistake(
        "in percent",
        "The bubble is asked as a share, from 0 to 1.",
        lambda trace: 100 * right_bubble(trace),
    ),
)


def judge_traces(cases: Sequence[Trace], came: Sequence[Any]) -> str:
    compare(cases, as_floats(came), right_bubble, TRACES, tolerance=1e-3, what="the bubble:")
    return (
        f"{len(cases)} traces of up to {max(trace.num_ranks for trace in cases)} ranks, nested, overlapping and with "
        "waits inside the marks: each within 0.1 percentage points of what microsecond by microsecond gives."
    )


def picture(events: Sequence[Event], rank: int, width: int = 60) -> str:
    """The events of a rank as bars of text, one line each, by their start."""
    chosen = sorted((event for event in events if event[0] == rank), key=lambda event: (event[2], -event[3]))
    first, last = min(event[2] for event in events), max(event[3] for event in events)
    lines = []
    for _, name, start, end in chosen:
        a, b = (round((time - first) / (last - first) * width) for time in (start, end))
        lines.append(f"{name[:24]:24} |{' ' * a}{'#' * max(1, b - a)}".ljust(27 + width) + "|")
    return "\n".join(lines)


TASKS = (
    Task(
        unit="07",
        name="peak_bytes",
        kind="rebuild",
        minutes=15,
        points=2,
        difficulty=1,
        cases=draw_stashes,
        attempt=attempt_stash,
        judge=judge_stashes,
        look_at=(
            "at which moments of a row the bytes are compared with the highest so far.",
            "which graph a backward frees: of which stage, and of which micro-batch.",
        ),
        hints=(
            "Go through 0F0,0F1,0B0,0F2 with graphs of 10, 20 and 5 bytes, and write down what is kept after each "
            "action.",
            "A forward leaves its graph, its own backward frees it; the peak is the most in between: lesson 07 under "
            "'Write it first' (../../notebooks/07_bubble_and_stash.ipynb). Here each graph has a size of its own.",
            "For each row start with nothing kept. For each action: look up the bytes of its stage and micro-batch; a "
            "forward adds them, a backward takes them away. Remember the most that was ever kept, and collect one such "
            "number per row.",
        ),
        instead=(peak_stash, kept, predict_stash),
    ),
    Task(
        unit="07",
        name="time_and_bubble",
        kind="transfer",
        minutes=30,
        points=4,
        difficulty=2,
        cases=draw_costs,
        attempt=attempt_costs,
        judge=judge_costs,
        look_at=(
            "how far apart two micro-batches that follow each other leave the last stage, and later the first.",
            "what the very first micro-batch waits for on its way through all stages.",
        ),
        hints=(
            "Follow the forwards alone. When does micro-batch 0 leave the last stage, and how much later does each "
            "further one? Draw K=3 with one slow stage in the middle, then with the slow stage first.",
            "It is the staircase of lesson 07 under 'Count the dots' (../../notebooks/07_bubble_and_stash.ipynb) with "
            "steps of different heights. A line moves at the pace of its slowest station, its bottleneck: "
            "https://en.wikipedia.org/wiki/Bottleneck_(production).",
            "Forwards: the way of one micro-batch through all stages and over all borders, then for each further one "
            "the time of the slowest forward. When the last stage has done its last forward, the same begins for the "
            "backwards, with their own slowest stage. The two add up to the time. The work of all stages, divided by "
            "the time of all ranks, is what the bubble leaves of 1.",
        ),
        instead=(simulate,),
    ),
    Task(
        unit="07",
        name="bubble_of_trace",
        kind="transfer",
        minutes=30,
        points=4,
        difficulty=2,
        cases=draw_traces,
        attempt=attempt_trace,
        judge=judge_traces,
        look_at=(
            "which events are work, and what happens where two of them overlap.",
            "what the work is divided by: whose time, and from when to when.",
        ),
        hints=(
            "Take the picture of the example and mark, on paper, the time in which rank 0 computes. How much is it, "
            "and how much do the durations of its operators add up to?",
            "The time in which at least one of several intervals runs is the length of their union "
            "(https://en.wikipedia.org/wiki/Klee%27s_measure_problem, one dimension). What is idle, and of what it is "
            "a share, is in lesson 07 under 'Measure it' (../../notebooks/07_bubble_and_stash.ipynb).",
            "For each rank: keep the events that are work, sorted by their start. Go through them and remember up to "
            "when the time is covered; each event adds only what lies beyond that. Add up over the ranks, divide by "
            "the number of ranks times the time from the first start to the last end of any event, and take that from "
            "1.",
        ),
        instead=(from_profiler,),
    ),
)
