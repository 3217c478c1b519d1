"""The text of an answer while its tokens come: whole characters, no stop strings, thoughts apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from minimind.chat.reasoning import Part, ReasoningStream
from minimind.chat.sampling import TokenLogprobs
from minimind.tokenizer import StreamDecoder, Tokenizer

Reason = Literal["stop", "length"]


class TokenText(NamedTuple):
    """A token of an answer whose log-probabilities were asked for."""

    token: int
    logprobs: TokenLogprobs
    start: int  # character of the answer in which it begins


class Piece(NamedTuple):
    """What an answer gains at once."""

    answer: str = ""
    thinking: str = ""
    tokens: tuple[TokenText, ...] = ()
    finished: Reason | None = None

    def followed_by(self, other: Piece) -> Piece:
        return Piece(
            self.answer + other.answer,
            self.thinking + other.thinking,
            self.tokens + other.tokens,
            other.finished,
        )


class StopStrings:
    """Lets text through up to the first of some strings, which may come in pieces of any size.

    Of several the one that is complete first counts; what may be the beginning of one waits.

    Attributes: found: whether one has come; nothing passes any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What can be shown now that `text` has come."""
        text = self._held + text
        places = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)[1]]
        longest = max(map(len, self._stops), default=1) - 1
        starts = range(max(0, len(text) - longest), len(text))
        held = next((i for i in starts if self._may_begin(text[i:])), len(text))
        self._held = text[held:]
        return text[:held]

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        return text

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


class AnswerText:
    """Turns the tokens of one answer into pieces to show.

    Args:
        stops: strings that end the answer; they are looked for in all that the model writes, tags and
            thoughts included.
        reasons: whether answers have thoughts and tags in them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), reasons: bool = False) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self._reasoning = ReasoningStream() if reasons else None
        self._parts: list[Part] = []  # in which something was shown, in order
        self._written = self._shown = 0  # characters that the model wrote, and those past the stop strings
        self._tokens: deque[TokenText] = deque()  # whose characters are not yet shown

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> Piece:
        """What a token adds; `finished` if it completes a stop string."""
        if logprobs:
            self._tokens.append(TokenText(token, logprobs, self._written))
        text = self._decoder.push(token)
        self._written += len(text)
        return self._piece(self._stops.push(text), "stop" if self._stops.found else None)

    def finish(self, reason: Reason) -> Piece:
        """What was held back. Half a character, where the length cuts an answer, is not shown."""
        return self._piece(self._stops.flush(), reason)

    def _piece(self, text: str, finished: Reason | None) -> Piece:
        self._shown += len(text)
        whole = finished and not self._stops.found
        ready = []
        while self._tokens and (whole or self._tokens[0].start < self._shown):
            ready.append(self._tokens.popleft())
        if self._reasoning is None:
            return Piece(text, "", tuple(ready), finished)
        found = self._reasoning.push(text) + (self._reasoning.flush() if finished else [])
        return Piece(*self._join(found), tuple(ready), finished)

    def _join(self, found: Sequence[tuple[Part, str]]) -> tuple[str, str]:
        """(answer, thinking); stretches of a part stand on lines of their own, as in `split_reasoning`."""
        texts: dict[Part, str] = {"answer": "", "thinking": ""}
        for part, text in found:
            if part in self._parts and part != self._parts[-1]:
                texts[part] += "\n"
            if part not in self._parts[-1:]:
                self._parts.append(part)
            texts[part] += text
        return texts["answer"], texts["thinking"]
