"""Answers to unit 11."""

import math
from itertools import product

from course_utils.schedules import SCHEDULES, gpipe, one_f_one_b, rematerialise
from course_utils.simulation import kept, peak_inputs, peak_stash, simulate
from course_utils.stages import by_count
from tests.bank import right, wrong

# --- training_step ----------------------------------------------------------------------------------------------------


@right("11.training_step")
def early_return(rank):
    rank.zero_grad()
    rank.forward_backward(rank.loss_scale)
    rank.multiply_gradients(1 / rank.loss_scale)
    squares = rank.exchange(rank.own_norm() ** 2)
    norm = sum(squares) ** 0.5
    if norm != norm or norm == math.inf:
        rank.update_loss_scale(True)
        return False
    rank.multiply_gradients(min(1.0, rank.max_norm / (norm + 1e-6)))
    rank.optimizer_step()
    rank.learning_rate_step()
    rank.update_loss_scale(False)
    return True


@right("11.training_step")
def divided_late(rank):
    """Never unscales by itself: the norm is divided, and one factor does both."""
    rank.forward_backward(rank.loss_scale)
    norm = math.hypot(*rank.exchange(rank.own_norm())) / rank.loss_scale
    fine = math.isfinite(norm)
    if fine:
        rank.multiply_gradients(min(1.0, rank.max_norm / norm) / rank.loss_scale)
        rank.optimizer_step()
        rank.learning_rate_step()
    rank.zero_grad()
    rank.update_loss_scale(not fine)
    return fine


def a_step(rank, **but):
    """Right, but for what is given."""

    def part(name, *arguments):
        return but[name](*arguments) if name in but else getattr(rank, name)(*arguments)

    part("zero_grad")
    rank.forward_backward(rank.loss_scale)
    part("unscale") if "unscale" in but else rank.multiply_gradients(1 / rank.loss_scale)
    norms = rank.exchange(rank.own_norm())
    norm = but["norm"](norms) if "norm" in but else math.hypot(*norms)
    skipped = but["skipped"](norm) if "skipped" in but else not math.isfinite(norm)
    if "clip" in but:
        but["clip"](norm)
    elif norm > rank.max_norm:
        rank.multiply_gradients(rank.max_norm / norm)
    if "late" in but:
        but["late"]()
    if not skipped:
        part("optimizer_step")
        part("learning_rate_step")
    part("update_loss_scale", skipped)
    return but["returned"](skipped) if "returned" in but else not skipped


def nothing(*arguments):
    return None


@wrong("11.training_step", "no zero_grad")
def never_clears(rank):
    return a_step(rank, zero_grad=nothing)


@wrong("11.training_step", "not unscaled", "pytorch/examples#1196")
def never_unscales(rank):
    return a_step(rank, unscale=nothing)


@wrong("11.training_step", "clip before unscale", "pytorch/examples#1196")
def clips_scaled(rank):
    return a_step(rank, unscale=nothing, late=lambda: rank.multiply_gradients(1 / rank.loss_scale))


@wrong("11.training_step", "own norm", "torchtitan#596")
def own_norm_only(rank):
    rank.zero_grad()
    rank.forward_backward(rank.loss_scale)
    rank.multiply_gradients(1 / rank.loss_scale)
    norm = rank.own_norm()
    skipped = not math.isfinite(norm)
    if not skipped:
        if norm > rank.max_norm:
            rank.multiply_gradients(rank.max_norm / norm)
        rank.optimizer_step()
        rank.learning_rate_step()
    rank.update_loss_scale(skipped)
    return not skipped


@wrong("11.training_step", "own decision to skip", "fairscale#179")
def skips_alone(rank):
    own = {}

    def decide(norm):
        own["finite"] = math.isfinite(rank.own_norm())
        return not own["finite"]

    return a_step(rank, skipped=decide)


@wrong("11.training_step", "sum of norms", "fastmoe#65")
def adds_norms(rank):
    return a_step(rank, norm=sum)


@wrong("11.training_step", "largest norm")
def takes_largest(rank):
    return a_step(rank, norm=lambda norms: max(norms, key=lambda n: n if math.isfinite(n) else math.inf))


@wrong("11.training_step", "scaled up")
def always_to_max(rank):
    return a_step(rank, clip=lambda norm: rank.multiply_gradients(rank.max_norm / norm))


