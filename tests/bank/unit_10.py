"""Answers to unit 10."""

import cmath
import copy
import math
import warnings

import torch
from torch.optim.lr_scheduler import LambdaLR

from course_utils.optimization import Noam
from tests.bank import right, wrong

# --- noam_rate --------------------------------------------------------------------------------------------------------


@right("10.noam_rate")
def two_branches(step, d_model, warm_up, factor):
    peak = factor / math.sqrt(d_model * warm_up)
    if step <= warm_up:
        return peak * step / warm_up
    return peak * math.sqrt(warm_up / step)


@right("10.noam_rate")
def in_tensors(step, d_model, warm_up, factor):
    n = torch.tensor(float(step))
    return factor / d_model**0.5 * torch.minimum(n.rsqrt(), n / warm_up / warm_up**0.5)


@wrong("10.noam_rate", "step from 0", "verl#3674")
def counts_from_zero(step, d_model, warm_up, factor):
    n = step - 1
    return factor * d_model**-0.5 * min(max(n, 1) ** -0.5, n * warm_up**-1.5)


@wrong("10.noam_rate", "division by 0", "yoyodyne#300")
def counts_from_zero_unguarded(step, d_model, warm_up, factor):
    n = step - 1
    return factor * d_model**-0.5 * min((1 / n) ** 0.5, n * warm_up**-1.5)


@wrong("10.noam_rate", "step counted twice")
def adds_one(step, d_model, warm_up, factor):
    step += 1
    return factor * d_model**-0.5 * min(step**-0.5, step * warm_up**-1.5)


@wrong("10.noam_rate", "warm-up power")
def wrong_power(step, d_model, warm_up, factor):
    return factor * d_model**-0.5 * min(step**-0.5, step * warm_up**-0.5)


@wrong("10.noam_rate", "max instead of min")
def takes_the_larger(step, d_model, warm_up, factor):
    return factor * d_model**-0.5 * max(step**-0.5, step * warm_up**-1.5)


@wrong("10.noam_rate", "sum instead of min")
def adds_them_up(step, d_model, warm_up, factor):
    return factor * d_model**-0.5 * (step**-0.5 + step * warm_up**-1.5)


@wrong("10.noam_rate", "d_model^0.5")
def wider_is_faster(step, d_model, warm_up, factor):
    return factor * d_model**0.5 * min(step**-0.5, step * warm_up**-1.5)


@wrong("10.noam_rate", "no d_model")
def without_width(step, d_model, warm_up, factor):
    return factor * min(step**-0.5, step * warm_up**-1.5)


@wrong("10.noam_rate", "1/d_model")
def without_the_root(step, d_model, warm_up, factor):
    return factor / d_model * min(step**-0.5, step * warm_up**-1.5)


@wrong("10.noam_rate", "no factor")
def without_factor(step, d_model, warm_up, factor):
    return d_model**-0.5 * min(step**-0.5, step * warm_up**-1.5)


@wrong("10.noam_rate", "never falls")
def only_the_rise(step, d_model, warm_up, factor):
    return factor * d_model**-0.5 * step * warm_up**-1.5


@wrong("10.noam_rate", "no warm-up")
def only_the_fall(step, d_model, warm_up, factor):
    return factor * d_model**-0.5 * step**-0.5


@wrong("10.noam_rate", "falls with the step itself")
def falls_too_fast(step, d_model, warm_up, factor):
    peak = factor / math.sqrt(d_model * warm_up)
    return peak * min(step / warm_up, warm_up / step)


@wrong("10.noam_rate", "the width of the lesson")
def hard_coded(step, d_model, warm_up, factor):
    return factor * 128**-0.5 * min(step**-0.5, step * warm_up**-1.5)


@wrong("10.noam_rate", "calls the package")
def asks_the_package(step, d_model, warm_up, factor):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = Noam(optimizer, d_model, warm_up, factor)
    scheduler.last_epoch = step - 1
    return scheduler.get_lr()[0]


@wrong("10.noam_rate", "no return")
def returns_nothing(step, d_model, warm_up, factor):
    factor * d_model**-0.5 * min(step**-0.5, step * warm_up**-1.5)


# --- cosine_rate ------------------------------------------------------------------------------------------------------


@right("10.cosine_rate")
def on_the_circle(step, warm_up, total, peak, final):
    if warm_up and step <= warm_up:
        return step / warm_up * peak
    if step >= total:
        return final
    z = cmath.exp(1j * math.pi * (step - warm_up) / (total - warm_up))
    middle, half = (peak + final) / 2, (peak - final) / 2
    return middle + half * z.real


