"""Schedules for property tests: all named ones, and random ones of which some run and some hang."""

import random

from hypothesis import strategies as st

from course_utils.schedules import SCHEDULES, Action, Schedule, looped

sizes = st.tuples(st.integers(1, 8), st.integers(1, 16))  # (K, M)


def named_schedules(min_stages: int = 1, min_micro_batches: int = 1) -> st.SearchStrategy[Schedule]:
    """naive, GPipe and 1F1B, for K up to 8 and M up to 16."""
    return st.builds(
        lambda name, num_stages, num_micro_batches: SCHEDULES[name](num_stages, num_micro_batches),
        st.sampled_from(sorted(SCHEDULES)),
        st.integers(min_stages, 8),
        st.integers(min_micro_batches, 16),
    )


def looped_schedules() -> st.SearchStrategy[Schedule]:
    """Two to three ranks with one to three stages each."""
    return st.builds(looped, st.integers(2, 3), st.integers(1, 3), st.integers(1, 4))


def random_schedules(may_hang: bool = True) -> st.SearchStrategy[Schedule]:
    """Complete schedules in ascending order with random interleavings; `may_hang=False`: they run when buffered."""
    return st.builds(lambda seed: random_schedule(random.Random(seed), may_hang), st.integers(0, 2**32 - 1))


def any_valid_schedule() -> st.SearchStrategy[Schedule]:
    """Schedules that run when messages are buffered."""
    return st.one_of(named_schedules(), looped_schedules(), random_schedules(may_hang=False))


def random_schedule(rng: random.Random, may_hang: bool = True) -> Schedule:
    """A schedule that keeps every rule but one: it may hang.

    Ranks hold one stage each, or several in a loop, or several anywhere. Most schedules start as one that runs, and
    then a few neighbours are swapped; some are shuffled. About half of them hang with buffers, more with queues.
    """
    num_ranks, num_micro_batches = rng.choice([2, 2, 2, 3, 3, 4]), rng.choice([1, 2, 2, 3, 3, 4])
    num_stages = rng.choice([num_ranks, num_ranks + 1, min(6, 2 * num_ranks)])
    rank_of_stage = [stage % num_ranks for stage in range(num_stages)]
    if rng.random() < 0.5:
        rng.shuffle(rank_of_stage)
    kind = rng.choice(["shuffled", "looped", "runs", "runs", "runs"])
    if kind == "shuffled" and may_hang:
        rows = shuffled_rows(rng, rank_of_stage, num_micro_batches)
    elif kind == "looped":
        base = looped(num_ranks, rng.choice([1, 2]), num_micro_batches)
        rank_of_stage, rows = list(base.rank_of_stage), [list(row) for row in base.actions]
    else:
        rows = rows_that_run(rng, rank_of_stage, num_micro_batches)
    for _ in range(rng.choice([0, 1, 2, 4]) if may_hang else 0):
        swap_neighbours(rng, rng.choice(rows))
    return Schedule(num_micro_batches, tuple(rank_of_stage), tuple(map(tuple, rows)))


def rows_that_run(rng: random.Random, rank_of_stage: list[int], num_micro_batches: int) -> list[list[Action]]:
    """Again and again some rank does something that it can do now."""
    num_stages = len(rank_of_stage)
    rows: list[list[Action]] = [[] for _ in range(max(rank_of_stage) + 1)]
    done = {"F": [0] * num_stages, "B": [0] * num_stages}
    eagerness = rng.choice([0.2, 0.5, 0.9])  # to prefer a backward: towards GPipe, towards 1F1B
    while min(done["B"]) < num_micro_batches:
        ready = [Action("F", s, n) for s, n in enumerate(done["F"]) if n < ([num_micro_batches] + done["F"])[s]]
        ready += [Action("B", s, n) for s, n in enumerate(done["B"]) if n < (done["B"] + [done["F"][-1]])[s + 1]]
        backwards = [action for action in ready if action.kind == "B"]
        action = rng.choice(backwards if backwards and rng.random() < eagerness else ready)
        rows[rank_of_stage[action.stage]].append(action)
        done[action.kind][action.stage] += 1
    return rows


def shuffled_rows(rng: random.Random, rank_of_stage: list[int], num_micro_batches: int) -> list[list[Action]]:
    """Each rank does its work in an order of its own, without a thought for the others."""
    rows = []
    for rank in range(max(rank_of_stage) + 1):
        stages = [stage for stage, owner in enumerate(rank_of_stage) if owner == rank]
        left = {stage: [num_micro_batches, num_micro_batches] for stage in stages}  # forwards, backwards
        row: list[Action] = []
        while any(left.values()):
            stage = rng.choice([stage for stage in stages if left[stage][1]])
            forwards, backwards = left[stage]
            is_forward = forwards == backwards or (forwards > 0 and rng.random() < 0.5)
            row.append(Action("FB"[not is_forward], stage, num_micro_batches - (forwards if is_forward else backwards)))
            left[stage][not is_forward] -= 1
            if not left[stage][1]:
                del left[stage]
                stages.remove(stage)
        rows.append(row)
    return rows


def swap_neighbours(rng: random.Random, row: list[Action]) -> None:
    """Swap two actions that follow each other, if their stage allows it."""
    candidates = [i for i in range(len(row) - 1) if may_swap(row[i], row[i + 1])]
    if candidates:
        i = rng.choice(candidates)
        row[i], row[i + 1] = row[i + 1], row[i]


def may_swap(first: Action, second: Action) -> bool:
    """Two actions of one stage keep their order if they are of one kind or of one micro-batch."""
    return first.stage != second.stage or (first.kind != second.kind and first.micro_batch != second.micro_batch)
