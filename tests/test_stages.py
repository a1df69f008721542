"""Stages: where to cut, what a stage holds, and that a cut changes nothing."""

import gc
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from course_utils import stages, transformer
from course_utils.number_words import collate
from course_utils.stages import (
    CutModel,
    Partition,
    Stage,
    by_cost,
    by_count,
    global_parameter_names,
    measure_costs,
    stage_table,
)
from course_utils.transformer import TransformerConfig, block_builders

SMALL = TransformerConfig(d_model=16, heads=2, dropout=0.2)
BUILDERS = block_builders(SMALL)
NUMBERS = [7, 12345, 600, 98]


def cut(partition: Partition, seed: int = 0) -> list[Stage]:
    model = CutModel(SMALL, partition)
    return [model.build(stage, seed) for stage in range(model.num_stages)]


def partition_at(*first_blocks: int) -> Partition:
    """The cut of the small model whose later stages begin at these blocks."""
    bounds = [0, *first_blocks, len(BUILDERS)]
    return tuple(range(start, end) for start, end in itertools.pairwise(bounds))


EVERY_CUT = [
    partition_at(*starts)
    for later in range(len(BUILDERS))
    for starts in itertools.combinations(range(1, len(BUILDERS)), later)
]


# --- Where to cut ---


@pytest.mark.smoke
def test_cuts_by_count():
    assert by_count(8, 1) == (range(0, 8),)
    assert by_count(8, 2) == (range(0, 4), range(4, 8))
    assert by_count(8, 3) == (range(0, 3), range(3, 6), range(6, 8))
    assert by_count(3, 3) == (range(0, 1), range(1, 2), range(2, 3))


@given(st.integers(1, 60), st.data())
def test_cuts_by_count_are_even(num_blocks, data):
    num_stages = data.draw(st.integers(1, num_blocks))
    partition = by_count(num_blocks, num_stages)
    sizes = [len(blocks) for blocks in partition]
    assert [index for blocks in partition for index in blocks] == list(range(num_blocks))
    assert len(sizes) == num_stages and max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def all_partitions(num_blocks: int, num_stages: int) -> list[Partition]:
    """Every cut there is, those with an early first cut first."""
    partitions = []
    for starts in itertools.combinations(range(1, num_blocks), num_stages - 1):
        bounds = [0, *starts, num_blocks]
        partitions.append(tuple(range(start, end) for start, end in itertools.pairwise(bounds)))
    return partitions


def stage_costs(costs: list[float], partition: Partition) -> list[float]:
    return [math.fsum(costs[i] for i in blocks) for blocks in partition]


COSTS = st.one_of(st.integers(0, 4), st.sampled_from([0.1, 0.2, 0.3]), st.floats(0, 1e6))  # many ties, and none


@given(st.lists(COSTS, min_size=1, max_size=9), st.data())
def test_cuts_by_cost_are_the_best_of_all_cuts(costs, data):
    num_stages = data.draw(st.integers(1, len(costs)))
    chosen = by_cost(costs, num_stages)
    assert chosen == by_cost(list(costs), num_stages)
    everything = all_partitions(len(costs), num_stages)
    assert chosen in everything
    slowest = min(max(stage_costs(costs, partition)) for partition in everything)
    assert max(stage_costs(costs, chosen)) == slowest
    best = [partition for partition in everything if max(stage_costs(costs, partition)) == slowest]
    fastest = max(min(stage_costs(costs, partition)) for partition in best)
    assert min(stage_costs(costs, chosen)) == fastest
    most_even = [partition for partition in best if min(stage_costs(costs, partition)) == fastest]
    assert len(chosen[0]) == min(len(partition[0]) for partition in most_even)


def test_cuts_by_cost():
    assert by_cost([1, 1, 1, 1, 4], 2) == (range(0, 4), range(4, 5))
    assert by_cost([1, 1, 1, 1, 4], 3) == (range(0, 2), range(2, 4), range(4, 5))  # not 1, 3: the spread is smaller
    assert by_cost([5, 1, 1], 2) == (range(0, 1), range(1, 3))
    assert by_cost([0, 0, 0], 2) == (range(0, 1), range(1, 3))


@pytest.mark.parametrize("bad", [0, -1, 9, 2.0, None, True], ids=repr)
def test_a_number_of_stages_that_cannot_be_says_how_many_blocks_there_are(bad):
    for make in (lambda: by_count(8, bad), lambda: by_cost([1.0] * 8, bad)):
        with pytest.raises(ValueError, match="8 blocks .* 1 to 8 stages") as error:
            make()
        assert repr(bad) in str(error.value)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_cost_that_is_none_is_an_error(bad):
    with pytest.raises(ValueError, match=f"cost of block 1 .* got {bad}"):
        by_cost([1.0, bad, 1.0], 2)


