"""The answers to one request: submitted together, read as they come, given up together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from minimind.chat.engine import Engine, Event
from minimind.chat.options import SamplingOptions
from minimind.server.errors import ApiError
from minimind.server.metrics import Metrics
from minimind.server.scheduler import Full, Scheduler, Ticket
from minimind.server.text import AnswerText, Piece


def unavailable(scheduler: Scheduler) -> ApiError:
    reason = "the model has stopped with an error; the server's log has it"
    return ApiError(503, reason if scheduler.failed else "the server is being stopped")


@dataclass(frozen=True)
class Served:
    """A model that requests can name."""

    name: str  # "minimind", "minimind:lora_medical"
    stage: str  # that made its weights
    adapter: str | None
    created: int  # seconds since 1970
    engine: Engine

    @property
    def reasons(self) -> bool:
        return self.stage == "reason"


class Answers:
    """Answers numbered from 0, as an asynchronous iterator over (number, piece).

    Args:
        prompts: of each answer, as ids; equal ones may be one object.
        options, texts: as many.
        top_logprobs: as `Engine.submit` has it.
    Raises: ApiError when there is no room for them, or never would be, or nothing to answer them.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        metrics: Metrics,
        model: Served,
        prompts: Sequence[Sequence[int]],
        options: Sequence[SamplingOptions],
        texts: Sequence[AnswerText],
        top_logprobs: int | None = None,
    ) -> None:
        self._scheduler, self._metrics, self._model = scheduler, metrics.of[model.name], model.name
        self._pieces: asyncio.Queue[tuple[int, Piece] | ApiError] = asyncio.Queue()
        self._texts = texts
        self._began = time.perf_counter()
        self._unfinished = set(range(len(prompts)))
        self.completion_tokens = 0
        self._tickets = self._submit(prompts, options, top_logprobs)

    def _submit(
        self, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions], top_logprobs: int | None
    ) -> list[Ticket]:
        if self._scheduler.failed:
            raise unavailable(self._scheduler)
        capacity = self._scheduler.capacity(self._model)
        if len(prompts) > capacity:
            raise ApiError(400, f"{len(prompts)} answers are more than this server has room for ({capacity})")
        takes = [self._take_of(number) for number in range(len(prompts))]
        try:
            tickets = self._scheduler.submit(self._model, prompts, options, takes, top_logprobs)
        except Full:
            wait = {"Retry-After": "1"}
            raise ApiError(
                429, "too many requests are waiting; try again in a second", headers=wait
            ) from None
        self._metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return tickets

    def _take_of(self, number: int):
        return lambda event: self._take(number, event)

    def _take(self, number: int, event: Event | None) -> None:
        """An event of the engine; called in the event loop whether or not anybody reads the answer now."""
        if event is None:
            self._unfinished.clear()
            self._pieces.put_nowait(unavailable(self._scheduler))
            return
        text, piece = self._texts[number], Piece()
        if event.token is not None:
            if self.completion_tokens == 0:
                self._metrics.first_token.observe(time.perf_counter() - self._began)
            self.completion_tokens += 1
            self._metrics.answer_tokens.inc()
            piece = text.push(event.token, event.logprobs)
            if piece.finished:  # a stop string
                self._scheduler.cancel(self._tickets[number])
        if event.finished and not piece.finished:
            piece = piece.followed_by(text.finish(event.finished))
        if piece != Piece():
            self._pieces.put_nowait((number, piece))
        if piece.finished:
            self._unfinished.discard(number)
            self._metrics.answer.observe(time.perf_counter() - self._began)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Raises: ApiError when the engine breaks, or the server stops."""
        reading = len(self._texts)
        while reading:
            found = await self._pieces.get()
            if isinstance(found, ApiError):
                raise found
            yield found
            reading -= found[1].finished is not None

    async def whole(self) -> list[Piece]:
        """Each answer in one piece."""
        pieces = [Piece()] * len(self._texts)
        async for number, piece in self:
            pieces[number] = pieces[number].followed_by(piece)
        return pieces

    def close(self) -> None:
        """Give up what has not ended: nobody reads it any more."""
        for number in self._unfinished:
            self._scheduler.cancel(self._tickets[number])
            self._metrics.cancelled.inc()
        self._unfinished.clear()
