"""Exercises of unit 06: the executor from memory, and the fastest schedule under a limit of memory."""

import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from course_utils.checks.report import Wrong
from course_utils.checks.tasks import Named, Task, WrongForm
from course_utils.pipeline import Pipeline
from course_utils.plots import describe_timeline, draw_timeline, show
from course_utils.schedules import Action, Schedule, ScheduleError, gpipe, naive, one_f_one_b, parse
from course_utils.simulation import peak_stash, simulate
from course_utils.threads import Deadlock, run_in_threads
from course_utils.transports import PeerLost, Worker
from course_utils.validity import validate

# --- run_rank ---------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A schedule to be carried out."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"the schedule {self.name}, {' | '.join(self.text.splitlines())}"


class Graph:
    """What a forward leaves for its backward."""

    def __init__(self, micro_batch: int):
        self.micro_batch = micro_batch


class Rank:
    """One rank with a stage that computes with single numbers: stage k adds k + 1, a backward adds up what it gets.

    actions: the rank's list. `log` has one line for each thing that was done; nobody who uses a Rank needs it.
    """

    def __init__(self, worker: Worker, schedule: Schedule):
        self.actions = schedule.actions[worker.rank]
        self._worker, self._schedule = worker, schedule
        self.log: list[str] = []
        self._alive: weakref.WeakSet[Graph] = weakref.WeakSet()
        self._open: dict[int, str] = {}

    def receive(self, action: Action) -> float | None:
        """Wait for what an action needs from another rank; None if it needs nothing."""
        message = self._schedule.received_by(action)
        self.log.append(f"receive {action}" + " (it needs nothing)" * (message is None) + f", keeps {len(self._alive)}")
        if message is None:
            return None
        buffer = torch.empty(())
        self._worker.transport.wait(self._worker.transport.irecv(buffer, self._schedule.channel(message)[0], message))
        return buffer.item()

    def forward(self, micro_batch: int, arrived: float | None) -> tuple[Graph, float]:
        """(graph, activation): the graph is to be kept for the backward, the activation is for the next stage."""
        stage = self._worker.rank
        self.log.append(f"{stage}F{micro_batch}" + " without activations" * (arrived is None and stage > 0))
        graph = Graph(micro_batch)
        self._alive.add(graph)
        self.log.append(f"keeps {len(self._alive)}")
        return graph, (micro_batch if arrived is None else arrived) + stage + 1

    def backward(self, graph: Graph, arrived: float | None) -> float:
        """The gradient for the stage before. It needs the graph of the same micro-batch's forward."""
        last = self._worker.rank == self._schedule.num_stages - 1
        self.log.append(
            f"{self._worker.rank}B{graph.micro_batch}" + " without gradients" * (arrived is None and not last)
        )
        return 1.0 if arrived is None else arrived + 1

    def begin_send(self, action: Action, result: float) -> Any:
        """Begin to send what an action has made to whoever needs it; what is returned must be waited for."""
        message = self._schedule.sent_by(action)
        self.log.append(f"send {action}" + " (nobody needs it)" * (message is None))
        if message is None:
            return None
        operation = self._worker.transport.isend(
            torch.tensor(float(result)), self._schedule.channel(message)[1], message
        )
        self._open[id(operation)] = str(action)
        return operation

    def wait(self, operation: Any) -> None:
        """Wait until something has been sent."""
        if operation is not None:
            self.log.append(f"wait {self._open.get(id(operation), '?')}")
            self._worker.transport.wait(operation)


def draw_runs(draw: random.Random) -> list[Run]:
    sizes = [(1, 2), (2, 3), (3, draw.randint(4, 6))]
    runs = [Run("GPipe", gpipe(k, m).to_text()) for k, m in sizes]
    runs += [Run("1F1B", one_f_one_b(k, m).to_text()) for k, m in sizes[1:]]
    return [*runs, Run("naive", naive(2, draw.randint(2, 4)).to_text())]