@wrong("11.training_step", "not clipped")
def never_clips(rank):
    return a_step(rank, clip=nothing)


@wrong("11.training_step", "never skipped")
def never_skips(rank):
    rank.zero_grad()
    rank.forward_backward(rank.loss_scale)
    rank.multiply_gradients(1 / rank.loss_scale)
    norm = math.hypot(*rank.exchange(rank.own_norm()))
    if norm > rank.max_norm:
        rank.multiply_gradients(rank.max_norm / norm)
    rank.optimizer_step()
    rank.learning_rate_step()
    rank.update_loss_scale(False)
    return True


@wrong("11.training_step", "rate moves always", "Lightning#18828")
def rate_always(rank):
    came = a_step(rank, learning_rate_step=nothing)
    rank.learning_rate_step()
    return came


@wrong("11.training_step", "rate never moves")
def rate_never(rank):
    return a_step(rank, learning_rate_step=nothing)


@wrong("11.training_step", "loss scale not told")
def scale_not_told(rank):
    return a_step(rank, update_loss_scale=nothing)


@wrong("11.training_step", "loss scale told of good steps only")
def scale_good_only(rank):
    return a_step(rank, update_loss_scale=lambda skipped: skipped or rank.update_loss_scale(False))


@wrong("11.training_step", "loss scale told of skipped steps only")
def scale_skipped_only(rank):
    return a_step(rank, update_loss_scale=lambda skipped: skipped and rank.update_loss_scale(True))


@wrong("11.training_step", "loss scale told the opposite")
def scale_opposite(rank):
    return a_step(rank, update_loss_scale=lambda skipped: rank.update_loss_scale(not skipped))


@wrong("11.training_step", "loss scale told that all is well")
def scale_all_well(rank):
    return a_step(rank, update_loss_scale=lambda skipped: rank.update_loss_scale(False))


@wrong("11.training_step", "an exchange without all ranks", "fairscale#179")
def exchanges_if_finite(rank):
    rank.zero_grad()
    rank.forward_backward(rank.loss_scale)
    rank.multiply_gradients(1 / rank.loss_scale)
    own = rank.own_norm()
    skipped = not math.isfinite(own)
    if not skipped:
        norm = math.hypot(*rank.exchange(own))
        rank.multiply_gradients(min(1.0, rank.max_norm / norm))
        rank.optimizer_step()
        rank.learning_rate_step()
    rank.update_loss_scale(skipped)
    return not skipped


@wrong("11.training_step", "more than one exchange")
def asks_twice(rank):
    return a_step(rank, skipped=lambda norm: any(rank.exchange(float(not math.isfinite(norm)))))


@wrong("11.training_step", "returns the opposite")
def returns_skipped(rank):
    return a_step(rank, returned=lambda skipped: skipped)


@wrong("11.training_step", "no return")
def returns_nothing(rank):
    a_step(rank)


@wrong("11.training_step", "step before clip")
def steps_first(rank):
    rank.zero_grad()
    rank.forward_backward(rank.loss_scale)
    rank.multiply_gradients(1 / rank.loss_scale)
    norm = math.hypot(*rank.exchange(rank.own_norm()))
    skipped = not math.isfinite(norm)
    if not skipped:
        rank.optimizer_step()
        if norm > rank.max_norm:
            rank.multiply_gradients(rank.max_norm / norm)
        rank.learning_rate_step()
    rank.update_loss_scale(skipped)
    return not skipped


@wrong("11.training_step", "unscaled by the next loss scale")
def updates_scale_first(rank):
    rank.zero_grad()
    rank.forward_backward(rank.loss_scale)
    norm = math.hypot(*rank.exchange(rank.own_norm())) / rank.loss_scale
    skipped = not math.isfinite(norm)
    rank.update_loss_scale(skipped)
    if not skipped:
        rank.multiply_gradients(min(1.0, rank.max_norm / norm) / rank.loss_scale)
        rank.optimizer_step()
        rank.learning_rate_step()
    return not skipped


# --- fastest_plan -----------------------------------------------------------------------------------------------------


