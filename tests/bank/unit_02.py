"""Answers to unit 02."""

import torch

from tests.bank import right, wrong

# --- step_in_stages ---------------------------------------------------------------------------------------------------


def leaf_of(tensor):
    return None if tensor is None else tensor.detach().requires_grad_()


def walk(sent, gradients):
    pairs = [(t, g) for t, g in zip(sent, gradients, strict=True) if t is not None]
    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


@right("02.step_in_stages")
def with_a_list(stages, x):
    kept, carry = [], (x, None)
    for stage in stages:
        leaves = tuple(leaf_of(tensor) for tensor in carry)
        carry = stage(leaves)
        kept.append((leaves, carry))
    loss = carry[0].detach()
    gradients = (torch.ones(()), None)
    for leaves, sent in reversed(kept):
        walk(sent, gradients)
        gradients = [None if leaf is None else leaf.grad for leaf in leaves]
    return loss


@right("02.step_in_stages")
def recursive(stages, x):
    """The gradients of a carry come out of the call for the stages after it."""

    def go_on(k, carry):
        hidden, memory = carry
        if k == len(stages):
            return hidden.item(), (torch.ones_like(hidden), None)
        leaves = (leaf_of(hidden) if k else hidden, leaf_of(memory))
        sent = stages[k](leaves)
        loss, gradients = go_on(k + 1, sent)
        walk(sent, gradients)
        return loss, tuple(None if leaf is None else leaf.grad for leaf in leaves)

    return go_on(0, (x, None))[0]


@right("02.step_in_stages")
def with_views_of_leaves(stages, x):
    """Each stage gets views of leaves."""
    received, sent = [], []
    carry = (x, None)
    for stage in stages:
        received.append([None if t is None else t.clone().detach().requires_grad_(True) for t in carry])
        carry = stage(tuple(None if t is None else t.view_as(t) for t in received[-1]))
        sent.append(carry)
    sent[-1][0].backward()
    for k in range(len(stages) - 2, -1, -1):
        there = [i for i in (0, 1) if sent[k][i] is not None]
        torch.autograd.backward([sent[k][i] for i in there], [received[k + 1][i].grad for i in there])
    return sent[-1][0].item()


def step(stages, x, receive=leaf_of, back=walk, first=1.0, order=reversed, hand_on=lambda gradients: gradients):
    """One step in which a part can be done otherwise."""
    kept, carry = [], (x, None)
    for stage in stages:
        leaves = tuple(map(receive, carry))
        carry = stage(leaves)
        kept.append((leaves, carry))
    loss, gradients = carry[0].detach(), (torch.tensor(first), None)
    for leaves, sent in order(kept):
        back(sent, gradients)
        gradients = hand_on(tuple(None if leaf is None else leaf.grad for leaf in leaves))
    return loss


@wrong("02.step_in_stages", "detach forgotten", "pytorch#153485")
def sends_history(stages, x):
    def receive(tensor):
        if tensor is None or tensor.grad_fn is None:
            return leaf_of(tensor)
        tensor.retain_grad()
        return tensor

    return step(stages, x, receive)


@wrong("02.step_in_stages", "detach forgotten", "pytorch#153485")
def retain_graph_as_a_cure(stages, x):
    kept, carry = [], (x, None)
    for stage in stages:
        for tensor in carry:
            if tensor is not None and tensor.requires_grad:
                tensor.retain_grad()
        received, carry = carry, stage(carry)
        kept.append((received, carry))
    carry[0].backward(retain_graph=True)
    for (received, _), (_, sent) in list(zip(kept[1:], kept, strict=False))[::-1]:
        for tensor, gradient in zip(sent, [None if t is None else t.grad for t in received], strict=True):
            if tensor is not None:
                tensor.backward(gradient, retain_graph=True)
    return carry[0].detach()


