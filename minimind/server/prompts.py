"""From a request to what the model reads: whole, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from minimind.chat.engine import Engine
from minimind.server.errors import ApiError
from minimind.server.schemas import Message
from minimind.tokenizer import Tokenizer

AT_ONCE = 4000  # characters encoded in some milliseconds; longer texts would keep other requests waiting
MESSAGE = 40  # characters that take as long as what is done for each message beside its text

REASONED = (
    "<think>\n{}\n</think>\n<answer>\n{}\n</answer>"  # how answers look in a reasoning model's training
)


async def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], engine: Engine, reasons: bool
) -> list[int]:
    """The conversation as in training, and the beginning of an answer.

    Raises: ApiError when that leaves no room for an answer.
    """
    conversation = [{"role": role_of(message), "content": content(message, reasons)} for message in messages]
    texts = [message["content"] for message in conversation]
    if len(messages) > engine.max_length:  # each takes some tokens beside its text
        raise too_long(f"at least {len(messages)}", "messages", engine.max_length)
    check_bytes(tokenizer, texts, "messages", engine.max_length)

    def encode() -> list[int]:
        return tokenizer.encode_chat(conversation, add_generation_prompt=True)[0]

    return check_length(await in_time(encode, texts), "messages", engine.max_length)


async def text_prompt(tokenizer: Tokenizer, text: str, engine: Engine) -> list[int]:
    """A text to be continued. Raises: ApiError as `chat_prompt`."""
    check_bytes(tokenizer, [text], "prompt", engine.max_length)
    ids = [tokenizer.bos_id, *await in_time(lambda: tokenizer.encode(text), [text])]
    return check_length(ids, "prompt", engine.max_length)


def role_of(message: Message) -> str:
    return "system" if message.role == "developer" else message.role  # OpenAI's newer word for it


def content(message: Message, reasons: bool) -> str:
    """What a message says; a reasoning model's earlier answer with its thoughts, if the client kept them."""
    if reasons and message.role == "assistant" and message.reasoning_content:
        return REASONED.format(message.reasoning_content, message.text)
    return message.text


async def in_time(encode, texts: Sequence[str]) -> list[int]:
    if sum(MESSAGE + len(text) for text in texts) <= AT_ONCE:
        return encode()
    return await asyncio.to_thread(encode)


def check_bytes(tokenizer: Tokenizer, texts: Sequence[str], param: str, max_length: int) -> None:
    """Refuse what cannot fit whatever its tokens are, before time is spent on encoding it."""
    least = sum(len(text.encode("utf-8", "replace")) for text in texts) // longest_token(tokenizer)
    if least > max_length:
        raise too_long(f"at least {least:,}", param, max_length)


def check_length(ids: list[int], param: str, max_length: int) -> list[int]:
    if len(ids) >= max_length:
        raise too_long(f"{len(ids):,}", param, max_length)
    return ids


def too_long(tokens: str, param: str, max_length: int) -> ApiError:
    return ApiError(
        400,
        f"the {param} take {tokens} tokens, and with an answer they must fit in {max_length:,}; shorten "
        "them, or start the server with a larger --max_seq_len",
        param,
        "context_length_exceeded",
    )


def longest_token(tokenizer: Tokenizer) -> int:
    return max(map(len, tokenizer.token_bytes))
