"""Answers to unit 09."""

import math

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from tests.bank import right, wrong

# --- clip_rank --------------------------------------------------------------------------------------------------------


def own_of(rank):
    return [(place, parameter.grad) for place, parameter in rank.parameters if parameter.grad is not None]


def unscale(rank, loss_scale):
    for _, gradient in own_of(rank):
        gradient /= loss_scale


def global_norm(rank):
    slots = torch.zeros(rank.num_parameters)
    for place, gradient in own_of(rank):
        slots[place] = gradient.norm()
    return rank.add_up(slots).norm().item()


def multiply(rank, factor):
    for _, gradient in own_of(rank):
        gradient *= factor


@right("09.clip_rank")
def with_the_scale_in_the_norm(rank, max_norm, loss_scale):
    """Powers of two change no bit, so the norm may be unscaled instead of each gradient."""
    norms = {place: torch.linalg.vector_norm(p.grad) for place, p in rank.parameters if p.grad is not None}
    slots = torch.tensor([float(norms.get(place, 0.0)) for place in range(rank.num_parameters)])
    total = float(torch.linalg.vector_norm(rank.add_up(slots / loss_scale)))
    factor = min(1.0, max_norm / (total + 1e-6)) if math.isfinite(total) else 1.0
    for _, parameter in rank.parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad * (factor / loss_scale)
    return total


@right("09.clip_rank")
def with_clamp(rank, max_norm, loss_scale):
    slots = torch.zeros(rank.num_parameters)
    for place, parameter in rank.parameters:
        if parameter.grad is None:
            continue
        parameter.grad.mul_(1.0 / loss_scale)
        slots[place] = parameter.grad.norm()
    total = rank.add_up(slots).norm()
    if torch.isfinite(total):
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for _, parameter in rank.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return total.item()


