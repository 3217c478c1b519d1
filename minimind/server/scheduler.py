"""One thread that runs the engines, for an event loop that must never wait for a step.

The loop's side is `submit`, `cancel` and the callbacks of tickets; all of that runs in the loop's thread. The
other thread alone touches the engines. Between them go commands one way and events the other, so there are
no locks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread

from minimind.chat.engine import Engine, Event
from minimind.chat.options import SamplingOptions

Take = Callable[[Event | None], None]  # is told each event of an answer; None: there will be no more


class Full(Exception):
    """As many answers as may wait are waiting."""


class Ticket:
    """An answer under way, as both threads know it."""

    def __init__(self, model: str, take: Take) -> None:
        self.model, self.take = model, take
        self.id = -1  # the engine's; for the engine's thread


class Scheduler:
    """Engines by the name of their model; each answers as many at a time as it has rows.

    Args:
        queue: how many more answers may wait in line at each engine.
        on_failure: called in the loop's thread if a step raises; all open answers have then been given up.

    Attributes: failed: whether a step has raised.
    """

    def __init__(self, engines: Mapping[str, Engine], queue: int, on_failure: Callable[[], None]) -> None:
        self.engines = dict(engines)
        self.queue = queue
        self.failed = False
        self._on_failure = on_failure
        self._open: dict[str, set[Ticket]] = {model: set() for model in engines}  # the loop's
        self._running: dict[tuple[str, int], Ticket] = {}  # the engine thread's
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="engines", daemon=True)

    def start(self) -> None:
        """Must be called in the event loop that answers requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """End the thread after its present step; answers that are still open hear no more."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    # ---- in the event loop ----

    def capacity(self, model: str) -> int:
        """Answers that an engine can have at once, those in line included."""
        return self.engines[model].rows + self.queue

    def waiting(self, model: str) -> int:
        return max(0, len(self._open[model]) - self.engines[model].rows)

    def submit(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        options: Sequence[SamplingOptions],
        takes: Sequence[Take],
        top_logprobs: int | None = None,
    ) -> list[Ticket]:
        """Put the answers of one request in line: one for each of `prompts`, with its options and callback.

        Raises: Full when there is no room for all of them.
        """
        if len(self._open[model]) + len(prompts) > self.capacity(model):
            raise Full
        tickets = [Ticket(model, take) for take in takes]
        self._open[model].update(tickets)
        for ticket, prompt, own in zip(tickets, prompts, options, strict=True):
            self._commands.put(partial(self._begin, ticket, prompt, own, top_logprobs))
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Its row is free after the present step. An answer that has ended is no mistake."""
        if ticket in self._open[ticket.model]:
            self._open[ticket.model].remove(ticket)
            self._commands.put(partial(self._forget, ticket))

    def _hand_out(self, told: Sequence[tuple[Ticket, Event]]) -> None:
        for ticket, event in told:
            if ticket in self._open[ticket.model]:  # else it has been cancelled meanwhile
                if event.finished:
                    self._open[ticket.model].remove(ticket)
                ticket.take(event)

    def give_up(self) -> None:
        """End all open answers where they are."""
        for tickets in self._open.values():
            for ticket in list(tickets):
                self.cancel(ticket)
                ticket.take(None)

    def _fail(self) -> None:
        self.failed = True
        self.give_up()
        self._on_failure()

    # ---- in the engines' thread ----

    def _run(self) -> None:
        ended = False
        try:
            while self._obey():
                self._step()
            ended = True
        finally:  # an exception goes on to the thread's end, which prints it
            if not ended:
                self._loop.call_soon_threadsafe(self._fail)

    def _obey(self) -> bool:
        """Do what the loop has asked for, and wait for that while no engine is busy; False: end."""
        while True:
            idle = not any(engine.busy for engine in self.engines.values())
            try:
                command = self._commands.get(block=idle)
            except Empty:
                return True
            if command is None:
                return False
            command()

    def _step(self) -> None:
        """A step of each engine that has something to do."""
        told = []
        for model, engine in self.engines.items():
            for event in engine.step() if engine.busy else ():
                key = model, event.id
                told.append((self._running.pop(key) if event.finished else self._running[key], event))
        if told:
            self._loop.call_soon_threadsafe(self._hand_out, told)

    def _begin(
        self, ticket: Ticket, prompt: Sequence[int], options: SamplingOptions, top_logprobs: int | None
    ) -> None:
        ticket.id = self.engines[ticket.model].submit(prompt, options, top_logprobs=top_logprobs)
        self._running[ticket.model, ticket.id] = ticket

    def _forget(self, ticket: Ticket) -> None:
        if self._running.pop((ticket.model, ticket.id), None):
            self.engines[ticket.model].cancel(ticket.id)