def attempt_run(answer: Callable, run: Run) -> dict[str, Any]:
    schedule = parse(run.text)
    ranks: dict[int, Rank] = {}

    def one_rank(worker: Worker) -> None:
        ranks[worker.rank] = Rank(worker, schedule)
        answer(ranks[worker.rank])

    stuck = ""
    try:
        run_in_threads(one_rank, schedule.num_ranks, limit=5)
    except (Deadlock, PeerLost) as error:
        stuck = str(error)
    return {"logs": [ranks[k].log for k in range(schedule.num_ranks)], "stuck": stuck}


def judge_runs(runs: Sequence[Run], came: Sequence[Any]) -> str:
    for run, value in zip(runs, came, strict=True):
        schedule = parse(run.text)
        for rank, log in enumerate(value["logs"]):
            judge_rank(run, schedule, rank, log, value["stuck"])
        if value["stuck"]:
            raise Wrong(f"With {run}: the ranks got stuck. {value['stuck']}.")
    return f"{len(runs)} runs of GPipe, 1F1B and naive: every rank followed its list and kept no graph too long."


def judge_rank(run: Run, schedule: Schedule, rank: int, log: list[str], stuck: str) -> None:
    wanted = [str(action) for action in schedule.actions[rank]]
    done = [line for line in log if line[:1].isdigit()]
    at = f"With {run}, rank {rank}"
    if any("without" in line for line in done):
        line = next(line for line in done if "without" in line)
        raise Named("computes without receiving", f"{at} computed {line}, which another stage had to send first.")
    if done != wanted[: len(done)]:
        place = next(i for i, (a, b) in enumerate(zip([*done, ""], [*wanted, ""], strict=False)) if a != b)
        came, due = done[place], wanted[place] if place < len(wanted) else "nothing more"
        if place < len(wanted) and came[:2] == due[:2] and "B" in came:
            raise Named(
                "the graph of another micro-batch",
                f"{at} ran the backward {came} when {due} was due: it was given the graph of another micro-batch.",
            )
        raise Named("not the schedule's order", f"{at} computed {came} when its list says {due}.")
    sent = {line[5:] for line in log if line.startswith("send ")} & {
        str(a) for a in schedule.actions[rank] if schedule.sent_by(a)
    }
    waited = {line[5:] for line in log if line.startswith("wait ")}
    due_to_send = [str(a) for a in schedule.actions[rank] if schedule.sent_by(a) and str(a) in done]
    if (missing := [action for action in due_to_send if action not in sent]) and (not stuck or not sent):
        raise Named("nothing sent", f"{at}: nobody sent what {missing[0]} had made, and another rank needs it.")
    if stuck:
        last = log[-1] if log else ""
        if last.startswith("wait ") and len(done) < len(wanted):
            raise Named(
                "waits for a send at once",
                f"{at} waited for the send of {last[5:]} before it went on, but the receiver was not there yet: "
                f"{stuck}.",
            )
        return
    if len(done) < len(wanted):
        raise Named(
            "not all actions",
            f"{at} computed {len(done)} of its {len(wanted)} actions; {wanted[len(done)]} is missing.",
        )
    if sent - waited:
        raise Named(
            "a send that nobody waits for",
            f"{at} never waited for the send of {min(sent - waited)}. On real processes a message whose handle is "
            "dropped may be lost.",
        )
    kept = max(int(line[6:]) for line in log if line.startswith("keeps "))
    if kept > peak_stash(schedule)[rank]:
        raise Named(
            "graphs kept after their backward",
            f"{at} kept {kept} graphs at a time; {peak_stash(schedule)[rank]} are needed. A graph is of no use after "
            "its backward, and all its activations live as long as something names it.",
        )


def log_of_a_run(answer: Callable) -> None:
    """Print what an executor does on stage 1 of 2, with GPipe and two micro-batches."""
    came = attempt_run(answer, Run("GPipe", gpipe(2, 2).to_text()))
    print("\n".join(came["logs"][1]))
    if came["stuck"]:
        print(came["stuck"])


# --- at_most ----------------------------------------------------------------------------------------------------------

FORWARD, BACKWARD = 1, 2  # slots


class Limit(NamedTuple):
    """K stages, M micro-batches, at most `cap` graphs at a time on any stage."""

    K: int
    M: int
    cap: int

    def __str__(self) -> str:
        return f"K={self.K}, M={self.M}, cap={self.cap}"


