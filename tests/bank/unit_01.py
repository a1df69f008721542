"""Answers to unit 01."""

import torch
from torch.nn.functional import cross_entropy

from course_utils.number_words import END, PAD, START
from tests.bank import right, wrong

# --- one_step ---------------------------------------------------------------------------------------------------------


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def triangle(ids):
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()


def shifted(rows):
    return padded([[START, *row] for row in rows]), padded([[*row, END] for row in rows])


@right("01.one_step")
def with_ignore_index(model, rows):
    ids, targets = shifted(rows)
    logits = model(ids, triangle(ids))
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
    loss.backward()
    return loss.item()


@right("01.one_step")
def with_both_masks(model, rows):
    length = max(map(len, rows)) + 1
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), 1, length, length, dtype=torch.bool)
    for r, row in enumerate(rows):
        ids[r, : len(row) + 1] = torch.tensor([START, *row])
        for query in range(length):
            mask[r, 0, query, : min(query, len(row)) + 1] = True
    log_probabilities = model(ids, mask).log_softmax(-1)
    total = sum(-log_probabilities[r, i, word] for r, row in enumerate(rows) for i, word in enumerate([*row, END]))
    loss = total / sum(len(row) + 1 for row in rows)
    loss.backward()
    return loss


@right("01.one_step")
def one_sequence_cut_twice(model, rows):
    whole = padded([[START, *row, END] for row in rows])
    ids = torch.where(whole == END, PAD, whole)[:, :-1]
    targets = whole[:, 1:]
    losses = cross_entropy(model(ids, triangle(ids)).transpose(1, 2), targets, reduction="none")
    loss = losses[targets != PAD].mean()
    loss.backward()
    return loss


def finish(loss):
    loss.backward()
    return loss.detach()


@wrong("01.one_step", "shift forgotten")
def same_in_and_out(model, rows):
    _, targets = shifted(rows)
    return finish(cross_entropy(model(targets, triangle(targets)).transpose(1, 2), targets, ignore_index=PAD))


@wrong("01.one_step", "shift forgotten")
def target_is_the_input(model, rows):
    ids, _ = shifted(rows)
    return finish(cross_entropy(model(ids, triangle(ids)).transpose(1, 2), ids, ignore_index=PAD))


@wrong("01.one_step", "no <end>")
def never_stops(model, rows):
    ids, targets = padded([[START, *row[:-1]] for row in rows]), padded(rows)
    return finish(cross_entropy(model(ids, triangle(ids)).transpose(1, 2), targets, ignore_index=PAD))


@wrong("01.one_step", "padding divides")
def divides_by_places(model, rows):
    ids, targets = shifted(rows)
    losses = cross_entropy(model(ids, triangle(ids)).transpose(1, 2), targets, ignore_index=PAD, reduction="none")
    return finish(losses.mean())


@wrong("01.one_step", "padding in the loss")
def asks_at_padding(model, rows):
    ids, targets = shifted(rows)
    return finish(cross_entropy(model(ids, triangle(ids)).transpose(1, 2), targets))


@wrong("01.one_step", "mean of means", "torchtitan#2206")
def mean_of_rows(model, rows):
    ids, targets = shifted(rows)
    logits = model(ids, triangle(ids))
    return finish(
        torch.stack([cross_entropy(x, y, ignore_index=PAD) for x, y in zip(logits, targets, strict=True)]).mean()
    )


@wrong("01.one_step", "not divided")
def just_the_sum(model, rows):
    ids, targets = shifted(rows)
    logits = model(ids, triangle(ids))
    return finish(cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD, reduction="sum"))


@wrong("01.one_step", "divided after the backward", "torchtitan#2972")
def divides_late(model, rows):
    ids, targets = shifted(rows)
    logits = model(ids, triangle(ids))
    total = cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD, reduction="sum")
    total.backward()
    return total.item() / (targets != PAD).sum().item()


@wrong("01.one_step", "mask the wrong way round")
def true_means_forbidden(model, rows):
    """As nn.Transformer has it."""
    ids, targets = shifted(rows)
    mask = ~(triangle(ids) & (ids != PAD)[:, None, None, :])
    return finish(cross_entropy(model(ids, mask).transpose(1, 2), targets, ignore_index=PAD))


@wrong("01.one_step", "mask the wrong way round")
def upper_triangle(model, rows):
    ids, targets = shifted(rows)
    return finish(cross_entropy(model(ids, ~triangle(ids)).transpose(1, 2), targets, ignore_index=PAD))


@wrong("01.one_step", "does not see itself")
def off_by_one(model, rows):
    ids, targets = shifted(rows)
    mask = triangle(ids).tril(-1) & (ids != PAD)[:, None, None, :]
    return finish(cross_entropy(model(ids, mask).transpose(1, 2), targets, ignore_index=PAD))


