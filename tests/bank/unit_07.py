"""Answers to unit 07."""

import itertools

import numpy as np

from tests.bank import right, wrong

# --- peak_bytes -------------------------------------------------------------------------------------------------------


@right("07.peak_bytes")
def with_a_dictionary(schedule, sizes):
    peaks = []
    for row in schedule.actions:
        graphs, peak = {}, 0
        for kind, stage, m in row:
            if kind == "F":
                graphs[stage, m] = sizes[stage][m]
            else:
                del graphs[stage, m]
            peak = max(peak, sum(graphs.values()))
        peaks.append(peak)
    return peaks


@right("07.peak_bytes")
def by_sums(schedule, sizes):
    signs = {"F": 1, "B": -1}
    return tuple(
        max(itertools.accumulate(signs[a.kind] * sizes[a.stage][a.micro_batch] for a in row))
        for row in schedule.actions
    )


@wrong("07.peak_bytes", "micro-batches, not bytes")
def counts(schedule, sizes):
    return by_sums(schedule, [[1] * len(row) for row in sizes])


@wrong("07.peak_bytes", "the end instead of the peak")
def at_the_end(schedule, sizes):
    kept = []
    for row in schedule.actions:
        now = 0
        for action in row:
            now += sizes[action.stage][action.micro_batch] * (1 if action.kind == "F" else -1)
        kept.append(now)
    return kept


@wrong("07.peak_bytes", "nothing freed")
def nothing_freed(schedule, sizes):
    return [sum(sizes[a.stage][a.micro_batch] for a in row if a.kind == "F") for row in schedule.actions]


@wrong("07.peak_bytes", "looked at after backwards only")
def after_backwards(schedule, sizes):
    peaks = []
    for row in schedule.actions:
        kept = peak = 0
        for action in row:
            size = sizes[action.stage][action.micro_batch]
            if action.kind == "F":
                kept += size
            else:
                kept -= size
                peak = max(peak, kept)
        peaks.append(peak)
    return peaks


@wrong("07.peak_bytes", "the newest graph freed")
def as_a_stack(schedule, sizes):
    peaks = []
    for row in schedule.actions:
        graphs, peak = [], 0
        for action in row:
            if action.kind == "F":
                graphs.append(sizes[action.stage][action.micro_batch])
            else:
                graphs.pop()
            peak = max(peak, sum(graphs))
        peaks.append(peak)
    return peaks


@wrong("07.peak_bytes", "number times the largest")
def times_the_largest(schedule, sizes):
    largest = [max(max(sizes[k]) for k in schedule.stages_of(rank)) for rank in range(schedule.num_ranks)]
    return [n * size for n, size in zip(counts(schedule, sizes), largest, strict=True)]


@wrong("07.peak_bytes", "the formula of GPipe and 1F1B")
def by_formula(schedule, sizes):
    return [
        sum(sizes[k][: min(schedule.num_micro_batches, schedule.num_stages - k)]) for k in range(schedule.num_stages)
    ]


@wrong("07.peak_bytes", "one peak for all ranks")
def one_for_all(schedule, sizes):
    return [max(by_sums(schedule, sizes))] * schedule.num_ranks


@wrong("07.peak_bytes", "carried over to the next rank")
def carried_over(schedule, sizes):
    peaks, peak = [], 0
    for row in schedule.actions:
        kept = 0
        for action in row:
            kept += sizes[action.stage][action.micro_batch] * (1 if action.kind == "F" else -1)
            peak = max(peak, kept)
        peaks.append(peak)
    return peaks


@wrong("07.peak_bytes", "peaks of stages added")
def stages_apart(schedule, sizes):
    peaks = []
    for rank, row in enumerate(schedule.actions):
        total = 0
        for stage in schedule.stages_of(rank):
            kept = peak = 0
            for action in row:
                if action.stage == stage:
                    kept += sizes[stage][action.micro_batch] * (1 if action.kind == "F" else -1)
                    peak = max(peak, kept)
            total += peak
        peaks.append(total)
    return peaks


