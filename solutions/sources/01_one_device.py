# %% [markdown] tags=["opening"]
# # Exercises 01 · One device
#
# **You need** [lesson 01](../../notebooks/01_one_device.ipynb). **Minutes:** 60. Each task stands on its own: one that is
# not solved costs nothing in the next.

# %% tags=["setup"]
import torch

from course_utils.checks import call, check, hint, start
from course_utils.checks.unit_01 import WordModel, most_rows
from course_utils.checks.values import print_numbers
from course_utils.number_words import END, PAD, START, TARGET
from course_utils.plots import new_figure, show

start("01")

# %% [markdown]
# ## 1 · One training step, from memory
# `rows` are lists of word ids, without `<start>`, `<end>` or padding. Let the model read them as one mini-batch, and leave in its
# parameters the gradients of the loss per token. **Target:** one call of the model with no column more than the longest row needs
# (its words and one); loss and gradients as when each word is asked for alone, to within $10^{-5}$.
#
# | | |
# | --- | --- |
# | `model(ids, mask)` | logits (rows, length, 13): scores of the next token at every place |
# | `ids` | (rows, length), what the decoder is given |
# | `mask` | fits (rows, 1, length, length); True where a query may look at a key |
# | `PAD`, `START`, `END` | the ids 0, 1 and 2; the words have the ids 3 to 12 |
#
# The gradients are empty when your function is called. The functions of lesson 01 are yours to write here.


# %% tags=["answer:one_step"]
def one_step(model, rows):
    """Forward and backward of one mini-batch; return the loss per token."""
    ### BEGIN SOLUTION
    length = max(len(row) for row in rows) + 1
    ids = torch.tensor([[START, *row] + [PAD] * (length - 1 - len(row)) for row in rows])
    targets = torch.tensor([[*row, END] + [PAD] * (length - 1 - len(row)) for row in rows])
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    logits = model(ids, mask)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    loss = losses[targets != PAD].sum() / (targets != PAD).sum()
    loss.backward()
    return loss.detach()
    ### END SOLUTION


# %% [markdown]
# Two rows, "seven" and "four two": five tokens are asked for, `<end>` twice among them.

# %%
model = WordModel(seed=0)
loss = call(one_step, model, [TARGET.encode(["seven"]), TARGET.encode(["four", "two"])])
print("shapes of the ids that the model was given:", model.calls)
if loss is not None:
    print_numbers("yours:", "loss per token {:.4f}", loss)

# %% tags=["check:one_step", "nbval-check-output"]
check("unit01.one_step", one_step)

# %% [markdown] tags=["solution"]
# **Why.** Input and output are one sequence, shifted by one, so one call trains every place. Padding stands behind the tokens here, and
# the causal mask alone hides it from them. The loss leaves padding out twice: in the sum, and in what it is divided by.
#
# **One wrong way:** to leave the division to `mean`. With `ignore_index` the padded places are zero in the sum, but
# `losses.mean()` still counts them below the line. The more padding
# there is, the smaller are the loss and the gradients, for no reason that has to do with the words:


# %% tags=["solution", "nbval-check-output"]
def divides_by_places(model, rows):
    length = max(len(row) for row in rows) + 1
    ids = torch.tensor([[START, *row] + [PAD] * (length - 1 - len(row)) for row in rows])
    targets = torch.tensor([[*row, END] + [PAD] * (length - 1 - len(row)) for row in rows])
    logits = model(ids, torch.ones(length, length, dtype=torch.bool).tril())
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD, reduction="none")
    loss = losses.mean()
    loss.backward()
    return loss.detach()


check("unit01.one_step", divides_by_places)

# %% [markdown]
# ## 2 · Several sequences in one row
# Padding is computed and thrown away. Put several sequences into a row of `width` slots instead, so that **each token still sees exactly
# what it sees when its sequence is alone**. **Target:** fewer than `width` padded slots in all. The sequences have 1, 3 or 7 words, so 2, 4
# or 8 slots with `<start>` (or `<end>`); `width` is 8 or 16. Any order of the sequences is fine.

# %% tags=["nbval-check-output"]
sequences = [
    TARGET.encode(text.split()) for text in ("six", "one two three", "nine " * 6 + "nine", "four two zero", "five")
]
slots = sum(len(words) + 1 for words in sequences)
print(f"{slots} tokens; one row per sequence: {5 * 8} slots, {5 * 8 - slots} of them padded")
for width in (8, 16):
    rows = most_rows(sequences, width)
    print(f"width {width}: at most {rows} rows, {rows * width - slots} padded slots")

