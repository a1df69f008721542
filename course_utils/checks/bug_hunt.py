"""The bug hunt's training script, which runs and whose loss falls, and what is seen in its runs because of its bugs.

`SCRIPT` is what learners read and run; eight of its functions are wrong. `symptoms` runs all of it with some functions
replaced and says what is still to be seen.
"""

import linecache
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks.report import TookTooLong, is_unwritten, time_limit

# --- The script -------------------------------------------------------------------------------------------------------

SCRIPT = '''\
"""Trains a small model on K stages with GPipe, M micro-batches a step, and a loss scale for the half-precision head."""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from course_utils.threads import run_in_threads

PAD, IDS, WIDTH, D, LAYERS = 0, 10, 8, 16, 4  # ids are 1 to 9; rows end with at least one PAD
DROPOUT, MAX_NORM, PEAK_RATE, WARM_UP, FIRST_SCALE, GROWTH = 0.1, 0.5, 0.01, 20, 2.0**24, 100


def batch(step, rows=10):
    """(ids, targets): per id, 2 if it is above the mean of its row, else 1; PAD where the row has ended."""
    noise = torch.Generator().manual_seed(step)
    lengths = torch.randint(2, WIDTH, (rows, 1), generator=noise)
    ids = torch.randint(1, IDS, (rows, WIDTH), generator=noise) * (torch.arange(WIDTH) < lengths)
    return ids, (1 + (ids > ids.sum(1, keepdim=True) / lengths)) * (ids != PAD)


def split(rows, M):
    """A list of M micro-batches with the rows of a mini-batch (a tensor), in order; sizes differ by at most 1."""
    size = len(rows) // M
    return [rows[m * size : (m + 1) * size] for m in range(M)]


def attend(hidden, ids):
    """Self-attention without weights: a place mixes the real places of its row. hidden: (rows, width, D)."""
    mask = (ids == PAD)[:, None, :]  # the padding, for every query of a row
    return F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=mask)


class Layer(nn.Module):
    """Layer `number` of the model. It draws its dropout mask from `noise`, a torch.Generator."""

    def __init__(self, number):
        super().__init__()
        self.number, self.linear = number, seeded(nn.Linear(D, D), number)

    def forward(self, hidden, ids, noise):
        keep = torch.rand(hidden.shape, generator=noise) >= DROPOUT
        return hidden + torch.tanh(self.linear(attend(hidden, ids))) * keep / (1 - DROPOUT)


def seeded(module, seed):
    """The same weights for the same seed, wherever the model is cut."""
    noise = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=noise)
    return module


class Stage(nn.Module):
    """Stage k of K: its layers, the embedding on the first stage, the head on the last."""

    def __init__(self, k, K):
        super().__init__()
        self.embedding = seeded(nn.Embedding(IDS, D), 100) if k == 0 else None
        self.layers = nn.ModuleList(map(Layer, range(k * LAYERS // K, (k + 1) * LAYERS // K)))
        self.head = seeded(nn.Linear(D, 3), 101) if k == K - 1 else None


def run_layers(layers, hidden, ids, step, m):
    """Run micro-batch m of a step through the layers of a stage. No cut of the model changes what comes out."""
    noise = torch.Generator().manual_seed(10000 * step + 100 * m)
    for layer in layers:
        hidden = layer(hidden, ids, noise)
    return hidden


def loss_share(logits, targets, all_targets):
    """What a micro-batch adds to the loss, the mean over all tokens of the mini-batch. PAD in targets is no token."""
    mean = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
    return mean * len(targets) / len(all_targets)


def backward(parameters, leaf, out, gradient):
    """Add the gradients of one micro-batch to those of the stage's parameters; return that of the leaf.

    leaf: what the stage received, None on the first. out: what it made. gradient: of out, None for the scaled loss.
    """
    wanted = parameters if leaf is None else [*parameters, leaf]
    for tensor, found in zip(wanted, torch.autograd.grad(out, wanted, gradient), strict=True):
        tensor.grad = found
    return None if leaf is None else leaf.grad


def tell_all(worker, number):
    """The numbers of all ranks, a list; every rank must call it."""
    others, mine = [r for r in range(worker.world_size) if r != worker.rank], torch.tensor(float(number))
    buffers = {r: torch.empty(()) for r in others}
    work = [worker.transport.isend(mine, r, "a number") for r in others]
    work += [worker.transport.irecv(buffers[r], r, "a number") for r in others]
    for each in work:
        worker.transport.wait(each)
    return [float(buffers.get(r, mine)) for r in range(worker.world_size)]


def clip(parameters, max_norm, tell):
    """Shorten the gradients so that their norm over all ranks is at most max_norm; return that norm before.

    parameters: of this rank. tell(number): the numbers of all ranks, a list.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return math.sqrt(sum(other**2 for other in tell(norm)))


def learning_rate(update):
    """A linear warm-up, then a fall with the inverse square root. The first update has number 1."""
    return PEAK_RATE * min(update / WARM_UP, (WARM_UP / update) ** 0.5)


def after_step(state, skipped, growth):
    """Count a step in `state`, in place. skipped: its gradients were not finite, so the weights were not updated.

    step: mini-batches used. updates: of the weights. scale: of the loss; halved by a skipped step, doubled after
    `growth` good ones in a row. good: good steps since the scale last changed.
    """
    state["step"] += 1
    state["updates"] += 1
    state["good"] = 0 if skipped else state["good"] + 1
    if skipped:
        state["scale"] /= 2
    elif state["good"] == growth:
        state["scale"] *= 2
        state["good"] = 0


def save(parameters, optimizer, state):
    """All that a rank must know to go on."""
    weights = [parameter.detach() for parameter in parameters]
    return copy.deepcopy({"weights": weights, "optimizer": optimizer.state_dict(), "state": state})


def restore(saved, parameters, optimizer, state):
    """Put what `save` returned into parameters, optimizer and state, in place; the run goes on as if never ended."""
    with torch.no_grad():
        for parameter, weight in zip(parameters, saved["weights"], strict=True):
            parameter.copy_(weight)
    optimizer.load_state_dict(saved["optimizer"])
    state = dict(saved["state"])


def pass_on(worker, tensor, peer):
    return worker.transport.isend(tensor.detach(), peer, "a tensor")


def take(worker, shape, peer):
    buffer = torch.empty(shape)
    worker.transport.wait(worker.transport.irecv(buffer, peer, "a tensor"))
    return buffer


def one_step(worker, stage, ids, targets, all_targets, state):
    """All forwards, then all backwards. The loss on the last stage, 0 on the others."""
    k, last, loss, kept, work = worker.rank, worker.world_size - 1, 0.0, [], []
    for m in range(len(ids)):
        leaf = take(worker, (*ids[m].shape, D), k - 1).requires_grad_() if k > 0 else None
        out = run_layers(stage.layers, stage.embedding(ids[m]) if k == 0 else leaf, ids[m], state["step"], m)
        if k < last:
            work.append(pass_on(worker, out, k + 1))
        else:
            share = loss_share(stage.head(out).half().float(), targets[m], all_targets)
            loss, out = loss + share.item(), share * state["scale"]
        kept.append((leaf, out))
    for leaf, out in kept:
        gradient = take(worker, out.shape, k + 1) if k < last else None
        gradient = backward(list(stage.parameters()), leaf, out, gradient)
        if k > 0:
            work.append(pass_on(worker, gradient, k - 1))
    for each in work:
        worker.transport.wait(each)
    return loss


def train_rank(worker, M, steps, saved):
    """What one rank does. Returns a line of the log per step, and what it would save at the end."""
    stage = Stage(worker.rank, worker.world_size)
    parameters = list(stage.parameters())
    optimizer = torch.optim.Adam(parameters)
    state = {"step": 0, "updates": 0, "scale": FIRST_SCALE, "good": 0}
    if saved is not None:
        restore(saved[worker.rank], parameters, optimizer, state)
    log = []
    for _ in range(steps):
        ids, targets = batch(state["step"])
        loss = one_step(worker, stage, split(ids, M), split(targets, M), targets, state)
        for parameter in parameters:
            parameter.grad /= state["scale"]
        norm = clip(parameters, MAX_NORM, lambda number: tell_all(worker, number))
        clipped = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in parameters))
        rate, skipped = learning_rate(state["updates"] + 1), not math.isfinite(norm)
        if not skipped:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        optimizer.zero_grad()
        log.append({**state, "loss": loss, "norm": norm, "clipped": clipped, "rate": rate, "skipped": skipped})
        after_step(state, skipped, GROWTH)
    return log, save(parameters, optimizer, state)


def train(K=2, M=4, steps=60, saved=None):
    """Train on K stages. Returns the logs of the ranks, and what was saved at the end: both lists by rank."""
    return tuple(zip(*run_in_threads(train_rank, K, M, steps, saved, limit=5), strict=True))
'''

