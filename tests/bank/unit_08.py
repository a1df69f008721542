"""Answers to unit 08."""

import math

import torch

from tests.bank import right, wrong

# --- end_step ---------------------------------------------------------------------------------------------------------


def gradients_of(stage):
    return [p.grad for p in stage.parameters if p.grad is not None]


def overflows(stage):
    return not all(bool(torch.isfinite(g).all()) for g in gradients_of(stage))


def unscale(stage, power=-1):
    for g in gradients_of(stage):
        g.mul_(stage.scale**power)


def update_scale(stage, skipped):
    stage.good_steps = 0 if skipped else stage.good_steps + 1
    if skipped:
        stage.scale /= 2
    elif stage.good_steps == stage.growth_interval:
        stage.good_steps, stage.scale = 0, stage.scale * 2


@right("08.end_step")
def in_functions(stage):
    skipped = stage.any_stage(overflows(stage))
    unscale(stage)
    stage.clip()
    if not skipped:
        stage.update_weights()
    update_scale(stage, skipped)


@right("08.end_step")
def by_the_global_norm(stage):
    """As the package does: a norm that is not finite tells every stage."""
    for p in stage.parameters:
        if p.grad is not None:
            p.grad = p.grad / stage.scale
    if math.isfinite(stage.clip()):
        stage.update_weights()
        stage.good_steps += 1
        if stage.good_steps % stage.growth_interval == 0:
            stage.scale *= 2
    else:
        stage.good_steps = 0
        stage.scale *= 0.5


@right("08.end_step")
def leaves_early(stage):
    found = any(not math.isfinite(v) for g in gradients_of(stage) for v in g.tolist())
    if stage.any_stage(found):
        stage.scale, stage.good_steps = stage.scale / 2, 0
        return
    for g in gradients_of(stage):
        g /= stage.scale
    stage.clip()
    stage.update_weights()
    update_scale(stage, False)


@wrong("08.end_step", "own gradients only", "fairscale#179")
def each_for_itself(stage):
    skipped = overflows(stage)
    unscale(stage)
    stage.clip()
    if not skipped:
        stage.update_weights()
    update_scale(stage, skipped)


@wrong("08.end_step", "not all stages join", "fairscale#179")
def each_for_itself_and_leaves(stage):
    skipped = overflows(stage)
    if not skipped:
        unscale(stage)
        stage.clip()
        stage.update_weights()
    update_scale(stage, skipped)


@wrong("08.end_step", "not all stages join")
def asks_only_when_in_trouble(stage):
    skipped = overflows(stage) and stage.any_stage(True)
    unscale(stage)
    stage.clip()
    if not skipped:
        stage.update_weights()
    update_scale(stage, skipped)


def ends(stage, before_clip=unscale, after_clip=lambda stage: None, find=overflows, scale=update_scale, skips=True):
    skipped = stage.any_stage(find(stage))
    before_clip(stage)
    stage.clip()
    after_clip(stage)
    if not (skipped and skips):
        stage.update_weights()
    scale(stage, skipped)


@wrong("08.end_step", "not unscaled", "pytorch/examples#1196")
def forgets_unscale(stage):
    ends(stage, before_clip=lambda stage: None)


@wrong("08.end_step", "clipped before unscaled", "pytorch/examples#1196")
def clips_first(stage):
    ends(stage, before_clip=lambda stage: None, after_clip=unscale)


@wrong("08.end_step", "unscaled twice")
def unscales_twice(stage):
    ends(stage, before_clip=lambda stage: unscale(stage, -2))


@wrong("08.end_step", "unscaled again after the clip")
def unscales_again(stage):
    ends(stage, after_clip=unscale)


@wrong("08.end_step", "not unscaled")
def scales_up(stage):
    ends(stage, before_clip=lambda stage: unscale(stage, 1))


@wrong("08.end_step", "not clipped")
def never_clips(stage):
    skipped = stage.any_stage(overflows(stage))
    unscale(stage)
    if not skipped:
        stage.update_weights()
    update_scale(stage, skipped)


@wrong("08.end_step", "updated all the same")
def never_skips(stage):
    ends(stage, skips=False)


