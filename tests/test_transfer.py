"""The messages of a step: all ranks plan the same, what is not in the plan is not sent, nothing is let go too early."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from course_utils.number_words import Geometry
from course_utils.pipeline import Pipeline
from course_utils.processes import launch
from course_utils.schedules import Message, Schedule, gpipe, looped, one_f_one_b
from course_utils.threads import run_in_threads
from course_utils.transfer import Exchange, Gathering, PlanMismatch, Specs, StepAgreement, StepPlan, agree
from course_utils.transformer import CarrySpec
from course_utils.transports import PeerLost, TorchTransport, TransferError, WaitTimeout, Worker
from course_utils.validity import posting_plan
from tests.models import TINY_RUN, one_step

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers need not import this file, and pytest with it

Run = Callable[..., list]
THREADS_AND_GLOO = [
    pytest.param(run_in_threads, id="threads"),
    pytest.param(launch, id="gloo", marks=pytest.mark.processes),
]
SMALL = [gpipe(2, 3), gpipe(3, 4), one_f_one_b(3, 5), one_f_one_b(4, 2), looped(2, 2, 3), looped(3, 2, 2)]


def small_carry(stage: int, geometry: Geometry) -> Specs:
    """(hidden, memory): the memory needs no gradient here."""
    rows, length, _ = geometry
    return CarrySpec((rows, length), torch.float32, True), CarrySpec((length, 5), torch.int64, False)


def small_plan(num_micro_batches: int = 2, num_stages: int = 2, rows: int = 2) -> StepPlan:
    return StepPlan(num_micro_batches * [(rows, 3, 4)], small_carry, num_stages)


def tensors_for(specs: Specs) -> list[Tensor | None]:
    return [None if spec is None else torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs]


# --- The plan of a step ----------------------------------------------------------------------------------------


def test_every_border_of_the_model_has_its_shapes_and_the_memory_ends_with_its_last_reader():
    cut = replace(TINY_RUN, stages=8).cut  # a block per stage
    plan = StepPlan([(3, 4, 5), (2, 6, 7)], cut.carry_after, 8)
    for number, (rows, source_length, target_length) in enumerate(plan.geometries):
        source, target = (rows, source_length, 16), (rows, target_length, 16)
        shapes = [
            (source, None),  # behind the source embedding,
            (source, None),  # the encoder's layers,
            (source, None),
            (None, source),  # the encoder's norm: the memory,
            (target, source),  # the target embedding,
            (target, source),  # the first decoder layer,
            (target, None),  # and the second, the last to read the memory.
        ]
        for stage, expected in enumerate(shapes):
            for message in (Message(stage, stage + 1, number), Message(stage + 1, stage, number)):
                specs = plan.specs(message)
                assert tuple(spec and spec.shape for spec in specs) == expected, message
                assert all(spec is None or spec.dtype == torch.float32 for spec in specs)


def test_gradients_flow_only_for_what_requires_them():
    plan = small_plan()
    hidden, memory = small_carry(0, (2, 3, 4))
    assert plan.specs(Message(0, 1, 1)) == (hidden, memory)
    assert plan.specs(Message(1, 0, 1)) == (hidden, None)
    assert plan.num_bytes(Message(0, 1, 1)) == 2 * 3 * 4 + 3 * 5 * 8
    assert plan.num_bytes(Message(1, 0, 1)) == 2 * 3 * 4


def with_specs(**changes: Any) -> StepPlan:
    """A plan whose first micro-batch hands on something a little different."""

    def carry(stage: int, geometry: Geometry) -> Specs:
        hidden, memory = small_carry(stage, geometry)
        assert hidden is not None
        return (hidden._replace(**changes) if geometry[2] == 4 else hidden), memory

    return StepPlan([(2, 3, 4), (2, 3, 5)], carry, 2)


DIFFERENT_PLANS = {
    "the plan itself": with_specs(),
    "rows": StepPlan([(3, 3, 4), (2, 3, 5)], small_carry, 2),
    "source length": StepPlan([(2, 4, 4), (2, 3, 5)], small_carry, 2),
    "target length": StepPlan([(2, 3, 4), (2, 3, 6)], small_carry, 2),
    "order": StepPlan([(2, 3, 5), (2, 3, 4)], small_carry, 2),
    "one micro-batch more": StepPlan([(2, 3, 4), (2, 3, 5), (2, 3, 5)], small_carry, 2),
    "one stage more": StepPlan([(2, 3, 4), (2, 3, 5)], small_carry, 3),
    "shape": with_specs(shape=(3, 2)),
    "dtype": with_specs(dtype=torch.float64),
    "no gradient": with_specs(requires_grad=False),
    "nothing": StepPlan([(2, 3, 4), (2, 3, 5)], lambda stage, geometry: (None, None), 2),
}


def test_digests_differ_as_soon_as_anything_differs():
    digests = {name: plan.digest for name, plan in DIFFERENT_PLANS.items()}
    assert len(set(digests.values())) == len(digests), digests
    assert {len(digest) for digest in digests.values()} == {32}
    assert with_specs().digest == StepPlan([(2, 3, 4), (2, 3, 5)], small_carry, 2).digest


# --- Sends and receives of a step ------------------------------------------------------------------------------


class Recorder:
    """A transport that moves nothing and writes down what it is asked to do."""

    wire_device = "cpu"

    def __init__(self, rank: int, world_size: int, posts_early: bool = True):
        self.rank, self.world_size, self.posts_early = rank, world_size, posts_early
        self.posted: dict[int, list[Message]] = {}  # receives, by the rank they come from
        self.sent: list[Tensor] = []
        self.waited: list[tuple[str, Message]] = []

    def isend(self, tensor: Tensor, peer: int, label: Message, control: bool = False) -> tuple[str, Message]:
        self.sent.append(tensor)
        return "send", label

    def irecv(self, buffer: Tensor, peer: int, label: Message, control: bool = False) -> tuple[str, Message]:
        self.posted.setdefault(peer, []).append(label)
        return "recv", label

    def wait(self, operation: tuple[str, Message]) -> None:
        self.waited.append(operation)


def one_tensor(stage: int, geometry: Geometry) -> Specs:
    return (CarrySpec((1,), torch.float32, True),)


def walk_through(schedule: Schedule, transport: Recorder) -> list[list[str]]:
    """The messages of one rank's step, without computing; what the outbox holds after each action, and at the end."""
    plan = StepPlan(schedule.num_micro_batches * [(1, 1, 1)], one_tensor, schedule.num_stages)
    exchange = Exchange(transport, schedule, plan, posting_plan(schedule, transport.rank), "cpu")
    kept = []
    for number, action in enumerate(schedule.actions[transport.rank], start=1):
        if (message := schedule.received_by(action)) is not None:
            exchange.receive(message)
        exchange.begin_action(number)
        if (message := schedule.sent_by(action)) is not None:
            exchange.send(message, tensors_for(plan.specs(message)))
        kept.append([f"{sent.kind[0]}{sent.micro_batch}" for sent in exchange.outbox])
    exchange.finish()
    assert exchange.inbox == {} and not any(exchange.to_post.values())
    return [*kept, [str(sent) for sent in exchange.outbox]]