@wrong("07.peak_bytes", "the rank's number for the stage")
def rank_as_stage(schedule, sizes):
    return [
        max(itertools.accumulate(sizes[rank][a.micro_batch] * (1 if a.kind == "F" else -1) for a in row))
        for rank, row in enumerate(schedule.actions)
    ]


@wrong("07.peak_bytes", "calls the package")
def calls_the_package(schedule, sizes):
    from course_utils.simulation import peak_stash

    return peak_stash(schedule)


# --- time_and_bubble --------------------------------------------------------------------------------------------------


def share(forward, backward, M, time):
    return 1 - M * (sum(forward) + sum(backward)) / (len(forward) * time)


@right("07.time_and_bubble")
def two_lines(forward, backward, transfer, M):
    def line(costs):
        return sum(costs) + (len(costs) - 1) * transfer + (M - 1) * max(costs)

    time = line(forward) + line(backward)
    busy = [M * (f + b) for f, b in zip(forward, backward, strict=True)]
    return time, sum(time - own for own in busy) / (len(busy) * time)


@right("07.time_and_bubble")
def from_small_ones(forward, backward, transfer, M):
    """A small step is simulated by hand, and continued."""
    K = len(forward)

    def fill(costs, pieces):
        ends = [[0] * K for _ in range(pieces)]
        for m in range(pieces):
            for k in range(K):
                arrived = ends[m][k - 1] + transfer if k else 0
                ends[m][k] = max(arrived, ends[m - 1][k] if m else 0) + costs[k]
        return ends[-1][-1]

    def step(pieces):
        return fill(forward, pieces) + fill(backward[::-1], pieces)

    time = step(M) if M < 5 else step(4) + (M - 4) * (step(4) - step(3))
    return [time, share(forward, backward, M, time)]


@wrong("07.time_and_bubble", "all as slow as the slowest")
def all_slow(forward, backward, transfer, M):
    K = len(forward)
    time = (M + K - 1) * (max(forward) + max(backward)) + 2 * (K - 1) * transfer
    return time, share(forward, backward, M, time)


@wrong("07.time_and_bubble", "all as fast as the mean")
def all_mean(forward, backward, transfer, M):
    K = len(forward)
    time = (M + K - 1) * (sum(forward) + sum(backward)) / K + 2 * (K - 1) * transfer
    return time, share(forward, backward, M, time)


@wrong("07.time_and_bubble", "one slowest stage for both directions")
def one_slowest(forward, backward, transfer, M):
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    time = sum(both) + (M - 1) * max(both) + 2 * (len(both) - 1) * transfer
    return time, share(forward, backward, M, time)


@wrong("07.time_and_bubble", "one micro-batch too many")
def off_by_one(forward, backward, transfer, M):
    time = sum(forward) + sum(backward) + M * (max(forward) + max(backward)) + 2 * (len(forward) - 1) * transfer
    return time, share(forward, backward, M, time)


@wrong("07.time_and_bubble", "K and M swapped")
def swapped(forward, backward, transfer, M):
    K = len(forward)
    time = sum(forward) + sum(backward) + (K - 1) * (max(forward) + max(backward)) + 2 * (M - 1) * transfer
    return time, share(forward, backward, M, time)


@wrong("07.time_and_bubble", "one micro-batch at a time")
def one_at_a_time(forward, backward, transfer, M):
    time = M * (sum(forward) + sum(backward) + 2 * (len(forward) - 1) * transfer)
    return time, share(forward, backward, M, time)


@wrong("07.time_and_bubble", "messages forgotten")
def free_messages(forward, backward, transfer, M):
    return two_lines(forward, backward, 0, M)


@wrong("07.time_and_bubble", "messages of one direction")
def one_direction(forward, backward, transfer, M):
    return two_lines(forward, backward, transfer / 2, M)


@wrong("07.time_and_bubble", "K messages each way")
def too_many_borders(forward, backward, transfer, M):
    time = two_lines(forward, backward, transfer, M)[0] + 2 * transfer
    return time, share(forward, backward, M, time)


@wrong("07.time_and_bubble", "every message waited for")
def all_messages(forward, backward, transfer, M):
    return two_lines(forward, backward, transfer * M, M)