@wrong("08.end_step", "zeroed in place of skipped")
def zeroes(stage):
    skipped = stage.any_stage(overflows(stage))
    unscale(stage)
    stage.clip()
    if skipped:
        for g in gradients_of(stage):
            g.zero_()
    stage.update_weights()
    update_scale(stage, skipped)


@wrong("08.end_step", "bad values set to zero")
def replaces_nan(stage):
    skipped = stage.any_stage(overflows(stage))
    for g in gradients_of(stage):
        g.copy_(torch.nan_to_num(g, 0.0, 0.0, 0.0))
    unscale(stage)
    stage.clip()
    stage.update_weights()
    update_scale(stage, skipped)


@wrong("08.end_step", "NaN is missed")
def looks_for_infinity(stage):
    ends(stage, find=lambda stage: any(bool(g.isinf().any()) for g in gradients_of(stage)))


@wrong("08.end_step", "only NaN is looked for")
def looks_for_nan(stage):
    ends(stage, find=lambda stage: any(bool(g.isnan().any()) for g in gradients_of(stage)))


@wrong("08.end_step", "the next scale is divided by")
def scale_first(stage):
    skipped = stage.any_stage(overflows(stage))
    update_scale(stage, skipped)
    unscale(stage)
    stage.clip()
    if not skipped:
        stage.update_weights()


@wrong("08.end_step", "the scale never changes")
def constant_scale(stage):
    ends(stage, scale=lambda stage, skipped: None)


@wrong("08.end_step", "scale kept after a skip")
def only_grows(stage):
    def scale(stage, skipped):
        before = stage.scale
        update_scale(stage, skipped)
        stage.scale = before if skipped else stage.scale

    ends(stage, scale=scale)


@wrong("08.end_step", "never grows")
def only_shrinks(stage):
    def scale(stage, skipped):
        stage.scale *= 0.5 if skipped else 1

    ends(stage, scale=scale)


@wrong("08.end_step", "count kept after a skip")
def count_goes_on(stage):
    def scale(stage, skipped):
        if skipped:
            stage.scale /= 2
        else:
            stage.good_steps += 1
            if stage.good_steps == stage.growth_interval:
                stage.good_steps, stage.scale = 0, stage.scale * 2

    ends(stage, scale=scale)


@wrong("08.end_step", "count kept after a growth")
def grows_ever_after(stage):
    def scale(stage, skipped):
        stage.good_steps = 0 if skipped else stage.good_steps + 1
        if skipped:
            stage.scale /= 2
        elif stage.good_steps >= stage.growth_interval:
            stage.scale *= 2

    ends(stage, scale=scale)


@wrong("08.end_step", "grows a step late")
def one_late(stage):
    def scale(stage, skipped):
        stage.good_steps = 0 if skipped else stage.good_steps + 1
        if skipped:
            stage.scale /= 2
        elif stage.good_steps > stage.growth_interval:
            stage.good_steps, stage.scale = 0, stage.scale * 2

    ends(stage, scale=scale)


@wrong("08.end_step", "good and bad have changed places")
def wrong_way_round(stage):
    ends(stage, scale=lambda stage, skipped: update_scale(stage, not skipped))


# --- next_state -------------------------------------------------------------------------------------------------------


@right("08.next_state")
def counts_down(state, overflowed, rules):
    """As Megatron-LM does: how many more overflows are forgiven."""
    left, good = state.get("left", rules.hysteresis), state.get("good", 0)
    if not overflowed:
        good += 1
        if good < rules.growth_interval:
            return {**state, "good": good}
        return {"scale": min(state["scale"] * rules.growth_factor, rules.largest)}
    if left > 1:
        return {"scale": state["scale"], "left": left - 1}
    return {"scale": max(state["scale"] * rules.backoff_factor, rules.smallest), "left": left - 1}


@right("08.next_state")
def in_place(state, overflowed, rules):
    for name in ("good", "bad"):
        state.setdefault(name, 0)
    state["bad" if overflowed else "good"] += 1
    factor = 1.0
    if overflowed:
        state["good"] = 0
        factor = rules.backoff_factor if state["bad"] >= rules.hysteresis else 1.0
    elif state["good"] == rules.growth_interval:
        state["good"] = state["bad"] = 0
        factor = rules.growth_factor
    state["scale"] = min(max(state["scale"] * factor, rules.smallest), rules.largest)
    return state