def test_a_send_is_kept_until_a_message_shows_that_it_was_used():
    schedule = one_f_one_b(2, 3)
    transport = Recorder(0, 2)
    # 0F0 0F1 0B0 0F2 0B1 0B2, and all is over: gradients show that the activations of their micro-batch were used.
    assert walk_through(schedule, transport) == [["a0"], ["a0", "a1"], ["a1"], ["a1", "a2"], ["a2"], [], []]
    transport = Recorder(1, 2)
    # 1F0 1B0 1F1 1B1 1F2 1B2: only activations of micro-batch 2 are sent after gradients were used, those of 0.
    assert walk_through(schedule, transport) == [[], ["g0"], ["g0"], ["g0", "g1"], ["g1"], ["g1", "g2"], []]
    waited = [f"{kind} {message.kind[0]}{message.micro_batch}" for kind, message in transport.waited]
    assert waited == ["recv a0", "recv a1", "recv a2", "send g0", "send g1", "send g2"]


@pytest.mark.parametrize("schedule", SMALL, ids=Schedule.to_text)
def test_every_send_is_waited_for_once(schedule):
    for rank in range(schedule.num_ranks):
        transport = Recorder(rank, schedule.num_ranks)
        assert walk_through(schedule, transport)[-1] == []
        waits = [message for kind, message in transport.waited if kind == "send"]
        sent = [
            message for channel, messages in schedule.channels.items() if channel[0] == rank for message in messages
        ]
        assert sorted(waits) == sorted(sent)
        assert len(transport.sent) == len(sent)


