"""The model: masks, weights, embeddings, dropout, and what every block hands on."""

import math
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from course_utils.number_words import END, PAD, START, Batch, collate
from course_utils.transformer import (
    Attention,
    Block,
    BlockBuilder,
    Carry,
    DecoderLayer,
    Embedding,
    EncoderLayer,
    TransformerConfig,
    block_builders,
    carry_after,
    drop,
    generator_for,
    initialise,
    padding_mask,
    sinusoidal_positions,
    target_mask,
)

SMALL = TransformerConfig(d_model=16, heads=2)
NUMBERS = [7, 12345, 600, 98, 1000000]


def build(config: TransformerConfig, seed: int = 0) -> list[Block]:
    return [builder.build(seed) for builder in block_builders(config)]


def logits_of(blocks: list[Block], micro_batch: Batch, dropout_seed: int | None = None) -> Tensor:
    carry: Carry = (None, None)
    for index, block in enumerate(blocks):
        carry = block(carry, micro_batch, None if dropout_seed is None else generator_for(dropout_seed, index))
    logits, memory = carry
    assert logits is not None and memory is None
    return logits


def with_target(b: Batch, target_input: Tensor) -> Batch:
    return Batch(b.source, target_input, b.target_output)


# --- Masks ---


def test_the_masks_of_one_row():
    ids = torch.tensor([[START, 5, PAD]])
    assert padding_mask(ids).tolist() == [[[[True, True, False]]]]
    assert target_mask(ids).tolist() == [[[[True, False, False], [True, True, False], [True, True, False]]]]


@pytest.mark.parametrize("layers", [1, 3])
def test_a_word_after_the_current_one_never_changes_the_output(layers):
    blocks = build(TransformerConfig(d_model=16, heads=2, decoder_layers=layers))
    b = collate(NUMBERS)
    before = logits_of(blocks, b)
    for position in range(1, b.target_length):
        changed = b.target_input.clone()
        changed[:, position:] = torch.randint(END, 13, changed[:, position:].shape, generator=generator_for(position))
        after = logits_of(blocks, with_target(b, changed))
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


def test_a_word_before_the_current_one_does_change_the_output():
    blocks, b = build(SMALL), collate(NUMBERS)
    changed = b.target_input.clone()
    changed[:, 0] = END
    different = (logits_of(blocks, with_target(b, changed)) != logits_of(blocks, b)).any(dim=-1)
    assert different.all()


@pytest.mark.parametrize("embedding", ["source_embedding", "target_embedding"])
def test_what_stands_in_the_padding_never_changes_the_output(embedding):
    """The vector of <pad> may be anything: not one bit of an output that counts moves."""
    b = collate(NUMBERS)
    blocks = build(SMALL)
    counts = b.target_output != PAD
    before = logits_of(blocks, b)
    names = [builder.name for builder in block_builders(SMALL)]
    with torch.no_grad():
        blocks[names.index(embedding)].embedding.tokens.weight[PAD] = 1000.0
    after = logits_of(blocks, b)
    assert torch.equal(after[counts], before[counts])
    assert before[~counts].numel() > 0


def test_a_row_does_not_see_how_long_its_neighbours_are():
    blocks, b = build(SMALL), collate(NUMBERS)
    together = logits_of(blocks, b)
    for row, number in enumerate(NUMBERS):
        alone = logits_of(blocks, collate([number]))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone)


def test_every_digit_counts_for_every_word_and_so_does_its_place():
    blocks = build(SMALL)
    b = collate([123456])
    before = logits_of(blocks, b)
    for place in range(b.source_length):
        changed = b.source.clone()
        changed[0, place] = 10  # the digit 9
        different = logits_of(blocks, Batch(changed, b.target_input, b.target_output)) != before
        assert different.any(dim=-1).all()
    swapped = logits_of(blocks, Batch(b.source.flip(1), b.target_input, b.target_output))
    assert (swapped - before).abs().max() > 1e-3


# --- The same as PyTorch's own layers ---


def copy_attention(own: Attention, reference: nn.MultiheadAttention) -> None:
    width = own.query.out_features
    zero = torch.zeros(width)  # the bias that our keys do not have
    reference.in_proj_weight.copy_(torch.cat([own.query.weight, own.key.weight, own.value.weight]))
    reference.in_proj_bias.copy_(torch.cat([own.query.bias, zero, own.value.bias]))
    reference.out_proj.load_state_dict(own.out.state_dict())


def copy_feedforward(own: nn.Module, reference: nn.Module) -> None:
    reference.linear1.load_state_dict(own.feedforward.expand.state_dict())
    reference.linear2.load_state_dict(own.feedforward.contract.state_dict())