@wrong("07.time_and_bubble", "messages as work")
def message_per_stage(forward, backward, transfer, M):
    return two_lines([f + transfer for f in forward], [b + transfer for b in backward], 0, M)


@wrong("07.time_and_bubble", "of the ideal time", "arXiv 2104.04473, section 2.2.1")
def of_the_ideal_time(forward, backward, transfer, M):
    time, bubble = two_lines(forward, backward, transfer, M)
    return time, bubble / (1 - bubble)


@wrong("07.time_and_bubble", "the formula of equal stages")
def equal_formula(forward, backward, transfer, M):
    K = len(forward)
    return two_lines(forward, backward, transfer, M)[0], (K - 1) / (M + K - 1)


@wrong("07.time_and_bubble", "the formula of equal stages, of the ideal time")
def equal_formula_ideal(forward, backward, transfer, M):
    return two_lines(forward, backward, transfer, M)[0], (len(forward) - 1) / M


@wrong("07.time_and_bubble", "the share of work")
def utilisation(forward, backward, transfer, M):
    time, bubble = two_lines(forward, backward, transfer, M)
    return time, 1 - bubble


@wrong("07.time_and_bubble", "simulated")
def simulated(forward, backward, transfer, M):
    from course_utils.schedules import gpipe
    from course_utils.simulation import simulate

    step = simulate(gpipe(len(forward), M), forward, backward, transfer)
    return step.makespan, step.bubble_of_total


@wrong("07.time_and_bubble", "no return")
def no_return(forward, backward, transfer, M):
    two_lines(forward, backward, transfer, M)


# --- bubble_of_trace --------------------------------------------------------------------------------------------------

WORK = ("aten::", "autograd::")


def length_of(events):
    return max(e[3] for e in events) - min(e[2] for e in events)


def union(intervals):
    covered, until = 0, None
    for start, end in sorted(intervals):
        if until is None or start > until:
            covered, until = covered + end - start, end
        elif end > until:
            covered, until = covered + end - until, end
    return covered


def busy(events, rank, names=WORK):
    return union([(s, e) for r, name, s, e in events if r == rank and name.startswith(names)])


@right("07.bubble_of_trace")
def counting_levels(events, num_ranks):
    """+1 where an operator begins, -1 where one ends; idle where the sum is 0."""
    idle = 0
    first, last = min(e[2] for e in events), max(e[3] for e in events)
    for rank in range(num_ranks):
        changes = [(first, 0), (last, 0)]
        for r, name, start, end in events:
            if r == rank and name.split("::")[0] in ("aten", "autograd"):
                changes += [(start, 1), (end, -1)]
        changes.sort()
        level = 0
        for (now, change), (then, _) in itertools.pairwise(changes):
            level += change
            idle += (then - now) * (level == 0)
    return idle / (num_ranks * (last - first))


@right("07.bubble_of_trace")
def painted(events, num_ranks):
    first = min(e[2] for e in events)
    grid = np.zeros((num_ranks, max(e[3] for e in events) - first), dtype=bool)
    for rank, name, start, end in events:
        if name.startswith(WORK):
            grid[rank, start - first : end - first] = True
    return 1 - grid.mean()


@right("07.bubble_of_trace")
def merged(events, num_ranks):
    return 1 - sum(busy(events, rank) for rank in range(num_ranks)) / num_ranks / length_of(events)


@wrong("07.bubble_of_trace", "durations added")
def added(events, num_ranks):
    total = sum(end - start for _, name, start, end in events if name.startswith(WORK))
    return 1 - total / (num_ranks * length_of(events))


@wrong("07.bubble_of_trace", "durations added")
def added_and_cut_off(events, num_ranks):
    return max(0.0, added(events, num_ranks))


@wrong("07.bubble_of_trace", "waits counted as work", "zero-bubble#25")
def with_marks(events, num_ranks):
    names = (*WORK, "Forward", "Backward")
    return 1 - sum(busy(events, rank, names) for rank in range(num_ranks)) / (num_ranks * length_of(events))