@pytest.mark.parametrize("posts_early", [True, False])
@pytest.mark.parametrize("schedule", SMALL, ids=Schedule.to_text)
def test_receives_are_posted_in_the_order_in_which_their_sender_sends(schedule, posts_early):
    for rank in range(schedule.num_ranks):
        transport = Recorder(rank, schedule.num_ranks, posts_early)
        walk_through(schedule, transport)
        for peer in range(schedule.num_ranks):
            assert tuple(transport.posted.get(peer, ())) == schedule.channels.get((peer, rank), ())


@pytest.mark.parametrize("num_stages", [2, 3, 5, 8])
def test_the_outbox_of_1f1b_does_not_grow_with_the_number_of_micro_batches(num_stages):
    def peaks(make: Callable[[int, int], Schedule], num_micro_batches: int) -> list[int]:
        schedule = make(num_stages, num_micro_batches)
        return [max(map(len, walk_through(schedule, Recorder(k, num_stages)))) for k in range(num_stages)]

    assert (
        peaks(one_f_one_b, 9)
        == peaks(one_f_one_b, 20)
        == [min(num_stages, num_stages - k + 1) for k in range(num_stages)]
    )
    assert peaks(gpipe, 20) == num_stages * [20]


# --- What is not in the plan is not sent -----------------------------------------------------------------------

HIDDEN, MEMORY = torch.zeros(2, 3), torch.zeros(3, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ([torch.zeros(3, 2), MEMORY], r"the plan says 2x3 float32, the stage gave 3x2 float32"),
        ([HIDDEN.double(), MEMORY], r"the plan says 2x3 float32, the stage gave 2x3 float64"),
        ([None, MEMORY], r"the plan says 2x3 float32, the stage gave nothing"),
        ([HIDDEN, MEMORY.float()], r"the plan says 3x5 int64, the stage gave 3x5 float32"),
        ([HIDDEN], "the plan has 2 tensors, the stage gave 1"),
        ([HIDDEN, MEMORY, HIDDEN], "the plan has 2 tensors, the stage gave 3"),
    ],
)
def test_tensors_that_are_not_those_of_the_plan_are_named(tensors, complaint):
    transport, schedule = Recorder(0, 2), gpipe(2, 2)
    exchange = Exchange(transport, schedule, small_plan(), posting_plan(schedule, 0), "cpu")
    with pytest.raises(PlanMismatch, match="the activations of micro-batch 1.*" + complaint):
        exchange.send(Message(0, 1, 1), tensors)
    assert not any(sent.shape == torch.Size([3, 2]) or sent.dtype == torch.float64 for sent in transport.sent)


def test_what_the_plan_does_not_name_stays():
    transport, schedule = Recorder(1, 2), gpipe(2, 2)
    exchange = Exchange(transport, schedule, small_plan(), posting_plan(schedule, 1), "cpu")
    exchange.send(Message(1, 0, 0), [HIDDEN, torch.zeros(77)])  # the gradient of a memory that needs none
    assert [tuple(sent.shape) for sent in transport.sent] == [(2, 3)]


# --- The same over threads and over gloo -----------------------------------------------------------------------


def strided_tensors() -> tuple[list[Tensor], list[Tensor]]:
    """(hidden, memory) and their gradients, none of them contiguous: a transpose, every other column, one number."""
    activations = [torch.arange(6.0).view(3, 2).t(), torch.arange(30).view(3, 10)[:, ::2]]
    gradients = [torch.tensor(7.0).expand(2, 3), torch.zeros(3, 5)]
    assert not any(tensor.is_contiguous() for tensor in [*activations, gradients[0]])
    return activations, gradients


def exchange_strided_tensors(worker: Worker) -> list[Tensor | None]:
    activations, gradients = strided_tensors()
    schedule = gpipe(2, 1)
    exchange = Exchange(worker.transport, schedule, small_plan(1), posting_plan(schedule, worker.rank), "cpu")
    there, back = Message(0, 1, 0), Message(1, 0, 0)
    if worker.rank == 0:
        exchange.send(there, activations)
        received = exchange.receive(back)
    else:
        received = exchange.receive(there)
        exchange.send(back, gradients)
    exchange.finish()
    assert exchange.outbox == {} and exchange.inbox == {}
    return received