@right("10.cosine_rate")
def by_a_tangent(step, warm_up, total, peak, final):
    """With t, the tangent of half the angle, the weight of the peak is 1 / (1 + t^2)."""
    up = min(step, warm_up) / warm_up if warm_up > 0 else 1.0
    down = max(0, min(step, total) - warm_up)
    if down == 0:
        return peak * up
    t = math.tan(math.pi * down / (total - warm_up) / 2)
    return final + (peak - final) / (1 + t * t)


@right("10.cosine_rate")
def in_torch(step, warm_up, total, peak, final):
    if step < warm_up:
        return torch.lerp(torch.tensor(0.0), torch.tensor(peak), step / warm_up)
    share = torch.tensor((step - warm_up) / (total - warm_up), dtype=torch.float64).clamp(0, 1)
    return torch.lerp(torch.tensor(final).double(), torch.tensor(peak).double(), torch.cos(share * torch.pi / 2) ** 2)


def cosine(step, warm_up, total, peak, final, share=None, weight=None, rise=None):
    """The right one, unless a part of it is given."""
    if step < warm_up:
        return peak * step / warm_up if rise is None else rise
    done = min(1.0, (step - warm_up) / (total - warm_up)) if share is None else share
    w = 0.5 + 0.5 * math.cos(math.pi * done) if weight is None else weight(done)
    return w * peak + (1 - w) * final


@wrong("10.cosine_rate", "step from 0")
def cosine_from_zero(step, warm_up, total, peak, final):
    return cosine(step - 1, warm_up, total, peak, final)


@wrong("10.cosine_rate", "step counted twice")
def cosine_plus_one(step, warm_up, total, peak, final):
    return cosine(step + 1, warm_up, total, peak, final)


@wrong("10.cosine_rate", "rises again")
def never_stops(step, warm_up, total, peak, final):
    return cosine(step, warm_up, total, peak, final, share=(step - warm_up) / (total - warm_up))


@wrong("10.cosine_rate", "restarts")
def restarts(step, warm_up, total, peak, final):
    if step <= warm_up:
        return cosine(step, warm_up, total, peak, final)
    return cosine(step, warm_up, total, peak, final, share=(step - warm_up) % (total - warm_up) / (total - warm_up))


@wrong("10.cosine_rate", "a whole period")
def whole_period(step, warm_up, total, peak, final):
    return cosine(step, warm_up, total, peak, final, weight=lambda s: (1 + math.cos(2 * math.pi * s)) / 2)


@wrong("10.cosine_rate", "a quarter of a period")
def quarter_period(step, warm_up, total, peak, final):
    return cosine(step, warm_up, total, peak, final, weight=lambda s: math.cos(math.pi / 2 * s))


@wrong("10.cosine_rate", "degrees")
def in_degrees(step, warm_up, total, peak, final):
    return cosine(step, warm_up, total, peak, final, weight=lambda s: 0.5 * (1 + math.cos(180 * s)))


@wrong("10.cosine_rate", "a straight fall")
def straight(step, warm_up, total, peak, final):
    return cosine(step, warm_up, total, peak, final, weight=lambda s: 1 - s)


@wrong("10.cosine_rate", "warm-up counted twice", "pytorch-image-models#1242")
def fall_from_step_zero(step, warm_up, total, peak, final):
    return cosine(step, warm_up, total, peak, final, share=min(1.0, step / total))


@wrong("10.cosine_rate", "does not reach the end")
def fall_too_long(step, warm_up, total, peak, final):
    return cosine(step, warm_up, total, peak, final, share=min(1.0, (step - warm_up) / total))


@wrong("10.cosine_rate", "one step too late at the peak")
def one_step_too_late(step, warm_up, total, peak, final):
    return cosine(step, warm_up, total, peak, final, rise=peak * step / (warm_up + 1))


@wrong("10.cosine_rate", "warm-up from the final rate")
def up_from_final(step, warm_up, total, peak, final):
    rise = final + (peak - final) * step / warm_up if warm_up else None
    return cosine(step, warm_up, total, peak, final, rise=rise)


@wrong("10.cosine_rate", "falls to 0")
def falls_to_zero(step, warm_up, total, peak, final):
    return cosine(step, warm_up, total, peak, 0.0)


@wrong("10.cosine_rate", "final rate on top")
def final_on_top(step, warm_up, total, peak, final):
    return cosine(step, warm_up, total, peak, 0.0) + final * (step >= warm_up)