@right("11.fastest_plan")
def all_in_one(cluster):
    plans = []
    names = {"gpipe": gpipe, "1f1b": one_f_one_b}
    divisors = [M for M in range(1, cluster.rows + 1) if cluster.rows % M == 0]
    for K, M, name, again in product(
        range(1, min(cluster.devices, cluster.blocks) + 1), divisors, names, (True, False)
    ):
        order, rows = names[name](K, M), cluster.rows // M
        if again:
            order = rematerialise(order, "always")
        blocks = [len(stage) for stage in by_count(cluster.blocks, K)]
        needs = [
            n * cluster.weights + rows * max(n * cluster.activations * g + cluster.inputs * i for g, i in moments)
            for n, moments in zip(blocks, kept(order), strict=True)
        ]
        if max(needs) <= cluster.memory:
            forward = [cluster.start + n * rows * cluster.per_row for n in blocks]
            time = simulate(order, forward, [2 * f for f in forward], cluster.message).makespan
            plans.append((time, (K, M, name, again)))
    return min(plans)[1] if plans else None


@right("11.fastest_plan")
def formula_for_memory(cluster):
    """The stash by formula: M or min(M, K - k) graphs, with recomputation one graph and the inputs of the others."""
    best, least = None, math.inf
    for K in range(1, cluster.devices + 1):
        if cluster.blocks < K:
            break
        small, more = divmod(cluster.blocks, K)
        blocks = [small + (k < more) for k in range(K)]
        for M in (M for M in range(1, cluster.rows + 1) if not cluster.rows % M):
            rows = cluster.rows // M
            for name in SCHEDULES:
                for policy in ("never", "always"):
                    if name == "naive" or any(
                        need(cluster, K, M, k, n, name, policy) > cluster.memory for k, n in enumerate(blocks)
                    ):
                        continue
                    f = [cluster.start + n * rows * cluster.per_row for n in blocks]
                    order = rematerialise(SCHEDULES[name](K, M), policy)
                    time = simulate(order, f, [2 * x for x in f], cluster.message).makespan
                    if time < least:
                        best, least = [K, M, name, policy == "always"], time
    return best


def need(cluster, K, M, k, n, name, policy):
    flying, rows = M if name == "gpipe" else min(M, K - k), cluster.rows // M
    graph, inputs = n * cluster.activations * rows, cluster.inputs * rows
    # with recomputation: before it all of them are inputs, after it one is a graph
    stash = flying * graph if policy == "never" else max(flying * inputs, graph + (flying - 1) * inputs)
    return n * cluster.weights + stash


def searched(cluster, Ks=None, Ms=None, names=("gpipe", "1f1b"), policies=(False, True), time=None, memory=None):
    """Right, but for what is given."""
    found = []
    for K in Ks or range(1, min(cluster.devices, cluster.blocks) + 1):
        for M in Ms or [M for M in range(1, cluster.rows + 1) if cluster.rows % M == 0]:
            for name, again in product(names, policies):
                rows, blocks = cluster.rows // M, [len(stage) for stage in by_count(cluster.blocks, K)]
                order = rematerialise(SCHEDULES[name](K, M), "always" if again else "never")
                stash = [
                    max(
                        n * rows * cluster.activations * now.graphs + rows * cluster.inputs * now.inputs
                        for now in moments
                    )
                    for n, moments in zip(blocks, kept(order), strict=True)
                ]
                needs = [n * cluster.weights + s for n, s in zip(blocks, stash, strict=True)]
                if memory is not None:
                    needs = memory(order, rows, blocks, stash)
                f = [cluster.start + n * rows * cluster.per_row for n in blocks]
                if max(needs) <= cluster.memory:
                    if time is not None:
                        seconds = time(order, f, K, M, again, rows, blocks)
                    else:
                        seconds = simulate(order, f, [2 * x for x in f], cluster.message).makespan
                    found.append((seconds, (K, M, name, again)))
    return min(found)[1] if found else None


@wrong("11.fastest_plan", "memory forgotten")
def no_memory(cluster):
    return searched(cluster, memory=lambda order, rows, blocks, stash: [0])


@wrong("11.fastest_plan", "weights forgotten")
def no_weights(cluster):
    return searched(cluster, memory=lambda order, rows, blocks, stash: stash)


@wrong("11.fastest_plan", "stash forgotten")
def no_stash(cluster):
    return searched(cluster, memory=lambda order, rows, blocks, stash: [n * cluster.weights for n in blocks])