@pytest.mark.parametrize("run", THREADS_AND_GLOO)
def test_tensors_that_are_not_contiguous_arrive_as_they_are(run):
    activations, gradients = strided_tensors()
    of_rank_0, of_rank_1 = run(exchange_strided_tensors, 2)
    assert all(map(torch.equal, of_rank_1, activations))
    assert torch.equal(of_rank_0[0], gradients[0])
    assert of_rank_0[1] is None


def gather_twice(worker: Worker) -> list[list[int]]:
    """Two gatherings at once: what comes first belongs to the first."""
    gatherings = [Gathering(worker.transport, 2, "some bytes") for _ in range(2)]
    own = [torch.tensor([worker.rank, number], dtype=torch.uint8) for number in (50, 60)]
    return [[t.tolist() for t in g.share(bytes_)] for g, bytes_ in zip(gatherings, own, strict=True)]


@pytest.mark.parametrize("run", THREADS_AND_GLOO)
def test_everybody_gets_everybodys_bytes_by_rank(run):
    assert run(gather_twice, 3) == 3 * [[[[0, 50], [1, 50], [2, 50]], [[0, 60], [1, 60], [2, 60]]]]


def test_a_single_rank_gathers_from_itself():
    assert run_in_threads(gather_twice, 1) == [[[[0, 50]], [[0, 60]]]]


def share_norms(worker: Worker, norms: Tensor) -> Tensor:
    """Each rank has the norms whose place modulo the number of ranks is its own."""
    own = torch.where(torch.arange(len(norms)) % worker.world_size == worker.rank, norms, 0.0)
    agreement = StepAgreement(worker.transport, len(norms))
    agreement.open()
    return agreement.share(own, small_plan())


@pytest.mark.parametrize("run", THREADS_AND_GLOO)
def test_norms_arrive_on_all_ranks_bit_for_bit_and_a_nan_as_a_nan(run):
    norms = torch.rand(9, generator=torch.Generator().manual_seed(3)) * 1e-3
    norms[4], norms[6], norms[7] = float("nan"), float("inf"), 0.0
    for found in run(share_norms, 3, norms):
        assert torch.equal(found.isnan(), torch.arange(9) == 4)
        assert torch.equal(found[~norms.isnan()], norms[~norms.isnan()])


# --- A plan that is another one on one rank only ---------------------------------------------------------------


def caught(function: Callable[[], object]) -> str:
    """The text of the PlanMismatch that a function ends with; empty if it does not."""
    try:
        function()
    except PlanMismatch as error:
        return str(error)
    return ""


def share_plans(worker: Worker, plans_of_ranks: Sequence[Sequence[StepPlan]]) -> str:
    """A run whose steps have these plans: the first is compared on its own, each other one in the step before it."""
    first, *others = plans_of_ranks[worker.rank]

    def steps() -> None:
        agree(worker.transport, first)
        agreement = StepAgreement(worker.transport, 4)
        for number, plan in enumerate(others, start=1):
            agreement.open()
            worker.emit(number)
            agreement.share(torch.zeros(4), plan)

    return caught(steps)


@pytest.mark.parametrize("run", THREADS_AND_GLOO)
@pytest.mark.parametrize("step", [0, 1, 3])
def test_another_plan_on_one_rank_is_an_error_on_all_that_shows_all_plans(run, step):
    plans = [[StepPlan([(rows, 3, 4), (2, 6, 7)], small_carry, 2) for rows in (2, 3, 4, 5)] for _ in range(3)]
    plans[1][step] = StepPlan([(9, 3, 4), (2, 6, 7)], small_carry, 2)
    seen: list[tuple[int, int]] = []
    texts = run(share_plans, 3, plans, on_event=lambda rank, number: seen.append((rank, number)))
    assert sorted(seen) == [(rank, number) for rank in range(3) for number in range(1, step + 1)]
    assert len(set(texts)) == 1
    for rank, rows in ((0, 2 + step), (1, 9), (2, 2 + step)):
        assert f"rank {rank}: 2 micro-batches over 2 stages: {rows} rows, 3 -> 4 tokens; 2 rows, 6 -> 7" in texts[0]


