"""The sampler against the definitions of its papers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from minimind.chat.draws import NO_ID, penalize
from minimind.chat.options import SamplingOptions
from minimind.chat.sampling import PENALTY_WINDOW, Sampler, token_logprobs
from minimind.errors import UserError

LOGITS = [2.0, 1.5, 1.0, 0.3, 0.0, -0.5, -1.0, -3.0]
DRAWS = 40_000
ANY = (0, 1, 2)  # as stop ids: no token is forbidden


def reference(
    logits: list[float], temperature: float, top_k: int | None, top_p: float, min_p: float = 0
) -> list[float]:
    """Temperature, then top-k, then the smallest nucleus, one token after another, then min-p."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def sampler(options: list[SamplingOptions], stop_ids: tuple[int, ...] = ANY) -> Sampler:
    """One row for each of the options."""
    made = Sampler(len(options))
    for row, own in enumerate(options):
        made.begin(row, own, stop_ids)
    return made


def draws(logits: torch.Tensor, options: list[SamplingOptions], count: int = 1) -> list[list[int]]:
    """`count` draws for each of the options, all from the same logits (V,), in shared batches."""
    batch = max(1, 2000 // len(options))
    together = sampler([replace(own, seed=seed) for seed in range(batch) for own in options])
    found = [[] for _ in options]
    for _ in range(-(-count // batch)):
        together.said[:] = NO_ID  # each is the first of its answer
        ids = together.draw(logits.repeat(len(options) * batch, 1))
        for i, own in enumerate(found):
            own += ids[i :: len(options)]
    return found


KNOBS = [  # temperature, top_k, top_p, min_p
    (1, None, 1, 0),
    (0.5, None, 1, 0),
    (2, None, 1, 0),
    (1, 3, 1, 0),
    (1, None, 0.7, 0),
    (0.7, None, 0.95, 0),
    (1.3, 4, 0.8, 0),
    (1, 1, 1, 0),
    (1, 100, 0.9, 0),
    (0, None, 1, 0),
    (1, None, 1, 0.3),
    (1, None, 0.7, 0.3),
    (1, 3, 1, 0.1),
    (2, None, 1, 1),
]


def test_draws_follow_the_definition_whatever_the_neighbours_ask_for():
    options = [SamplingOptions(temperature=t, top_k=k, top_p=p, min_p=m, seed=0) for t, k, p, m in KNOBS]
    for (temperature, top_k, top_p, min_p), ids in zip(
        KNOBS, draws(torch.tensor(LOGITS), options, DRAWS), strict=True
    ):
        shares = torch.tensor(ids).bincount(minlength=8) / len(ids)
        expected = reference(LOGITS, temperature or 1e-2, top_k, top_p, min_p)
        for share, p in zip(shares.tolist(), expected, strict=True):
            # 5 sigma; exactly 0 outside the set
            assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / DRAWS)


@pytest.mark.parametrize("top_p", [0.6, 0.9])
def test_a_wide_nucleus_is_found_exactly(top_p):
    logits = torch.linspace(0, -1, 2000)
    kept = sum(p > 0 for p in reference(logits.tolist(), 1, None, top_p))
    assert kept > 500
    wide, narrow = (SamplingOptions(temperature=t, top_p=top_p, seed=0) for t in (1, 0.01))
    ids, near = draws(logits, [wide, narrow], 5000)
    assert kept - 20 <= max(ids) <= kept  # the id is the rank here
    assert max(near) < 64


def test_a_wide_min_p_is_found_exactly():
    logits = torch.linspace(0, -1, 2000)
    kept = sum(p > 0 for p in reference(logits.tolist(), 1, None, 1, 0.6))
    assert kept > 500
    (ids,) = draws(logits, [SamplingOptions(temperature=1, top_p=1, min_p=0.6, seed=0)], 5000)
    assert kept - 20 <= max(ids) <= kept  # the id is the rank here


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(3, 1, 3), (None, 0.5, 4), (6, 0.5, 3), (None, 1e-6, 1)]
)
def test_of_equal_tokens_the_first_are_kept(top_k, top_p, kept):
    options = SamplingOptions(temperature=1, top_k=top_k, top_p=top_p, seed=0)
    (ids,) = draws(torch.zeros(8), [options], 1000)
    assert set(ids) == set(range(kept))


