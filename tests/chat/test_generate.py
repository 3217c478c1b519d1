"""The sampler against the definitions of its papers, and the decoding loop against plain full forwards."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from minimind.chat.generate import (
    NUCLEUS_GUESS,
    PENALTY_WINDOW,
    decode,
    generate,
    generate_batch,
    penalize_repetition,
    random_generator,
    sample,
)
from minimind.chat.options import SamplingOptions
from minimind.config import ModelConfig
from minimind.errors import UserError
from minimind.model import MiniMind

DENSE = ModelConfig(hidden_size=64, num_hidden_layers=2, vocab_size=300)
MOE = ModelConfig(hidden_size=64, num_hidden_layers=2, vocab_size=300, num_experts=4)
GREEDY = SamplingOptions(temperature=0, repetition_penalty=1, max_new_tokens=24)
LOGITS = [2.0, 1.5, 1.0, 0.3, 0.0, -0.5, -1.0, -3.0]
DRAWS = 100_000


def random_model(config: ModelConfig = DENSE, seed: int = 0) -> MiniMind:
    torch.manual_seed(seed)
    model = MiniMind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def reference(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """Temperature, then top-k, then the smallest nucleus, one token after another."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def draw(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    return sample(logits, options, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1, None, 1),
        (0.5, None, 1),
        (2, None, 1),
        (1, 3, 1),
        (1, None, 0.7),
        (0.7, None, 0.95),
        (1.3, 4, 0.8),
        (1, 1, 1),
    ],
)
def test_draws_follow_the_definition(temperature, top_k, top_p):
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    ids = draw(torch.tensor(LOGITS).expand(DRAWS, -1), options)
    for share, p in zip(
        ids.bincount(minlength=8) / DRAWS, reference(LOGITS, temperature, top_k, top_p), strict=True
    ):
        assert abs(share.item() - p) <= 5 * math.sqrt(
            p * (1 - p) / DRAWS
        )  # 5 sigma; exactly 0 outside the set


def test_a_nucleus_wider_than_the_guess_is_found_exactly():
    logits = torch.linspace(0, -1, 2000)
    kept = sum(p > 0 for p in reference(logits.tolist(), 1, None, 0.6))
    assert kept > NUCLEUS_GUESS
    ids = draw(logits.expand(5000, -1), SamplingOptions(temperature=1, top_p=0.6))
    assert kept - 20 <= ids.max() <= kept  # the id is the rank here
    narrow = torch.stack((logits, 50 * logits))  # rows of one batch may need different widths
    assert draw(narrow, SamplingOptions(temperature=1, top_p=0.6)).shape == (2,)


@pytest.mark.parametrize("temperature", [0, 1e-30, 1e-5])
def test_no_temperature_is_greedy(temperature):
    logits = torch.randn(50, 300)
    assert draw(logits, SamplingOptions(temperature=temperature)).equal(logits.argmax(-1))


def test_penalty_divides_or_multiplies_what_was_said_once():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [2.0, -2.0, 1.0, 0.5]])
    said = torch.tensor([[0, 1, 0], [3, 3, 3]])
    expected = torch.tensor([[2 / 1.25, -2 * 1.25, 1.0, 0.5], [2.0, -2.0, 1.0, 0.5 / 1.25]])
    torch.testing.assert_close(penalize_repetition(logits, said, 1.25), expected)
    assert penalize_repetition(logits, said[:, :0], 1.25) is logits


def test_greedy_is_the_argmax_of_full_forwards():
    model, ids = random_model(), [1, 40, 50, 60]
    for token in generate(model, ids.copy(), GREEDY, stop_ids=()):
        logits = model(torch.tensor([ids])).logits[0, -1].detach()
        logits[:3] = -torch.inf
        assert token == logits.argmax()
        ids.append(token)
    assert len(ids) == 4 + GREEDY.max_new_tokens


def test_the_penalty_reads_the_window_of_the_answer_and_never_the_prompt():
    model, prompt = random_model(replace(DENSE, vocab_size=100)), [1, *range(3, 100)]
    options = SamplingOptions(temperature=0, repetition_penalty=1.3, max_new_tokens=PENALTY_WINDOW + 30)
    ids = prompt.copy()
    for token in generate(model, prompt, options, stop_ids=()):
        logits = model(torch.tensor([ids])).logits[0, -1].detach()
        logits[:3] = -torch.inf
        for said in set(ids[len(prompt) :][-PENALTY_WINDOW:]):
            logits[said] *= 1 / 1.3 if logits[said] > 0 else 1.3
        assert token == logits.argmax()
        ids.append(token)
    answer = ids[len(prompt) :]
    plain = list(generate(model, prompt, replace(options, repetition_penalty=1), stop_ids=()))
    assert answer[0] == plain[0]
    assert answer != plain
    assert any(answer[i] in answer[:i] for i in range(PENALTY_WINDOW, len(answer)))


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("penalty", [1, 1.2])
def test_a_batch_answers_as_each_prompt_alone(config, penalty):
    model = random_model(config)
    stops = {0, 2, *range(100, 120)}  # so that answers end at many different lengths
    options = SamplingOptions(temperature=0, repetition_penalty=penalty, max_new_tokens=40)
    torch.manual_seed(1)
    prompts = [torch.randint(3, 300, (length,)).tolist() for length in [5, 9, 5, 3, 9, 5, 5, 1, 5, 5]]
    alone = [list(generate(model, p, options, stops)) for p in prompts]
    assert len({len(answer) for answer in alone}) > 3
    assert generate_batch(model, prompts, options, stops) == alone
    assert generate_batch(model, prompts, options, stops, batch_size=2) == alone
    assert generate_batch(model, [], options) == []


def test_answers_hold_no_stop_and_no_control_ids():
    model = random_model()
    with torch.no_grad():  # make the control ids very likely: their rows look like everything at once
        model.lm_head.weight[:3] *= 4
    options = SamplingOptions(temperature=1.5, top_p=1, repetition_penalty=1, max_new_tokens=30, seed=0)
    prompts = [[1, i] for i in range(3, 203)]
    ended = generate_batch(model, prompts, options)
    assert not {0, 1, 2} & {token for answer in ended for token in answer}
    assert min(map(len, ended)) < 30
    endless = generate_batch(model, prompts, options, stop_ids=())
    assert not {0, 1, 2} & {token for answer in endless for token in answer}
    assert {len(answer) for answer in endless} == {30}


def test_seeds_reproduce_and_no_seed_varies():
    model = random_model()
    options = SamplingOptions(temperature=1, top_p=1, max_new_tokens=20, seed=7)
    first = list(generate(model, [1, 5], options))
    torch.manual_seed(123)  # the sampler has its own generator
    assert list(generate(model, [1, 5], options)) == first
    others = [SamplingOptions(temperature=1, top_p=1, max_new_tokens=20, seed=s) for s in (8, None, None)]
    answers = {tuple(first), *(tuple(generate(model, [1, 5], o)) for o in others)}
    assert len(answers) == 4


def test_the_loop_can_be_left_at_any_token_and_keeps_no_gradient_state():
    model = random_model()
    tokens = generate(model, [1, 5], GREEDY)
    next(tokens)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    tokens.close()


def test_every_row_is_named_by_its_place_in_the_batch():
    model = random_model()
    prompts = torch.tensor([[1, 5], [1, 6], [1, 7]])
    rows = Counter(row for row, _ in decode(model, prompts, GREEDY, (), random_generator(model, GREEDY)))
    assert rows == {0: 24, 1: 24, 2: 24}
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(model, [], GREEDY))


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
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_senseless_options_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingOptions(**wrong)