@pytest.mark.parametrize("name", [name for name in DIFFERENT_PLANS if name != "the plan itself"])
def test_the_error_shows_a_difference_whatever_it_is(name):
    plans = [DIFFERENT_PLANS["the plan itself"], DIFFERENT_PLANS[name]]
    texts = run_in_threads(share_plans, 2, [[plan] for plan in plans])
    assert texts[0] == texts[1]
    shown, differences = texts[0].split("they differ in this:\n")
    for lines in (shown.splitlines()[1:], differences.splitlines()):
        of_rank_0, of_rank_1 = (line.partition(": ")[2] for line in lines)
        assert of_rank_0 != of_rank_1 and "not show" not in of_rank_0 + of_rank_1
    assert len(differences) < len(shown)


def test_plans_that_are_too_long_to_be_shown_are_told_apart_by_their_digests():
    geometries = 200 * [(2, 3, 4)]
    plans = [StepPlan([*geometries, (2, 3, last)], small_carry, 2) for last in (4, 5)]
    text, _ = run_in_threads(share_plans, 2, [[plan] for plan in plans])
    assert all(plan.digest.hex()[:8] in text for plan in plans)


def train_with_another_batch(worker: Worker, expecting: bool) -> str:
    """Two steps of the real engine; rank 1 has one row less in the second one."""
    cut, schedule = TINY_RUN.cut, gpipe(2, 3)
    pipeline = Pipeline({worker.rank: cut.build(worker.rank, 0)}, schedule, worker.transport, cut.carry_after)
    agreement = StepAgreement(worker.transport, 4)
    plans, batches = [], []
    for size in (7, 7 - worker.rank):
        micro_batches, num_tokens = one_step(replace(TINY_RUN, batch_size=size))
        batches.append((micro_batches, num_tokens))
        plans.append(pipeline.plan(micro_batches))

    def steps() -> None:
        agree(worker.transport, plans[0])
        agreement.open()
        pipeline.step(batches[0][0], plans[0], batches[0][1])
        if expecting:
            pipeline.expect(plans[1])
        agreement.share(torch.zeros(4), plans[1])
        pipeline.step(batches[1][0], plans[1], batches[1][1])

    return caught(steps)


@pytest.mark.parametrize(
    ("run", "expecting"),
    [
        (run_in_threads, False),
        (run_in_threads, True),
        pytest.param(launch, True, marks=pytest.mark.processes),
    ],
)
def test_another_batch_on_one_rank_ends_training_on_all(run, expecting):
    """Also when receives of the wrong size are posted already: nobody sends before the plans have been compared."""
    texts = run(train_with_another_batch, 2, expecting)
    assert texts[0] == texts[1]
    assert "rank 0: 3 micro-batches over 2 stages: 3 rows" in texts[0]
    assert "rank 1: 3 micro-batches over 2 stages: 2 rows" in texts[0]


# --- Receives that are posted before the step ------------------------------------------------------------------


def gradients_after_three_steps(worker: Worker, schedule: Schedule, expecting: bool) -> dict[str, Tensor | None]:
    cut = replace(TINY_RUN, stages=schedule.num_stages).cut
    stages = {s: cut.build(s, 0) for s in schedule.stages_of(worker.rank)}
    pipeline = Pipeline(stages, schedule, worker.transport, cut.carry_after)
    agreement = StepAgreement(worker.transport, 4)
    batches = [one_step(replace(TINY_RUN, seed=seed)) for seed in range(3)]
    plans = [pipeline.plan(micro_batches) for micro_batches, _ in batches]
    agree(worker.transport, plans[0])
    for number, (micro_batches, num_tokens) in enumerate(batches):
        agreement.open()
        pipeline.step(micro_batches, plans[number], num_tokens)
        assert pipeline.expected is None
        if number + 1 < len(batches):
            if expecting:
                pipeline.expect(plans[number + 1])
            agreement.share(torch.zeros(4), plans[number + 1])
    return {name: p.grad for stage in stages.values() for name, p in stage.named_parameters_globally()}


@pytest.mark.parametrize(
    ("run", "schedule"),
    [
        (run_in_threads, gpipe(3, 3)),
        (run_in_threads, looped(2, 2, 3)),
        pytest.param(launch, one_f_one_b(2, 3), marks=pytest.mark.processes),
    ],
    ids=["threads GPipe", "threads looped", "gloo 1F1B"],
)
def test_receives_posted_before_the_step_change_nothing(run, schedule):
    usual = run_in_threads(gradients_after_three_steps, schedule.num_ranks, schedule, False)
    expecting = run(gradients_after_three_steps, schedule.num_ranks, schedule, True)
    for of_rank, others in zip(usual, expecting, strict=True):
        assert [name for name in of_rank if not torch.equal(of_rank[name], others[name])] == []