@wrong("02.step_in_stages", "detach forgotten")
def one_backward(stages, x):
    carry = (x, None)
    for stage in stages:
        carry = stage(carry)
    carry[0].backward()
    return carry[0].detach()


@wrong("02.step_in_stages", "requires_grad forgotten")
def only_detached(stages, x):
    return step(stages, x, lambda tensor: None if tensor is None else tensor.detach())


@wrong("02.step_in_stages", "two walks through a stage")
def one_after_the_other(stages, x):
    def back(sent, gradients):
        for tensor, gradient in zip(sent, gradients, strict=True):
            if tensor is not None:
                tensor.backward(gradient)

    return step(stages, x, back=back)


@wrong("02.step_in_stages", "two walks through a stage")
def added_afterwards(stages, x):
    def back(sent, gradients):
        for tensor, gradient in zip(sent, gradients, strict=True):
            if tensor is not None and tensor.grad_fn is not None:
                tensor.backward(gradient, retain_graph=True)

    return step(stages, x, back=back)


@wrong("02.step_in_stages", "gradient of memory dropped", "transformers#9765")
def hidden_only(stages, x):
    def back(sent, gradients):
        tensor, gradient = next(pair for pair in zip(sent, gradients, strict=True) if pair[0] is not None)
        tensor.backward(gradient)

    return step(stages, x, back=back)


@wrong("02.step_in_stages", "gradient of memory dropped", "transformers#9765")
def hidden_only_if_there(stages, x):
    def back(sent, gradients):
        tensor, gradient = next(pair for pair in zip(sent, gradients, strict=True) if pair[0] is not None)
        if gradient is not None:
            tensor.backward(gradient)

    return step(stages, x, back=back)


@wrong("02.step_in_stages", "gradient of hidden dropped")
def memory_only(stages, x):
    def back(sent, gradients):
        tensor, gradient = [pair for pair in zip(sent, gradients, strict=True) if pair[0] is not None][-1]
        tensor.backward(gradient)

    return step(stages, x, back=back)


@wrong("02.step_in_stages", "divided by the number of stages")
def shares_the_loss(stages, x):
    return step(stages, x, first=1 / len(stages))


@wrong("02.step_in_stages", "divided on each stage", "DeepSpeed#8152")
def divides_on_each_stage(stages, x):
    return step(stages, x, hand_on=lambda gradients: tuple(None if g is None else g / len(stages) for g in gradients))


@wrong("02.step_in_stages", "the loss keeps its graph")
def returns_the_graph(stages, x):
    kept, carry = [], (x, None)
    for stage in stages:
        leaves = tuple(map(leaf_of, carry))
        carry = stage(leaves)
        kept.append((leaves, carry))
    gradients = (torch.tensor(1.0), None)
    for leaves, sent in reversed(kept):
        walk(sent, gradients)
        gradients = tuple(None if leaf is None else leaf.grad for leaf in leaves)
    return carry[0]


@wrong("02.step_in_stages", "no backward")
def forward_only(stages, x):
    carry = (x, None)
    for stage in stages:
        carry = stage(tuple(map(leaf_of, carry)))
    return carry[0].detach()


@wrong("02.step_in_stages", "stops at the border")
def last_stage_only(stages, x):
    carry = (x, None)
    for stage in stages:
        carry = stage(tuple(map(leaf_of, carry)))
    carry[0].backward()
    return carry[0].detach()


@wrong("02.step_in_stages", "no None in the carry")
def never_none(stages, x):
    return step(stages, x, lambda tensor: tensor.detach().requires_grad_())


@wrong("02.step_in_stages", "for two stages")
def first_and_last(stages, x):
    sent = stages[0]((x, None))
    leaves = tuple(map(leaf_of, sent))
    loss, _ = stages[-1](leaves) if len(stages) > 1 else (sent[0], None)
    loss.backward()
    if len(stages) > 1:
        walk(sent, [None if leaf is None else leaf.grad for leaf in leaves])
    return loss.detach()


