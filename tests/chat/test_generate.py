"""Whole answers, one or many, against plain full forwards of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minimind.chat.generate import generate, generate_batch
from minimind.chat.inference import InferenceModel
from minimind.chat.options import SamplingOptions
from minimind.chat.sampling import PENALTY_WINDOW
from minimind.errors import UserError

from .models import DENSE, MOE, random_model

GREEDY = SamplingOptions(temperature=0, repetition_penalty=1, max_new_tokens=24)


@pytest.fixture(scope="module")
def ready() -> InferenceModel:
    return InferenceModel(random_model(), "fp32")


def test_greedy_is_the_argmax_of_full_forwards(ready):
    model, ids = random_model(), [1, 40, 50, 60]
    for token in generate(ready, ids.copy(), GREEDY, stop_ids=()):
        logits = model(torch.tensor([ids])).logits[0, -1].detach()
        logits[:3] = -torch.inf
        assert token == logits.argmax()
        ids.append(token)
    assert len(ids) == 4 + GREEDY.max_new_tokens


def test_the_penalty_reads_the_window_of_the_answer_and_never_the_prompt():
    model, prompt = random_model(replace(DENSE, vocab_size=100)), [1, *range(3, 100)]
    ready = InferenceModel(model, "fp32")
    options = SamplingOptions(temperature=0, repetition_penalty=1.3, max_new_tokens=PENALTY_WINDOW + 30)
    ids = prompt.copy()
    for token in generate(ready, prompt, options, stop_ids=()):
        logits = model(torch.tensor([ids])).logits[0, -1].detach()
        logits[:3] = -torch.inf
        for said in set(ids[len(prompt) :][-PENALTY_WINDOW:]):
            logits[said] *= 1 / 1.3 if logits[said] > 0 else 1.3
        assert token == logits.argmax()
        ids.append(token)
    answer = ids[len(prompt) :]
    plain = list(generate(ready, prompt, replace(options, repetition_penalty=1), stop_ids=()))
    assert answer[0] == plain[0]
    assert answer != plain
    assert any(answer[i] in answer[:i] for i in range(PENALTY_WINDOW, len(answer)))


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(seed=3, repetition_penalty=1.2)])
def test_a_batch_answers_as_each_prompt_alone(config, options):
    ready = InferenceModel(random_model(config), "fp32")
    stops = {0, 2, *range(100, 120)}  # so that answers end at many different lengths
    options = replace(options, max_new_tokens=40)
    torch.manual_seed(1)
    prompts = [torch.randint(3, 300, (length,)).tolist() for length in [5, 9, 300, 3, 9, 5, 5, 1, 5, 600]]

    def seeded(i: int) -> SamplingOptions:
        return options if options.seed is None else replace(options, seed=options.seed + i)

    alone = [list(generate(ready, prompt, seeded(i), stops)) for i, prompt in enumerate(prompts)]
    assert len({len(answer) for answer in alone}) > 3
    assert generate_batch(ready, prompts, options, stops) == alone
    assert generate_batch(ready, prompts, options, stops, rows=2) == alone
    assert generate_batch(ready, [], options) == []


def test_answers_hold_no_stop_and_no_control_ids():
    model = random_model()
    with torch.no_grad():  # make the control ids very likely: their rows look like everything at once
        model.lm_head.weight[:3] *= 4
    ready = InferenceModel(model)
    options = SamplingOptions(temperature=1.5, top_p=1, repetition_penalty=1, max_new_tokens=30, seed=0)
    prompts = [[1, i] for i in range(3, 203)]
    ended = generate_batch(ready, prompts, options)
    assert not {0, 1, 2} & {token for answer in ended for token in answer}
    assert min(map(len, ended)) < 30
    endless = generate_batch(ready, prompts, options, stop_ids=())
    assert not {0, 1, 2} & {token for answer in endless for token in answer}
    assert {len(answer) for answer in endless} == {30}


def test_seeds_reproduce_and_no_seed_varies(ready):
    options = SamplingOptions(temperature=1, top_p=1, max_new_tokens=20, seed=7)
    first = list(generate(ready, [1, 5], options))
    torch.manual_seed(123)  # the sampler has its own generator
    assert list(generate(ready, [1, 5], options)) == first
    others = [SamplingOptions(temperature=1, top_p=1, max_new_tokens=20, seed=s) for s in (8, None, None)]
    answers = {tuple(first), *(tuple(generate(ready, [1, 5], o)) for o in others)}
    assert len(answers) == 4
    one, other = generate_batch(ready, [[1, 5], [1, 5]], options)
    assert one == first
    assert other != first


def test_the_loop_can_be_left_at_any_token_and_keeps_no_gradient_state(ready):
    tokens = generate(ready, [1, 5], GREEDY)
    next(tokens)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    tokens.close()


def test_an_empty_prompt_is_refused(ready):
    with pytest.raises(UserError, match="at least one token"):
        next(generate(ready, [], GREEDY))