@wrong("10.cosine_rate", "cut off at the final rate")
def cut_off(step, warm_up, total, peak, final):
    fallen = cosine(step, warm_up, total, peak, 0.0)
    return fallen if step < warm_up else max(final, fallen)


@wrong("10.cosine_rate", "no rate without a warm-up")
def no_warm_up_of_zero(step, warm_up, total, peak, final):
    return min(peak * step / warm_up, cosine(step, warm_up, total, peak, final))


@wrong("10.cosine_rate", "the example's numbers")
def only_the_example(step, warm_up, total, peak, final):
    return cosine(step, 10, 100, 1e-3, 1e-5)


# --- resumable --------------------------------------------------------------------------------------------------------


@right("10.resumable")
def a_class(optimizer, rate_of):
    class Schedule:
        def __init__(self):
            self.state = {"update": 1, "bases": [group["lr"] for group in optimizer.param_groups]}
            self.write()

        def write(self):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = self.state["bases"][i] * rate_of(self.state["update"])

        def step(self, skipped):
            self.state["update"] += 0 if skipped else 1
            self.write()

        def save(self):
            return copy.deepcopy(self.state)

        def load(self, state):
            self.state.update(state)
            self.write()

    schedule = Schedule()
    return schedule.step, schedule.save, schedule.load


@right("10.resumable")
def on_top_of_torch(optimizer, rate_of):
    scheduler = LambdaLR(optimizer, lambda epoch: rate_of(epoch + 1))

    def step(skipped):
        if not skipped:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step()

    def load(state):
        scheduler.load_state_dict(state)
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    return step, lambda: copy.deepcopy(scheduler.state_dict()), load


@right("10.resumable")
def as_text(optimizer, rate_of):
    """The base rates lie in the optimizer's groups, as torch keeps them, and travel in the state as well."""
    count = [0]
    for group in optimizer.param_groups:
        group.setdefault("base", group["lr"])

    def write():
        for group in optimizer.param_groups:
            group["lr"] = rate_of(count[0] + 1) * group["base"]

    def step(skipped):
        if skipped:
            return
        count[0] += 1
        write()

    def save():
        return " ".join([str(count[0]), *(repr(group["base"]) for group in optimizer.param_groups)])

    def load(state):
        number, *bases = state.split()
        count[0] = int(number)
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["base"] = float(base)
        write()

    write()
    return step, save, load


def scheduled(optimizer, rate_of, **changed):
    """The right one, unless a part of it is changed."""
    held = optimizer.param_groups
    groups = (lambda: held) if changed.get("holds_groups") else (lambda: optimizer.param_groups)
    now = {"updates": 0, "bases": [group["lr"] for group in groups()]}
    count = changed.get("count", lambda updates, skipped: updates + (not skipped))
    first = changed.get("first", 1)

    def write():
        for group, base in zip(groups(), now["bases"], strict=True):
            group["lr"] = (1.0 if changed.get("no_bases") else base) * rate_of(now["updates"] + first)

    def step(skipped):
        now["updates"] = count(now["updates"], skipped)
        write()

    def load(state):
        changed.get("load", now.update)(state)
        if "after_load" in changed:
            now["updates"] += changed["after_load"]
        if not changed.get("silent"):
            write()

    write()
    return step, lambda: changed.get("save", copy.deepcopy)(now), load


@wrong("10.resumable", "rate moves on a skipped step", "Lightning#18828")
def counts_skipped(optimizer, rate_of):
    return scheduled(optimizer, rate_of, count=lambda updates, skipped: updates + 1)


@wrong("10.resumable", "rate moves only on a skipped step")
def wrong_way_round(optimizer, rate_of):
    return scheduled(optimizer, rate_of, count=lambda updates, skipped: updates + skipped)


@wrong("10.resumable", "begins again after an overflow")
def starts_over(optimizer, rate_of):
    return scheduled(optimizer, rate_of, count=lambda updates, skipped: 0 if skipped else updates + 1)


@wrong("10.resumable", "goes back after an overflow")
def goes_back(optimizer, rate_of):
    return scheduled(optimizer, rate_of, count=lambda updates, skipped: max(0, updates + (-1 if skipped else 1)))


@wrong("10.resumable", "state not restored")
def keeps_its_own_count(optimizer, rate_of):
    return scheduled(optimizer, rate_of, save=lambda now: {"bases": list(now["bases"])})


@wrong("10.resumable", "state not restored")
def loads_nothing(optimizer, rate_of):
    return scheduled(optimizer, rate_of, load=lambda state: None)


