"""Many answers at once, from one model: requests join and leave between two steps (continuous batching).

    engine = Engine(InferenceModel(model), rows=16, max_length=2048)
    first = engine.submit(prompt_ids, SamplingOptions())
    while engine.busy:
        for event in engine.step():
            …

A step feeds one token of each running answer to the model, together: the weights, whose reading is what a
token costs, are read once for all. Before that it takes in a stretch of the prompts that wait, short enough
that no running answer stands still for long. (Orca, Yu et al. 2022, OSDI; chunked prompts: Sarathi, Agrawal
et al. 2023, arXiv:2308.16369.)

An engine has no threads and no locks: whoever calls it from several threads takes turns.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, NamedTuple

from minimind.chat.inference import InferenceModel
from minimind.chat.network import Stretch
from minimind.chat.options import SamplingOptions
from minimind.chat.sampling import STOP_IDS, Sampler, TokenLogprobs, token_logprobs
from minimind.errors import UserError

PREFILL = 256  # prompt tokens in a step; a thirtieth of a second for 26 M parameters on two cores

Reason = Literal["stop", "length"]


class Event(NamedTuple):
    """A token of an answer, or its end, or both when the last token is the one that the length allows."""

    id: int
    token: int | None = None  # a stop id is never told
    logprobs: TokenLogprobs | None = None  # for requests that asked
    finished: Reason | None = None


@dataclass(eq=False)
class Request:
    id: int
    prompt: list[int]
    options: SamplingOptions
    stop_ids: Collection[int]
    max_new_tokens: int
    top_logprobs: int | None
    answer: array[int] = field(default_factory=lambda: array("q"))
    read: int = 0  # prompt tokens that the cache holds

    @property
    def ready(self) -> bool:
        """Whether all of the prompt but its last token is read; that one brings the first token's logits."""
        return self.read == len(self.prompt) - 1

    @property
    def held(self) -> list[int]:
        """The tokens whose keys and values its row of the cache has."""
        return [*self.prompt, *self.answer][: self.read + len(self.answer)]

    @property
    def position(self) -> int:
        """Of the token to be fed next: the last of prompt and answer."""
        return len(self.prompt) + len(self.answer) - 1


