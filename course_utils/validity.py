"""Which schedules can run, and in which order their messages must be received.

Two facts decide whether a schedule hangs: what each action waits for, and in which order one rank's messages move. The
second depends on the machine under it, so "valid" always names a model of its queues:

    buffered        a message moves as soon as it is sent and its receive is posted (gloo)
    directed pair   a rank's messages to one peer wait for each other, and so do those from that peer (NCCL with a
                    communicator for each direction)
    pair and kind   one queue per peer for activations, one for gradients (NCCL with two groups)
    pair            one queue per peer (NCCL, single operations)
    rank            one queue for everything that a rank sends and receives (NCCL, batched operations)

In a queue the operations start in the order in which they were issued, each only when the one before it is through.
NCCL buffers small messages, so a schedule that has a cycle in such a model *may* hang: it does so once its tensors
grow.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from course_utils.schedules import Action, Message, Schedule, ScheduleError


class MissingAction(ScheduleError):
    """An action that the step needs stands on no rank."""


class DuplicateAction(ScheduleError):
    """An action stands in the schedule twice."""


class WrongRank(ScheduleError):
    """An action stands on a rank that does not hold its stage, or names a stage or micro-batch that does not exist."""


class BackwardBeforeForward(ScheduleError):
    """A stage runs the backward of a micro-batch before its forward, or recomputes it at another time than between."""


class NotAscending(ScheduleError):
    """A stage takes its micro-batches out of order, so that gradients would be added in another order."""


class Cycle(ScheduleError):
    """Ranks wait for each other in a circle: the schedule would hang."""


Node = Action | Message

# For each model: which queue of a rank a message belongs to. Operations in different queues do not wait for each other.
QUEUES: dict[str, Callable[[tuple[int, int], str], Hashable] | None] = {
    "buffered": None,
    "directed pair": lambda channel, kind: channel,
    "pair and kind": lambda channel, kind: (frozenset(channel), kind),
    "pair": lambda channel, kind: frozenset(channel),
    "rank": lambda channel, kind: "all",
}


def validate(schedule: Schedule, queues: str = "buffered", forward_only: bool = False) -> Schedule:
    """Return the schedule if it runs to its end under a model of its queues.

    Raises:
        ScheduleError: the first that applies of MissingAction, DuplicateAction, WrongRank, BackwardBeforeForward,
            NotAscending, Cycle.
    """
    check_model(queues)
    check_actions(schedule, *("F", "") if forward_only else ("FB", "R"))
    check_order(schedule)
    needs = dependencies(schedule, queues)
    if cycle := find_cycle(needs):
        raise Cycle(f"deadlock ({queues}): " + describe_cycle(schedule, cycle))
    return schedule


def check_model(queues: str) -> None:
    """Raises a ValueError for a model that is not in QUEUES."""
    if queues not in QUEUES:
        raise ValueError(f"unknown model of queues {queues!r}; there are {', '.join(QUEUES)}")


def check_actions(schedule: Schedule, kinds: str, optional: str) -> None:
    """Each action of the step once, those of optional kinds at most once, all on the rank that holds their stage."""
    places: dict[Action, list[int]] = {}
    for rank, row in enumerate(schedule.actions):
        for action in row:
            places.setdefault(action, []).append(rank)
    step = [
        Action(kind, stage, m)
        for stage in range(schedule.num_stages)
        for kind in kinds + optional
        for m in range(schedule.num_micro_batches)
    ]
    for action in step:
        if action not in places and action.kind in kinds:
            raise MissingAction(f"{action} is missing; it belongs on rank {schedule.rank_of_stage[action.stage]}")
    for action, ranks in places.items():
        if len(ranks) > 1:
            raise DuplicateAction(f"{action} appears {len(ranks)} times, on ranks {ranks}")
    for action in sorted(set(places) - set(step)):
        raise WrongRank(
            f"{action} is on rank {places[action][0]}, but the step has {schedule.num_stages} stages, "
            f"{schedule.num_micro_batches} micro-batches and the kinds {', '.join(kinds + optional)}"
        )
    for action in (action for action in step if action in places):
        rank, owner = places[action][0], schedule.rank_of_stage[action.stage]
        if rank != owner:
            raise WrongRank(f"{action} is on rank {rank}, but rank {owner} holds stage {action.stage}")


def check_order(schedule: Schedule) -> None:
    """Within a stage F before R before B, and the micro-batches of each kind ascending."""
    position = {action: i for row in schedule.actions for i, action in enumerate(row)}
    for action in sorted(position):
        for kind in {"F": "", "R": "F", "B": "FR"}[action.kind]:
            earlier = Action(kind, action.stage, action.micro_batch)
            if position.get(earlier, -1) > position[action]:
                raise BackwardBeforeForward(f"{action} comes before {earlier}")
    for action in sorted(position):
        before = Action(action.kind, action.stage, action.micro_batch - 1)
        if position.get(before, -1) > position[action]:
            raise NotAscending(
                f"{action} comes before {before}; micro-batches are taken in ascending order, so that gradients are "
                "added in the same order everywhere"
            )


def issue_order(schedule: Schedule, rank: int) -> Iterator[tuple[str, Node]]:
    """What a rank does, in order: ("recv", message), ("run", action), ("send", message).

    The receives of a channel are issued in the order in which its sender sends, just before the action that needs them.
    Were they issued in the order in which this rank needs them, messages could be swapped without an error.
    """
    to_come = {channel: deque(messages) for channel, messages in schedule.channels.items() if channel[1] == rank}
    for action in schedule.actions[rank]:
        if (needed := schedule.received_by(action)) is not None:
            waiting = to_come.get(schedule.channel(needed), deque())
            while needed in waiting:
                yield "recv", waiting.popleft()
        yield "run", action
        if (sent := schedule.sent_by(action)) is not None:
            yield "send", sent


def dependencies(schedule: Schedule, queues: str = "buffered") -> dict[Node, list[Node]]:
    """For each action and message of a step the actions and messages that it waits for.

    An action waits for the one before it on its rank, and for its input. A message waits for the action that makes
    it. In a queue it also waits, on both sides, for the operation before it, and for its receive to be issued, which
    happens after the receiver's action before. (Without queues receives are posted early: see `PostingPlan`.)
    """
    needs: dict[Node, list[Node]] = {}
    queue_of = QUEUES[queues]
    for rank in range(schedule.num_ranks):
        action_before: Action | None = None
        last_in_queue: dict[Hashable, Message] = {}
        for what, node in issue_order(schedule, rank):
            waits = needs.setdefault(node, [])
            if isinstance(node, Action):
                source = schedule.received_by(node) or schedule.source_of(node)
                waits.extend(other for other in (action_before, source) if other is not None)
                action_before = node
                continue
            if action_before is not None and (what == "send" or queue_of is not None):
                waits.append(action_before)
            if queue_of is not None:
                queue = queue_of(schedule.channel(node), node.kind)
                if queue in last_in_queue:
                    waits.append(last_in_queue[queue])
                last_in_queue[queue] = node
    return needs


def in_dependency_order(needs: dict[Node, list[Node]]) -> list[Node]:
    """The nodes, each after all that it waits for; nodes on or behind a cycle are left out (Kahn, 1962)."""
    missing = {node: len(waits) for node, waits in needs.items()}
    users: dict[Node, list[Node]] = {}
    for node, waits in needs.items():
        for other in waits:
            users.setdefault(other, []).append(node)
    ready = deque(node for node, count in missing.items() if count == 0)
    order = []
    while ready:
        node = ready.popleft()
        order.append(node)
        for user in users.get(node, ()):
            missing[user] -= 1
            if missing[user] == 0:
                ready.append(user)
    return order


def find_cycle(needs: dict[Node, list[Node]]) -> list[Node] | None:
    """Nodes that wait in a circle, each for the next one and the last for the first; None if there are none."""
    stuck = set(needs) - set(in_dependency_order(needs))
    if not stuck:
        return None
    node, path = min(stuck, key=str), []
    while node not in path:
        path.append(node)
        node = next(other for other in needs[node] if other in stuck)
    return path[path.index(node) :]


def describe_cycle(schedule: Schedule, cycle: list[Node]) -> str:
    """`0B0 on rank 0 waits for the gradients of micro-batch 0 (stage 1 to 0), ...`: each wait on the way round."""

    def name(node: Node) -> str:
        if isinstance(node, Action):
            return f"{node} on rank {schedule.rank_of_stage[node.stage]}"
        source, destination = schedule.channel(node)
        return f"{node} (stage {node.source} on rank {source} to stage {node.destination} on rank {destination})"

    def wait(node: Node, other: Node) -> str:
        verb = "waits" if isinstance(node, Action) else "wait"
        queued = " ahead of them in a queue" if isinstance(node, Message) and isinstance(other, Message) else ""
        return f"{name(node)} {verb} for {name(other)}{queued}"

    return "; ".join(wait(node, other) for node, other in zip(cycle, cycle[1:] + cycle[:1], strict=True))


@dataclass(frozen=True)
class PostingPlan:
    """When one rank posts its receives, and when it knows that its sends have arrived.

    Attributes:
        posted_at: {i: messages whose receives are posted when the rank's i-th action begins to compute}, i from 1; 0 is
            the start of the step.
        acknowledged_by: {message that arrives: own messages that its sender had used before it sent this one}.
    """

    posted_at: dict[int, tuple[Message, ...]]
    acknowledged_by: dict[Message, tuple[Message, ...]]


def posting_plan(schedule: Schedule, rank: int) -> PostingPlan:
    """Post each receive at the last moment that is early enough.

    Over gloo a message moves only after its receive is posted, so a receive that is posted when its data is needed
    costs a delay of the line. Posted all at once, receives cost memory that 1F1B is meant to save. In between: a
    message cannot be sent before its sender has seen a certain own send of the receiver, so the receive is posted
    when the action begins to compute that makes this send. Vector clocks (Fidge, 1988; Mattern, 1989) over the
    schedule say which one it is.
    """
    clock = vector_clocks(schedule)
    place = {action: (owner, i) for owner, row in enumerate(schedule.actions) for i, action in enumerate(row, start=1)}
    used_at = {message: place[action] for action in place if (message := schedule.received_by(action)) is not None}
    posted_at: dict[int, list[Message]] = {}
    for channel, messages in schedule.channels.items():
        if channel[1] == rank:
            for message in messages:
                posted_at.setdefault(clock[message][rank], []).append(message)
    acknowledged_by: dict[Message, tuple[Message, ...]] = {}
    unacknowledged: list[Message] = []
    for action in schedule.actions[rank]:
        if (received := schedule.received_by(action)) is not None:
            seen = clock[received]
            done = [m for m in unacknowledged if seen[used_at[m][0]] >= used_at[m][1]]
            acknowledged_by[received] = tuple(done)
            unacknowledged = [m for m in unacknowledged if m not in done]
        if (sent := schedule.sent_by(action)) is not None:
            unacknowledged.append(sent)
    return PostingPlan({i: tuple(messages) for i, messages in posted_at.items()}, acknowledged_by)


def vector_clocks(schedule: Schedule) -> dict[Node, list[int]]:
    """For every action and message: how many actions of each rank have surely ended before it begins.

    Raises:
        Cycle: for a schedule that hangs.
    """
    needs = dependencies(schedule)
    place = {action: (rank, i) for rank, row in enumerate(schedule.actions) for i, action in enumerate(row, start=1)}
    clock: dict[Node, list[int]] = {}
    for node in in_dependency_order(needs):
        seen = [0] * schedule.num_ranks
        for other in needs[node]:
            seen = [max(pair) for pair in zip(seen, clock[other], strict=True)]
            if isinstance(other, Action):
                rank, i = place[other]
                seen[rank] = max(seen[rank], i)
        clock[node] = seen
    if len(clock) < len(needs):
        raise Cycle("a schedule that hangs has no posting plan; validate() names the cycle")
    return clock