def follows(state, overflowed, rules, **other):
    """With mistakes."""
    o = {"late": 0, "row": False, "anew": False, "once": False, "keep": False, "low": True, "high": True, "ever": False}
    o |= other
    scale, good, bad = state["scale"], state.get("good", 0), state.get("bad", 0)
    if overflowed:
        good, bad = good if o["keep"] else 0, bad + 1
        if bad >= rules.hysteresis + o["late"]:
            scale *= rules.backoff_factor
            scale = max(scale, rules.smallest) if o["low"] else scale
            bad = 0 if o["anew"] else bad
    else:
        good += 1
        bad = 0 if o["row"] else bad
        if good == rules.growth_interval or (o["ever"] and good > rules.growth_interval):
            good, bad = good if o["ever"] else 0, bad if o["once"] else 0
            scale *= rules.growth_factor
            scale = min(scale, rules.largest) if o["high"] else scale
    return {"scale": scale, "good": good, "bad": bad}


@wrong("08.next_state", "every overflow lowers")
def as_torch(state, overflowed, rules):
    return follows(state, overflowed, rules._replace(hysteresis=1))


@wrong("08.next_state", "forgives one too many")
def more_than(state, overflowed, rules):
    return follows(state, overflowed, rules, late=1)


@wrong("08.next_state", "only overflows in a row count", "Megatron-LM's docstring; DeepSpeed's consecutive_hysteresis")
def consecutive(state, overflowed, rules):
    return follows(state, overflowed, rules, row=True)


@wrong("08.next_state", "forgives anew after lowering")
def every_nth(state, overflowed, rules):
    return follows(state, overflowed, rules, anew=True)


@wrong("08.next_state", "forgives only once")
def never_renewed(state, overflowed, rules):
    return follows(state, overflowed, rules, once=True)


@wrong("08.next_state", "count kept after an overflow")
def counts_all_good_steps(state, overflowed, rules):
    return follows(state, overflowed, rules, keep=True)


@wrong("08.next_state", "count kept after a growth")
def grows_on(state, overflowed, rules):
    return follows(state, overflowed, rules, ever=True)


@wrong("08.next_state", "count kept after a forgiven overflow")
def forgiven_and_forgotten(state, overflowed, rules):
    forgiven = overflowed and state.get("bad", 0) + 1 < rules.hysteresis
    return follows(state, overflowed, rules, keep=forgiven)


@wrong("08.next_state", "no limits")
def without_limits(state, overflowed, rules):
    return follows(state, overflowed, rules, low=False, high=False)


@wrong("08.next_state", "no smallest")
def without_smallest(state, overflowed, rules):
    return follows(state, overflowed, rules, low=False)


@wrong("08.next_state", "no largest")
def without_largest(state, overflowed, rules):
    return follows(state, overflowed, rules, high=False)


@wrong("08.next_state", "a stopped growth is none")
def stops_at_the_top(state, overflowed, rules):
    new = follows(state, overflowed, rules)
    if not overflowed and state["scale"] == rules.largest == new["scale"]:
        new["bad"] = state.get("bad", 0)
    return new


@wrong("08.next_state", "factors of 2")
def doubles(state, overflowed, rules):
    return follows(state, overflowed, rules._replace(growth_factor=2.0, backoff_factor=0.5))


@wrong("08.next_state", "grows a step late")
def late(state, overflowed, rules):
    return follows(state, overflowed, rules._replace(growth_interval=rules.growth_interval + 1))


@wrong("08.next_state", "state outside the dictionary")
def remembers_outside(state, overflowed, rules, memory={}):  # noqa: B006
    new = follows({**memory, **state}, overflowed, rules)
    memory.update(good=new["good"], bad=new["bad"])
    return {"scale": new["scale"]}


@wrong("08.next_state", "more than three numbers")
def keeps_more(state, overflowed, rules):
    new = follows(state, overflowed, rules)
    return {**new, "step": state.get("step", 0) + 1}


@wrong("08.next_state", "keeps the whole history")
def keeps_history(state, overflowed, rules):
    return {"scale": state["scale"], "history": [*state.get("history", []), overflowed]}


@wrong("08.next_state", "no return")
def no_return(state, overflowed, rules):
    state["scale"] = follows(state, overflowed, rules)["scale"]