class Engine:
    """Answers up to `rows` requests at a time, each of up to `max_length` tokens with its prompt.

    Requests beyond that wait in line.
    """

    def __init__(self, model: InferenceModel, rows: int = 16, max_length: int = 2048) -> None:
        self.model = model
        self.rows = rows
        self.max_length = min(max_length, model.config.max_position_embeddings)
        self.cache = model.cache(rows, self.max_length)
        self.sampler = Sampler(rows)
        self.waiting: deque[Request] = deque()
        # Row i of the cache belongs to running[i]. All are ready but the last, whose prompt may be half read.
        self.running: list[Request] = []
        self.left: dict[int, list[int]] = {}  # what free rows of the cache still hold
        self._ids = count()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def warm_up(self) -> None:
        """Answer nobody: what the first answer on a machine compiles, no one waits for then."""
        prompt = [0, 0][: self.max_length - 1]  # where there is room: one is read, the other brings logits
        self.submit(prompt, SamplingOptions(max_new_tokens=1))
        while self.busy:
            self.step()

    def submit(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        stop_ids: Collection[int] = STOP_IDS,
        top_logprobs: int | None = None,
    ) -> int:
        """Put a request in line; its number names it in events.

        Args:
            stop_ids: what ends an answer; other control ids are never drawn.
            top_logprobs: tell each token's log-probability and those of so many likeliest; None: tell none.
        Raises: UserError for an empty prompt, or one that leaves no room for an answer.
        """
        if not prompt_ids:
            raise UserError("a prompt needs at least one token")
        room = self.max_length - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens; with an answer it must fit in {self.max_length}"
            )
        longest = min(options.max_new_tokens, room)
        request = Request(
            next(self._ids), list(prompt_ids), options, frozenset(stop_ids), longest, top_logprobs
        )
        self.waiting.append(request)
        return request.id

    def stream(
        self, prompt_ids: Sequence[int], options: SamplingOptions, stop_ids: Collection[int] = STOP_IDS
    ) -> Iterator[int]:
        """The tokens of one answer as they come, from an engine that has no other."""
        self.submit(prompt_ids, options, stop_ids)
        try:
            while self.busy:
                yield from (event.token for event in self.step() if event.token is not None)
        finally:
            if self.busy:  # interrupted, perhaps in the middle of a step
                self.forget()

    def forget(self) -> None:
        """Give up all requests, and what the cache holds."""
        self.waiting.clear()
        self.running.clear()
        self.left.clear()

    def cancel(self, request_id: int) -> None:
        """Forget a request. One that has already finished is no mistake: it may just have."""
        for request in self.waiting:
            if request.id == request_id:
                self.waiting.remove(request)
                return
        for request in self.running:
            if request.id == request_id:
                self._leave(request)
                return

    def step(self) -> list[Event]:
        """Read on in waiting prompts, then draw a token for every request whose prompt is read."""
        self._read_prompts()
        ready = [request for request in self.running if request.ready]
        if not ready:
            return []
        last = [request.answer[-1] if request.answer else request.prompt[-1] for request in ready]
        logits = self.model.next_logits(last, [request.position for request in ready], self.cache)  # (B, V)
        asked = [row for row, request in enumerate(ready) if request.top_logprobs is not None]
        logprobs = dict(zip(asked, logits[asked].log_softmax(-1), strict=True)) if asked else {}
        tokens = self.sampler.draw(logits)

        events = []
        for row, (request, token) in enumerate(zip(ready, tokens, strict=True)):
            event = self._take(request, token)
            if row in logprobs and event.token is not None:
                event = event._replace(
                    logprobs=token_logprobs(logprobs[row], token, request.top_logprobs or 0)
                )
            events.append(event)
        for event, request in zip(events, ready, strict=True):
            if event.finished:
                self._leave(request)
        return events

    def _take(self, request: Request, token: int) -> Event:
        """Add a token to its answer, unless it ends it."""
        if token in request.stop_ids:
            return Event(request.id, finished="stop")
        request.answer.append(token)
        full = len(request.answer) == request.max_new_tokens
        return Event(request.id, token, finished="length" if full else None)

    def _read_prompts(self) -> None:
        """Read up to PREFILL tokens of prompts, the half-read one first, then as many as are in line.

        Each prompt is cut at the same places whoever else is there, so that its sums round the same.
        """
        stretches: list[Stretch] = []
        budget = PREFILL
        while True:
            if not self.running or self.running[-1].ready:
                if not self.waiting or len(self.running) == self.rows:
                    break
                begun = self.waiting.popleft()
                self.sampler.begin(len(self.running), begun.options, begun.stop_ids)
                self.running.append(begun)
            request = self.running[-1]
            if not request.read:
                self._recall(request, {stretch.row: stretch.start for stretch in stretches})
            ids = request.prompt[request.read : -1][:PREFILL]
            if len(ids) > budget:
                break
            if ids:
                stretches.append(Stretch(len(self.running) - 1, request.read, ids))
            request.read += len(ids)
            budget -= len(ids)
        if stretches:
            self.model.read(stretches, self.cache)

    def _recall(self, request: Request, unread: Mapping[int, int]) -> None:
        """Spare a prompt, the last, the longest beginning that a row holds, as of the turn before in a chat.

        unread: rows of which tokens are about to be read, from which position on.
        """
        if self.model.device.type != "cpu":  # where it would be rounded otherwise, as other products are
            return
        own = len(self.running) - 1
        held = self.left | {i: self.running[i].held[: unread.get(i)] for i in range(own)}
        self.left.pop(own, None)
        wanted = request.prompt[:-1]
        length, _, row = max(
            ((shared(ids, wanted), i == own, i) for i, ids in held.items()), default=(0, 0, 0)
        )
        if length and row != own:
            self.cache.move(row, own, length)
        request.read = length

    def _leave(self, request: Request) -> None:
        """Close the gap that a request leaves, so that the running ones stay the first rows."""
        left = self.running[-1].held
        gap = self.running.index(request)
        last_ready = len(self.running) - (1 if self.running[-1].ready else 2)
        for row in (last_ready, len(self.running) - 1):  # a half-read prompt stays the last
            if row > gap:
                self._move(row, gap)
                gap = row
        self.running.pop()
        self.left[len(self.running)] = left

    def _move(self, source: int, target: int) -> None:
        request = self.running[target] = self.running[source]
        self.sampler.move(source, target)
        self.cache.move(source, target, request.read + len(request.answer))


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
