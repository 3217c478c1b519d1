"""Answers in the shapes of OpenAI's API: whole, or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from minimind.server.answers import Answers
from minimind.server.errors import ApiError
from minimind.server.text import Piece, TokenText
from minimind.tokenizer import Tokenizer

LINE_ENDS = "\x85\u2028\u2029"  # to some clients, beside those that JSON escapes anyway


class Shape(ABC):
    """How one request is answered. Subclasses say what a choice looks like.

    Args: tokenizer: for the texts of tokens with log-probabilities.
    """

    kind: str  # of the whole answer
    chunk_kind: str
    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, prompt_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Piece], completion_tokens: int) -> dict[str, Any]:
        choices = [self.choice(number, piece) for number, piece in enumerate(pieces)]
        usage = self.usage(completion_tokens)
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_kind, "choices": choices}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    @abstractmethod
    def choice(self, number: int, piece: Piece) -> dict[str, Any]:
        """A choice in the whole answer."""

    def beginnings(self, count: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    @abstractmethod
    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        """A choice in a chunk."""

    def token_text(self, token: int) -> str:
        """The text of a token alone; bytes of a character's part as \\xe4."""
        written = self.tokenizer.token_bytes[token]
        if not written:
            return self.tokenizer.decode([token], skip_special_tokens=False)
        return written.decode("utf-8", "backslashreplace")


class Chat(Shape):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, number: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.answer}
        if piece.thinking:
            message["reasoning_content"] = piece.thinking
        return self._choice(number, piece, {"message": message})

    def beginnings(self, count: int) -> list[dict[str, Any]]:
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._choice(number, Piece(), delta) for number in range(count)]

    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        texts = {"reasoning_content": piece.thinking, "content": piece.answer}
        return self._choice(number, piece, {"delta": {name: text for name, text in texts.items() if text}})

    def _choice(self, number: int, piece: Piece, text: dict[str, Any]) -> dict[str, Any]:
        content = [self._logprobs(token) for token in piece.tokens]
        logprobs = {"content": content, "refusal": None} if content else None
        return {"index": number, **text, "logprobs": logprobs, "finish_reason": piece.finished}

    def _logprobs(self, told: TokenText) -> dict[str, Any]:
        top = [self._logprob(token, value) for token, value in told.logprobs.top]
        return self._logprob(told.token, told.logprobs.chosen) | {"top_logprobs": top}

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        written = list(self.tokenizer.token_bytes[token])
        return {"token": self.token_text(token), "logprob": value, "bytes": written}


class Completion(Shape):
    """Args: prompts: the text before each answer, where offsets begin."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, prompt_tokens: int, prompts: Sequence[str]) -> None:
        super().__init__(model, tokenizer, prompt_tokens)
        self.prompts = prompts

    def choice(self, number: int, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece.tokens, len(self.prompts[number])) if piece.tokens else None
        return {
            "index": number,
            "text": piece.answer,
            "logprobs": logprobs,
            "finish_reason": piece.finished,
        }

    part = choice

    def _logprobs(self, tokens: Sequence[TokenText], start: int) -> dict[str, Any]:
        def likeliest(told: TokenText) -> dict[str, float]:
            pairs = [*told.logprobs.top, (told.token, told.logprobs.chosen)]
            return {self.token_text(token): value for token, value in pairs}

        return {
            "tokens": [self.token_text(told.token) for told in tokens],
            "token_logprobs": [told.logprobs.chosen for told in tokens],
            "top_logprobs": [likeliest(told) for told in tokens],
            "text_offset": [start + told.start for told in tokens],
        }


class EventStream(StreamingResponse):
    """The chunks of some answers. A client that leaves gives up what has not ended."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, count: int, shape: Shape, include_usage: bool) -> None:
        self.answers = answers
        no_buffers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # of proxies such as nginx
        super().__init__(events(answers, count, shape, include_usage), headers=no_buffers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.close()


async def events(answers: Answers, count: int, shape: Shape, include_usage: bool) -> AsyncIterator[str]:
    """Once a stream has begun its status cannot change: an error is then an event, and no [DONE] follows."""
    unknown = {"usage": None} if include_usage else {}
    for choice in shape.beginnings(count):
        yield event(shape.chunk([choice]) | unknown)
    try:
        async for number, piece in answers:
            yield event(shape.chunk([shape.part(number, piece)]) | unknown)
    except ApiError as error:
        yield event(error.body())
        return
    if include_usage:
        yield event(shape.chunk([]) | {"usage": shape.usage(answers.completion_tokens)})
    yield "data: [DONE]\n\n"


def event(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in LINE_ENDS:
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"data: {text}\n\n"