# --- What a cut must not change ---


@pytest.mark.parametrize(
    "partition", EVERY_CUT[:: len(EVERY_CUT) // 12], ids=lambda p: "-".join(str(len(b)) for b in p)
)
def test_weights_are_the_same_for_every_cut(partition):
    whole = dict(cut(partition_at())[0].named_parameters_globally())
    assert list(whole) == global_parameter_names(BUILDERS) == CutModel(SMALL, partition).parameter_names
    torch.manual_seed(len(partition))
    parts = [pair for stage in reversed(cut(partition)) for pair in stage.named_parameters_globally()]
    assert len(parts) == len(whole) and dict(parts).keys() == whole.keys()
    for name, parameter in parts:
        assert torch.equal(parameter, whole[name]), name


def test_global_names():
    names = global_parameter_names(BUILDERS)
    assert names[0] == "00.source_embedding.embedding.tokens.weight"
    assert "01.encoder_0.attention.query.weight" in names and "07.head.linear.bias" in names
    assert names == sorted(names, key=lambda name: name[:2]) and len(set(names)) == len(names)


def run(partition: Partition) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of the cut model; only numbers cross from one stage to the next."""
    micro_batch = collate(NUMBERS)
    model = cut(partition)
    borders, hidden, memory = [], None, None
    for stage in model:
        leaves = [None if t is None else t.detach().requires_grad_() for t in (hidden, memory)]
        hidden, memory = stage((leaves[0], leaves[1]), micro_batch, dropout_key=(0, 5, 2))
        borders.append((leaves, (hidden, memory)))
    logits = hidden.detach()
    gradients: list[Tensor | None] = [torch.cos(torch.arange(logits.numel())).view_as(logits), None]
    for leaves, made in reversed(borders):
        roots = [(t, gradient) for t, gradient in zip(made, gradients, strict=True) if t is not None]
        torch.autograd.backward([t for t, _ in roots], [gradient for _, gradient in roots])
        gradients = [None if leaf is None else leaf.grad for leaf in leaves]
    return logits, {name: p.grad for stage in model for name, p in stage.named_parameters_globally()}


@pytest.fixture(scope="module")
def uncut() -> tuple[Tensor, dict[str, Tensor]]:
    return run(partition_at())


def test_no_bit_of_output_or_gradient_depends_on_the_cut(uncut):
    assert len(EVERY_CUT) == 2 ** (len(BUILDERS) - 1)
    for partition in EVERY_CUT:
        logits, gradients = run(partition)
        assert torch.equal(logits, uncut[0]), partition
        for name, gradient in gradients.items():
            assert torch.equal(gradient, uncut[1][name]), (partition, name)


def test_a_stage_hands_on_what_carry_after_says():
    micro_batch = collate(NUMBERS)
    for partition in EVERY_CUT:
        carry = (None, None)
        for stage in cut(partition)[:-1]:
            carry = stage(carry, micro_batch)
            specs = CutModel(SMALL, partition).carry_after(stage.index, micro_batch.geometry)
            assert tuple(None if t is None else (t.shape, t.dtype, t.requires_grad) for t in carry) == specs


def test_dropout_is_known_by_its_key():
    (model,) = cut(partition_at())
    micro_batch = collate(NUMBERS)

    def logits(key: tuple[int, int, int] | None) -> Tensor:
        return model((None, None), micro_batch, key)[0]

    first = logits((0, 5, 2))
    assert torch.equal(logits((0, 5, 2)), first)
    for key in [(1, 5, 2), (0, 6, 2), (0, 5, 3), (5, 0, 2), None]:
        assert not torch.equal(logits(key), first)
    without = logits(None)
    model.eval()  # torch's switch has no say: the key alone decides
    assert torch.equal(logits((0, 5, 2)), first) and torch.equal(logits(None), without)


def test_two_blocks_never_share_a_mask(monkeypatch):
    """The generators of a stage's blocks are all different, and those of another micro-batch are too."""
    keys = []
    monkeypatch.setattr(stages, "generator_for", lambda *key: keys.append(key) or torch.Generator())
    for micro_batch in (0, 1):
        cut(partition_at())[0]((None, None), collate(NUMBERS), (0, 0, micro_batch))
    assert len(set(keys)) == len(keys) == 2 * len(BUILDERS)
    no_dropout = block_builders(TransformerConfig(d_model=16, heads=2))
    Stage(0, 1, no_dropout, 0)((None, None), collate(NUMBERS), (0, 0, 0))
    assert len(keys) == 2 * len(BUILDERS)  # without dropout none is made


# --- What a stage holds ---


def live_parameter_bytes(ignored: set[int]) -> int:
    """The memory of all parameters that exist in this process, those of the meta device and the ignored ones aside."""
    alive = [x for x in gc.get_objects() if type(x) is nn.Parameter and x.device.type == "cpu"]
    return sum({p.data_ptr(): p.nbytes for p in alive if id(p) not in ignored}.values())


class Watch:
    """Remembers the largest number of parameter bytes alive at a moment when a block had just got its memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gc.collect()
        self.others = [x for x in gc.get_objects() if type(x) is nn.Parameter]  # kept, so that no id is used again
        self.ignored = {id(p) for p in self.others}
        self.peak = 0
        initialise = transformer.initialise

        def watched(block: nn.Module, generator: torch.Generator) -> None:
            self.peak = max(self.peak, live_parameter_bytes(self.ignored))
            initialise(block, generator)

        monkeypatch.setattr(transformer, "initialise", watched)


def bytes_of(index: int) -> int:
    return 4 * sum(shape.numel() for shape in BUILDERS[index].parameter_shapes().values())


@pytest.mark.parametrize("partition", [partition_at(4), partition_at(2, 5)], ids=len)
def test_building_a_stage_never_holds_more_than_its_blocks_and_one(partition, monkeypatch):
    largest = max(bytes_of(index) for index in range(len(BUILDERS)))
    for index, blocks in enumerate(partition):
        watch = Watch(monkeypatch)
        stage = Stage(index, len(partition), [BUILDERS[i] for i in blocks], seed=0)
        own = sum(bytes_of(i) for i in blocks)
        assert sum(p.nbytes for p in stage.parameters()) == own <= watch.peak <= own + largest
        del stage


def test_a_stage_knows_its_place():
    first, middle, last = cut(partition_at(2, 5))
    assert [stage.is_first for stage in (first, middle, last)] == [True, False, False]
    assert [stage.is_last for stage in (first, middle, last)] == [False, False, True]
    (alone,) = cut(partition_at())
    assert alone.is_first and alone.is_last


def test_a_stage_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="no stage 2 of 2.*0 to 1"):
        Stage(2, 2, BUILDERS, 0)
    with pytest.raises(ValueError, match="no stage -1"):
        Stage(-1, 2, BUILDERS, 0)
    for blocks in ([], [0, 2], [1, 0], [3, 3]):
        with pytest.raises(ValueError, match="neighbouring blocks") as error:
            Stage(0, 2, [BUILDERS[i] for i in blocks], 0)
        assert str(blocks) in str(error.value)


def test_the_table_of_stages():
    builders = block_builders(TransformerConfig())
    assert stage_table(builders, by_count(8, 2)).splitlines() == [
        "stage  parameters      bytes  blocks",
        "    0     397,952  1,591,808  source_embedding, encoder_0, encoder_1, encoder_norm",
        "    1     532,237  2,128,948  target_embedding, decoder_0, decoder_1, head",
        "  all     930,189  3,720,756  8 blocks",
    ]
    for wrong in [by_count(7, 2), (range(0, 4), range(5, 8)), (range(4, 8), range(0, 4))]:
        with pytest.raises(ValueError, match="each of the 8 blocks once"):
            stage_table(builders, wrong)


# --- Measured costs ---


def test_costs_are_medians_without_the_first_run(monkeypatch):
    seconds = [100.0, 1.0, 9.0, 2.0]  # the first is to warm up
    clock = itertools.chain.from_iterable((0.0, duration) for _ in BUILDERS for duration in seconds)
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(clock))
    assert measure_costs(BUILDERS, collate(NUMBERS), seed=0, repetitions=3) == [2.0] * len(BUILDERS)


def test_measuring_costs_works_and_disturbs_nothing(monkeypatch):
    before = torch.get_rng_state()
    watch = Watch(monkeypatch)
    costs = measure_costs(BUILDERS, collate(NUMBERS), seed=0, repetitions=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(costs) == len(BUILDERS) and min(costs) > 0
    assert watch.peak <= 2 * max(bytes_of(index) for index in range(len(BUILDERS)))
    for num_stages in range(1, len(BUILDERS) + 1):
        assert len(by_cost(costs, num_stages)) == num_stages
    with pytest.raises(ValueError, match="repetitions must be at least 1, got 0"):
        measure_costs(BUILDERS, collate(NUMBERS), seed=0, repetitions=0)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=4), st.integers(0, 2**40))
def test_any_numbers_and_any_seed_run(numbers, seed):
    (model,) = cut(partition_at(), seed)
    logits, memory = model((None, None), collate(numbers), (seed, seed, 0))
    assert logits.shape == (*collate(numbers).target_input.shape, 13) and logits.isfinite().all()
    assert memory is None
