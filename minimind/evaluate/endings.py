"""How likely is each of several endings of a prompt? For many prompts at once, without a token read twice.

The endings of a prompt share it, and the prompts of a group share how they begin: solved examples, say. A row
holds such a beginning once, then prompts that go on from it, each followed by its endings:

    beginning | prompt 1 | ending 1a | ending 1b | prompt 2 | ending 2a | ending 2b | …

A token looks at those before it in its own ending, in the prompt of that, and in the beginning; its position
is its place in that sentence, not in the row. So every sentence is computed as if it stood alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.data.packing import pack
from minimind.model import MiniMind, compute_dtype
from minimind.train.parallel import Parallel

# Positions of a batch: all of its rows at once. Scores take rows · heads · length² numbers.
POSITIONS = {"cpu": 8192, "cuda": 32768, "mps": 8192}
SHORTEST_ROW = 256
# A longer row shares its beginning among more prompts, but each token is scored with all of the row.
ROW_PER_BEGINNING = 4
LONGEST_ROW = 2048  # unless a single prompt needs more
SORTED = 4  # batches whose rows are put in order of length, so that little of them is padding


class Item(NamedTuple):
    """A prompt and the endings that compete. No list is empty."""

    prompt: list[int]
    endings: list[list[int]]


class Row(NamedTuple):
    """T positions."""

    ids: list[int]
    positions: list[int]
    prompts: list[int]  # which prompt of the row a token is of, from 1; 0 in the beginning
    endings: list[int]  # which ending of that prompt, from 1; 0 in the prompt itself
    sources: list[int]  # for each token of all endings, the column that predicts it
    labels: list[int]  # and the token
    owners: list[tuple[int, int]]  # and the (item, ending) it is of


@torch.no_grad()
def log_likelihoods(
    model: MiniMind, groups: Iterable[Sequence[Item]], parallel: Parallel
) -> Iterator[list[tuple[int, list[float]]]]:
    """Log-probabilities (in nats) of the endings of every item, batch by batch.

    Yields (number of the item, one sum over tokens for each ending) of the items that a batch has finished.
    Items are counted through all groups, and come in any order within a group.
    """
    numbers = count()
    rows = (row for group in groups for row in rows_of(group, numbers))
    for batch in in_batches(rows, POSITIONS[parallel.device.type]):
        yield score(model, batch, parallel)


def in_batches(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    """Rows of about one length together, of no more than `most` positions with their padding (or one row)."""
    rows = iter(rows)
    while waiting := first_rows(rows, SORTED * most):
        waiting.sort(key=lambda row: -len(row.ids))
        while waiting:
            longest = len(waiting[0].ids)
            fit = max(1, most // longest)
            batch = [row for row in waiting[:fit] if 3 * len(row.ids) > 2 * longest]
            yield batch
            waiting = waiting[len(batch) :]


def first_rows(rows: Iterator[Row], positions: int) -> list[Row]:
    """The next rows with so many positions, or all that are left."""
    taken, found = [], 0
    while found < positions and (row := next(rows, None)):
        taken.append(row)
        found += len(row.ids)
    return taken


def rows_of(group: Sequence[Item], numbers: Iterator[int]) -> list[Row]:
    """The items of a group as few full rows; `numbers` counts the items of all groups."""
    prompts = [item.prompt for item in group]
    # Every prompt keeps a token of its own: the one that its endings go on from.
    shared = min(common_length(prompts), min(map(len, prompts)) - 1)
    lengths = np.array([len(item.prompt) - shared + sum(len(e) - 1 for e in item.endings) for item in group])
    wanted = min(max(SHORTEST_ROW, ROW_PER_BEGINNING * shared), LONGEST_ROW)
    counts = np.bincount(lengths)
    packed = pack(counts, max(wanted - shared, len(counts) - 1))
    # `pack` says which lengths share a row; items of one length may take each other's place.
    slots = packed.slots(np.arange(len(packed)))
    by_length = np.argsort(lengths, kind="stable")
    members = by_length[(counts.cumsum() - counts)[slots.lengths] + slots.numbers]
    numbered = [(next(numbers), item) for item in group]
    return [
        make_row(group[0].prompt[:shared], [numbered[i] for i in members[start:end]])
        for start, end in zip(slots.borders, slots.borders[1:], strict=False)
    ]


def common_length(sequences: Sequence[list[int]]) -> int:
    """How many ids all of `sequences` have in common from the start: in order, the first and the last do."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def make_row(beginning: list[int], members: list[tuple[int, Item]]) -> Row:
    shared = len(beginning)
    row = Row(list(beginning), list(range(shared)), [0] * shared, [0] * shared, [], [], [])

    def add(ids: list[int], position: int, prompt: int, ending: int) -> None:
        row.ids.extend(ids)
        row.positions.extend(range(position, position + len(ids)))
        row.prompts.extend([prompt] * len(ids))
        row.endings.extend([ending] * len(ids))

    for number, (item_number, item) in enumerate(members, 1):
        add(item.prompt[shared:], shared, number, 0)
        end_of_prompt = len(row.ids) - 1
        for place, ending in enumerate(item.endings):
            row.sources.append(end_of_prompt)
            row.sources.extend(range(len(row.ids), len(row.ids) + len(ending) - 1))
            row.labels.extend(ending)
            row.owners.extend([(item_number, place)] * len(ending))
            add(ending[:-1], len(item.prompt), number, place + 1)  # nothing is asked of the last token
    return row


