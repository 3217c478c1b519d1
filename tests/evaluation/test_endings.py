"""Log-probabilities of endings that share rows: as if each sentence were read alone."""

from __future__ import annotations

import random
from itertools import count

import pytest
import torch
from test_model import SHAPES, random_model

from minimind.evaluate.endings import Item, common_length, log_likelihoods, rows_of, sentence_mask
from minimind.train.parallel import Parallel

CPU = Parallel(torch.device("cpu"), torch.float32)


def make_groups(beginnings: list[int], items: int, seed: int = 0) -> list[list[Item]]:
    """A group for each length of beginning; prompts and endings of all lengths."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(257) for _ in range(count)]

    groups = []
    for length in beginnings:
        shared = ids(length)
        groups.append(
            [
                Item(shared + ids(rng.randint(1, 60)), [ids(rng.randint(1, 9)) for _ in range(4)])
                for _ in range(items)
            ]
        )
    return groups


def alone(model, item: Item) -> list[float]:
    """Each prompt with each ending in a row of its own."""
    found = []
    for ending in item.endings:
        with torch.no_grad():
            logits = model(torch.tensor([item.prompt + ending])).logits[0]
        logps = logits[len(item.prompt) - 1 : -1].log_softmax(-1)
        found.append(logps.gather(1, torch.tensor(ending)[:, None]).sum().item())
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_sharing_rows_changes_nothing(shape):
    model = random_model(SHAPES[shape]).eval()
    groups = make_groups([0, 1, 90], items=12)
    found = dict(pair for batch in log_likelihoods(model, groups, CPU) for pair in batch)
    items = [item for group in groups for item in group]
    assert sorted(found) == list(range(len(items)))
    for index, item in enumerate(items):
        assert found[index] == pytest.approx(alone(model, item), abs=1e-4)


def test_a_beginning_is_read_once_in_a_row_and_rows_are_full():
    (group,) = make_groups([100], items=40)
    rows = rows_of(group, count())
    lengths = [len(row.ids) for row in rows]
    own = sum(len(i.prompt) - 100 + sum(len(e) - 1 for e in i.endings) for i in group)
    assert sum(lengths) == own + 100 * len(rows)
    assert max(lengths) <= 400
    assert sum(lengths[:-1]) >= 0.95 * max(lengths) * (len(lengths) - 1)  # nearly no padding
    assert sorted({item for row in rows for item, _ in row.owners}) == list(range(40))


def test_prompts_that_are_equal_or_contain_each_other():
    model = random_model(SHAPES["dense"]).eval()
    group = [Item([5], [[1], [2, 3]]), Item([5], [[4], [4, 4]]), Item([5, 6, 7], [[1], [2]])]
    found = dict(pair for batch in log_likelihoods(model, [group], CPU) for pair in batch)
    for index, item in enumerate(group):
        assert found[index] == pytest.approx(alone(model, item), abs=1e-5)


def test_a_prompt_longer_than_a_row_gets_a_longer_row():
    model = random_model(SHAPES["dense"]).eval()
    items = [Item(list(range(1, 200)) * 2, [[1, 2], [3]]), Item([7, 8], [[1], [2]])]
    found = dict(pair for batch in log_likelihoods(model, [items], CPU) for pair in batch)
    assert found[0] == pytest.approx(alone(model, items[0]), abs=1e-4)


def test_the_mask_written_out():
    prompts = torch.tensor([[0, 1, 1, 1, 2, 2, -1]])
    endings = torch.tensor([[0, 0, 1, 2, 0, 1, 0]])
    assert sentence_mask(prompts, endings)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 0, 1],
    ]


def test_bf16_layers_still_give_logits_in_fp32():
    """In bf16 logits near 10 are multiples of 1/16, and endings of one token would tie."""
    model = random_model(SHAPES["dense"]).eval()
    (group,) = make_groups([0], items=10)
    group = [Item(item.prompt, [[t] for t in range(40)]) for item in group]
    bf16 = Parallel(torch.device("cpu"), torch.bfloat16)
    for batch in log_likelihoods(model, [group], bf16):
        for _, logps in batch:
            assert len(set(logps)) == 40


@pytest.mark.parametrize(
    ("sequences", "length"), [([[1, 2], [1, 3]], 1), ([[1, 2], [1]], 1), ([[2]], 1), ([[], [1]], 0)]
)
def test_common_length(sequences, length):
    assert common_length(sequences) == length