# %% [markdown]
# Return four tensors for `R` rows:
#
# | | shape | |
# | --- | --- | --- |
# | `ids` | `(R, width)` | what the decoder is given: `<start>` and the words of each sequence; `PAD` elsewhere |
# | `positions` | `(R, width)` | which vector of positions is added; at padding any one from 0 to `width - 1` |
# | `mask` | `(R, 1, width, width)`, bool | True where a query may look at a key. A padded slot may look at anything, but not at nothing |
# | `targets` | `(R, width)` | what is asked for at each slot; `PAD` where nothing is asked |


# %% tags=["answer:pack"]
def pack(sequences, width):
    """(ids, positions, mask, targets) of as few rows as possible. `sequences` are lists of word ids."""
    ### BEGIN SOLUTION
    groups, used = [], width
    for words in sorted(sequences, key=len, reverse=True):
        if used + len(words) + 1 > width:
            groups.append([])
            used = 0
        groups[-1].append(words)
        used += len(words) + 1
    ids, positions, targets, owner = (torch.zeros(len(groups), width, dtype=torch.int64) for _ in range(4))
    for row, group in enumerate(groups):
        begin = 0
        for number, words in enumerate(group, start=1):
            slots = slice(begin, begin + len(words) + 1)
            ids[row, slots] = torch.tensor([START, *words])
            targets[row, slots] = torch.tensor([*words, END])
            positions[row, slots] = torch.arange(len(words) + 1)
            owner[row, slots] = number
            begin = slots.stop
    mask = (owner[:, None, :, None] == owner[:, None, None, :]).tril()
    return ids, positions, mask, targets
    ### END SOLUTION


# %% [markdown]
# The mask of your first row at width 16. Each sequence should be a triangle of its own on the diagonal.


# %%
def draw_mask(mask, tokens):
    """Dark where a query may look at a key."""
    figure, axes = new_figure(4.2)
    axes.imshow(mask, cmap="Blues", vmin=0, vmax=1.5)
    axes.set(xlabel="looked at (key)", ylabel="looks (query)")
    axes.set_xticks(range(len(tokens)), tokens, rotation=90)
    axes.set_yticks(range(len(tokens)), tokens)
    return figure


def show_first_row(pack):
    ids, positions, mask, targets = pack(sequences, 16)
    sees = ", ".join(map(str, mask[0, 0].sum(-1).tolist()))
    says = f"Keys that each query of the first row may look at: {sees}."
    show(draw_mask(mask[0, 0], TARGET.decode(ids[0])), says=says)


call(show_first_row, pack)

# %% tags=["check:pack", "nbval-check-output"]
check("unit01.pack", pack)

# %% [markdown] tags=["solution"]
# **Why.** One tensor says whose each slot is, and everything follows from it: a query may look at a key of the same owner that does not
# come after it. Padding is an owner too, so its slots look at one another and no softmax is over nothing. The positions must begin again,
# or the second sequence would be read with vectors that it never has alone. Longest first leaves no gap because each length divides the
# longer ones and the width (Coffman, Garey and Johnson, 1987); for other lengths it is only a good rule.
#
# **One wrong way:** the causal mask of lesson 01 on the packed row. Shapes fit, the loss falls, and the model reads one number with another
# one before it, which it will never see in use (Krell et al., 2021, call it cross-contamination).


# %% tags=["solution", "nbval-check-output"]
def only_causal(sequences, width):
    ids, positions, mask, targets = pack(sequences, width)
    return ids, positions, torch.ones_like(mask).tril(), targets


check("unit01.pack", only_causal)

# %% [markdown]
# ## References
# Vaswani et al., 2017, *Attention Is All You Need*, [arXiv 1706.03762](https://arxiv.org/abs/1706.03762), section 3.2.3 · Krell et al., 2021,
# *Efficient Sequence Packing without Cross-contamination*, [arXiv 2107.02027](https://arxiv.org/abs/2107.02027) · Coffman, Garey and Johnson,
# 1987, *Bin packing with divisible item sizes*, Journal of Complexity 3 · The loss is right and the
# gradients are not: [torchtitan#2972](https://github.com/pytorch/torchtitan/issues/2972).
