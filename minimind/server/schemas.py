"""What requests may hold: the fields of OpenAI's API that this server knows, and three of its own.

A field that would change the answer and is not supported is refused, so that nobody relies on it; one that
cannot change it (`user`, `metadata`, …) is passed over. `null` means that the field is left out.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from minimind.chat.options import SamplingOptions

MAX_ANSWERS = 128  # of one request
MAX_MESSAGES, MAX_FIELDS = 8192, 100  # far more than are sensible: what is checked takes time
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
INT32 = 2**31 - 1

WITHOUT_EFFECT = {
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
ONLY_AS = {  # not supported, but harmless at these values
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}


def without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character (U+0000), which no text has")
    return text


def string_or_list(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a string"


Item = TypeVar("Item")
Many = Annotated[list[Item], Field(max_length=MAX_MESSAGES, fail_fast=True)]  # told by its first mistake
Text = Annotated[str, AfterValidator(without_nul)]
Stop = Annotated[Text, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    passed_over: ClassVar[set[str]] = set()

    @model_validator(mode="before")
    @classmethod
    def leave_out(cls, value: Any) -> Any:
        """Without the fields that are null or have no effect."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise ValueError(f"an object of {len(value)} fields; there are not so many")
        return {k: v for k, v in value.items() if v is not None and k not in cls.passed_over}


class TextPart(Schema):
    type: Literal["text"]
    text: Text


class Message(Schema):
    """A message of a conversation. `reasoning_content` is what an assistant thought before it answered."""

    passed_over = {"name", "refusal", "annotations"}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("a string")] | Annotated[Many[TextPart], Tag("a list")],
        Discriminator(string_or_list),
    ]
    reasoning_content: Text = ""

    @property
    def text(self) -> str:
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class StreamOptions(Schema):
    passed_over = {"include_obfuscation"}

    include_usage: bool = False


class Request(Schema):
    """What a chat and a completion have in common."""

    passed_over = WITHOUT_EFFECT

    model: str = "minimind"
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MAX_ANSWERS)
    stop: Annotated[
        Annotated[Stop, Tag("a string")] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("a list")],
        Discriminator(string_or_list),
    ] = []
    max_tokens: int | None = Field(None, ge=1, le=INT32)
    temperature: float = Field(SamplingOptions.temperature, ge=0, le=2)
    top_p: float = Field(SamplingOptions.top_p, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    top_k: int = Field(0, ge=-1, le=INT32, description="draw from the k likeliest tokens; 0 or -1: from all")
    min_p: float = Field(
        SamplingOptions.min_p,
        ge=0,
        le=1,
        description="draw none less likely than this share of the likeliest",
    )
    repetition_penalty: float = Field(
        SamplingOptions.repetition_penalty, ge=0.01, le=100, description="1: none"
    )

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        for name in ONLY_AS.keys() & value.keys():
            given = value.pop(name)
            if given is not None and given not in ONLY_AS[name]:
                raise PydanticCustomError(
                    "unsupported", "{name} is not supported; leave it out", {"name": name}
                )
        return value

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self, place: int, max_new_tokens: int) -> SamplingOptions:
        """How answer number `place` is drawn; each has a seed of its own."""
        return SamplingOptions(
            temperature=self.temperature,
            top_p=max(self.top_p, 1e-6),
            top_k=self.top_k if self.top_k > 0 else None,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=max_new_tokens,
            seed=None if self.seed is None else (self.seed + place) % 2**63,
        )


class ChatRequest(Request):
    messages: Many[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def check_pairs(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprobs_asked(self) -> int | None:
        """How many of the likeliest tokens to tell beside each; None: tell nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    prompt: Annotated[
        Annotated[Text, Tag("a string")]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_ANSWERS), Tag("a list")],
        Discriminator(string_or_list),
    ]
    max_tokens: int = Field(16, ge=1, le=INT32)
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt
