"""The encoder-decoder of Vaswani et al. (2017), "Attention Is All You Need", as a flat list of blocks.

    source_embedding  encoder_0 .. encoder_norm | target_embedding  decoder_0 .. head
    [---------------- part "encoder" ----------]  [---------- part "decoder" --------]

Two rules make the list easy to cut anywhere:

- Every block maps a *carry* to a carry. The carry is the pair (hidden, memory): what the next block works on, and what
  the encoder has understood. It is all that ever crosses from one stage to the next.
- A block is described by a *builder* before it exists, and block i is initialised by a random generator of its own,
  seeded by (seed, i). So a stage builds only its own blocks, and they get the weights they have in the uncut model.

The layers are pre-norm (Xiong et al., 2020): normalise, compute, add to the residual stream. The paper's order, add and
then normalise (section 3.1), is harder to train. Shapes are batch first: (rows, length, d_model).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.number_words import PAD, SOURCE, TARGET, Batch, Geometry

Carry = tuple[Tensor | None, Tensor | None]  # (hidden, memory)


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of the model. ValueError for sizes that do not fit together."""

    d_model: int = 128
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    d_feedforward: int | None = None  # None: 4 * d_model, as in section 3.3
    dropout: float = 0.0
    source_vocabulary: int = len(SOURCE)
    target_vocabulary: int = len(TARGET)
    max_length: int = 64

    def __post_init__(self) -> None:
        # A vocabulary has padding and at least one token.
        smallest = {"d_model": 2, "heads": 1, "encoder_layers": 1, "decoder_layers": 1, "max_length": 1}
        smallest |= {"d_feedforward": 1, "source_vocabulary": 2, "target_vocabulary": 2}
        for name, at_least in smallest.items():
            value = getattr(self, name)
            if name == "d_feedforward" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
                raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")
        if self.d_model % self.heads or self.d_model % 2:
            raise ValueError(
                f"d_model={self.d_model} must be even (sine and cosine) and a multiple of heads={self.heads}: "
                f"change one of the two"
            )
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number of at least 0 and less than 1, got {self.dropout!r}")

    @property
    def feedforward_width(self) -> int:
        return 4 * self.d_model if self.d_feedforward is None else self.d_feedforward


# --- Masks: True where a query may look at a key --------------------------------------------------------------


def padding_mask(ids: Tensor) -> Tensor:
    """Nobody looks at padding. (rows, length) ids -> (rows, 1, 1, length): the same for all heads and queries."""
    return (ids != PAD)[:, None, None, :]


def causal_mask(length: int, device: torch.device | str = "cpu") -> Tensor:
    """A token sees itself and those before it (section 3.2.3). -> (length, length), True on and below the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def target_mask(ids: Tensor) -> Tensor:
    """Causal, and no padding. (rows, length) ids -> (rows, 1, length, length).

    The first token of a row is <start>, never padding, so every query has something to look at.
    """
    return causal_mask(ids.shape[1], ids.device) & padding_mask(ids)


# --- Random numbers: always from a generator made for one purpose ---------------------------------------------


def generator_for(*key: int) -> torch.Generator:
    """A random generator that depends on the key alone: the same numbers in every process, thread and run.

    Python's hash() would not do: it may differ between versions.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def drop(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Dropout (section 5.4) with its mask from `generator`; None means no dropout, as in evaluation.

    Each element becomes zero with probability `rate`; the others grow by 1 / (1 - rate), so the expected value stays.
    """
    if generator is None or rate == 0:
        return x
    keep = torch.rand(x.shape, generator=generator, device=generator.device) >= rate
    return x * keep.to(x) / (1 - rate)  # .to(x): x's device and dtype


# --- The parts of a layer -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention (section 3.2.2).

    The keys have no bias. It would add the same number to a query's score for every key, which the softmax takes out
    again: its gradient is truly zero, and what is computed instead is rounding noise that Adam blows up to full steps.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model, bias=False)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, looked_at: Tensor, mask: Tensor) -> Tensor:
        """x (rows, queries, d_model), looked_at (rows, keys, d_model) -> (rows, queries, d_model).

        mask: bool, broadcast to (rows, heads, queries, keys); True where a query may look at a key.
        """
        query = self._split_heads(self.query(x))
        key = self._split_heads(self.key(looked_at))
        value = self._split_heads(self.value(looked_at))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))  # heads side by side again

    def _split_heads(self, x: Tensor) -> Tensor:
        """(rows, length, d_model) -> (rows, heads, length, d_model / heads)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """The same two-layer network at every position (section 3.3)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.d_model, config.feedforward_width)
        self.contract = nn.Linear(config.feedforward_width, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.relu(self.expand(x)))


class Embedding(nn.Module):
    """Token ids to vectors, plus where they stand (sections 3.4 and 3.5).

    The weights start with variance 1 / d_model and are multiplied by sqrt(d_model), so a token's vector and that of its
    position have about the same size. PyTorch's default, variance 1, would make tokens eleven times as large as
    positions (d_model 128): nothing crashes, the model just hardly learns where a digit stands.
    """

    def __init__(self, vocabulary: int, config: TransformerConfig) -> None:
        super().__init__()
        self.scale = math.sqrt(config.d_model)
        self.dropout = config.dropout
        self.tokens = nn.Embedding(vocabulary, config.d_model)
        self.positions: Tensor  # (max_length, d_model), computed, not learnt
        self.register_buffer("positions", sinusoidal_positions(config.max_length, config.d_model), persistent=False)

    def forward(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        """ids (rows, length) -> (rows, length, d_model). ValueError for rows too long or an id that no token has."""
        length, vocabulary = ids.shape[1], self.tokens.num_embeddings
        if length > len(self.positions):
            raise ValueError(
                f"{length} tokens in a row, but the model has positions for max_length={len(self.positions)}: "
                f"use shorter rows or a larger max_length"
            )
        # On a GPU this question would make the CPU wait for the answer, so it is asked on the CPU only.
        if ids.device.type == "cpu" and (ids.min() < 0 or ids.max() >= vocabulary):
            raise ValueError(
                f"token ids from {int(ids.min())} to {int(ids.max())}, but the vocabulary has ids 0 to "
                f"{vocabulary - 1}: encode with the vocabulary that the model was made for"
            )
        return drop(self.tokens(ids) * self.scale + self.positions[:length], self.dropout, generator)


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """Section 3.5: PE(position, 2i) = sin(position / 10000^(2i / d_model)), PE(position, 2i + 1) = cos(the same)."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    two_i = torch.arange(0, d_model, 2, dtype=torch.float32)
    angle = position / 10_000 ** (two_i / d_model)  # (length, d_model / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