def score(model: MiniMind, rows: Sequence[Row], parallel: Parallel) -> list[tuple[int, list[float]]]:
    """The items of `rows`, with the log-probability of each ending."""
    length = max(len(row.ids) for row in rows)

    def padded(name: str, value: int) -> Tensor:  # (B, T)
        values = np.full((len(rows), length), value, np.int64)
        for i, row in enumerate(rows):
            values[i, : len(row.ids)] = getattr(row, name)
        return torch.from_numpy(values).to(parallel.device)

    may_look = sentence_mask(padded("prompts", -1), padded("endings", 0))
    sources = [i * length + source for i, row in enumerate(rows) for source in row.sources]
    labels = torch.tensor([label for row in rows for label in row.labels], device=parallel.device)
    with parallel.autocast():
        hidden = hidden_states(model, padded("ids", 0), padded("positions", 0), may_look)
        hidden = hidden.flatten(0, 1)[torch.tensor(sources, device=parallel.device)]  # (M, H)
    # In fp32 always: bf16 logits are so coarse that letters tie, and a tie would go to A.
    logits = F.linear(hidden.float(), model.lm_head.weight.float())  # (M, V)
    found = F.cross_entropy(logits, labels, reduction="none").tolist()
    sums: dict[int, dict[int, float]] = {}
    for (item, ending), nll in zip((o for row in rows for o in row.owners), found, strict=True):
        of_item = sums.setdefault(item, {})
        of_item[ending] = of_item.get(ending, 0.0) - nll
    return [(item, [of_item[ending] for ending in sorted(of_item)]) for item, of_item in sums.items()]


def sentence_mask(prompts: Tensor, endings: Tensor) -> Tensor:
    """Who may look at whom, (B, T, T), for `prompts` and `endings` (B, T) as in `Row`; -1 marks padding."""
    prompt, ending = prompts[:, :, None], endings[:, :, None]  # of those who look
    prompt_seen, ending_seen = prompts[:, None, :], endings[:, None, :]
    same_sentence = (prompt_seen == prompt) & ((ending_seen == 0) | (ending_seen == ending))
    return ((prompt_seen == 0) | same_sentence).tril()


def hidden_states(model: MiniMind, input_ids: Tensor, position_ids: Tensor, may_look: Tensor) -> Tensor:
    """`Decoder.forward` under a mask of its caller's: (B, T), (B, T), (B, T, T) → (B, T, H)."""
    decoder = model.model
    x = decoder.embed_tokens(input_ids)
    x = x.to(compute_dtype(x))
    rotary = decoder.rotary(position_ids, x.dtype)
    mask = torch.zeros(may_look.shape, device=x.device, dtype=x.dtype)
    mask = mask.masked_fill_(~may_look, -torch.inf)[:, None]  # (B, 1, T, T)
    x, _ = decoder.layers(x, rotary, mask, None)
    return decoder.norm(x)