@wrong("02.step_in_stages", "a stage called again")
def forward_twice(stages, x):
    carry = (x, None)
    for stage in stages:
        carry = tuple(None if t is None else t.detach() for t in stage(carry))
    return step(stages, x)


# --- step_with_skips --------------------------------------------------------------------------------------------------


def back_in_order(kept, add):
    """Backward with a way to add a gradient: add(gradients, name, gradient)."""
    gradients = {"loss": torch.ones(())}
    for stage, leaves, given in reversed(kept):
        names = [name for name in given if name in gradients]
        torch.autograd.backward([given[name] for name in names], [gradients[name] for name in names])
        for name in stage.takes:
            if leaves[name].grad is not None:
                add(gradients, name, leaves[name].grad)


def forward(stages, x, receive=lambda tensor: tensor.detach().requires_grad_()):
    there, kept = {"x": x}, []
    for stage in stages:
        leaves = {name: receive(there[name]) for name in stage.takes}
        given = stage(leaves)
        kept.append((stage, leaves, given))
        there.update(given)
    return there["loss"].detach(), kept


def add_up(gradients, name, gradient):
    gradients[name] = gradients[name] + gradient if name in gradients else gradient


@right("02.step_with_skips")
def with_a_dictionary(stages, x):
    loss, kept = forward(stages, x)
    back_in_order(kept, add_up)
    return loss


@wrong("02.step_with_skips", "one leaf for several stages")
def one_leaf_for_all_users(stages, x):
    """Autograd adds up in the leaf that they share."""
    made, leaves = {}, {"x": x}
    for stage in stages:
        given = stage({name: leaves[name] for name in stage.takes})
        made.update(given)
        leaves.update({name: tensor.detach().requires_grad_() for name, tensor in given.items()})
    made["loss"].backward()
    for stage in stages[-2::-1] if len(stages) > 1 else []:
        names = [name for name in stage.gives if leaves[name].grad is not None]
        torch.autograd.backward([made[name] for name in names], [leaves[name].grad for name in names])
    return made["loss"].item()


@right("02.step_with_skips")
def zeros_for_what_nobody_uses(stages, x):
    there, kept = {"x": x}, []
    for stage in stages:
        leaves = {name: there[name].detach().requires_grad_(name != "x") for name in stage.takes}
        given = stage(leaves)
        kept.append((leaves, given))
        there = {**there, **given}
    sums = {name: torch.zeros_like(tensor) for name, tensor in there.items()}
    sums["loss"] += 1
    while kept:
        leaves, given = kept.pop()
        torch.autograd.backward(list(given.values()), [sums[name] for name in given])
        for name, leaf in leaves.items():
            if name != "x":
                sums[name] += leaf.grad
    return there["loss"].detach()


@wrong("02.step_with_skips", "only one use counted")
def overwrites(stages, x):
    loss, kept = forward(stages, x)
    back_in_order(kept, lambda gradients, name, gradient: gradients.update({name: gradient}))
    return loss


@wrong("02.step_with_skips", "only one use counted")
def keeps_what_came_first(stages, x):
    loss, kept = forward(stages, x)
    back_in_order(kept, lambda gradients, name, gradient: gradients.setdefault(name, gradient))
    return loss


@wrong("02.step_with_skips", "only the neighbour's gradient", "transformers#9765")
def from_the_neighbour(stages, x):
    loss, kept = forward(stages, x)
    for k in range(len(stages) - 1, -1, -1):
        _, _, given = kept[k]
        if k == len(stages) - 1:
            given["loss"].backward()
            continue
        after = {name: leaf.grad for name, leaf in kept[k + 1][1].items()}
        names = [name for name in given if name in after]
        torch.autograd.backward([given[name] for name in names], [after[name] for name in names])
    return loss