def test_an_expected_step_has_its_first_receives_posted_and_must_be_the_next():
    transport, cut = Recorder(1, 2), TINY_RUN.cut
    pipeline = Pipeline({1: cut.build(1, 0)}, gpipe(2, 3), transport, cut.carry_after)
    micro_batches, num_tokens = one_step()
    shorter, _ = one_step(replace(TINY_RUN, batch_size=6))
    pipeline.expect(pipeline.plan(shorter))
    assert transport.posted == {0: [Message(0, 1, number) for number in range(3)]}
    with pytest.raises(PlanMismatch, match="expect.* was told 3 micro-batches .*: 2 rows.* this step has .*: 3 rows"):
        pipeline.step(micro_batches, pipeline.plan(micro_batches), num_tokens)


# --- When the other end does not answer ------------------------------------------------------------------------


def wait_in_vain(worker: Worker) -> str:
    """Rank 1 never sends."""
    if worker.rank == 1:
        time.sleep(0.5)  # in threads a rank that has ended cannot be waited for, and that is known at once
        return ""
    schedule = gpipe(2, 3)
    exchange = Exchange(worker.transport, schedule, small_plan(3), posting_plan(schedule, 0), "cpu")
    try:
        exchange.receive(Message(1, 0, 2))
    except WaitTimeout as error:
        return str(error)
    return "no WaitTimeout"


@pytest.mark.parametrize(
    ("run", "options"),
    [
        pytest.param(run_in_threads, {"limit": 0.2}, id="threads"),
        pytest.param(launch, {"wait_limit": 0.2}, id="gloo", marks=pytest.mark.processes),
    ],
)
def test_a_wait_that_runs_out_says_who_waited_for_what_from_whom(run, options):
    text, _ = run(wait_in_vain, 2, **options)
    for part in ("stage 0 wait", "the gradients of micro-batch 2", "from stage 1", "0.2 s"):
        assert part in text


def survive(rank: str, folder: str) -> None:
    """Two ranks without a launcher, so that nobody ends the second when the first has died."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=20)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=2, timeout=limit)
    transport = TorchTransport(int(rank), 2, dist.new_group(timeout=limit), limit=20)
    dist.barrier()
    if rank == "1":
        os._exit(3)
    for begin in (transport.irecv, transport.irecv, transport.isend):
        try:
            transport.wait(begin(torch.zeros(1000), 1, "the activations of micro-batch 5"))
        except TransferError as error:
            print(type(error).__name__, error, flush=True)
    os._exit(0)


@pytest.mark.processes
def test_a_peer_that_dies_is_named(tmp_path: Path):
    """Whether it dies while it is waited for, or before a message is begun."""
    command = [sys.executable, "-c", "import sys; from tests.test_transfer import survive; survive(*sys.argv[1:])"]
    processes = [
        subprocess.Popen([*command, rank, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    try:
        output, errors = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    lost = [line for line in output.splitlines() if line.startswith(f"{PeerLost.__name__} stage 0 ")]
    assert len(lost) == 3, output + errors
    assert all("lost stage 1" in line and "the activations of micro-batch 5" in line for line in lost)


@pytest.mark.parametrize("transport", ["threads"])
def test_another_schedule_on_one_rank_is_an_error_on_all(transport):
    """Both are valid, and their messages would be mixed up."""
    complaints = []

    def wrong(worker: Worker) -> None:
        schedule = (gpipe if worker.rank == 0 else one_f_one_b)(2, 3)
        cut = TINY_RUN.cut
        pipeline = Pipeline({worker.rank: cut.build(worker.rank, 0)}, schedule, worker.transport, cut.carry_after)
        try:
            agree(worker.transport, pipeline.plan(one_step()[0]))
        except PlanMismatch as error:
            complaints.append(str(error))

    run_in_threads(wrong, 2)
    assert len(complaints) == 2
    assert all("0F0,0F1,0F2,0B0" in text and "1F0,1B0,1F1" in text for text in complaints)