NAME = "<train.py>"  # of the script, in tracebacks
linecache.cache[NAME] = (len(SCRIPT), None, SCRIPT.splitlines(keepends=True), NAME)


def load_script(**functions: Any) -> Any:
    """The script as a module, with some of its functions, or constants, replaced: `load_script(split=split)`.

    Raises:
        ValueError: the script has nothing of that name.
    """
    module = types.ModuleType("train")
    exec(compile(SCRIPT, NAME, "exec"), module.__dict__)
    for name, function in functions.items():
        if not hasattr(module, name):
            raise ValueError(f"the script has no {name!r}")
        setattr(module, name, function)
    return module


def show_script() -> None:
    """Print the script with the numbers of its lines."""
    print("\n".join(f"{number:3}  {line}".rstrip() for number, line in enumerate(SCRIPT.splitlines(), start=1)))


def show_run(logs: Sequence[Sequence[dict[str, Any]]], every: int = 10) -> None:
    """Print some lines of the log of the last rank: it knows the loss."""
    for line in logs[-1][::every]:
        skipped = ", skipped" * line["skipped"]
        print(f"step {line['step']:3}  loss {line['loss']:.2f}  scale {line['scale']:9.0f}{skipped}")


# --- The symptoms -----------------------------------------------------------------------------------------------------

