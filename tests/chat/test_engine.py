"""Requests that come, share steps, and go, against the same requests alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from random import Random
from unittest.mock import Mock

import pytest
import torch

from minimind.chat import engine as engine_module
from minimind.chat.engine import Engine, Event
from minimind.chat.generate import generate
from minimind.chat.inference import InferenceModel
from minimind.chat.options import WEIGHTS, SamplingOptions
from minimind.errors import UserError
from minimind.model import MiniMind

from .models import SHAPES, random_model

GREEDY = SamplingOptions(temperature=0, repetition_penalty=1, max_new_tokens=20)
MANY = [
    (5, GREEDY),
    (40, SamplingOptions(seed=1, temperature=1, top_p=0.9)),
    (3, SamplingOptions(seed=2, temperature=0.7, top_k=20, top_p=1)),
    (70, SamplingOptions(seed=3, temperature=1.2, top_p=1, repetition_penalty=1.3)),
    (1, SamplingOptions(temperature=0, repetition_penalty=1.2)),
    (9, SamplingOptions(seed=4)),
    (33, replace(GREEDY, max_new_tokens=1)),
    (21, GREEDY),
]


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    return InferenceModel(random_model(), "fp32")


@pytest.fixture(scope="module")
def requests() -> list[tuple[list[int], SamplingOptions]]:
    torch.manual_seed(2)
    return [
        (torch.randint(3, 300, (length,)).tolist(), replace(options, max_new_tokens=7 + 3 * i))
        for i, (length, options) in enumerate(MANY)
    ]


def run(engine: Engine) -> dict[int, list[Event]]:
    events = defaultdict(list)
    while engine.busy:
        for event in engine.step():
            events[event.id].append(event)
    return events


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("prefill", [8, 256])
def test_requests_that_join_at_any_time_are_answered_as_alone(model, requests, rows, prefill, monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL", prefill)  # small: prompts are read in several steps
    alone = [list(generate(model, prompt, options)) for prompt, options in requests]
    engine, events, late = Engine(model, rows, 128), defaultdict(list), list(requests)
    steps = 0
    while engine.busy or late:
        if late and steps % 2 == 0:
            engine.submit(*late.pop(0))
        for event in engine.step():
            events[event.id].append(event)
        steps += 1
    assert [tokens(events[i]) for i in range(len(requests))] == alone
    for own in events.values():
        assert [event.finished for event in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finished == ("stop" if own[-1].token is None else "length")


def test_there_is_always_room_to_warm_up(model):
    engine = Engine(model, 1, 2)
    engine.warm_up()
    assert not engine.busy


def test_warmed_up_it_answers_as_ever(model, requests):
    engine = Engine(model, 1, 200)
    engine.warm_up()
    assert not engine.busy
    prompt, options = requests[0]
    number = engine.submit(prompt, options)
    tokens = [event.token for event in run(engine)[number] if event.token is not None]
    assert tokens == list(generate(model, prompt, options))


@pytest.mark.parametrize("when", [0, 1, 2, 4, 6])
def test_others_do_not_notice_a_cancelled_request(model, requests, when, monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL", 8)
    alone = [list(generate(model, prompt, options)) for prompt, options in requests]
    for gone in range(len(requests)):  # running, half read or waiting
        engine = Engine(model, rows=4, max_length=128)
        for request in requests:
            engine.submit(*request)
        told = defaultdict(list)
        for _ in range(when):
            for event in engine.step():
                told[event.id].append(event)
        engine.cancel(gone)
        later = run(engine)
        assert gone not in later
        for i, answer in enumerate(alone):
            if i != gone:
                assert tokens(told[i] + later[i]) == answer
        engine.cancel(gone)  # again, or after its end: no mistake


class Reading(InferenceModel):
    """Notes what it reads of prompts."""

    def __init__(self, model: MiniMind, weights: str) -> None:
        super().__init__(model, weights)
        self.stretches: list[tuple[int, int]] = []  # (start, length)

    def read(self, stretches, cache):
        self.stretches += [(stretch.start, len(stretch.ids)) for stretch in stretches]
        super().read(stretches, cache)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_row_still_holds_is_not_read_again(shape, weights):
    model = Reading(random_model(SHAPES[shape]), weights)
    first, second = ([7 * i % 300 for i in range(start, start + 40)] for start in (3, 900))
    engine, told = Engine(model, rows=2, max_length=200), {}

    def ask(*prompts: list[int]) -> list[list[int]]:
        """The answers; each is that of an engine which holds nothing."""
        numbers = [engine.submit(prompt, GREEDY, stop_ids=()) for prompt in prompts]
        told.update(run(engine))
        model.stretches, found = [], (model.stretches, [tokens(told[number]) for number in numbers])
        assert found[1] == [list(generate(model, prompt, GREEDY, stop_ids=())) for prompt in prompts]
        model.stretches = []
        return found

    read, [answer] = ask(first)
    assert read == [(0, 39)]
    again = [*first, *answer, 5, 6, 7]  # the next turn of a chat
    assert ask(again)[0] == [(59, 3)]  # the last token of an answer was never fed
    assert ask(first)[0] == []
    assert ask([*first[:30], 9, 9])[0] == [(30, 1)]
    # Two at a time begin as what a row holds; the first then leaves its row to the other.
    assert ask([*first[:20], *second], [*first[:20], *second[1:]])[0] == [(20, 39), (20, 38)]
    assert ask([*first[:20], *second[1:], 8, 9], second)[0] == [(59, 1), (0, 39)]


@pytest.mark.parametrize("seed", range(3))
def test_texts_that_begin_alike_are_answered_as_alone(model, seed, monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL", 16)
    random = Random(seed)
    engine, texts, asked, told = Engine(model, rows=3, max_length=128), [[5]], {}, defaultdict(list)
    for _ in range(300):
        if random.random() < 0.2:  # as long as any, or a cut, with something new
            begun = random.choice(texts)[: random.randint(1, 60)]
            prompt = begun + [random.randrange(3, 300) for _ in range(random.randint(1, 30))]
            options = SamplingOptions(seed=random.randrange(100), max_new_tokens=random.randint(1, 20))
            asked[engine.submit(prompt, options)] = prompt, options
            texts.append(prompt)
        if asked and random.random() < 0.05:
            engine.cancel(random.choice(list(asked)))
        for event in engine.step():
            told[event.id].append(event)
            if event.finished:
                texts.append(asked[event.id][0] + tokens(told[event.id]))
    ended = [number for number, events in told.items() if events[-1].finished]
    assert len(ended) > 20
    for number in ended:
        prompt, options = asked[number]
        assert tokens(told[number]) == list(generate(model, prompt, options))


def test_an_answer_that_was_interrupted_leaves_nothing_behind(model, monkeypatch):
    engine, first = Engine(model, rows=1, max_length=100), [7 * i for i in range(3, 40)]
    stream = engine.stream(first, GREEDY, stop_ids=())
    begun = [next(stream) for _ in range(3)]
    monkeypatch.setattr(model, "read", interrupt := Mock(side_effect=KeyboardInterrupt))
    stream.close()
    with pytest.raises(KeyboardInterrupt):
        list(engine.stream([*first[:20], *first], GREEDY, stop_ids=()))
    monkeypatch.undo()
    assert interrupt.called
    assert not engine.busy
    assert list(engine.stream(first, GREEDY, stop_ids=())) == (
        whole := list(generate(model, first, GREEDY, stop_ids=()))
    )
    assert begun == whole[:3]


def test_a_long_prompt_is_read_beside_running_answers(model):
    engine = Engine(model, rows=2, max_length=2048)
    running = engine.submit([1, 5], replace(GREEDY, max_new_tokens=50), stop_ids=())
    engine.step()
    long = engine.submit([7] * 1100, GREEDY, stop_ids=())
    first = next(i for i in range(50) if any(event.id == long for event in engine.step()))
    assert first == 4  # 1099 tokens in stretches of 256; the last token of a prompt is fed like an answer's
    assert len(tokens(run(engine)[running])) == 50 - 1 - first - 1


def test_answers_end_where_their_room_does(model):
    engine = Engine(model, rows=2, max_length=16)
    engine.submit([5] * 10, GREEDY, stop_ids=())
    engine.submit([5] * 15, GREEDY, stop_ids=())
    events = run(engine)
    assert [len(tokens(events[i])) for i in (0, 1)] == [6, 1]
    assert {events[i][-1].finished for i in (0, 1)} == {"length"}
    with pytest.raises(UserError, match="16 tokens; with an answer it must fit in 16"):
        engine.submit([5] * 16, GREEDY)
    with pytest.raises(UserError, match="at least one token"):
        engine.submit([], GREEDY)
    assert not engine.busy
    assert engine.step() == []


def test_log_probabilities_are_the_models_own(model):
    plain = random_model()
    prompt = [1, 5, 9]
    engine = Engine(model, rows=3, max_length=64)
    options = SamplingOptions(seed=1, temperature=2, repetition_penalty=1.5, max_new_tokens=12)
    engine.submit(prompt, options, stop_ids=(), top_logprobs=4)
    engine.submit(prompt, options, stop_ids=())
    engine.submit(prompt, options, stop_ids=(), top_logprobs=0)
    with_top, without, bare = run(engine).values()
    assert tokens(with_top) == tokens(without) == tokens(bare)
    assert all(event.logprobs is None for event in without)
    assert all(event.logprobs.top == [] for event in bare)
    answer = torch.tensor([prompt + tokens(with_top)])
    expected = plain(answer).logits[0].log_softmax(-1)
    for i, event in enumerate(with_top):
        row = expected[len(prompt) - 1 + i]
        assert event.logprobs.chosen == pytest.approx(row[event.token].item(), abs=1e-4)
        values, ids = row.topk(4)
        assert [token for token, _ in event.logprobs.top] == ids.tolist()
        assert [value for _, value in event.logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_stop_ids_belong_to_a_request(model):
    engine = Engine(model, rows=2, max_length=64)
    answer = list(generate(model, [1, 5], GREEDY, stop_ids=()))
    stop = answer[5]
    engine.submit([1, 5], GREEDY, stop_ids=())
    engine.submit([1, 5], GREEDY, stop_ids=(stop,))
    whole, cut = run(engine).values()
    assert tokens(whole) == answer
    assert tokens(cut) == answer[: answer.index(stop)]
    assert cut[-1] == Event(1, finished="stop")