@wrong("07.bubble_of_trace", "only the marks")
def only_marks(events, num_ranks):
    names = ("Forward", "Backward")
    return 1 - sum(busy(events, rank, names) for rank in range(num_ranks)) / (num_ranks * length_of(events))


@wrong("07.bubble_of_trace", "messages counted as work")
def with_messages(events, num_ranks):
    names = (*WORK, "gloo:")
    return 1 - sum(busy(events, rank, names) for rank in range(num_ranks)) / (num_ranks * length_of(events))


@wrong("07.bubble_of_trace", "everything counted as work")
def everything(events, num_ranks):
    return 1 - sum(busy(events, rank, "") for rank in range(num_ranks)) / (num_ranks * length_of(events))


@wrong("07.bubble_of_trace", "backwards left out")
def only_aten(events, num_ranks):
    return 1 - sum(busy(events, rank, "aten::") for rank in range(num_ranks)) / (num_ranks * length_of(events))


@wrong("07.bubble_of_trace", "the mean of the ranks' own spans")
def own_spans(events, num_ranks):
    shares = []
    for rank in {e[0] for e in events}:
        own = [e for e in events if e[0] == rank]
        shares.append(1 - busy(own, rank) / length_of(own))
    return sum(shares) / len(shares)


@wrong("07.bubble_of_trace", "from the first to the last work")
def span_of_work(events, num_ranks):
    work = [e for e in events if e[1].startswith(WORK)]
    return 1 - sum(busy(work, rank) for rank in range(num_ranks)) / (num_ranks * length_of(work))


@wrong("07.bubble_of_trace", "of the ideal time")
def idle_over_work(events, num_ranks):
    bubble = merged(events, num_ranks)
    return bubble / (1 - bubble)


@wrong("07.bubble_of_trace", "the share of work")
def share_of_work(events, num_ranks):
    return 1 - merged(events, num_ranks)


@wrong("07.bubble_of_trace", "ranks mixed up")
def all_ranks_at_once(events, num_ranks):
    return 1 - union([e[2:] for e in events if e[1].startswith(WORK)]) / (num_ranks * length_of(events))


@wrong("07.bubble_of_trace", "one rank's time")
def one_ranks_time(events, num_ranks):
    return 1 - sum(busy(events, rank) for rank in range(num_ranks)) / length_of(events)


@wrong("07.bubble_of_trace", "ranks without events left out")
def only_seen_ranks(events, num_ranks):
    seen = {e[0] for e in events}
    return 1 - sum(busy(events, rank) for rank in seen) / (len(seen) * length_of(events))


@wrong("07.bubble_of_trace", "the inner end counts")
def forgets_the_outer_end(events, num_ranks):
    total = 0
    for rank in range(num_ranks):
        until = float("-inf")
        for start, end in sorted(e[2:] for e in events if e[0] == rank and e[1].startswith(WORK)):
            total += max(0, end - max(start, until))
            until = end
    return 1 - total / (num_ranks * length_of(events))


@wrong("07.bubble_of_trace", "events taken as sorted")
def unsorted(events, num_ranks):
    total = 0
    for rank in range(num_ranks):
        until = float("-inf")
        for start, end in (e[2:] for e in events if e[0] == rank and e[1].startswith(WORK)):
            total += max(0, end - max(start, until))
            until = max(until, end)
    return 1 - total / (num_ranks * length_of(events))


@wrong("07.bubble_of_trace", "in percent")
def in_percent(events, num_ranks):
    return 100 * merged(events, num_ranks)


# --- Mutants that nobody can tell from the solution -------------------------------------------------------------------

EQUIVALENT = {
    "07.peak_bytes": {
        "arguments swapped, line 10, column 19: max(peak, kept) -> max(kept, peak)": "the larger of two numbers of "
        "bytes has no order",
    },
    "07.bubble_of_trace": {
        "arguments swapped, line 10, column 30: max(begin, until) -> max(until, begin)": "the later of two times has "
        "no order",
        "operator, line 9, column 15: end > until -> end >= until": "an event that ends where all is covered already "
        "adds end - until, which is 0",
    },
}