# --- The blocks: carry -> carry -------------------------------------------------------------------------------


class Block(nn.Module):
    """What a stage is made of. forward(carry, micro_batch, generator) -> carry; generator=None: no dropout.

    A block makes its masks from the ids in micro_batch, which every stage has, so no mask is ever sent.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, carry: Carry, micro_batch: Batch, generator: torch.Generator | None = None) -> Carry:
        raise NotImplementedError


class SourceEmbedding(Block):
    """(None, None) -> (hidden, None), hidden (rows, source_length, d_model)"""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config.source_vocabulary, config)

    def forward(self, carry: Carry, micro_batch: Batch, generator: torch.Generator | None = None) -> Carry:
        return self.embedding(micro_batch.source, generator), None


class EncoderLayer(Block):
    """(hidden, None) -> (hidden, None): every digit looks at all digits."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.feedforward_norm = nn.LayerNorm(config.d_model)
        self.feedforward = FeedForward(config)

    def forward(self, carry: Carry, micro_batch: Batch, generator: torch.Generator | None = None) -> Carry:
        hidden, rate = _present("hidden", carry[0]), self.config.dropout
        x = self.attention_norm(hidden)
        hidden = hidden + drop(self.attention(x, x, padding_mask(micro_batch.source)), rate, generator)
        x = self.feedforward_norm(hidden)
        return hidden + drop(self.feedforward(x), rate, generator), None


class EncoderNorm(Block):
    """(hidden, None) -> (None, memory): the encoder is done, its result is kept for the decoder's layers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, carry: Carry, micro_batch: Batch, generator: torch.Generator | None = None) -> Carry:
        return None, self.norm(_present("hidden", carry[0]))


class TargetEmbedding(Block):
    """(None, memory) -> (hidden, memory), hidden (rows, target_length, d_model)"""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config.target_vocabulary, config)

    def forward(self, carry: Carry, micro_batch: Batch, generator: torch.Generator | None = None) -> Carry:
        return self.embedding(micro_batch.target_input, generator), carry[1]


class DecoderLayer(Block):
    """(hidden, memory) -> (hidden, memory): every word looks at the words before it, then at all digits."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.self_attention = Attention(config)
        self.cross_attention_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = Attention(config)
        self.feedforward_norm = nn.LayerNorm(config.d_model)
        self.feedforward = FeedForward(config)

    def forward(self, carry: Carry, micro_batch: Batch, generator: torch.Generator | None = None) -> Carry:
        hidden, memory = _present("hidden", carry[0]), _present("memory", carry[1])
        rate = self.config.dropout
        x = self.self_attention_norm(hidden)
        hidden = hidden + drop(self.self_attention(x, x, target_mask(micro_batch.target_input)), rate, generator)
        x = self.cross_attention_norm(hidden)
        hidden = hidden + drop(self.cross_attention(x, memory, padding_mask(micro_batch.source)), rate, generator)
        x = self.feedforward_norm(hidden)
        return hidden + drop(self.feedforward(x), rate, generator), memory