def target(num_stages: int, num_micro_batches: int, cap: int) -> int:
    """Slots that a step needs under a limit, with forwards of 1 slot and backwards of 2.

    Stage 0 may begin a micro-batch when an earlier one has been through all stages and back, which takes K rounds of a
    forward and a backward: so every cap micro-batches take that long. If the cap is large enough for that not to count,
    it is the makespan of GPipe (Huang et al., 2019, section 2.3).
    """
    both = FORWARD + BACKWARD
    full, rest = divmod(num_micro_batches - 1, cap)
    return both * max(num_stages * full + num_stages + rest, num_micro_batches + num_stages - 1)


def draw_limits(draw: random.Random) -> list[Limit]:
    limits = [Limit(2, 4, 2), Limit(1, 3, 1), Limit(4, 8, 4), Limit(4, 8, 2), Limit(3, 1, 2), Limit(3, 5, 8)]
    limits += [Limit(3, 4, 2), Limit(3, 5, 3), Limit(5, 6, 5)]
    return limits + [Limit(draw.randint(2, 6), draw.randint(2, 9), draw.randint(1, 5)) for _ in range(6)]


def show_schedules(answer: Callable) -> None:
    """Draw an answer's schedules for 4 stages, 8 micro-batches and two caps."""
    for cap in (4, 2):
        schedule = answer(4, 8, cap)
        timeline = simulate(schedule, FORWARD, BACKWARD)
        show(draw_timeline(timeline), says=f"A cap of {cap}. {describe_timeline(timeline)}")
        print(f"graphs kept at most, by stage: {peak_stash(schedule)}; target: {target(4, 8, cap)} slots")


def attempt_limit(answer: Callable, limit: Limit) -> dict[str, Any]:
    return as_values(answer(*limit))


def as_values(came: Any) -> dict[str, Any]:
    if not isinstance(came, Schedule):
        return {"no schedule": type(came).__name__}
    return {"text": came.to_text(), "rank_of_stage": list(came.rank_of_stage), "M": came.num_micro_batches}


def judge_limits(limits: Sequence[Limit], came: Sequence[Any]) -> str:
    for limit, values in zip(limits, came, strict=True):
        judge_limit(limit, values)
    return (
        f"{len(limits)} sizes, {', '.join(map(str, limits[:4]))} among them: no stage kept more than the cap, and no "
        "schedule took more slots than it has to."
    )


def a_or_an(name: str) -> str:
    return f"a{'n' * (name[0].lower() in 'aeiou')} {name}"


def judge_limit(limit: Limit, values: dict[str, Any]) -> None:
    if "no schedule" in values:
        forgotten = " Is a `return` missing?" if values["no schedule"] == "NoneType" else ""
        raise WrongForm(
            f"With {limit}: expected a Schedule, which one_stage_per_rank(num_micro_batches, rows) makes; came "
            f"{a_or_an(values['no schedule'])}.{forgotten}"
        )
    try:
        schedule = parse(values["text"], values["rank_of_stage"])
        if (schedule.num_ranks, values["M"], schedule.rank_of_stage) != (limit.K, limit.M, tuple(range(limit.K))):
            raise Wrong(
                f"With {limit}: the schedule is for {schedule.num_ranks} ranks and {values['M']} micro-batches, with "
                f"stages on ranks {list(schedule.rank_of_stage)}."
            )
        validate(Schedule(limit.M, schedule.rank_of_stage, schedule.actions))
    except ScheduleError as error:
        raise Named(type(error).__name__, f"With {limit}, this schedule cannot run: {error}.") from None
    peak, shown = peak_stash(schedule), f"With {limit}"
    slots, best = round(simulate(schedule, FORWARD, BACKWARD).makespan), target(*limit)
    if max(peak) > limit.cap:
        k = next(k for k, number in enumerate(peak) if number > limit.cap)
        for name, other in (("GPipe", gpipe), ("1F1B without the cap", one_f_one_b)):
            if schedule.actions == other(limit.K, limit.M).actions and limit.M > 1:
                raise Named(
                    name, f"{shown}: that is {name}. Stage {k} keeps {peak[k]} graphs, {limit.cap} are allowed."
                )
        raise Wrong(f"{shown}: stage {k} keeps {peak[k]} graphs at its fullest, {limit.cap} are allowed.")
    if slots > best:
        if schedule.actions == naive(limit.K, limit.M).actions:
            raise Named(
                "one at a time", f"{shown}: that is naive, one micro-batch at a time: {slots} slots, where {best} do."
            )
        raise Wrong(f"{shown}: the step takes {slots} slots (forward 1, backward 2); {best} are possible.")