def randomise(module: nn.Module) -> None:
    """Biases and norms too, so that a forgotten one shows."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator_for(index)) / 4)


@torch.no_grad()
def test_a_layer_computes_what_torchs_layers_compute():
    b = collate(NUMBERS)
    hidden = torch.randn(b.rows, b.source_length, 16, generator=generator_for(1))
    target = torch.randn(b.rows, b.target_length, 16, generator=generator_for(2))
    own = EncoderLayer(SMALL)
    randomise(own)
    reference = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, norm_first=True, batch_first=True)
    copy_attention(own.attention, reference.self_attn)
    copy_feedforward(own, reference)
    reference.norm1.load_state_dict(own.attention_norm.state_dict())
    reference.norm2.load_state_dict(own.feedforward_norm.state_dict())
    expected = reference(hidden, src_key_padding_mask=b.source == PAD)
    memory, none = own((hidden, None), b)
    torch.testing.assert_close(memory, expected)
    assert none is None

    own = DecoderLayer(SMALL)
    randomise(own)
    reference = nn.TransformerDecoderLayer(16, 2, 64, dropout=0.0, norm_first=True, batch_first=True)
    copy_attention(own.self_attention, reference.self_attn)
    copy_attention(own.cross_attention, reference.multihead_attn)
    copy_feedforward(own, reference)
    reference.norm1.load_state_dict(own.self_attention_norm.state_dict())
    reference.norm2.load_state_dict(own.cross_attention_norm.state_dict())
    reference.norm3.load_state_dict(own.feedforward_norm.state_dict())
    expected = reference(
        target,
        memory,
        tgt_mask=torch.ones(b.target_length, b.target_length, dtype=torch.bool).triu(1),
        tgt_key_padding_mask=b.target_input == PAD,
        memory_key_padding_mask=b.source == PAD,
    )
    torch.testing.assert_close(own((target, memory), b)[0], expected)


# --- Embeddings and positions ---


def test_positions_follow_the_papers_formula():
    table = sinusoidal_positions(64, 128)
    assert table.shape == (64, 128)
    for position in (0, 1, 17, 63):
        for i in (0, 1, 40, 63):
            angle = position / 10_000 ** (2 * i / 128)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("d_model", [32, 128, 512])
def test_embeddings_have_unit_size(d_model):
    """Tokens and positions weigh about the same: a token's elements have variance 1, a position's 1/2."""
    config = TransformerConfig(d_model=d_model, max_length=8)
    embedding = Embedding(1000, config)
    initialise(embedding, generator_for(0))
    ids = torch.arange(1000).view(125, 8)
    tokens = embedding(ids, None) - sinusoidal_positions(8, d_model)
    assert tokens.std().item() == pytest.approx(1, abs=0.02)
    assert tokens.mean().item() == pytest.approx(0, abs=0.02)
    assert embedding.positions.pow(2).mean().item() == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [-1, 11, 99])
def test_a_token_id_that_no_token_has_is_an_error(bad):
    b = collate([12])
    with pytest.raises(ValueError, match=rf"{bad}.*ids 0 to 10"):
        logits_of(build(SMALL), Batch(torch.tensor([[1, bad]]), b.target_input, b.target_output))
    with pytest.raises(ValueError, match=r"13.*ids 0 to 12"):
        logits_of(build(SMALL), with_target(b, torch.tensor([[START, 13]])))


def test_rows_longer_than_the_positions_are_an_error():
    blocks = build(TransformerConfig(d_model=16, heads=2, max_length=5))
    assert logits_of(blocks, collate([1234])).shape == (1, 5, 13)
    with pytest.raises(ValueError, match="6 tokens .* max_length=5"):
        logits_of(blocks, collate([12345]))  # five digits fit, <start> and five words do not
    with pytest.raises(ValueError, match="7 tokens .* max_length=5"):
        logits_of(blocks, collate([1234567]))


# --- Weights ---


def parameters_of(block: Block) -> dict[str, Tensor]:
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def assert_same_weights(a: Block, b: Block) -> None:
    ours, theirs = parameters_of(a), parameters_of(b)
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@settings(max_examples=10)
@given(st.permutations(range(8)), st.integers(0, 2**32 - 1))
def test_weights_depend_on_the_seed_and_the_place_alone(order, disturbance):
    builders = block_builders(SMALL)
    expected = build(SMALL, seed=5)
    torch.manual_seed(disturbance)
    for index in order:
        torch.rand(3)
        before = torch.get_rng_state()
        block = builders[index].build(seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        assert_same_weights(block, expected[index])


def test_blocks_built_in_threads_have_the_same_weights():
    expected, results = build(SMALL), {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: build(SMALL)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for i in range(4):
        for block, same in zip(results[i], expected, strict=True):
            assert_same_weights(block, same)


def test_seeds_and_layers_have_different_weights():
    builders = block_builders(SMALL)
    first, second, other_seed = builders[1].build(0), builders[2].build(0), builders[1].build(1)
    for name, weight in first.named_parameters():
        if weight.dim() == 2:
            assert not torch.equal(weight, second.get_parameter(name))
            assert not torch.equal(weight, other_seed.get_parameter(name))


def test_every_number_in_a_new_block_is_set(monkeypatch):
    """Memory that was only reserved may hold anything; here it holds NaN, which would show."""
    to_empty = nn.Module.to_empty

    def to_nan(module, **arguments):
        module = to_empty(module, **arguments)
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data.fill_(math.nan)
        return module

    monkeypatch.setattr(nn.Module, "to_empty", to_nan)
    for block in build(SMALL):
        for name, tensor in parameters_of(block).items():
            assert tensor.isfinite().all(), name


def test_the_sizes_of_the_weights():
    layer = block_builders(TransformerConfig())[1].build(0)
    bound = math.sqrt(1 / 128)
    assert bound * 0.98 < layer.feedforward.expand.weight.abs().max().item() <= bound
    assert layer.feedforward.expand.bias.eq(0).all()
    assert layer.attention_norm.weight.eq(1).all() and layer.attention_norm.bias.eq(0).all()


def test_no_key_has_a_bias_and_every_parameter_gets_a_gradient():
    builders = block_builders(SMALL)
    names = [f"{builder.name}.{name}" for builder in builders for name in builder.parameter_shapes()]
    assert sum(name.endswith("attention.key.weight") for name in names) == 6
    assert not [name for name in names if name.endswith("key.bias")]
    blocks, b = build(SMALL), collate([102, 3456, 789])
    loss = nn.functional.cross_entropy(logits_of(blocks, b).flatten(0, 1), b.target_output.flatten(), ignore_index=PAD)
    loss.backward()
    norms = [parameter.grad.norm().item() for block in blocks for parameter in block.parameters()]
    # A gradient that is truly zero, as a key bias's, comes out as noise of 1e-9 or so.
    assert min(norms) > 1e-4, names[norms.index(min(norms))]


def test_a_builder_knows_the_shapes_without_building(monkeypatch):
    for builder in block_builders(SMALL):
        block = builder.build(0)
        assert builder.parameter_shapes() == {name: parameter.shape for name, parameter in block.named_parameters()}
        again = pickle.loads(pickle.dumps(builder))
        assert again == builder
        assert_same_weights(again.build(0), block)
    monkeypatch.setattr(nn.Module, "to_empty", None)  # nothing is allocated
    assert (
        block_builders(TransformerConfig(d_model=2**20))[1].parameter_shapes()["attention.key.weight"] == (2**20,) * 2
    )


def test_the_list_of_blocks():
    builders = block_builders(TransformerConfig(encoder_layers=1, decoder_layers=3))
    assert [(builder.name, builder.part) for builder in builders] == [
        ("source_embedding", "encoder"),
        ("encoder_0", "encoder"),
        ("encoder_norm", "encoder"),
        ("target_embedding", "decoder"),
        ("decoder_0", "decoder"),
        ("decoder_1", "decoder"),
        ("decoder_2", "decoder"),
        ("head", "decoder"),
    ]
    assert [builder.index for builder in builders] == list(range(8))


# --- Dropout ---


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = torch.ones(100_000)
    dropped = drop(x, 0.2, generator_for(1))
    assert dropped.unique().tolist() == pytest.approx([0, 1.25])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert drop(x, 0.2, None) is x and drop(x, 0.0, generator_for(1)) is x
    assert drop(x.bfloat16(), 0.2, generator_for(1)).dtype == torch.bfloat16


def test_dropout_comes_from_its_generator_alone():
    config = TransformerConfig(d_model=16, heads=2, dropout=0.3)
    blocks, b = build(config), collate(NUMBERS)
    before = torch.get_rng_state()
    first = logits_of(blocks, b, dropout_seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(logits_of(blocks, b, dropout_seed=1), first)
    assert not torch.equal(logits_of(blocks, b, dropout_seed=2), first)
    assert torch.equal(logits_of(blocks, b), logits_of(build(SMALL), b))  # none: as if there were no rate


@pytest.mark.parametrize("index", [0, 1, 4, 5])
def test_every_sublayer_drops(index, monkeypatch):
    """The embeddings drop once, an encoder layer twice, a decoder layer three times (section 5.4)."""
    config = TransformerConfig(d_model=16, heads=2, dropout=0.3)
    blocks, b, rates = build(config), collate(NUMBERS), []
    carry: Carry = (None, None)
    for block in blocks[:index]:
        carry = block(carry, b, None)
    monkeypatch.setattr(
        "course_utils.transformer.drop", lambda x, rate, generator: rates.append((rate, generator)) or x
    )
    generator = generator_for(0)
    blocks[index](carry, b, generator)
    assert rates == [(0.3, generator)] * {0: 1, 1: 2, 4: 1, 5: 3}[index]


def test_a_generator_is_known_by_its_key():
    first = torch.rand(4, generator=generator_for(0, 7, 2, 5))
    assert torch.equal(first, torch.rand(4, generator=generator_for(0, 7, 2, 5)))
    others = [(0, 7, 2, 6), (0, 7, 3, 5), (0, 8, 2, 5), (1, 7, 2, 5), (7, 0, 2, 5), (0, 72, 5), (0, 7, 25)]
    assert not any(torch.equal(first, torch.rand(4, generator=generator_for(*key))) for key in others)


# --- What is handed on ---


@settings(max_examples=20)
@given(
    encoder_layers=st.integers(1, 3),
    decoder_layers=st.integers(1, 3),
    numbers=st.lists(st.integers(0, 10**8), min_size=1, max_size=3),
    low_precision=st.booleans(),
)
def test_the_carry_is_what_carry_after_says(encoder_layers, decoder_layers, numbers, low_precision):
    config = TransformerConfig(8, 2, encoder_layers, decoder_layers)
    builders, b = block_builders(config), collate(numbers)
    carry: Carry = (None, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        for builder in builders[:-1]:
            carry = builder.build(0)(carry, b, None)
            for tensor, spec in zip(carry, carry_after(builders, builder.index, b.geometry, config), strict=True):
                assert (tensor is None) == (spec is None), builder.name
                if tensor is not None:
                    assert (tensor.shape, tensor.dtype, tensor.requires_grad) == spec
                    assert tensor.is_contiguous()
    assert carry_after(builders, len(builders) - 1, b.geometry, config) == (None, None)


def test_no_memory_where_nobody_reads_it():
    config = TransformerConfig()
    builders = block_builders(config)
    handed_on = []
    for builder in builders:
        hidden, memory = carry_after(builders, builder.index, (4, 6, 7), config)
        handed_on.append((hidden and hidden.shape[1], memory and memory.shape[1]))
    assert handed_on == [(6, None), (6, None), (6, None), (None, 6), (7, 6), (7, 6), (7, None), (None, None)]
    with pytest.raises(ValueError, match="no block 8.*0 to 7"):
        carry_after(builders, 8, (4, 6, 7), config)


def test_a_block_without_what_it_needs_is_an_error():
    blocks, b = build(SMALL), collate(NUMBERS)
    with pytest.raises(ValueError, match="needs hidden"):
        blocks[1]((None, None), b)
    with pytest.raises(ValueError, match="needs memory"):
        blocks[5]((torch.zeros(b.rows, b.target_length, 16), None), b)


# --- Sizes that do not fit ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model must be a whole number of at least 2, got 0"),
        ({"d_model": 130}, "d_model=130 .* multiple of heads=4"),
        ({"d_model": 9, "heads": 3}, "d_model=9 must be even"),
        ({"heads": -1}, "heads must .* got -1"),
        ({"encoder_layers": 0}, "encoder_layers must .* got 0"),
        ({"decoder_layers": 1.5}, "decoder_layers must .* got 1.5"),
        ({"d_feedforward": 0}, "d_feedforward must .* got 0"),
        ({"max_length": True}, "max_length must .* got True"),
        ({"source_vocabulary": 1}, "source_vocabulary must .* at least 2, got 1"),
        ({"target_vocabulary": None}, "target_vocabulary must .* got None"),
        ({"dropout": 1.0}, "dropout must be a number of at least 0 and less than 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must .* got -0.1"),
        ({"dropout": math.nan}, "dropout must .* got nan"),
        ({"dropout": "0"}, "dropout must .* got '0'"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**arguments)


def test_the_width_of_the_feedforward_layer():
    def width(builder: BlockBuilder) -> int:
        return builder.parameter_shapes()["feedforward.expand.weight"][0]

    assert width(block_builders(TransformerConfig())[1]) == 512
    assert width(block_builders(TransformerConfig(d_feedforward=96))[5]) == 96