SYMPTOMS = {  # what is seen in a run, by the function that is the cause; never what is wrong there
    "split": "fewer rows go through the model than a mini-batch has",
    "attend": "another embedding of PAD changes the loss, though PAD is no token",
    "run_layers": "the loss of the first step is another one on two stages than on one",
    "loss_share": "the loss of the first step is another one with M = 4 than with M = 1",
    "backward": "the norm of the gradients falls when M grows, though all rows are alike in length",
    "clip": "after clipping, the gradients of all stages together are longer than they may be",
    "after_step": "a run whose first steps are skipped makes its first update at a later learning rate",
    "restore": "a resumed run does not go on where the saved one had ended",
}


def even_batch(step: int) -> tuple[Tensor, Tensor]:
    """8 rows, all with 6 ids: no row and no micro-batch weighs more than another."""
    noise = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 10, (8, 6), generator=noise)
    targets = 1 + (ids > ids.float().mean(1, keepdim=True)).long()
    return F.pad(ids, (0, 2)), F.pad(targets, (0, 2))


def uneven_batch(step: int) -> tuple[Tensor, Tensor]:
    """8 rows: the first have 2 ids, the last have 6."""
    ids, targets = even_batch(step)
    real = torch.arange(8) < LENGTHS
    return ids * real, targets * real


LENGTHS = torch.tensor([2, 2, 2, 2, 3, 6, 6, 6]).unsqueeze(1)


def first_line(script: Any, **options: Any) -> dict[str, Any]:
    """The first line of the log of the last rank."""
    return script.train(steps=1, **options)[0][-1][0]


def rows_seen(functions: dict[str, Any]) -> tuple[bool, str]:
    seen: list[int] = []
    script = load_script(**functions)
    run = script.run_layers

    def counts(layers: Any, hidden: Tensor, *others: Any) -> Tensor:
        seen.append(len(hidden))
        return run(layers, hidden, *others)

    script.run_layers = counts
    script.train(K=1, steps=1)
    return sum(seen) != 10, f"{sum(seen)} of 10 rows"