@wrong("01.one_step", "looks ahead")
def padding_only(model, rows):
    ids, targets = shifted(rows)
    mask = (ids != PAD)[:, None, None, :]
    return finish(cross_entropy(model(ids, mask).transpose(1, 2), targets, ignore_index=PAD))


@wrong("01.one_step", "several calls")
def row_by_row(model, rows):
    total = 0
    for row in rows:
        ids, targets = shifted([row])
        total = total + cross_entropy(model(ids, triangle(ids)).transpose(1, 2), targets, reduction="sum")
    return finish(total / sum(len(row) + 1 for row in rows))


@wrong("01.one_step", "no backward")
def only_forward(model, rows):
    ids, targets = shifted(rows)
    return cross_entropy(model(ids, triangle(ids)).transpose(1, 2), targets, ignore_index=PAD)


@wrong("01.one_step", "a column too many")
def too_wide(model, rows):
    ids, targets = padded([[START, *row, PAD] for row in rows]), padded([[*row, END, PAD] for row in rows])
    return finish(cross_entropy(model(ids, triangle(ids)).transpose(1, 2), targets, ignore_index=PAD))


@wrong("01.one_step", "numbers in the mask")
def mask_of_floats(model, rows):
    ids, targets = shifted(rows)
    logits = model(ids, torch.triu(torch.full((ids.shape[1],) * 2, float("-inf")), 1))
    return finish(cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD))


# --- pack -------------------------------------------------------------------------------------------------------------


def groups_of(sequences, width):
    """Longest first, each into the first row with room."""
    groups, room = [], []
    for words in sorted(sequences, key=len, reverse=True):
        row = next((r for r, left in enumerate(room) if left > len(words)), len(room))
        if row == len(room):
            groups.append([])
            room.append(width)
        groups[row].append(words)
        room[row] -= len(words) + 1
    return groups


def laid_out(groups, width):
    """ids, positions, targets and owners (-1 for padding) of rows of sequences, as lists that grow."""
    ids, positions, targets, owners = [], [], [], []
    for group in groups:
        i, p, t, o = [], [], [], []
        for number, words in enumerate(group):
            i += [START, *words]
            t += [*words, END]
            p += range(len(words) + 1)
            o += [number] * (len(words) + 1)
        rest = width - len(i)
        ids.append(i + [PAD] * rest)
        positions.append(p + [0] * rest)
        targets.append(t + [PAD] * rest)
        owners.append(o + [-1] * rest)
    return [torch.tensor(rows) for rows in (ids, positions, targets, owners)]


def packed(sequences, width, groups=groups_of):
    ids, positions, targets, owners = laid_out(groups(sequences, width), width)
    return ids, positions, (owners[:, None, :, None] == owners[:, None, None, :]).tril(), targets


@right("01.pack")
def first_fit(sequences, width):
    return packed(sequences, width)


@right("01.pack")
def square_by_square(sequences, width):
    groups = groups_of(sequences, width)
    ids, targets = torch.zeros(len(groups), width, dtype=torch.long), torch.zeros(len(groups), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(groups), 1, 1, 1)
    for r, group in enumerate(groups):
        start = 0
        for words in group:
            for place, (given, asked) in enumerate(zip([START, *words], [*words, END], strict=True)):
                ids[r, start + place], targets[r, start + place], positions[r, start + place] = given, asked, place
                mask[r, 0, start + place, start : start + place + 1] = True
            start += len(words) + 1
    return ids, positions, mask.transpose(0, 1).reshape(len(groups), 1, width, width), targets


@right("01.pack")
def padding_in_front(sequences, width):
    """From the starts: their running number is the owner."""
    ids, _, targets, _ = laid_out(groups_of(sequences, width), width)
    ids = torch.stack([row.roll(int((row == PAD).sum())) for row in ids])
    targets = torch.stack([row.roll(int((row == PAD).sum())) for row in targets])
    owner = (ids == START).cumsum(1)
    slots = torch.arange(width)
    begins = torch.where(ids == START, slots, 0).cummax(1).values
    mask = (owner[:, :, None] == owner[:, None, :]) & (slots[:, None] >= slots)
    return ids, (slots - begins) * (owner > 0), mask[:, None], targets


@wrong("01.pack", "one row per sequence")
def not_packed(sequences, width):
    return packed(sequences, width, lambda all_of_them, width: [[words] for words in all_of_them])


def in_the_order_given(sequences, width, room=0):
    groups, used = [], width
    for words in sequences:
        if used + len(words) + 1 + room > width:
            groups.append([])
            used = 0
        groups[-1].append(words)
        used += len(words) + 1
    return groups


@wrong("01.pack", "too many padded slots")
def order_given(sequences, width):
    return packed(sequences, width, in_the_order_given)