# --- skip_together ----------------------------------------------------------------------------------------------------


def found(rank):
    return any(not bool(g.isfinite().all()) for g in rank.gradients if g is not None)


def disseminate(rank, known, combine, drop=False, rounds=None):
    for r in range((rank.world_size - 1).bit_length() if rounds is None else rounds):
        handle = rank.begin_send(known, (rank.rank + 2**r) % rank.world_size)
        known = combine(known, rank.receive((rank.rank - 2**r) % rank.world_size))
        if not drop:
            rank.wait(handle)
    return known


@right("08.skip_together")
def backwards_round_the_ring(rank):
    handles, known, step = [], 1.0 if found(rank) else 0.0, 1
    while step < rank.world_size:
        handles.append(rank.begin_send(known, (rank.rank - step) % rank.world_size))
        known = max(known, rank.receive((rank.rank + step) % rank.world_size))
        step = 2 * step
    for handle in handles:
        rank.wait(handle)
    return known > 0


@right("08.skip_together")
def counts_as_sums(rank):
    """Sums count some ranks twice, which does no harm to the question whether there is any."""
    return disseminate(rank, int(found(rank)), lambda a, b: a + b) > 0


@right("08.skip_together")
def by_norms(rank):
    norm = sum(float(g.norm()) for g in rank.gradients if g is not None)
    return not math.isfinite(disseminate(rank, norm, lambda a, b: a + b))


@wrong("08.skip_together", "own gradients only", "fairscale#179")
def for_itself(rank):
    return found(rank)


@wrong("08.skip_together", "own gradients only", "fairscale#179")
def ignores_what_it_hears(rank):
    disseminate(rank, found(rank), lambda a, b: a)
    return found(rank)


@wrong("08.skip_together", "NaN is missed")
def infinity_only(rank):
    own = any(bool(g.isinf().any()) for g in rank.gradients if g is not None)
    return bool(disseminate(rank, own, lambda a, b: bool(a or b)))


@wrong("08.skip_together", "only NaN is looked for")
def nan_only(rank):
    own = any(bool((g != g).any()) for g in rank.gradients if g is not None)
    return bool(disseminate(rank, own, lambda a, b: bool(a or b)))


@wrong("08.skip_together", "minus infinity is missed")
def largest_only(rank):
    own = any(not bool(g.max() < math.inf) for g in rank.gradients if g is not None)
    return bool(disseminate(rank, own, lambda a, b: bool(a or b)))


@wrong("08.skip_together", "NaN lost in max")
def by_maximum(rank):
    largest = max((float(g.abs().max()) for g in rank.gradients if g is not None), default=0.0)
    return not math.isfinite(disseminate(rank, largest, max))


@wrong("08.skip_together", "a send that nobody waits for")
def drops_handles(rank):
    return bool(disseminate(rank, found(rank), lambda a, b: bool(a or b), drop=True))


@wrong("08.skip_together", "too few rounds")
def rounded_down(rank):
    return bool(disseminate(rank, found(rank), lambda a, b: bool(a or b), rounds=int(math.log2(rank.world_size))))


@wrong("08.skip_together", "a message to itself")
def hard_coded(rank):
    return bool(disseminate(rank, found(rank), lambda a, b: bool(a or b), rounds=2 if rank.world_size > 1 else 0))


@wrong("08.skip_together", "everyone tells everyone")
def tells_everyone(rank):
    others = [k for k in range(rank.world_size) if k != rank.rank]
    handles = [rank.begin_send(found(rank), k) for k in others]
    heard = [rank.receive(k) for k in others]
    for handle in handles:
        rank.wait(handle)
    return found(rank) or any(heard)


@wrong("08.skip_together", "once round the ring")
def ring(rank):
    known = passed = found(rank)
    for _ in range(rank.world_size - 1):
        handle = rank.begin_send(passed, (rank.rank + 1) % rank.world_size)
        passed = rank.receive((rank.rank - 1) % rank.world_size)
        rank.wait(handle)
        known = known or passed == 1
    return known