@wrong("11.fastest_plan", "peaks of two moments")
def peaks_added(cluster):
    def needs(order, rows, blocks, stash):
        peaks = zip(blocks, peak_stash(order), peak_inputs(order), strict=True)
        return [n * cluster.weights + rows * (n * cluster.activations * g + cluster.inputs * i) for n, g, i in peaks]

    return searched(cluster, memory=needs)


@wrong("11.fastest_plan", "recomputation for nothing")
def free_recomputation(cluster):
    def seconds(order, f, K, M, again, rows, blocks):
        return min(
            simulate(SCHEDULES[name](K, M), f, [2 * x for x in f], cluster.message).makespan
            for name in ("gpipe", "1f1b")
            if order.actions == rematerialise(SCHEDULES[name](K, M), "always" if again else "never").actions
        )

    return searched(cluster, time=seconds)


@wrong("11.fastest_plan", "never recomputes")
def keeps_everything(cluster):
    return searched(cluster, policies=(False,))


@wrong("11.fastest_plan", "messages for nothing")
def free_messages(cluster):
    return searched(
        cluster, time=lambda order, f, K, M, again, rows, blocks: simulate(order, f, [2 * x for x in f]).makespan
    )


@wrong("11.fastest_plan", "starts for nothing")
def free_starts(cluster):
    def seconds(order, f, K, M, again, rows, blocks):
        f = [x - cluster.start for x in f]
        return simulate(order, f, [2 * x for x in f], cluster.message).makespan

    return searched(cluster, time=seconds)


@wrong("11.fastest_plan", "always the most micro-batches", "fairscale#51")
def largest_M(cluster):
    return searched(cluster, Ms=[cluster.rows])


@wrong("11.fastest_plan", "always all devices")
def largest_K(cluster):
    return searched(cluster, Ks=[min(cluster.devices, cluster.blocks)])


@wrong("11.fastest_plan", "always GPipe")
def only_gpipe(cluster):
    return searched(cluster, names=("gpipe",))


@wrong("11.fastest_plan", "always 1F1B")
def only_1f1b(cluster):
    return searched(cluster, names=("1f1b",))


@wrong("11.fastest_plan", "another bubble formula")
def wrong_denominator(cluster):
    def seconds(order, f, K, M, again, rows, blocks):
        bubble = (K - 1) / M
        return M * max(f) * (4 if again else 3) / (1 - bubble) if bubble < 1 else math.inf

    return searched(cluster, time=seconds)


@wrong("11.fastest_plan", "a formula for equal stages")
def right_denominator(cluster):
    def seconds(order, f, K, M, again, rows, blocks):
        return M * max(f) * (4 if again else 3) / (1 - (K - 1) / (M + K - 1))

    return searched(cluster, time=seconds)


@wrong("11.fastest_plan", "rows that do not divide")
def any_M(cluster):
    K = min(cluster.devices, cluster.blocks)
    return K, cluster.rows - 1, "1f1b", True


@wrong("11.fastest_plan", "more micro-batches than rows", "torchtitan#775")
def rule_of_thumb(cluster):
    return cluster.devices, 4 * cluster.devices, "1f1b", False


@wrong("11.fastest_plan", "more stages than devices")
def a_stage_per_block(cluster):
    return cluster.blocks, cluster.rows, "1f1b", False


@wrong("11.fastest_plan", "no return")
def no_return(cluster):
    searched(cluster)


@wrong("11.fastest_plan", "a backward as long as a forward")
def short_backward(cluster):
    return searched(
        cluster,
        time=lambda order, f, K, M, again, rows, blocks: simulate(order, f, f, cluster.message).makespan,
    )


EQUIVALENT = {
    "11.training_step": {
        "operator, line 10, column 11: norm > rank.max_norm -> norm >= rank.max_norm": "a norm that is max_norm, which "
        "is above 0, gives a factor of exactly 1",
    },
    "11.fastest_plan": {
        "constant, line 10, column 53: 1 -> 2": "one micro-batch more than there are rows never divides the rows",
        "constant, line 22, column 103: True -> False": "there is one size and one stash for each stage, so neither "
        "sequence is longer",
        "operator, line 24, column 56: time < least -> time <= least": "the last of several plans with the shortest "
        "step in place of the first; any of them is right",
    },
}
