"""Answers to unit 06."""

from course_utils.schedules import Action, gpipe, naive, one_stage_per_rank, parse
from tests.bank import right, wrong

# --- run_rank ---------------------------------------------------------------------------------------------------------


@right("06.run_rank")
def with_lists(rank):
    kept = [None] * len(rank.actions)
    on_the_way = []
    for kind, stage, m in rank.actions:
        action = Action(kind, stage, m)
        if kind == "F":
            graph, out = rank.forward(m, rank.receive(action))
            kept[m] = graph
            del graph
        else:
            graph, kept[m] = kept[m], None
            out = rank.backward(graph, rank.receive(action))
            del graph
        handle = rank.begin_send(action, out)
        if handle is not None:
            on_the_way.append(handle)
    while on_the_way:
        rank.wait(on_the_way.pop(0))


@right("06.run_rank")
def in_two_functions(rank):
    graphs = {}

    def compute(action, arrived):
        if action.kind == "B":
            return rank.backward(graphs.pop(action.micro_batch), arrived)
        graphs[action.micro_batch], activations = rank.forward(action.micro_batch, arrived)
        return activations

    handles = [rank.begin_send(a, compute(a, rank.receive(a))) for a in rank.actions]
    list(map(rank.wait, handles))


@wrong("06.run_rank", "waits for a send at once", "pytorch#172668")
def waits_at_once(rank):
    graphs = {}
    for action in rank.actions:
        arrived = rank.receive(action)
        if action.kind == "F":
            graphs[action.micro_batch], result = rank.forward(action.micro_batch, arrived)
        else:
            result = rank.backward(graphs.pop(action.micro_batch), arrived)
        rank.wait(rank.begin_send(action, result))


@wrong("06.run_rank", "a send that nobody waits for")
def drops_the_handle(rank):
    graphs = {}
    for action in rank.actions:
        arrived = rank.receive(action)
        if action.kind == "F":
            graphs[action.micro_batch], result = rank.forward(action.micro_batch, arrived)
        else:
            result = rank.backward(graphs.pop(action.micro_batch), arrived)
        rank.begin_send(action, result)


@wrong("06.run_rank", "a send that nobody waits for")
def waits_for_the_last_one(rank):
    graphs, handle = {}, None
    for action in rank.actions:
        arrived = rank.receive(action)
        if action.kind == "F":
            graphs[action.micro_batch], result = rank.forward(action.micro_batch, arrived)
        else:
            result = rank.backward(graphs.pop(action.micro_batch), arrived)
        handle = rank.begin_send(action, result) or handle
    rank.wait(handle)


@wrong("06.run_rank", "the graph of another micro-batch")
def pops_the_newest(rank):
    graphs, handles = [], []
    for action in rank.actions:
        arrived = rank.receive(action)
        if action.kind == "F":
            graph, result = rank.forward(action.micro_batch, arrived)
            graphs.append(graph)
        else:
            result = rank.backward(graphs.pop(), arrived)
        handles.append(rank.begin_send(action, result))
    for handle in handles:
        rank.wait(handle)


@wrong("06.run_rank", "graphs kept after their backward")
def keeps_all_graphs(rank):
    graphs, handles = {}, []
    for action in rank.actions:
        arrived = rank.receive(action)
        if action.kind == "F":
            graphs[action.micro_batch], result = rank.forward(action.micro_batch, arrived)
        else:
            result = rank.backward(graphs[action.micro_batch], arrived)
        handles.append(rank.begin_send(action, result))
    for handle in handles:
        rank.wait(handle)


@wrong("06.run_rank", "computes without receiving")
def never_receives(rank):
    graphs, handles = {}, []
    for action in rank.actions:
        if action.kind == "F":
            graphs[action.micro_batch], result = rank.forward(action.micro_batch, None)
        else:
            result = rank.backward(graphs.pop(action.micro_batch), None)
        handles.append(rank.begin_send(action, result))
    for handle in handles:
        rank.wait(handle)


@wrong("06.run_rank", "not the schedule's order")
def always_gpipe(rank):
    graphs, handles = {}, []
    for kind in "FB":
        for action in [a for a in rank.actions if a.kind == kind]:
            arrived = rank.receive(action)
            if kind == "F":
                graphs[action.micro_batch], result = rank.forward(action.micro_batch, arrived)
            else:
                result = rank.backward(graphs.pop(action.micro_batch), arrived)
            handles.append(rank.begin_send(action, result))
    for handle in handles:
        rank.wait(handle)


@wrong("06.run_rank", "nothing sent")
def forgets_gradients(rank):
    graphs, handles = {}, []
    for action in rank.actions:
        arrived = rank.receive(action)
        if action.kind == "F":
            graphs[action.micro_batch], result = rank.forward(action.micro_batch, arrived)
            handles.append(rank.begin_send(action, result))
        else:
            rank.backward(graphs.pop(action.micro_batch), arrived)
    for handle in handles:
        rank.wait(handle)


# --- at_most ----------------------------------------------------------------------------------------------------------