@wrong("08.skip_together", "one rank collects")
def collects(rank):
    known = found(rank)
    if rank.rank > 0:
        rank.wait(rank.begin_send(known, 0))
        return rank.receive(0) == 1
    known = any([known, *[rank.receive(k) == 1 for k in range(1, rank.world_size)]])
    for handle in [rank.begin_send(known, k) for k in range(1, rank.world_size)]:
        rank.wait(handle)
    return known


@wrong("08.skip_together", "along a chain")
def chain(rank):
    k, last, known = rank.rank, rank.world_size - 1, found(rank)
    if k > 0:
        known = rank.receive(k - 1) == 1 or known
    if k < last:
        rank.wait(rank.begin_send(known, k + 1))
        known = rank.receive(k + 1) == 1
    if k > 0:
        rank.wait(rank.begin_send(known, k - 1))
    return known


@wrong("08.skip_together", "the news travels one way")
def downstream(rank):
    known = found(rank)
    if rank.rank > 0:
        known = rank.receive(rank.rank - 1) == 1 or known
    if rank.rank < rank.world_size - 1:
        rank.wait(rank.begin_send(known, rank.rank + 1))
    return known


@wrong("08.skip_together", "one neighbour only")
def left_neighbour(rank):
    return bool(disseminate(rank, found(rank), lambda a, b: bool(a or b), rounds=int(rank.world_size > 1)))


@wrong("08.skip_together", "all wait for a send", "pytorch#172668")
def sends_first(rank):
    known, step = found(rank), 1
    while step < rank.world_size:
        rank.wait(rank.begin_send(known, (rank.rank + step) % rank.world_size))
        known = rank.receive((rank.rank - step) % rank.world_size) == 1 or known
        step *= 2
    return known


@wrong("08.skip_together", "all receive first")
def receives_first(rank):
    known, step = found(rank), 1
    while step < rank.world_size:
        heard = rank.receive((rank.rank - step) % rank.world_size)
        rank.wait(rank.begin_send(known, (rank.rank + step) % rank.world_size))
        known = known or heard == 1
        step *= 2
    return known


@wrong("08.skip_together", "a rank that is not there")
def exclusive_or(rank):
    """Recursive doubling, which needs a power of two."""
    known, step = found(rank), 1
    while step < rank.world_size:
        handle = rank.begin_send(known, rank.rank ^ step)
        known = rank.receive(rank.rank ^ step) == 1 or known
        rank.wait(handle)
        step *= 2
    return known


@wrong("08.skip_together", "messages depend on what is found")
def short_circuit(rank):
    known, step = found(rank), 1
    while step < rank.world_size:
        handle = rank.begin_send(known, (rank.rank + step) % rank.world_size)
        known = known or rank.receive((rank.rank - step) % rank.world_size) == 1
        rank.wait(handle)
        step *= 2
    return known


@wrong("08.skip_together", "messages depend on what is found")
def sends_only_news(rank):
    known, step = found(rank), 1
    while step < rank.world_size:
        handle = rank.begin_send(known, (rank.rank + step) % rank.world_size) if known else None
        known = rank.receive((rank.rank - step) % rank.world_size) == 1 or known
        if handle is not None:
            rank.wait(handle)
        step *= 2
    return known


@wrong("08.skip_together", "nothing is passed on")
def never_passes_on(rank):
    own = known = found(rank)
    step = 1
    while step < rank.world_size:
        handle = rank.begin_send(own, (rank.rank + step) % rank.world_size)
        known = rank.receive((rank.rank - step) % rank.world_size) == 1 or known
        rank.wait(handle)
        step *= 2
    return known


@wrong("08.skip_together", "skip and update have changed places")
def is_good(rank):
    return not disseminate(rank, found(rank), lambda a, b: bool(a or b))


@wrong("08.skip_together", "all instead of any")
def all_must_agree(rank):
    return bool(disseminate(rank, found(rank), lambda a, b: bool(a and b)))


EQUIVALENT = {
    "08.next_state": {
        "arguments swapped, line 8, column 20: max(rules.smallest, scale * rules.backoff_factor) -> "
        "max(scale * rules.backoff_factor, rules.smallest)": "the larger of two numbers, in either order",
        "arguments swapped, line 13, column 20: min(rules.largest, scale * rules.growth_factor) -> "
        "min(scale * rules.growth_factor, rules.largest)": "the smaller of two numbers, in either order",
    },
}