def run_on_processes(answer: Callable) -> str:
    """One real step with the learner's schedule against GPipe's, two processes each."""
    from course_utils.fingerprints import fingerprint
    from course_utils.processes import launch

    mine, theirs = (fingerprint(launch(real_step, 2, s)) for s in (answer(2, 4, 2), gpipe(2, 4)))
    if mine != theirs:
        return f"On two real processes your schedule gave other gradients than GPipe: {mine} and {theirs}."
    return f"On two real processes, 4 micro-batches: fingerprint {mine}, the one of GPipe."


def real_step(worker: Worker, schedule: Schedule) -> Any:
    from course_utils.fingerprints import step_summary
    from course_utils.number_words import batch
    from course_utils.stages import CutModel, by_count
    from course_utils.transformer import TransformerConfig

    cut = CutModel(TransformerConfig(d_model=16, heads=2), by_count(8, 2))
    whole = batch(range(1000), seed=0, step=0, size=8)
    stage = cut.build(worker.rank, seed=0)
    pipeline = Pipeline({worker.rank: stage}, schedule, worker.transport, cut.carry_after)
    micro_batches = whole.split(4)
    losses = pipeline.step(micro_batches, pipeline.plan(micro_batches), whole.num_tokens)
    return step_summary(losses, stage.named_parameters_globally())


TASKS = (
    Task(
        unit="06",
        name="run_rank",
        kind="rebuild",
        minutes=20,
        points=3,
        difficulty=2,
        cases=draw_runs,
        attempt=attempt_run,
        judge=judge_runs,
        look_at=(
            "what each action needs before it can compute.",
            "what is still on its way, or still kept, when the function ends.",
        ),
        hints=(
            "Go through one line of the schedule by hand, `1F0,1B0`: which calls does the first action need, which the "
            "second, and what must the second remember of the first?",
            "Take in, compute, hand on, for every action; a dictionary from micro-batch to graph remembers. The loop "
            "is in lesson 06 under 'Execute it' (../../notebooks/06_the_gpipe_schedule.ipynb).",
            "For each action: receive what it needs. If it is a forward, compute it and keep the graph under its "
            "micro-batch; otherwise take that graph out of what is kept and compute the backward. Begin to send the "
            "result and note what is returned. After the last action, wait for everything noted. Leave no variable "
            "with a graph in it behind: a name keeps all that the graph holds.",
        ),
    ),
    Task(
        unit="06",
        name="at_most",
        kind="transfer",
        minutes=45,
        points=5,
        difficulty=3,
        cases=draw_limits,
        attempt=attempt_limit,
        judge=judge_limits,
        look_at=(
            "which stages could have computed something while they stood still.",
            "what a stage does next when both a forward and a backward could run.",
        ),
        hints=(
            "Take K=2, M=4, cap=2 and draw the slots by hand. When may stage 0 begin micro-batch 2? What does it do in "
            "the slots after that?",
            "With a large cap a fixed pattern will do (Narayanan et al., 2021, section 2.2: "
            "https://arxiv.org/abs/2104.04473). With a small one the pattern depends on K, M and cap together: "
            "instead of guessing it, let it come out of a simulation in which every stage does what it can.",
            "Go through the slots in order. In each, look at every stage that is free. If its next backward has its "
            "gradient (on the last stage: its own forward is done), it takes that; otherwise, if its next forward has "
            "its activations and the stage keeps fewer graphs than the cap, it takes that. Write down when each action "
            "ends, so that later slots know what has arrived. The rows are what each stage took, in order.",
        ),
        instead=(one_f_one_b,),
        on_processes=run_on_processes,
    ),
)