def event_driven(num_stages, num_micro_batches, cap):
    """Rows of (kind, micro-batch), by going from one end of an action to the next."""
    rows = [[] for _ in range(num_stages)]
    arrived = [{"F": set(range(num_micro_batches)) if k == 0 else set(), "B": set()} for k in range(num_stages)]
    busy = {}
    now = 0
    while sum(map(len, rows)) < 2 * num_stages * num_micro_batches:
        for (k, kind, m), end in list(busy.items()):
            if end == now:
                del busy[k, kind, m]
                step = k + 1 if kind == "F" else k - 1
                if kind == "F" and k == num_stages - 1:
                    arrived[k]["B"].add(m)
                elif 0 <= step < num_stages:
                    arrived[step][kind].add(m)
        for k, row in enumerate(rows):
            if any(stage == k for stage, _, _ in busy):
                continue
            counts = {kind: sum(a == kind for a, _ in row) for kind in "FB"}
            for kind in "BF":
                m = counts[kind]
                full = kind == "F" and counts["F"] - counts["B"] >= cap
                if m in arrived[k][kind] and not full:
                    row.append((kind, m))
                    busy[k, kind, m] = now + (1 if kind == "F" else 2)
                    break
        now += 1
    return rows


@right("06.at_most")
def by_events(num_stages, num_micro_batches, cap):
    rows = event_driven(num_stages, num_micro_batches, cap)
    return one_stage_per_rank(
        num_micro_batches, [[Action(kind, k, m) for kind, m in row] for k, row in enumerate(rows)]
    )


@right("06.at_most")
def in_text(num_stages, num_micro_batches, cap):
    rows = event_driven(num_stages, num_micro_batches, cap)
    return parse("\n".join(",".join(f"{k}{kind}{m}" for kind, m in row) for k, row in enumerate(rows)))


@wrong("06.at_most", "GPipe")
def just_gpipe(num_stages, num_micro_batches, cap):
    return gpipe(num_stages, num_micro_batches)


@wrong("06.at_most", "one at a time")
def just_naive(num_stages, num_micro_batches, cap):
    return naive(num_stages, num_micro_batches)


@wrong("06.at_most", "the same warm-up on every stage")
def same_warm_up(num_stages, num_micro_batches, cap):
    rows = []
    for k in range(num_stages):
        row = [Action("F", k, m) for m in range(min(cap, num_micro_batches))]
        for m in range(num_micro_batches):
            row += [Action("B", k, m)] + [Action("F", k, m + cap)] * (m + cap < num_micro_batches)
        rows.append(row)
    return one_stage_per_rank(num_micro_batches, rows)


@wrong("06.at_most", "1F1B without the cap")
def without_the_cap(num_stages, num_micro_batches, cap):
    return with_warm_up(num_stages, num_micro_batches, lambda k: num_stages - k)


def with_warm_up(num_stages, num_micro_batches, length):
    rows = []
    for k in range(num_stages):
        warm_up = min(num_micro_batches, length(k))
        row = [Action("F", k, m) for m in range(warm_up)]
        for m in range(num_micro_batches):
            row.append(Action("B", k, m))
            if m + warm_up < num_micro_batches:
                row.append(Action("F", k, m + warm_up))
        rows.append(row)
    return one_stage_per_rank(num_micro_batches, rows)


@wrong("06.at_most", "a warm-up that is cut off at the cap")
def cut_off(num_stages, num_micro_batches, cap):
    return with_warm_up(num_stages, num_micro_batches, lambda k: min(cap, num_stages - k))


@wrong("06.at_most", "one too many in flight")
def off_by_one(num_stages, num_micro_batches, cap):
    return by_events(num_stages, num_micro_batches, cap + 1)


@wrong("06.at_most", "BackwardBeforeForward")
def backward_first(num_stages, num_micro_batches, cap):
    return one_stage_per_rank(
        num_micro_batches,
        [[Action(kind, k, m) for m in range(num_micro_batches) for kind in "BF"] for k in range(num_stages)],
    )


@wrong("06.at_most", "NotAscending")
def newest_backward_first(num_stages, num_micro_batches, cap):
    rows = []
    for k in range(num_stages):
        row = []
        for start in range(0, num_micro_batches, cap):
            group = range(start, min(start + cap, num_micro_batches))
            row += [Action("F", k, m) for m in group] + [Action("B", k, m) for m in reversed(group)]
        rows.append(row)
    return one_stage_per_rank(num_micro_batches, rows)


@wrong("06.at_most", "groups of cap")
def in_groups(num_stages, num_micro_batches, cap):
    rows = []
    for k in range(num_stages):
        row = []
        for start in range(0, num_micro_batches, cap):
            group = range(start, min(start + cap, num_micro_batches))
            row += [Action(kind, k, m) for kind in "FB" for m in group]
        rows.append(row)
    return one_stage_per_rank(num_micro_batches, rows)


@wrong("06.at_most", "no return")
def no_return(num_stages, num_micro_batches, cap):
    by_events(num_stages, num_micro_batches, cap)


@wrong("06.at_most", "MissingAction")
def from_one(num_stages, num_micro_batches, cap):
    rows = event_driven(num_stages, num_micro_batches, cap)
    return one_stage_per_rank(
        num_micro_batches, [[Action(kind, k, m + 1) for kind, m in row] for k, row in enumerate(rows)]
    )


EQUIVALENT = {
    "06.at_most": {
        "constant, line 14, column 79: 0 -> -1": "it only has to be no later than the slot, and slots begin at 0",
        "constant, line 24, column 16: 1 -> 2": (
            "as if a forward took 2 slots too: that order was as fast with all 1152 sizes up to K=8, M=16, cap=9"
        ),
    },
}