@wrong("09.clip_rank", "a stage clipped by its own norm", "torchtitan#596, Modalities#313, pytorch#162638")
def by_its_own_norm(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    return clip_grad_norm_([p for _, p in rank.parameters], max_norm).item()


@wrong("09.clip_rank", "clipped before it is unscaled", "pytorch/examples#1196")
def clips_first(rank, max_norm, loss_scale):
    total = global_norm(rank)
    if total > max_norm:
        multiply(rank, max_norm / total)
    unscale(rank, loss_scale)
    return total


@wrong("09.clip_rank", "clipped before it is unscaled")
def unscales_the_norm_too_late(rank, max_norm, loss_scale):
    total = global_norm(rank)
    if total > max_norm:
        multiply(rank, max_norm / total)
    unscale(rank, loss_scale)
    return total / loss_scale


@wrong("09.clip_rank", "never unscaled")
def never_unscaled(rank, max_norm, loss_scale):
    total = global_norm(rank)
    if total > max_norm:
        multiply(rank, max_norm / total)
    return total


@wrong("09.clip_rank", "norms added up")
def adds_norms_up(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    total = rank.add_up(torch.tensor([sum(g.norm().item() for _, g in own_of(rank))])).item()
    if max_norm < total < math.inf:
        multiply(rank, max_norm / total)
    return total


@wrong("09.clip_rank", "stages' norms added up")
def adds_stages_up(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    own = [g for _, g in own_of(rank)]
    total = rank.add_up(torch.tensor([float(get_total_norm(own))])).item()
    if max_norm < total < math.inf:
        multiply(rank, max_norm / total)
    return total


@wrong("09.clip_rank", "no root")
def squares_without_a_root(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    total = rank.add_up(torch.tensor([sum(g.pow(2).sum().item() for _, g in own_of(rank))])).item()
    if max_norm < total < math.inf:
        multiply(rank, max_norm / total)
    return total


@wrong("09.clip_rank", "each gradient by its own norm")
def one_by_one(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    total = global_norm(rank)
    for _, gradient in own_of(rank):
        gradient *= min(1.0, max_norm / (gradient.norm().item() + 1e-6))
    return total


@wrong("09.clip_rank", "each element by itself")
def clamps_elements(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    total = global_norm(rank)
    for _, gradient in own_of(rank):
        gradient.clamp_(-max_norm, max_norm)
    return total


@wrong("09.clip_rank", "small gradients made longer")
def always_to_the_bound(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    total = global_norm(rank)
    if math.isfinite(total):
        multiply(rank, max_norm / total)
    return total


@wrong("09.clip_rank", "the norm after clipping")
def returns_the_norm_after(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    total = global_norm(rank)
    if max_norm < total < math.inf:
        multiply(rank, max_norm / total)
        return max_norm
    return total


@wrong("09.clip_rank", "clipped to 1")
def to_one(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    total = global_norm(rank)
    if 1 < total < math.inf:
        multiply(rank, 1 / total)
    return total


@wrong("09.clip_rank", "a norm that is not finite spoils all")
def without_a_look_at_nan(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    total = global_norm(rank)
    multiply(rank, torch.clamp(max_norm / torch.tensor(total + 1e-6), max=1.0))
    return total


@wrong("09.clip_rank", "a gradient that is None")
def without_a_look_at_none(rank, max_norm, loss_scale):
    slots = torch.zeros(rank.num_parameters)
    for place, parameter in rank.parameters:
        parameter.grad /= loss_scale
        slots[place] = parameter.grad.norm()
    total = rank.add_up(slots).norm().item()
    if max_norm < total < math.inf:
        for _, parameter in rank.parameters:
            parameter.grad *= max_norm / total
    return total


@wrong("09.clip_rank", "a stage that does not take part")
def stays_away(rank, max_norm, loss_scale):
    if not rank.parameters:
        return 0.0
    unscale(rank, loss_scale)
    total = global_norm(rank)
    if max_norm < total < math.inf:
        multiply(rank, max_norm / total)
    return total


@wrong("09.clip_rank", "not the bits of one device", "torchtitan#4312")
def one_sum_per_stage(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    squares = sum(gradient.pow(2).sum() for _, gradient in own_of(rank))
    total = rank.add_up(torch.tensor([float(squares)])).sqrt().item()
    if max_norm < total < math.inf:
        multiply(rank, max_norm / total)
    return total


@wrong("09.clip_rank", "more than one exchange")
def one_exchange_for_each_parameter(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    own = dict(own_of(rank))
    norms = [rank.add_up(torch.tensor([own[i].norm().item() if i in own else 0.0])) for i in range(rank.num_parameters)]
    total = torch.cat(norms).norm().item()
    if max_norm < total < math.inf:
        multiply(rank, max_norm / total)
    return total


@wrong("09.clip_rank", "slots from the first on")
def slots_in_order(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    slots = torch.zeros(rank.num_parameters)
    for number, (_, gradient) in enumerate(own_of(rank)):
        slots[number] = gradient.norm()
    total = rank.add_up(slots).norm().item()
    if max_norm < total < math.inf:
        multiply(rank, max_norm / total)
    return total


@wrong("09.clip_rank", "no return")
def no_return(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    total = global_norm(rank)
    if max_norm < total < math.inf:
        multiply(rank, max_norm / total)


@wrong("09.clip_rank", "nothing clipped")
def drops_what_it_makes(rank, max_norm, loss_scale):
    unscale(rank, loss_scale)
    total = global_norm(rank)
    if max_norm < total < math.inf:
        for _, gradient in own_of(rank):
            gradient = gradient * (max_norm / total)
    return total


# --- norm_of_all ------------------------------------------------------------------------------------------------------


def number_of(gradients, p):
    own = [torch.linalg.vector_norm(g.double(), p).item() for g in gradients if g is not None]
    return torch.linalg.vector_norm(torch.tensor([0.0, *own], dtype=torch.float64), p).item()


@right("09.norm_of_all")
def by_the_definition(gradients, p, tell):
    sizes = [x.abs() for x in (g.double() for g in gradients if g is not None)]
    if p == math.inf:
        told = torch.tensor(tell(torch.cat([torch.zeros(1, dtype=torch.float64), *sizes]).max().item()))
        return told.max().item()
    return sum(tell(sum(float((x**p).sum()) for x in sizes))) ** (1 / p)


@right("09.norm_of_all")
def with_float32_and_a_loop(gradients, p, tell):
    total = 0.0
    for gradient in gradients:
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient, p, dtype=torch.float32).item()
            if p == math.inf:
                total = norm if math.isnan(norm) or norm > total else total
            else:
                total += norm**p
    told = tell(total if p == math.inf else total ** (1 / p))
    if p == math.inf:
        return math.nan if any(map(math.isnan, told)) else max(told)
    return sum(number**p for number in told) ** (1 / p)


@right("09.norm_of_all")
def with_torchs_own(gradients, p, tell):
    own = get_total_norm([g.double() for g in gradients if g is not None], norm_type=p)
    return get_total_norm([torch.tensor([number], dtype=torch.float64) for number in tell(own)], norm_type=p).item()


@wrong("09.norm_of_all", "a stage's own norm", "torchtitan#596")
def own_norm(gradients, p, tell):
    return number_of(gradients, p)


@wrong("09.norm_of_all", "norms added up")
def adds_norms(gradients, p, tell):
    return sum(tell(number_of(gradients, p)))


@wrong("09.norm_of_all", "no root")
def powers_without_a_root(gradients, p, tell):
    number = number_of(gradients, p)
    if p == math.inf:
        return torch.tensor(tell(number)).max().item()
    return sum(tell(number**p))


@wrong("09.norm_of_all", "p=inf as a sum")
def sums_maxima(gradients, p, tell):
    told = tell(number_of(gradients, p))
    return sum(told) if p == math.inf else sum(number**p for number in told) ** (1 / p)


@wrong("09.norm_of_all", "a maximum for every p", "fairscale#167")
def always_the_maximum(gradients, p, tell):
    return torch.tensor(tell(number_of(gradients, p)), dtype=torch.float64).max().item()


@wrong("09.norm_of_all", "2-norm of the stages' norms")
def hypot_of_norms(gradients, p, tell):
    return math.sqrt(sum(number**2 for number in tell(number_of(gradients, p))))


@wrong("09.norm_of_all", "roots taken twice")
def roots_taken_twice(gradients, p, tell):
    told = tell(number_of(gradients, p))
    return torch.tensor(told).max().item() if p == math.inf else sum(told) ** (1 / p)


@wrong("09.norm_of_all", "a NaN lost in a maximum")
def with_max(gradients, p, tell):
    told = tell(number_of(gradients, p))
    return max(told) if p == math.inf else sum(number**p for number in told) ** (1 / p)


@wrong("09.norm_of_all", "p is not used")
def always_two(gradients, p, tell):
    return math.sqrt(sum(number**2 for number in tell(number_of(gradients, 2))))


@wrong("09.norm_of_all", "largest instead of largest in size")
def without_abs(gradients, p, tell):
    if p == math.inf:
        own = [g.double() for g in gradients if g is not None]
        return torch.tensor(tell(max_or(own)), dtype=torch.float64).max().item()
    return sum(number**p for number in tell(number_of(gradients, p))) ** (1 / p)


def max_or(tensors):
    return torch.cat(tensors).max().item() if tensors and sum(t.numel() for t in tensors) else -math.inf


@wrong("09.norm_of_all", "computed in the gradients' precision", "torchtitan#4135")
def in_their_precision(gradients, p, tell):
    norms = [torch.linalg.vector_norm(g, p).item() for g in gradients if g is not None]
    told = tell(torch.linalg.vector_norm(torch.tensor([0.0, *norms], dtype=torch.float64), p).item())
    return torch.linalg.vector_norm(torch.tensor(told, dtype=torch.float64), p).item()


@wrong("09.norm_of_all", "powers that do not fit")
def powers_in_their_precision(gradients, p, tell):
    if p == math.inf:
        return torch.tensor(tell(number_of(gradients, p)), dtype=torch.float64).max().item()
    own = sum(float((g.abs() ** p).sum()) for g in gradients if g is not None)
    return sum(tell(own)) ** (1 / p)


@wrong("09.norm_of_all", "a stage that does not take part")
def nothing_to_tell(gradients, p, tell):
    if all(g is None for g in gradients):
        return 0.0
    return torch.linalg.vector_norm(torch.tensor(tell(number_of(gradients, p)), dtype=torch.float64), p).item()


@wrong("09.norm_of_all", "more than one exchange")
def one_number_per_gradient(gradients, p, tell):
    told = [number for g in (gradients + 10 * [None])[:10] for number in tell(number_of([g], p))]
    return torch.linalg.vector_norm(torch.tensor(told, dtype=torch.float64), p).item()


@wrong("09.norm_of_all", "not equally often")
def as_many_as_it_has(gradients, p, tell):
    told = [number for g in [None, *gradients] for number in tell(number_of([g], p))]
    return torch.linalg.vector_norm(torch.tensor(told, dtype=torch.float64), p).item()


@wrong("09.norm_of_all", "more than one number")
def tells_all_norms(gradients, p, tell):
    told = tell([number_of([g], p) for g in gradients])
    return torch.linalg.vector_norm(torch.tensor(told).flatten(), p).item()


@wrong("09.norm_of_all", "the sign kept")
def signs_kept(gradients, p, tell):
    if p == math.inf:
        return torch.tensor(tell(number_of(gradients, p)), dtype=torch.float64).max().item()
    return abs(sum(tell(sum(float((g.double() ** p).sum()) for g in gradients if g is not None)))) ** (1 / p)


@wrong("09.norm_of_all", "mean of the stages")
def mean_of_stages(gradients, p, tell):
    told = tell(number_of(gradients, p))
    return sum(told) / len(told)


# --- clip_tied --------------------------------------------------------------------------------------------------------


def add_copies(rank):
    if rank.num_stages > 1 and "embedding" in rank.gradients:
        rank.gradients["embedding"] += rank.swap(rank.gradients["embedding"])


def squares(rank, leave_out=()):
    return sum(float(g.double().pow(2).sum()) for name, g in rank.gradients.items() if name not in leave_out)


def clip_all(rank, total, max_norm):
    for gradient in rank.gradients.values():
        gradient *= min(1.0, max_norm / total)
    return total


def repeated(rank):
    return ("embedding",) if rank.rank > 0 else ()


@right("09.clip_tied")
def last_stage_counts(rank, max_norm):
    first, last = rank.rank == 0, rank.rank == rank.num_stages - 1
    g = rank.gradients
    if first != last:
        g["embedding"] = g["embedding"] + rank.swap(g["embedding"])
    counted = [tensor for name, tensor in g.items() if name != "embedding" or last]
    total = math.sqrt(sum(n**2 for n in rank.tell(torch.linalg.vector_norm(torch.cat([t.flatten() for t in counted])))))
    for name in g:
        g[name] = g[name] * min(1.0, max_norm / (total + 1e-6))
    return total


@right("09.clip_tied")
def half_of_it_each(rank, max_norm):
    """Both copies count, each with half of the square."""
    add_copies(rank)
    share = 0.5 if rank.num_stages > 1 else 1.0
    own = sum(float(g.norm() ** 2) * (share if name == "embedding" else 1.0) for name, g in rank.gradients.items())
    return clip_all(rank, math.sqrt(math.fsum(rank.tell(own))), max_norm)


@wrong("09.clip_tied", "the tied weight counted twice", "Megatron-LM#7227")
def counts_twice(rank, max_norm):
    add_copies(rank)
    return clip_all(rank, math.sqrt(sum(rank.tell(squares(rank)))), max_norm)


@wrong("09.clip_tied", "the tied weight not counted")
def counts_never(rank, max_norm):
    add_copies(rank)
    return clip_all(rank, math.sqrt(sum(rank.tell(squares(rank, ("embedding",))))), max_norm)


@wrong("09.clip_tied", "one stage leaves it out")
def last_leaves_it_out(rank, max_norm):
    add_copies(rank)
    left_out = ("embedding",) if rank.rank == rank.num_stages - 1 else ()
    return clip_all(rank, math.sqrt(sum(rank.tell(squares(rank, left_out)))), max_norm)


@wrong("09.clip_tied", "tied gradients averaged")
def averages(rank, max_norm):
    add_copies(rank)
    if rank.num_stages > 1 and "embedding" in rank.gradients:
        rank.gradients["embedding"] /= 2
    return clip_all(rank, math.sqrt(sum(rank.tell(squares(rank, repeated(rank))))), max_norm)


@wrong("09.clip_tied", "the copies' gradients are never added", "pytorch#51931, piper#13")
def never_adds(rank, max_norm):
    return clip_all(rank, math.sqrt(sum(rank.tell(squares(rank)))), max_norm)


@wrong("09.clip_tied", "the copies' gradients are never added")
def never_adds_and_counts_one(rank, max_norm):
    return clip_all(rank, math.sqrt(sum(rank.tell(squares(rank, repeated(rank))))), max_norm)


@wrong("09.clip_tied", "the norm before the copies are added")
def clips_then_adds(rank, max_norm):
    total = clip_all(rank, math.sqrt(sum(rank.tell(squares(rank)))), max_norm)
    add_copies(rank)
    return total


@wrong("09.clip_tied", "the norm before the copies are added")
def adds_too_late(rank, max_norm):
    total = math.sqrt(sum(rank.tell(squares(rank, repeated(rank)))))
    add_copies(rank)
    return clip_all(rank, total, max_norm)


@wrong("09.clip_tied", "only one copy gets the sum")
def last_keeps_its_own(rank, max_norm):
    if rank.num_stages > 1 and "embedding" in rank.gradients:
        arrived = rank.swap(rank.gradients["embedding"])
        if rank.rank == 0:
            rank.gradients["embedding"] += arrived
    return clip_all(rank, math.sqrt(sum(rank.tell(squares(rank, repeated(rank))))), max_norm)


@wrong("09.clip_tied", "a stage clipped by its own norm", "torchtitan#596")
def by_own_norm(rank, max_norm):
    add_copies(rank)
    return clip_all(rank, math.sqrt(squares(rank)), max_norm)


@wrong("09.clip_tied", "norms added up")
def sums_norms(rank, max_norm):
    add_copies(rank)
    return clip_all(rank, sum(rank.tell(math.sqrt(squares(rank, repeated(rank))))), max_norm)


@wrong("09.clip_tied", "no root")
def no_root(rank, max_norm):
    add_copies(rank)
    return clip_all(rank, sum(rank.tell(squares(rank, repeated(rank)))), max_norm)


@wrong("09.clip_tied", "small gradients made longer")
def makes_longer(rank, max_norm):
    add_copies(rank)
    total = math.sqrt(sum(rank.tell(squares(rank, repeated(rank)))))
    for gradient in rank.gradients.values():
        gradient *= max_norm / total
    return total


@wrong("09.clip_tied", "nothing clipped")
def only_adds(rank, max_norm):
    add_copies(rank)
    return math.sqrt(sum(rank.tell(squares(rank, repeated(rank)))))


@wrong("09.clip_tied", "nothing clipped")
def replaces_in_a_copy(rank, max_norm):
    add_copies(rank)
    total = math.sqrt(sum(rank.tell(squares(rank, repeated(rank)))))
    for gradient in rank.gradients.values():
        gradient = gradient * min(1.0, max_norm / total)
    return total


@wrong("09.clip_tied", "a swap with nobody")
def swaps_on_every_stage(rank, max_norm):
    if rank.num_stages > 1:
        tensor = rank.gradients.get("embedding", torch.zeros(5, 4))
        arrived = rank.swap(tensor)
        if "embedding" in rank.gradients:
            rank.gradients["embedding"] += arrived
    return clip_all(rank, math.sqrt(sum(rank.tell(squares(rank, repeated(rank))))), max_norm)


@wrong("09.clip_tied", "a swap with nobody")
def swaps_with_one_stage(rank, max_norm):
    if "embedding" in rank.gradients:
        rank.gradients["embedding"] += rank.swap(rank.gradients["embedding"])
    return clip_all(rank, math.sqrt(sum(rank.tell(squares(rank, repeated(rank))))), max_norm)


@wrong("09.clip_tied", "a stage that does not take part")
def only_the_ends_talk(rank, max_norm):
    add_copies(rank)
    if "embedding" not in rank.gradients:
        return clip_all(rank, math.sqrt(squares(rank)), max_norm)
    return clip_all(rank, math.sqrt(sum(rank.tell(squares(rank, repeated(rank))))), max_norm)


@wrong("09.clip_tied", "copies that differ in their bits")
def counts_in_another_precision(rank, max_norm):
    add_copies(rank)
    total = math.sqrt(sum(rank.tell(squares(rank, repeated(rank)))))
    if rank.rank == 0:
        return clip_all(rank, total, max_norm)
    for gradient in rank.gradients.values():
        gradient /= max(1.0, total / max_norm)
    return total


@wrong("09.clip_tied", "norms that differ in their bits")
def own_first(rank, max_norm):
    add_copies(rank)
    own = squares(rank, repeated(rank))
    told = rank.tell(own)
    total = own
    for k, number in enumerate(told):
        if k != rank.rank:
            total += number
    return clip_all(rank, math.sqrt(total), max_norm)


@wrong("09.clip_tied", "more than one exchange")
def swaps_for_the_norm(rank, max_norm):
    add_copies(rank)
    told = [rank.tell(float(g.double().pow(2).sum())) for name, g in sorted(rank.gradients.items()) if "weight" in name]
    ours = float(rank.gradients["embedding"].double().pow(2).sum()) if rank.rank == 0 else 0.0
    told.append(rank.tell(ours))
    return clip_all(rank, math.sqrt(sum(map(sum, told))), max_norm)


EQUIVALENT = {
    "09.clip_rank": {
        "operator, line 10, column 7: max_norm < total < math.inf -> max_norm <= total < math.inf": "a norm that is "
        "the bound, which is above 0, gives a factor of exactly 1",
    },
    "09.clip_tied": {
        "condition, line 7, column 8: if rank.rank > 0: -> if not rank.rank > 0:": "the first copy is left out in "
        "place of the last one; after the swap the two have the same bits",
        "operator, line 7, column 11: rank.rank > 0 -> rank.rank <= 0": "the first copy is left out in place of the "
        "last one; after the swap the two have the same bits",
        "operator, line 11, column 7: total > max_norm -> total >= max_norm": "a norm that is the bound, a finite "
        "number above 0, gives a factor of exactly 1",
    },
}