@wrong("10.resumable", "the loaded rate comes late", "pytorch#65342")
def writes_nothing_on_load(optimizer, rate_of):
    now = {"updates": 0, "bases": [group["lr"] for group in optimizer.param_groups]}

    def write():
        for group, base in zip(optimizer.param_groups, now["bases"], strict=True):
            group["lr"] = base * rate_of(now["updates"] + 1)

    def step(skipped):
        if not skipped:
            now["updates"] += 1
            write()

    write()
    return step, lambda: copy.deepcopy(now), now.update


@wrong("10.resumable", "base rates from a loaded optimizer", "nanotron#256")
def saves_the_counter(optimizer, rate_of):
    return scheduled(optimizer, rate_of, save=lambda now: {"updates": now["updates"]})


@wrong("10.resumable", "parameter groups of before")
def holds_the_groups(optimizer, rate_of):
    return scheduled(optimizer, rate_of, holds_groups=True)


@wrong("10.resumable", "one step ahead after a stop")
def one_too_many(optimizer, rate_of):
    return scheduled(optimizer, rate_of, after_load=1)


@wrong("10.resumable", "one step behind after a stop")
def one_too_few(optimizer, rate_of):
    return scheduled(
        optimizer, rate_of, save=lambda now: {"updates": max(0, now["updates"] - 1), "bases": list(now["bases"])}
    )


@wrong("10.resumable", "one step ahead")
def begins_at_two(optimizer, rate_of):
    return scheduled(optimizer, rate_of, first=2)


@wrong("10.resumable", "asks for update 0")
def begins_at_zero(optimizer, rate_of):
    return scheduled(optimizer, rate_of, first=0)


@wrong("10.resumable", "no base rates")
def forgets_base_rates(optimizer, rate_of):
    return scheduled(optimizer, rate_of, no_bases=True)


@wrong("10.resumable", "the saved state goes on")
def saves_itself(optimizer, rate_of):
    return scheduled(optimizer, rate_of, save=lambda now: now)


@wrong("10.resumable", "state not plain")
def saves_a_tensor(optimizer, rate_of):
    return scheduled(optimizer, rate_of, save=lambda now: {**now, "updates": torch.tensor(now["updates"])})


@wrong("10.resumable", "state too large")
def saves_the_history(optimizer, rate_of):
    history = []

    def count(updates, skipped):
        history.append([group["lr"] for group in optimizer.param_groups])
        return updates + (not skipped)

    return scheduled(optimizer, rate_of, count=count, save=lambda now: {**copy.deepcopy(now), "history": history[:]})


@wrong("10.resumable", "each rate comes late")
def nothing_at_the_beginning(optimizer, rate_of):
    done, bases = [0], [group["lr"] for group in optimizer.param_groups]

    def step(skipped):
        if not skipped:
            done[0] += 1
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * rate_of(done[0])

    return (
        step,
        lambda: [done[0], bases[:]],
        lambda state: (done.__setitem__(0, state[0]), bases.__setitem__(slice(None), state[1])),
    )


@wrong("10.resumable", "each rate made from the one before")
def compounds(optimizer, rate_of):
    done = [0]

    def write():
        for group in optimizer.param_groups:
            group["lr"] *= rate_of(done[0] + 1)

    def step(skipped):
        if not skipped:
            done[0] += 1
            write()

    write()
    return step, lambda: done[0], lambda state: done.__setitem__(0, state)


@wrong("10.resumable", "two functions")
def no_load(optimizer, rate_of):
    return scheduled(optimizer, rate_of)[:2]


@wrong("10.resumable", "no return")
def returns_no_functions(optimizer, rate_of):
    scheduled(optimizer, rate_of)


EQUIVALENT = {
    "10.noam_rate": {
        "arguments swapped, line 4, column 36: min(step ** (-0.5), step * warm_up ** (-1.5)) -> "
        "min(step * warm_up ** (-1.5), step ** (-0.5))": "the smaller of two finite numbers, in either order",
    },
    "10.cosine_rate": {
        "operator, line 4, column 7: step < warm_up -> step <= warm_up": "in step warm_up rise and fall both have the "
        "peak, to the last digits of a float",
        "arguments swapped, line 6, column 12: min(1.0, (step - warm_up) / (total - warm_up)) -> "
        "min((step - warm_up) / (total - warm_up), 1.0)": "the smaller of two finite numbers, in either order",
    },
    "10.resumable": {
        "constant, line 8, column 69: True -> False": "there is one base rate for each parameter group, so neither "
        "sequence is longer",
    },
}
