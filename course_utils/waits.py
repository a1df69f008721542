"""Who waits for whom: from what is known of every rank at one moment to one sentence that says what holds a run up.

A rank that waits, waits for one thing: that a certain other rank does its part of a message. These waits, drawn as
arrows between ranks, are the wait-for graph. Where at most one arrow leaves each rank, a circle is a deadlock and every
deadlock is a circle (Knapp, 1987: the one-resource model). Whoever is in no circle waits, perhaps by way of others, for
a rank that does not wait: one that computes, or has ended, or has died.

Nothing here is guessed from how long a wait has lasted. A wait is an arrow only as long as its peer has not done its
part: a message that is under way closes no circle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

# A verdict is of the first kind that applies.
KINDS = (
    *("crashed", "failed", "deadlock", "abandoned", "stands still", "lost", "slow", "message under way"),
    *("running", "starting", "finished", "stopped"),
)
WITH_CULPRIT = ("crashed", "failed", "abandoned", "stands still", "lost", "slow")

SHOWN_FROM = 0.1  # seconds: a shorter time is not told
LATE_FROM = 1.0  # seconds of waiting from which a rank that computes is called slow, and a message late

Node = TypeVar("Node")


@dataclass(eq=False)
class Wait:
    """A rank cannot go on before its peer has done its part of a message: sent it, or begun to receive it.

    Attributes:
        what: the message: "the activations of micro-batch 3".
        sends: whether the rank that waits is the one that sends.
        seconds: for how long it has waited.
        under_way: seconds since its peer has done its part, at least; None if it has not.
        ahead: what must move first, if one of the two ranks works off its messages in a queue.
    """

    rank: int
    peer: int
    what: str
    sends: bool = False
    seconds: float = 0.0
    under_way: float | None = None
    ahead: "Wait | None" = None

    @property
    def channel(self) -> tuple[int, int]:
        """The two ranks of the message, sender first."""
        return (self.rank, self.peer) if self.sends else (self.peer, self.rank)

    def message(self, noun: str) -> str:
        """`the activations of micro-batch 3 from stage 0`, or to send them `stage 1 to take the activations ...`"""
        return f"{noun} {self.peer} to take {self.what}" if self.sends else f"{self.what} from {noun} {self.peer}"

    def now(self, noun: str, with_time: bool = True) -> str:
        """`waits for the activations of micro-batch 3 from stage 0 (for 4.1 s)`"""
        queue = ""
        if self.ahead is not None and self.ahead.rank == self.rank:
            queue = ", behind another in its queue"
        elif self.ahead is not None:
            queue = f", which is behind another in {noun} {self.peer}'s queue"
        return f"waits for {self.message(noun)}{for_how_long(self.seconds) if with_time else ''}{queue}"

    def past(self, noun: str) -> str:
        """`waited 4.1 s for the activations of micro-batch 3 from stage 0`"""
        return f"waited{f' {self.seconds:.1f} s' if self.seconds >= SHOWN_FROM else ''} for {self.message(noun)}"


def for_how_long(seconds: float) -> str:
    return f" (for {seconds:.1f} s)" if seconds >= SHOWN_FROM else ""


@dataclass
class RankState:
    """What is known of one rank.

    Attributes:
        state: "starting"; "computing"; "waiting"; "gave up" (a wait ran out); "lost" (its peer, in a wait); "ended"
            with a result; "failed" with an exception; "died" without one; "frozen" (its process is stopped).
        text: what it computes or computed last: "B of micro-batch 5"; empty if nobody has said it.
        seconds: for how long it has been so.
        wait: what it waits for, or waited for when it gave up, lost its peer, died or froze.
        how: it failed or died.
    """

    rank: int
    state: str
    text: str = ""
    seconds: float = 0.0
    wait: Wait | None = None
    how: str = ""

    @property
    def blocked(self) -> Wait | None:
        """The wait that it cannot leave, if there is one."""
        return self.wait if self.state in ("waiting", "gave up", "lost") else None

    def was(self, noun: str) -> str:
        """`it was in B of micro-batch 5`, or what else it did."""
        if self.wait is not None:
            return f"it {self.wait.past(noun)}"
        return f"it was in {self.text}" if self.text else "it computed"

    def line(self, noun: str) -> str:
        """`stage 1 waits for the activations of micro-batch 3 from stage 0 (for 4.1 s)`"""
        text = {
            "starting": f"is starting{for_how_long(self.seconds)}",
            "computing": f"{f'is in {self.text}' if self.text else 'computes'}{for_how_long(self.seconds)}",
            "waiting": self.wait.now(noun) if self.wait else "",
            "gave up": f"gave up: {self.was(noun)}",
            "lost": f"lost its connection while {self.was(noun)}",
            "ended": "has ended",
            "failed": f"failed: {self.how}",
            "died": f"died ({self.how}) while {self.was(noun)}",
            "frozen": f"stands still while {self.was(noun)}",
        }[self.state]
        return f"{noun} {self.rank} {text}"


@dataclass(frozen=True)
class Verdict:
    """What holds a run up.

    Attributes:
        kind: one of KINDS.
        ranks: whom it concerns: those of the circle; the one that is slow, or has died, or sends no more.
        sentence: the same in words.
    """

    kind: str
    ranks: tuple[int, ...]
    sentence: str

    def __str__(self) -> str:
        return self.sentence

    @property
    def culprit(self) -> int | None:
        """The one rank on which all depends, if there is one. In a circle nobody is to blame more than another."""
        return self.ranks[0] if self.kind in WITH_CULPRIT else None


@dataclass
class Snapshot:
    """What all ranks did at one moment. As text: what holds them up, and then a line for each rank.

    Attributes:
        states: one per rank.
        noun: what a rank is called: see `noun_for`.
        late_from: seconds of waiting from which a rank that computes is called slow.
        end: how the run has ended, if it did so badly: "failed" or "stopped".
        more: text behind the lines.
    """

    states: Sequence[RankState]
    noun: str = "stage"
    late_from: float = LATE_FROM
    end: str = ""
    more: str = ""

    def __str__(self) -> str:
        return "\n".join([str(self.verdict), *("  " + line for line in self.lines), *filter(None, [self.more])])

    __repr__ = __str__  # what a notebook shows

    @property
    def lines(self) -> list[str]:
        return [state.line(self.noun) for state in self.states]

    @cached_property
    def verdict(self) -> Verdict:
        found = [self.of_failure(state) for state in self.states if state.state in ("died", "failed")]
        found += [self.of_frozen(state) for state in self.states if state.state == "frozen"]
        found += [self.of_waits(path, is_circle) for path, is_circle in self.chains] + [self.of_rest()]
        nearest = min(found, key=lambda verdict: KINDS.index(verdict.kind))
        if self.end == "stopped":
            return Verdict("stopped", (), f"the run was stopped; at that moment: {nearest}")
        return nearest

    @cached_property
    def chains(self) -> list[tuple[list[Wait], bool]]:
        """What `follow` finds from each rank that waits; first the ranks that have waited longest."""
        waits = [state.blocked for state in self.states if state.blocked is not None]
        return [follow(wait, self.needs) for wait in sorted(waits, key=lambda wait: -wait.seconds)]

    def needs(self, wait: Wait) -> Wait | None:
        """The wait that has to end before this one can; None if it depends on no other wait."""
        return None if wait.under_way is not None else wait.ahead or self.states[wait.peer].blocked

    # ---- one verdict for each way in which a run is held up ----

    def of_failure(self, state: RankState) -> Verdict:
        who = f"{self.noun} {state.rank}"
        if state.state == "died":
            kind, text = "crashed", f"{who}'s process ended ({state.how}) while {state.was(self.noun)}"
        else:
            kind, text = "failed", f"{who} failed: {state.how}"
        others = [s for s in self.states if s is not state and s.state != "ended"]
        failed = [s.rank for s in others if self.end or s.state in ("failed", "gave up", "lost")]
        if failed:
            text += f"; {self.name(failed)} failed because of that"
        waiters = [rank for rank in self.waiters(state.rank) if rank not in failed]
        if waiters:
            text += f"; {self.name(waiters, 'waits', 'wait')} for it"
        return Verdict(kind, (state.rank,), text)

    def of_frozen(self, state: RankState) -> Verdict:
        sentence = f"{self.noun} {state.rank} stands still: its process is stopped (SIGSTOP), "
        return Verdict("stands still", (state.rank,), f"{sentence}{self.who_waits(state.rank)}{state.was(self.noun)}")

    def of_waits(self, path: list[Wait], is_circle: bool) -> Verdict:
        """What a rank that waits depends on in the end."""
        if is_circle:
            return self.of_circle(path)
        last = path[-1]
        rank, peer = self.states[last.rank], self.states[last.peer]
        if rank.state == "lost" and peer.state != "ended":
            what = f"{self.noun} {rank.rank} lost its connection to {self.noun} {peer.rank} while {rank.was(self.noun)}"
            return Verdict("lost", (peer.rank,), what)
        if last.under_way is not None:
            return self.of_message(last)
        if peer.state == "ended":
            never = "receive" if last.sends else "send"
            who = f"{self.noun} {peer.rank}"
            return Verdict("abandoned", (peer.rank,), f"{self.tell(path)}, but {who} has ended: it will never {never}")
        if peer.state == "computing" and path[0].seconds >= self.late_from:
            where = f"in {peer.text}" if peer.text else "computing"
            how = f"{self.who_waits(peer.rank)}it has been {where} for {peer.seconds:.1f} s"
            return Verdict("slow", (peer.rank,), f"{self.noun} {peer.rank} is slow: {how}")
        return self.of_rest()

    def of_circle(self, circle: list[Wait]) -> Verdict:
        """The lowest rank begins, so that the same deadlock has the same words whoever blocked first."""
        first = min(range(len(circle)), key=lambda i: (circle[i].rank, circle[i].now(self.noun, with_time=False)))
        ranks = tuple(sorted({wait.rank for wait in circle}))
        who = {1: "it waits for itself", 2: "both wait"}.get(len(ranks), "all of them wait")
        sentence = f"{self.tell(circle[first:] + circle[:first])}: {who}, this is a deadlock"
        return Verdict("deadlock", ranks, sentence)

    def of_message(self, wait: Wait) -> Verdict:
        sender, receiver = wait.channel
        sentence = f"a message is under way: {wait.what} from {self.noun} {sender} to {self.noun} {receiver}"
        if wait.under_way is not None and wait.under_way >= LATE_FROM:
            sentence += (
                f", for {wait.under_way:.1f} s now: it is large and the line slow, or what `isend` returned "
                f"on {self.noun} {sender} was not kept until it was waited for"
            )
        return Verdict("message under way", (sender, receiver), sentence)

    def of_rest(self) -> Verdict:
        """Nobody is held up for long."""
        of_kind: dict[str, list[int]] = {}
        for state in self.states:
            of_kind.setdefault("waiting" if state.blocked else state.state, []).append(state.rank)
        kind = next((kind for kind in ("starting", "computing", "waiting") if kind in of_kind), "finished")
        verbs = {
            "starting": ("is starting", "are starting"),
            "computing": ("computes", "compute"),
            "waiting": ("waits", "wait"),
            "ended": ("has ended", "have ended"),
        }
        parts = [self.name(of_kind[state], *verb) for state, verb in verbs.items() if state in of_kind]
        kind = {"computing": "running", "waiting": "running"}.get(kind, kind)
        return Verdict(kind, tuple(range(len(self.states))), ", ".join(parts))

    # ---- words ----

    def tell(self, path: list[Wait]) -> str:
        """Each wait of a path; the first with its time."""
        texts = [f"{self.noun} {wait.rank} {wait.now(self.noun, with_time=wait is path[0])}" for wait in path]
        return "; ".join(texts)

    def waiters(self, rank: int) -> list[int]:
        """The ranks that wait for this one, also by way of others."""
        found = set()
        for path, is_circle in self.chains:
            if not is_circle and path[-1].peer == rank and path[-1].under_way is None:
                found.add(path[0].rank)
        return sorted(found - {rank})

    def who_waits(self, rank: int) -> str:
        waiters = self.waiters(rank)
        others = [state.rank for state in self.states if state.rank != rank and state.state != "ended"]
        if not waiters:
            return ""
        who = "everyone waits" if waiters == others and len(others) > 1 else self.name(waiters, "waits", "wait")
        return f"{who} for it, "

    def name(self, ranks: Sequence[int], *verbs: str) -> str:
        return " ".join([names(self.noun, ranks), *verbs[len(ranks) > 1 :][:1]])


def follow(first: Node, needs: Callable[[Node], Node | None]) -> tuple[list[Node], bool]:
    """Go from node to node: either to one that needs no other, then all nodes on the way; or into a circle, then those.

    Returns:
        The nodes, each needs the next; whether they are a circle, in which the last needs the first.
    """
    path = [first]
    while (node := needs(path[-1])) is not None:
        if node in path:
            return path[path.index(node) :], True
        path.append(node)
    return path, False


def names(noun: str, ranks: Sequence[int]) -> str:
    """`stage 1`, `stages 0 and 2`, `stages 0, 1 and 2`"""
    numbers = list(map(str, ranks))
    if len(numbers) < 2:
        return " ".join([noun, *numbers])
    return f"{noun}s {', '.join(numbers[:-1])} and {numbers[-1]}"


def noun_for(label: object, sender: int, receiver: int) -> str:
    """What to call the two ranks of a message: "stage", unless it goes between stages of other numbers than theirs."""
    stages = getattr(label, "source", sender), getattr(label, "destination", receiver)
    return "stage" if stages == (sender, receiver) else "rank"