@wrong("02.step_with_skips", "only the first output")
def one_root(stages, x):
    loss, kept = forward(stages, x)
    gradients = {"loss": torch.ones(())}
    for stage, leaves, given in reversed(kept):
        name = stage.gives[0]
        given[name].backward(gradients[name])
        for name in stage.takes:
            add_up(gradients, name, leaves[name].grad)
    return loss


@wrong("02.step_with_skips", "two walks through a stage")
def a_walk_for_each_output(stages, x):
    loss, kept = forward(stages, x)
    gradients = {"loss": torch.ones(())}
    for stage, leaves, given in reversed(kept):
        for name in stage.gives:
            if name in gradients:
                given[name].backward(gradients[name], retain_graph=True)
        for name in stage.takes:
            add_up(gradients, name, leaves[name].grad)
    return loss


@wrong("02.step_with_skips", "two walks through a stage")
def a_walk_for_each_use(stages, x):
    """Memory's gradients are not added up, each goes back alone."""
    loss, kept = forward(stages, x)
    gradients = {"loss": [torch.ones(())]}
    for stage, leaves, given in reversed(kept):
        for name in stage.gives:
            for gradient in gradients.get(name, []):
                given[name].backward(gradient, retain_graph=True)
        for name in stage.takes:
            gradients.setdefault(name, []).append(leaves[name].grad)
    return loss


@wrong("02.step_with_skips", "other bits")
def adds_in_ascending_order(stages, x):
    loss, kept = forward(stages, x)
    gradients = {"loss": [torch.ones(())]}
    for stage, leaves, given in reversed(kept):
        names = [name for name in given if name in gradients]
        sums = [sum(gradients[name][::-1][1:], gradients[name][-1]) for name in names]
        torch.autograd.backward([given[name] for name in names], sums)
        for name in stage.takes:
            gradients.setdefault(name, []).append(leaves[name].grad)
    return loss


@wrong("02.step_with_skips", "detach forgotten", "pytorch#153485")
def without_detach(stages, x):
    def receive(tensor):
        if tensor.requires_grad:
            tensor.retain_grad()
        return tensor

    loss, kept = forward(stages, x, receive)
    back_in_order(kept, add_up)
    return loss


@wrong("02.step_with_skips", "detach forgotten")
def all_at_once(stages, x):
    there = {"x": x}
    for stage in stages:
        there.update(stage({name: there[name] for name in stage.takes}))
    there["loss"].backward()
    return there["loss"].detach()


@wrong("02.step_with_skips", "requires_grad forgotten")
def without_requires_grad(stages, x):
    loss, kept = forward(stages, x, lambda tensor: tensor.detach())
    back_in_order(kept, add_up)
    return loss


@wrong("02.step_with_skips", "roots that nobody uses")
def no_gradient_there(stages, x):
    loss, kept = forward(stages, x)
    gradients = {"loss": torch.ones(())}
    for stage, leaves, given in reversed(kept):
        torch.autograd.backward([given[name] for name in given], [gradients[name] for name in given])
        for name in stage.takes:
            add_up(gradients, name, leaves[name].grad)
    return loss


@wrong("02.step_with_skips", "stops at the border")
def wrong_way(stages, x):
    loss, kept = forward(stages, x)
    back_in_order(kept[::-1], add_up)
    return loss


@wrong("02.step_with_skips", "mean of the uses")
def takes_the_mean(stages, x):
    loss, kept = forward(stages, x)
    gradients = {"loss": [torch.ones(())]}
    for stage, leaves, given in reversed(kept):
        names = [name for name in given if name in gradients]
        means = [torch.stack(gradients[name]).mean(0) for name in names]
        torch.autograd.backward([given[name] for name in names], means)
        for name in stage.takes:
            gradients.setdefault(name, []).append(leaves[name].grad)
    return loss


@wrong("02.step_with_skips", "the loss keeps its graph")
def returns_the_tensor(stages, x):
    _, kept = forward(stages, x)
    back_in_order(kept, add_up)
    return kept[-1][2]["loss"]
