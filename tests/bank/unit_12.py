"""Answers to unit 12: the script's own functions are among the wrong ones."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from course_utils.checks.bug_hunt import load_script
from tests.bank import right, wrong

script = load_script()
PAD = script.PAD

# --- split ------------------------------------------------------------------------------------------------------------

wrong("12.split", "rows dropped")(script.split)


@right("12.split")
def by_tensor_split(rows, M):
    return list(torch.tensor_split(rows, M))


@right("12.split")
def by_borders(rows, M):
    borders = [m * len(rows) // M for m in range(M + 1)]
    return [rows[a:b] for a, b in zip(borders, borders[1:], strict=False)]


@right("12.split")
def by_sizes(rows, M):
    size, more = divmod(len(rows), M)
    return rows.split([size + 1] * more + [size] * (M - more))


@wrong("12.split", "another number of micro-batches")
def by_chunk(rows, M):
    return rows.chunk(M)


@wrong("12.split", "another number of micro-batches")
def by_size(rows, M):
    return rows.split(len(rows) // M)


@wrong("12.split", "uneven sizes")
def rest_to_the_last(rows, M):
    size = len(rows) // M
    return [rows[m * size : (m + 1) * size if m < M - 1 else None] for m in range(M)]


@wrong("12.split", "uneven sizes")
def rounded_up(rows, M):
    size = math.ceil(len(rows) / M)
    return [rows[m * size : (m + 1) * size] for m in range(M)]


@wrong("12.split", "another order")
def in_strides(rows, M):
    return [rows[m::M] for m in range(M)]


@wrong("12.split", "rows used twice")
def overlapping(rows, M):
    size = math.ceil(len(rows) / M)
    return [rows[m * len(rows) // M : m * len(rows) // M + size] for m in range(M)]


@wrong("12.split", "no tensors")
def as_lists(rows, M):
    return [piece.tolist() for piece in torch.tensor_split(rows, M)]


# --- attend -----------------------------------------------------------------------------------------------------------

wrong("12.attend", "mask polarity")(script.attend)


@right("12.attend")
def with_sdpa(hidden, ids):
    real = ids.ne(0).unsqueeze(1).expand(-1, ids.shape[1], -1)
    return F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=real)


@right("12.attend")
def by_hand(hidden, ids):
    scores = hidden @ hidden.mT / hidden.shape[-1] ** 0.5
    return scores.masked_fill((ids == 0)[:, None], -torch.inf).softmax(-1) @ hidden


@right("12.attend")
def row_by_row(hidden, ids):
    out = torch.zeros_like(hidden)
    for i, row in enumerate(ids):
        n = int((row > 0).sum())
        own = hidden[i : i + 1, :n]
        out[i, :n] = F.scaled_dot_product_attention(own, own, own)[0]
    return out


@wrong("12.attend", "padding takes part")
def no_mask(hidden, ids):
    return F.scaled_dot_product_attention(hidden, hidden, hidden)


@wrong("12.attend", "padding takes part")
def mask_on_the_queries(hidden, ids):
    return F.scaled_dot_product_attention(
        hidden, hidden, hidden, attn_mask=(ids != PAD)[:, :, None].expand(-1, -1, ids.shape[1])
    )


@wrong("12.attend", "a mask of 0 and 1 added")
def mask_as_numbers(hidden, ids):
    mask = (ids != PAD).float()[:, None, :]
    return F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=mask)


@wrong("12.attend", "a mask of 0 and 1 added")
def padding_as_numbers(hidden, ids):
    mask = (ids == PAD).float()[:, None, :]
    return F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=mask)


@wrong("12.attend", "padding set to zero")
def zeroed(hidden, ids):
    hidden = hidden * (ids != PAD)[:, :, None]
    return F.scaled_dot_product_attention(hidden, hidden, hidden)


@wrong("12.attend", "causal")
def is_causal(hidden, ids):
    return F.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True)


@wrong("12.attend", "no scale")
def not_scaled(hidden, ids):
    scores = hidden @ hidden.mT
    return scores.masked_fill((ids == 0)[:, None], -torch.inf).softmax(-1) @ hidden


@wrong("12.attend", "masked after the softmax")
def masked_too_late(hidden, ids):
    scores = hidden @ hidden.mT / hidden.shape[-1] ** 0.5
    return (scores.softmax(-1) * (ids != 0)[:, None]) @ hidden


# --- run_layers -------------------------------------------------------------------------------------------------------

wrong("12.run_layers", "masks depend on the cut", "pytorch#55036")(script.run_layers)


@right("12.run_layers")
def a_seed_per_layer(layers, hidden, ids, step, m):
    for layer in layers:
        noise = torch.Generator()
        noise.manual_seed((step * 1000 + m) * 1000 + layer.number)
        hidden = layer(hidden, ids, noise)
    return hidden


@right("12.run_layers")
def by_hash(layers, hidden, ids, step, m):
    for layer in layers:
        hidden = layer(hidden, ids, torch.Generator().manual_seed(hash((step, m, layer.number)) % 2**63))
    return hidden


@wrong("12.run_layers", "masks depend on the cut")
def by_place_on_the_stage(layers, hidden, ids, step, m):
    for place, layer in enumerate(layers):
        hidden = layer(hidden, ids, torch.Generator().manual_seed(10000 * step + 100 * m + place))
    return hidden


@wrong("12.run_layers", "masks that cannot be drawn again")
def fresh_noise(layers, hidden, ids, step, m):
    for layer in layers:
        noise = torch.Generator()
        noise.seed()
        hidden = layer(hidden, ids, noise)
    return hidden


@wrong("12.run_layers", "masks that cannot be drawn again", "pytorch#55036")
def the_global_generator(layers, hidden, ids, step, m):
    for layer in layers:
        hidden = layer(hidden, ids, torch.default_generator)
    return hidden


@wrong("12.run_layers", "the same mask twice")
def without_the_layer(layers, hidden, ids, step, m):
    for layer in layers:
        hidden = layer(hidden, ids, torch.Generator().manual_seed(100 * step + m))
    return hidden


@wrong("12.run_layers", "the same mask twice")
def without_the_step(layers, hidden, ids, step, m):
    for layer in layers:
        hidden = layer(hidden, ids, torch.Generator().manual_seed(100 * m + layer.number))
    return hidden


@wrong("12.run_layers", "the same mask twice")
def without_the_micro_batch(layers, hidden, ids, step, m):
    for layer in layers:
        hidden = layer(hidden, ids, torch.Generator().manual_seed(100 * step + layer.number))
    return hidden


@wrong("12.run_layers", "the same mask twice")
def seeds_that_collide(layers, hidden, ids, step, m):
    for layer in layers:
        hidden = layer(hidden, ids, torch.Generator().manual_seed(1000 * step + 10 * m + layer.number))
    return hidden


@wrong("12.run_layers", "not one after the other")
def each_from_the_input(layers, hidden, ids, step, m):
    for layer in layers:
        out = layer(hidden, ids, torch.Generator().manual_seed(10000 * step + 100 * m + layer.number))
    return out


@wrong("12.run_layers", "layers left out", "torchtitan#963")
def one_layer_less(layers, hidden, ids, step, m):
    for layer in layers[:-1] or layers:
        hidden = layer(hidden, ids, torch.Generator().manual_seed(10000 * step + 100 * m + layer.number))
    return hidden


# --- loss_share -------------------------------------------------------------------------------------------------------

wrong("12.loss_share", "weighted by rows")(script.loss_share)


@right("12.loss_share")
def sum_over_count(logits, targets, all_targets):
    total = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=0, reduction="sum")
    return total / all_targets.count_nonzero()


@right("12.loss_share")
def weighted_mean(logits, targets, all_targets):
    mean = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
    return mean * ((targets != PAD).sum() / (all_targets != PAD).sum())


@right("12.loss_share")
def by_log_softmax(logits, targets, all_targets):
    real = targets > 0
    picked = logits.log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
    return -(picked * real).sum() / (all_targets > 0).sum()


@wrong("12.loss_share", "divided by its own tokens", "DeepSpeed#7773")
def mean_of_own(logits, targets, all_targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)


@wrong("12.loss_share", "padding counted as tokens")
def over_all_places(logits, targets, all_targets):
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum")
    return total / all_targets.numel()


@wrong("12.loss_share", "padding in the loss")
def nothing_ignored(logits, targets, all_targets):
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / (all_targets != PAD).sum()


@wrong("12.loss_share", "padding in the loss")
def a_plain_mean(logits, targets, all_targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) * len(targets) / len(all_targets)


@wrong("12.loss_share", "not divided", "torchtitan#2972")
def only_the_sum(logits, targets, all_targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum")


@wrong("12.loss_share", "divided by rows")
def over_rows(logits, targets, all_targets):
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum")
    return total / len(all_targets)


@wrong("12.loss_share", "no graph")
def a_number(logits, targets, all_targets):
    return sum_over_count(logits, targets, all_targets).item()


# --- backward ---------------------------------------------------------------------------------------------------------

wrong("12.backward", "only the last micro-batch", "Automodel#3530")(script.backward)


@right("12.backward")
def by_torch(parameters, leaf, out, gradient):
    out.backward(gradient)
    if leaf is not None:
        return leaf.grad


@right("12.backward")
def by_autograd(parameters, leaf, out, gradient):
    leaves = [] if leaf is None else [leaf]
    *own, back = [*torch.autograd.grad(out, [*parameters, *leaves], gradient), *[None] * (leaf is None)]
    for parameter, new in zip(parameters, own, strict=True):
        parameter.grad = new if parameter.grad is None else parameter.grad + new
    return back


@right("12.backward")
def by_product(parameters, leaf, out, gradient):
    ((out * gradient).sum() if gradient is not None else out).backward()
    return getattr(leaf, "grad", None)


@wrong("12.backward", "only the last micro-batch")
def cleared_each_time(parameters, leaf, out, gradient):
    for parameter in parameters:
        parameter.grad = None
    out.backward(gradient)
    return None if leaf is None else leaf.grad


@wrong("12.backward", "only the first micro-batch")
def never_added(parameters, leaf, out, gradient):
    wanted = parameters if leaf is None else [*parameters, leaf]
    found = torch.autograd.grad(out, wanted, gradient)
    for parameter, new in zip(parameters, found, strict=False):
        if parameter.grad is None:
            parameter.grad = new
    return None if leaf is None else found[-1]


@wrong("12.backward", "added twice")
def twice(parameters, leaf, out, gradient):
    wanted = parameters if leaf is None else [*parameters, leaf]
    found = torch.autograd.grad(out, wanted, gradient, retain_graph=True)
    out.backward(gradient)
    for parameter, new in zip(parameters, found, strict=False):
        parameter.grad += new
    return None if leaf is None else found[-1]


@wrong("12.backward", "scaled by every stage", "DeepSpeed#8152")
def scaled_again(parameters, leaf, out, gradient):
    out.backward(gradient)
    return None if leaf is None else 4 * leaf.grad


@wrong("12.backward", "halved each time", "torchtitan#1733")
def averaged(parameters, leaf, out, gradient):
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    out.backward(gradient)
    for parameter, old in zip(parameters, before, strict=True):
        if old is not None:
            parameter.grad = (parameter.grad + old) / 2
    return None if leaf is None else leaf.grad


@wrong("12.backward", "gradient that arrived ignored")
def as_a_sum(parameters, leaf, out, gradient):
    out.sum().backward()
    return None if leaf is None else leaf.grad


@wrong("12.backward", "no gradient handed on")
def no_return(parameters, leaf, out, gradient):
    out.backward(gradient)


# --- clip -------------------------------------------------------------------------------------------------------------

wrong("12.clip", "clipped by the stage's own norm", "torchtitan#596")(script.clip)


def own_norm(parameters):
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters]).item()


def multiply(parameters, factor):
    for parameter in parameters:
        parameter.grad.mul_(factor)


@right("12.clip")
def by_squares(parameters, max_norm, tell):
    norm = sum(tell(sum((parameter.grad**2).sum() for parameter in parameters))) ** 0.5
    if norm > max_norm:
        multiply(parameters, max_norm / norm)
    return norm


@right("12.clip")
def by_hypot(parameters, max_norm, tell):
    norm = math.hypot(*tell(own_norm(parameters)))
    multiply(parameters, min(1.0, max_norm / (norm + 1e-6)))
    return norm


@right("12.clip")
def by_torch_in_two_steps(parameters, max_norm, tell):
    norm = torch.tensor(tell(own_norm(parameters))).norm()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@wrong("12.clip", "the stage's own norm", "Modalities#313")
def only_own(parameters, max_norm, tell):
    return nn.utils.clip_grad_norm_(parameters, max_norm).item()


@wrong("12.clip", "norms added up")
def added_up(parameters, max_norm, tell):
    norm = sum(tell(own_norm(parameters)))
    multiply(parameters, min(1.0, max_norm / (norm + 1e-6)))
    return norm


@wrong("12.clip", "the largest norm")
def the_largest(parameters, max_norm, tell):
    norm = max(tell(own_norm(parameters)))
    multiply(parameters, min(1.0, max_norm / (norm + 1e-6)))
    return norm


@wrong("12.clip", "no root")
def no_root(parameters, max_norm, tell):
    norm = sum(other**2 for other in tell(own_norm(parameters)))
    multiply(parameters, min(1.0, max_norm / (norm + 1e-6)))
    return norm


@wrong("12.clip", "the mean of the norms")
def the_mean(parameters, max_norm, tell):
    norms = tell(own_norm(parameters))
    norm = sum(norms) / len(norms)
    multiply(parameters, min(1.0, max_norm / (norm + 1e-6)))
    return norm


@wrong("12.clip", "gradients made longer")
def always_scaled(parameters, max_norm, tell):
    norm = math.hypot(*tell(own_norm(parameters)))
    multiply(parameters, max_norm / (norm + 1e-6))
    return norm


@wrong("12.clip", "gradients made longer")
def always_to_the_bound(parameters, max_norm, tell):
    norm = math.hypot(*tell(own_norm(parameters)))
    multiply(parameters, max_norm / norm)
    return norm


@wrong("12.clip", "nothing clipped")
def only_the_norm(parameters, max_norm, tell):
    norm = math.hypot(*tell(own_norm(parameters)))
    for parameter in parameters:
        parameter.grad * min(1.0, max_norm / (norm + 1e-6))  # noqa: B018
    return norm


@wrong("12.clip", "not every rank tells")
def only_long_ones_tell(parameters, max_norm, tell):
    norm = own_norm(parameters)
    if norm > max_norm:
        norm = math.hypot(*tell(norm))
    multiply(parameters, min(1.0, max_norm / (norm + 1e-6)))
    return norm


@wrong("12.clip", "each rank decides about an overflow alone", "fairscale#179")
def overflow_alone(parameters, max_norm, tell):
    own = own_norm(parameters)
    norm = math.hypot(*[other for other in tell(own) if math.isfinite(other)])
    multiply(parameters, min(1.0, max_norm / (norm + 1e-6)))
    return norm if math.isfinite(own) else own


@wrong("12.clip", "clipped by value")
def by_value(parameters, max_norm, tell):
    nn.utils.clip_grad_value_(parameters, max_norm)
    return math.hypot(*tell(own_norm(parameters)))


# --- after_step -------------------------------------------------------------------------------------------------------

wrong("12.after_step", "the schedule moves on a skipped step", "Lightning#18828")(script.after_step)


@right("12.after_step")
def in_two_branches(state, skipped, growth):
    state["step"] += 1
    if skipped:
        state["scale"], state["good"] = state["scale"] / 2, 0
        return
    state["updates"] += 1
    state["good"] += 1
    if state["good"] == growth:
        state["scale"], state["good"] = state["scale"] * 2, 0


@right("12.after_step")
def with_update(state, skipped, growth):
    good = (state["good"] + 1) % growth * (not skipped)
    factor = 0.5 if skipped else 1.0 if good else 2.0
    state.update(
        step=state["step"] + 1, updates=state["updates"] + (not skipped), scale=state["scale"] * factor, good=good
    )


@wrong("12.after_step", "the data stands still")
def comes_again(state, skipped, growth):
    before = state["step"]
    in_two_branches(state, skipped, growth)
    state["step"] = before if skipped else before + 1


@wrong("12.after_step", "good steps not in a row")
def not_in_a_row(state, skipped, growth):
    before = state["good"]
    in_two_branches(state, skipped, growth)
    if skipped:
        state["good"] = before


@wrong("12.after_step", "the scale never grows")
def only_falls(state, skipped, growth):
    state["step"] += 1
    state["updates"] += not skipped
    state["scale"] *= 0.5 if skipped else 1
    state["good"] = 0 if skipped else (state["good"] + 1) % growth


@wrong("12.after_step", "the scale never falls")
def only_grows(state, skipped, growth):
    scale = state["scale"]
    in_two_branches(state, skipped, growth)
    state["scale"] = max(scale, state["scale"])


@wrong("12.after_step", "good never starts anew")
def grows_once(state, skipped, growth):
    state["step"] += 1
    state["updates"] += not skipped
    state["good"] = 0 if skipped else state["good"] + 1
    state["scale"] *= 0.5 if skipped else 2 if state["good"] == growth else 1


@wrong("12.after_step", "grows one step late")
def one_late(state, skipped, growth):
    in_two_branches(state, skipped, growth + 1)


@wrong("12.after_step", "skipped the other way round")
def other_way_round(state, skipped, growth):
    in_two_branches(state, not skipped, growth)


@wrong("12.after_step", "nothing changed in place")
def a_new_state(state, skipped, growth):
    state = dict(state)
    in_two_branches(state, skipped, growth)
    return state


# --- restore ----------------------------------------------------------------------------------------------------------

wrong("12.restore", "the state is not restored", "the_well#77")(script.restore)


@right("12.restore")
def all_in_place(saved, parameters, optimizer, state):
    for parameter, weight in zip(parameters, saved["weights"], strict=True):
        parameter.data.copy_(weight)
    optimizer.load_state_dict(saved["optimizer"])
    state.update(saved["state"])


@right("12.restore")
def name_by_name(saved, parameters, optimizer, state):
    with torch.no_grad():
        for i in range(len(parameters)):
            parameters[i][...] = saved["weights"][i]
    for name in state:
        state[name] = saved["state"][name]
    optimizer.load_state_dict(saved["optimizer"])


@wrong("12.restore", "the moments are not restored")
def without_moments(saved, parameters, optimizer, state):
    for parameter, weight in zip(parameters, saved["weights"], strict=True):
        parameter.data.copy_(weight)
    state.update(saved["state"])


@wrong("12.restore", "only the weights")
def only_weights(saved, parameters, optimizer, state):
    for parameter, weight in zip(parameters, saved["weights"], strict=True):
        parameter.data.copy_(weight)


@wrong("12.restore", "the weights are not restored")
def weights_rebound(saved, parameters, optimizer, state):
    for parameter, weight in zip(parameters, saved["weights"], strict=True):
        parameter = weight.clone().requires_grad_()  # noqa: B020, F841, PLW2901
    optimizer.load_state_dict(saved["optimizer"])
    state.update(saved["state"])


@wrong("12.restore", "the weights are not restored")
def new_parameters_in_the_list(saved, parameters, optimizer, state):
    parameters[:] = [weight.clone().requires_grad_() for weight in saved["weights"]]
    optimizer.load_state_dict(saved["optimizer"])
    state.update(saved["state"])


@wrong("12.restore", "only the step", "the_well#77")
def only_the_step(saved, parameters, optimizer, state):
    all_in_place(saved | {"state": {"step": saved["state"]["step"]}}, parameters, optimizer, state)


@wrong("12.restore", "without the scaler", "the_well#77")
def without_scaler(saved, parameters, optimizer, state):
    kept = {name: saved["state"][name] for name in ("step", "updates")}
    all_in_place(saved | {"state": kept}, parameters, optimizer, state)


@wrong("12.restore", "without the schedule", "the_well#77")
def without_schedule(saved, parameters, optimizer, state):
    kept = {name: number for name, number in saved["state"].items() if name != "updates"}
    all_in_place(saved | {"state": kept}, parameters, optimizer, state)


@wrong("12.restore", "one step too far")
def one_too_far(saved, parameters, optimizer, state):
    all_in_place(saved, parameters, optimizer, state)
    state["step"] += 1


EQUIVALENT = {
    "12.run_layers": {
        "constant, line 5, column 14: 10000 -> 10001": "keys are as different as before",
        "constant, line 5, column 14: 10000 -> 9999": "with up to 12 layers and micro-batches the rest is below 9999",
        "constant, line 5, column 29: 100 -> 101": "keys are as different as before",
        "constant, line 5, column 29: 100 -> 99": "with up to 12 layers the rest is below 99",
        "operator, line 5, column 14: 10000 * step + 100 * m + layer.number -> "
        "10000 * step + 100 * m - layer.number": "with numbers below 100 differences are as different as sums",
        "operator, line 5, column 14: 10000 * step + 100 * m -> 10000 * step - 100 * m": "with numbers below 100 "
        "differences are as different as sums, and a seed may be negative",
    },
    "12.loss_share": {
        "arguments swapped, line 4, column 28: logits.transpose(1, 2) -> logits.transpose(2, 1)": "the same two axes "
        "change places",
    },
    "12.clip": {
        "arguments swapped, line 10, column 26: min(1.0, max_norm / (norm + 1e-06)) -> "
        "min(max_norm / (norm + 1e-06), 1.0)": "other only for a norm that is NaN, and then the step is skipped",
        "constant, line 10, column 54: 1e-06 -> 2e-06": "any small number keeps a division by 0 off; the gradients "
        "change by less than the 2e-6 that are allowed",
    },
}