class LastDecoderLayer(DecoderLayer):
    """(hidden, memory) -> (hidden, None): the memory's last reader. What nobody reads again is not sent on."""

    def forward(self, carry: Carry, micro_batch: Batch, generator: torch.Generator | None = None) -> Carry:
        hidden, _ = super().forward(carry, micro_batch, generator)
        return hidden, None


class Head(Block):
    """(hidden, None) -> (logits, None), logits (rows, target_length, target_vocabulary): scores of the next word."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.d_model)
        self.linear = nn.Linear(config.d_model, config.target_vocabulary)

    def forward(self, carry: Carry, micro_batch: Batch, generator: torch.Generator | None = None) -> Carry:
        return self.linear(self.norm(_present("hidden", carry[0]))), None


def _present(name: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError(f"this block needs {name}, but the carry has None there: run the blocks before it first")
    return tensor


# --- Builders: the model before it exists ---------------------------------------------------------------------


@dataclass(frozen=True)
class BlockBuilder:
    """Block `index` of the model, not built yet: cheap to make, to send to another process and to ask for shapes."""

    index: int
    name: str
    part: str  # "encoder" or "decoder"
    kind: type[Block]
    config: TransformerConfig

    def build(self, seed: int, device: torch.device | str = "cpu") -> Block:
        """The block, its weights drawn from a generator seeded by (seed, index): no other random number is touched."""
        block = self._build_on_meta().to_empty(device="cpu")
        initialise(block, generator_for(seed, self.index))
        return block.to(device)  # drawn on the CPU, so that every device starts from the same weights

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """The names and shapes of the block's parameters; nothing is allocated."""
        return {name: parameter.shape for name, parameter in self._build_on_meta().named_parameters()}

    def _build_on_meta(self) -> Block:
        with torch.device("meta"):  # tensors that have a shape but no memory
            return self.kind(self.config)


@torch.no_grad()
def initialise(block: nn.Module, generator: torch.Generator) -> None:
    """Set all weights: linear ones up to 1 / sqrt(inputs), biases zero, embeddings with variance 1 / d_model.

    These are the weights of a plain nn.Linear. Those of nn.Transformer (Xavier) are up to twice as large: with the
    small learning rates of a long warm-up they change too slowly.
    """
    for module in block.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5, generator=generator)
        elif isinstance(module, Embedding):
            module.positions.copy_(sinusoidal_positions(*module.positions.shape))


def block_builders(config: TransformerConfig) -> list[BlockBuilder]:
    """The whole model as a flat list, in the order in which the blocks run."""
    encoder: list[tuple[str, type[Block]]] = [
        ("source_embedding", SourceEmbedding),
        *((f"encoder_{i}", EncoderLayer) for i in range(config.encoder_layers)),
        ("encoder_norm", EncoderNorm),
    ]
    last = config.decoder_layers - 1
    decoder: list[tuple[str, type[Block]]] = [
        ("target_embedding", TargetEmbedding),
        *((f"decoder_{i}", LastDecoderLayer if i == last else DecoderLayer) for i in range(config.decoder_layers)),
        ("head", Head),
    ]
    parts = [("encoder", *block) for block in encoder] + [("decoder", *block) for block in decoder]
    return [BlockBuilder(index, name, part, kind, config) for index, (part, name, kind) in enumerate(parts)]


class CarrySpec(NamedTuple):
    """What one tensor of a carry will be, known before it exists."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


def carry_after(
    builders: Sequence[BlockBuilder], index: int, geometry: Geometry, config: TransformerConfig
) -> tuple[CarrySpec | None, CarrySpec | None]:
    """(hidden, memory) behind block `index` for a micro-batch of that geometry, None for what is not handed on.

    `builders` is the whole model. The encoder's norm hands on the memory alone, the memory's last reader no memory any
    more, and behind the last block nothing is sent. Everything else needs a gradient: there are weights before it. The
    residual stream and the norms are float32, under autocast too.
    """
    if not 0 <= index < len(builders):
        raise ValueError(f"there is no block {index}: the model has {len(builders)} blocks, 0 to {len(builders) - 1}")
    rows, source_length, target_length = geometry
    over_source = CarrySpec((rows, source_length, config.d_model), torch.float32, requires_grad=True)
    over_target = CarrySpec((rows, target_length, config.d_model), torch.float32, requires_grad=True)
    kind, part = builders[index].kind, builders[index].part
    if kind is Head:
        return None, None
    if kind is EncoderNorm:
        return None, over_source
    if part == "encoder":
        return over_source, None
    memory_is_read_again = any(issubclass(later.kind, DecoderLayer) for later in builders[index + 1 :])
    return over_target, over_source if memory_is_read_again else None