@pytest.mark.parametrize("temperature", [0, 1e-30, 1e-5])
def test_no_temperature_is_greedy(temperature):
    logits = torch.randn(50, 300)
    greedy = SamplingOptions(temperature=temperature, repetition_penalty=1)
    assert sampler([greedy] * 50).draw(logits.clone()) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("top_p", [1, 0.5])
def test_a_draw_depends_on_its_own_row_alone(top_p):
    torch.manual_seed(0)
    logits = 3 * torch.randn(20, 2000) * torch.rand(20, 1)
    mine = SamplingOptions(temperature=1, top_p=top_p, seed=5)
    alone = sampler([mine], (0, 2)).draw(logits[:1].clone())
    neighbours = [SamplingOptions(temperature=i / 10, top_k=40 * i or None) for i in range(19)]
    assert sampler([mine, *neighbours], (0, 2)).draw(logits)[:1] == alone


def test_the_largest_uniform_number_still_draws_a_possible_token(monkeypatch):
    monkeypatch.setattr(Sampler, "uniform", lambda _, rows: [1 - 2**-24] * rows)
    for options in (SamplingOptions(temperature=1, top_p=1), SamplingOptions(temperature=1, top_k=3)):
        for scale in (0.1, 1, 10):
            logits = scale * torch.randn(50, 300)
            logits[:, 200:] = -torch.inf
            assert max(sampler([options] * 50).draw(logits)) < 200


@pytest.mark.parametrize(
    ("said", "penalty", "expected"),
    [
        ([0, 1, 0], 1.25, [2 / 1.25, -2 * 1.25, 1.0, 0.5]),
        ([3, 3, 3], 1.25, [2.0, -2.0, 1.0, 0.5 / 1.25]),
        ([3, NO_ID, NO_ID], 1.25, [2.0, -2.0, 1.0, 0.5 / 1.25]),
        ([0, 1], 1, [2.0, -2.0, 1.0, 0.5]),
    ],
)
def test_penalty_divides_or_multiplies_what_was_said_once(said, penalty, expected):
    scores = np.array([2.0, -2.0, 1.0, 0.5], np.float32)
    penalize(scores, np.array(said), np.float32(penalty))
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_a_row_suffers_for_its_own_answer_alone():
    logits = torch.tensor([[2.0, 1.9, 0.0, 0.0]]).repeat(4, 1)
    rows = sampler([SamplingOptions(temperature=0, repetition_penalty=p) for p in (1.25, 1.25, 1, 1.01)])
    for row, said in enumerate([[0], [1], [0], [0, 0, 0]]):
        rows.said[row, : len(said)] = said
    assert rows.draw(logits) == [1, 0, 0, 0]


def test_what_was_said_long_ago_is_free_again_and_moves_with_its_row():
    rows = sampler([SamplingOptions(temperature=0, repetition_penalty=1.25)] * 2)
    logits = torch.tensor([[2.0, 1.9, 0, 0], [0, 0, 0, 9.0]])
    first = [rows.draw(logits)[0] for _ in range(2)]
    assert first == [0, 1]  # then both have been said
    rows.move(0, 1)
    alone = logits[:1].repeat(2, 1)
    assert rows.draw(alone) == [0, 0]
    alone[:, 0] = 1.0
    assert [rows.draw(alone)[1] for _ in range(PENALTY_WINDOW)] == [1] * PENALTY_WINDOW
    alone[:, 0] = 1.6  # no longer divided: 1.6 > 1.9 / 1.25
    assert rows.draw(alone) == [0, 0]
    rows.begin(1, SamplingOptions(temperature=0, repetition_penalty=1.25), ANY)
    assert rows.draw(torch.tensor([[2.0, 0, 1.8, 0]]).repeat(2, 1)) == [2, 0]


def test_log_probabilities_name_the_likeliest():
    logprobs = torch.tensor([0.1, 0.6, 0.3]).log()
    found = token_logprobs(logprobs, 0, 2)
    assert found.chosen == pytest.approx(math.log(0.1))
    assert [token for token, _ in found.top] == [1, 2]
    assert found.top[0][1] == pytest.approx(math.log(0.6))
    assert token_logprobs(logprobs, 2, 0).top == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"top_k": 0},
        {"min_p": -0.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_senseless_options_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingOptions(**wrong)