def loss_and_padding(functions: dict[str, Any]) -> tuple[bool, str]:
    script, other = (load_script(**functions, DROPOUT=0.0) for _ in range(2))
    stage_of = other.Stage

    def with_other_padding(k: int, K: int) -> nn.Module:
        stage = stage_of(k, K)
        with torch.no_grad():
            stage.embedding.weight[0] += 1
        return stage

    other.Stage = with_other_padding
    one, two = (first_line(each, K=1)["loss"] for each in (script, other))
    return differ(one, two), f"loss {one:.4f}, with another one {two:.4f}"


def loss_and_stages(functions: dict[str, Any]) -> tuple[bool, str]:
    one, two = (first_line(load_script(**functions), K=K)["loss"] for K in (1, 2))
    return differ(one, two), f"K=1: {one:.4f}, K=2: {two:.4f}"


def loss_and_micro_batches(functions: dict[str, Any]) -> tuple[bool, str]:
    script = load_script(**functions, batch=uneven_batch, DROPOUT=0.0)
    one, four = (first_line(script, K=1, M=M)["loss"] for M in (1, 4))
    return differ(one, four), f"M=1: {one:.4f}, M=4: {four:.4f}"


def norm_and_micro_batches(functions: dict[str, Any]) -> tuple[bool, str]:
    script = load_script(**functions, batch=even_batch, DROPOUT=0.0, FIRST_SCALE=1024.0)
    one, four = (first_line(script, K=1, M=M)["norm"] for M in (1, 4))
    return differ(one, four, 0.01), f"M=1: {one:.3f}, M=4: {four:.3f}"


def norm_after_clipping(functions: dict[str, Any]) -> tuple[bool, str]:
    script = load_script(**functions, FIRST_SCALE=1024.0, MAX_NORM=0.05)
    lines = [log[0] for log in script.train(K=3, steps=1)[0]]
    norm = math.sqrt(sum(line["clipped"] ** 2 for line in lines))
    return norm > 0.0501, f"{norm:.3f}, and max_norm is 0.05"


def rate_of_first_update(functions: dict[str, Any]) -> tuple[bool, str]:
    rates = []
    for scale in (2.0**10, 2.0**24):
        log = load_script(**functions, FIRST_SCALE=scale).train(K=1, steps=6)[0][-1]
        rates.append(next((line["rate"] for line in log if not line["skipped"]), math.nan))
    return differ(*rates), f"{rates[0]:g}, and {rates[1]:g} after skipped steps"


def losses_after_resume(functions: dict[str, Any]) -> tuple[bool, str]:
    script = load_script(**functions, FIRST_SCALE=1024.0)
    whole = script.train(K=2, steps=6)[0][-1][4]
    resumed = script.train(K=2, steps=2, saved=script.train(K=2, steps=4)[1])[0][-1][0]
    told = [f"step {line['step']}, loss {line['loss']:.4f}" for line in (whole, resumed)]
    return told[0] != told[1], f"{told[0]}; resumed: {told[1]}"


def differ(one: float, other: float, relative: float = 1e-4) -> bool:
    return not abs(one - other) <= relative * abs(one)


EXPERIMENTS = {
    "split": rows_seen,
    "attend": loss_and_padding,
    "run_layers": loss_and_stages,
    "loss_share": loss_and_micro_batches,
    "backward": norm_and_micro_batches,
    "clip": norm_after_clipping,
    "after_step": rate_of_first_update,
    "restore": losses_after_resume,
}


def symptoms(*functions: Callable) -> None:
    """Run the whole script with these functions in place of its own, and print which symptoms are left.

    A function that is not written yet leaves the script's own in its place.
    """
    written = {function.__name__: function for function in functions if not is_unwritten(function)}
    print(f"in place of the script's own: {', '.join(written) or 'nothing yet'}")
    left = 0
    for name, experiment in EXPERIMENTS.items():
        try:
            with time_limit(60), quiet_torch():
                is_left, figures = experiment(written)
        except (Exception, TookTooLong) as error:
            is_left, figures = True, f"the script ended with {type(error).__name__}: {error}"[:200]
        left += is_left
        print(f"{'LEFT' if is_left else 'gone'}  {SYMPTOMS[name]} ({figures})")
    print(f"{left} of {len(EXPERIMENTS)} symptoms are left.")


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Leave torch's own generator as it was."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