@wrong("01.pack", "too many padded slots")
def off_by_one_in_the_room(sequences, width):
    return packed(sorted(sequences, key=len)[::-1], width, lambda s, w: in_the_order_given(s, w, room=1))


@wrong("01.pack", "sequences lost")
def last_row_forgotten(sequences, width):
    groups = groups_of(sequences, width)
    return packed(sequences, width, lambda s, w: groups[:-1] or groups[:0] or [groups[0][:-1]])


@wrong("01.pack", "positions do not restart")
def positions_of_the_row(sequences, width):
    ids, positions, mask, targets = packed(sequences, width)
    return ids, torch.arange(width).expand_as(positions).clone(), mask, targets


@wrong("01.pack", "positions from one")
def counts_from_one(sequences, width):
    ids, positions, mask, targets = packed(sequences, width)
    return ids, positions + 1, mask, targets


@wrong("01.pack", "looks into other sequences")
def only_causal(sequences, width):
    ids, positions, mask, targets = packed(sequences, width)
    return ids, positions, torch.ones_like(mask).tril(), targets


@wrong("01.pack", "looks ahead")
def only_blocks(sequences, width):
    ids, positions, targets, owners = laid_out(groups_of(sequences, width), width)
    return ids, positions, owners[:, None, :, None] == owners[:, None, None, :], targets


@wrong("01.pack", "mask the wrong way round")
def true_means_forbidden_here(sequences, width):
    ids, positions, mask, targets = packed(sequences, width)
    return ids, positions, ~mask, targets


@wrong("01.pack", "does not see itself")
def without_the_diagonal(sequences, width):
    ids, positions, mask, targets = packed(sequences, width)
    return ids, positions, mask.tril(-1), targets


@wrong("01.pack", "the wrong triangle")
def triu_for_tril(sequences, width):
    ids, positions, targets, owners = laid_out(groups_of(sequences, width), width)
    return ids, positions, (owners[:, None, :, None] == owners[:, None, None, :]).triu(), targets


@wrong("01.pack", "one or the other")
def or_for_and(sequences, width):
    ids, positions, targets, owners = laid_out(groups_of(sequences, width), width)
    blocks = owners[:, None, :, None] == owners[:, None, None, :]
    return ids, positions, blocks | torch.ones_like(blocks).tril(), targets


@wrong("01.pack", "a softmax over nothing")
def padding_sees_nothing(sequences, width):
    ids, positions, mask, targets = packed(sequences, width)
    return ids, positions, mask & (ids != PAD)[:, None, None, :] & (ids != PAD)[:, None, :, None], targets


@wrong("01.pack", "shift forgotten")
def targets_are_the_ids(sequences, width):
    ids, positions, mask, _ = packed(sequences, width)
    return ids, positions, mask, ids.clone()


@wrong("01.pack", "the next sequence as target")
def shifts_the_row(sequences, width):
    ids, positions, mask, targets = packed(sequences, width)
    moved = ids.roll(-1, 1)
    moved[:, -1] = END
    moved[(moved == PAD) & (ids != PAD)] = END
    return ids, positions, mask, moved * (ids != PAD)


@wrong("01.pack", "padding counted as token")
def end_at_padding(sequences, width):
    ids, positions, mask, targets = packed(sequences, width)
    return ids, positions, mask, torch.where(ids == PAD, END, targets)


@wrong("01.pack", "<end> among the ids")
def exchanged(sequences, width):
    ids, positions, mask, targets = packed(sequences, width)
    return targets, positions, mask, ids


@wrong("01.pack", "for one width only")
def width_of_the_example(sequences, width):
    return packed(sequences, 16)


@wrong("01.pack", "two dimensions too few")
def no_heads(sequences, width):
    ids, positions, mask, targets = packed(sequences, width)
    return ids, positions, mask[:, 0], targets


EQUIVALENT = {
    "01.one_step": {
        "arguments swapped, line 9, column 47: logits.transpose(1, 2) -> logits.transpose(2, 1)": (
            "exchanging two dimensions is the same either way round"
        ),
    },
    "01.pack": {
        "constant, line 5, column 52: True -> False": (
            "shortest first is as tight with 2, 4 and 8 slots: the gaps are 2 + 4 at most, the last row holds more"
        ),
        "constant, line 6, column 31: 1 -> 0": (
            "a row would overflow only by a single slot, and 2, 4, 8 and the width are all even"
        ),
        "constant, line 8, column 19: 0 -> -1": (
            "a row would overflow only by a single slot, and 2, 4, 8 and the width are all even"
        ),
        "constant, line 14, column 52: 1 -> 0": (
            "the first sequence shares its number with the padding, which stands behind all words and may see anything"
        ),
        "constant, line 14, column 52: 1 -> 2": "only whether two owners are the same counts, not their numbers",
    },
}
