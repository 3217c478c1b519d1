"""The formats of LLaMA-Factory, record by record: alpaca, sharegpt, and sharegpt with OpenAI's names.

    {"instruction": …, "input": …, "output": …, "system": …, "history": [[question, answer], …]}     alpaca
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}], "system": …}     sharegpt
    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}              openai

Preference pairs have `chosen` and `rejected` in place of the last answer. Columns and tags may have other
names, which an entry of `dataset_info.json` then tells; a `Layout` is such an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from minimind.data.records import InvalidLine, Kind, Message, Role
from minimind.errors import UserError

SIDES = ("chosen", "rejected")
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
CHAT_COLUMNS = {"messages": "conversations"}
COMMON_COLUMNS = {name: name for name in ("system", "tools", "images", "videos", "audios", "kto_tag", *SIDES)}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function",
    "system_tag": "system",
}
INEXPRESSIBLE = {
    "tools": "tools",
    "images": "pictures",
    "videos": "videos",
    "audios": "sounds",
    "kto_tag": "answers marked as good or bad without a second one",
}


@dataclass(frozen=True)
class Layout:
    """How a file is laid out: what `dataset_info.json` says of it."""

    formatting: str  # "alpaca" or "sharegpt"
    columns: Mapping[str, str]  # by LLaMA-Factory's names
    tags: Mapping[str, str]

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Layout:
        """As LLaMA-Factory reads it: columns or tags, where any is named, are those named alone."""
        try:
            usual = LAYOUTS[entry.get("formatting", "alpaca")]
            columns, tags = (
                msgspec.convert(entry.get(name, {}), dict[str, str]) for name in ("columns", "tags")
            )
        except (KeyError, TypeError, msgspec.ValidationError):
            raise UserError(
                f"dataset_info.json: the entry for {entry['file_name']} has a formatting, columns or tags "
                "that are unknown; mend it, or give --source"
            ) from None
        return cls(usual.formatting, columns or usual.columns, tags or usual.tags)

    def entry(self, file_name: str, kind: Kind) -> dict[str, Any]:
        """What `dataset_info.json` must say of a file that `from_minimind` has written."""
        wanted = ["messages"] if self.formatting == "sharegpt" else ["prompt", "query", "system", "history"]
        if kind == "preference":
            wanted += SIDES
        elif self.formatting == "alpaca":
            wanted.append("response")
        entry: dict[str, Any] = {"file_name": file_name, "formatting": self.formatting}
        if kind == "preference":
            entry["ranking"] = True
        entry["columns"] = {name: self.columns[name] for name in wanted}
        return entry | ({"tags": dict(self.tags)} if self.tags not in (TAGS, {}) else {})

    # ---- To MiniMind ----

    def to_minimind(self, record: Mapping[str, Any]) -> dict[str, list[Message]]:
        """A record in MiniMind's format. Raises: InvalidLine for what it cannot express."""
        for name, what in INEXPRESSIBLE.items():
            if self._value(record, name) not in (None, "", "[]", [], {}):
                raise InvalidLine(self.columns[name], f"{what} cannot be expressed in MiniMind's format")
        read = self._alpaca_prompt if self.formatting == "alpaca" else self._chat
        messages = read(record)
        if self.is_pair(record):
            return {side: [*messages, self._answer(record, side)] for side in SIDES}
        if self.formatting == "alpaca":
            messages.append(self._answer(record, "response"))
        return {"conversations": messages}

    def is_pair(self, record: Mapping[str, Any]) -> bool:
        return all(self._value(record, side) is not None for side in SIDES)

    def _value(self, record: Mapping[str, Any], name: str) -> Any:
        return record.get(self.columns[name]) if name in self.columns else None

    def _text(self, record: Mapping[str, Any], name: str) -> str:
        """A column that may be left out."""
        return text(self._value(record, name) or "", self.columns.get(name, name))

    def _system(self, record: Mapping[str, Any]) -> list[Message]:
        system = self._text(record, "system")
        return [{"role": "system", "content": system}] if system else []

    def _alpaca_prompt(self, record: Mapping[str, Any]) -> list[Message]:
        messages = self._system(record)
        history, column = self._value(record, "history") or [], self.columns.get("history", "history")
        if not isinstance(history, list):
            raise InvalidLine(column, "is no list of questions and answers")
        for i, turn in enumerate(history):
            if not isinstance(turn, list) or len(turn) != 2:
                raise InvalidLine(f"{column}[{i}]", "is no question with its answer")
            question, answer = (said(content, f"{column}[{i}]") for content in turn)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        question = "\n".join(filter(None, (self._text(record, "prompt"), self._text(record, "query"))))
        messages.append({"role": "user", "content": said(question, self.columns.get("prompt", "prompt"))})
        return messages

    def _chat(self, record: Mapping[str, Any]) -> list[Message]:
        column = self.columns.get("messages", "messages")
        messages = record.get(column)
        if not isinstance(messages, list):
            raise InvalidLine(column, "missing" if messages is None else "is no list of messages")
        read = [self._message(message, f"{column}[{i}]") for i, message in enumerate(messages)]
        starts_with_system = bool(read) and read[0]["role"] == "system"
        return read if starts_with_system else self._system(record) + read

    def _message(self, message: Any, field: str) -> Message:
        role_tag, content_tag = self.tags.get("role_tag", "from"), self.tags.get("content_tag", "value")
        if not isinstance(message, dict):
            raise InvalidLine(field, "is no message")
        role = message.get(role_tag)
        roles: tuple[Role, ...] = ("user", "assistant", "system")
        known = {self.tags.get(f"{name}_tag"): name for name in roles}
        tools = (self.tags.get("observation_tag"), self.tags.get("function_tag"))
        if not isinstance(role, str):
            raise InvalidLine(f"{field}.{role_tag}", "missing" if role is None else "is no text")
        if message.get("tool_calls") or role in tools:
            raise InvalidLine(f"{field}.{role_tag}", "tool calls cannot be expressed in MiniMind's format")
        if role not in known:
            raise InvalidLine(
                f"{field}.{role_tag}", f"unknown role `{role}`; one of {', '.join(filter(None, known))}"
            )
        return {"role": known[role], "content": said(message.get(content_tag), f"{field}.{content_tag}")}

    def _answer(self, record: Mapping[str, Any], name: str) -> Message:
        column, value = self.columns.get(name, name), self._value(record, name)
        if self.formatting == "sharegpt":
            return self._message(value, column)
        return {"role": "assistant", "content": said(value, column)}

    # ---- From MiniMind ----

    def from_minimind(self, record: Mapping[str, list[Message]]) -> dict[str, Any]:
        """A conversation or pair of MiniMind's in this layout."""
        chats = [record[name] for name in ("conversations", *SIDES) if name in record]
        if self.formatting == "sharegpt":
            return self._written_chat(chats)
        return self._written_alpaca(chats)

    def _written_chat(self, chats: list[list[Message]]) -> dict[str, Any]:
        def written(message: Message) -> dict[str, str]:
            role = self.tags[f"{message['role']}_tag"]
            return {self.tags["role_tag"]: role, self.tags["content_tag"]: message["content"]}

        if len(chats) == 1:
            return {self.columns["messages"]: [written(message) for message in chats[0]]}
        prompt = {self.columns["messages"]: [written(message) for message in chats[0][:-1]]}
        answers = zip(SIDES, chats, strict=True)
        return prompt | {self.columns[side]: written(chat[-1]) for side, chat in answers}

    def _written_alpaca(self, chats: list[list[Message]]) -> dict[str, Any]:
        system = chats[0][0]["content"] if chats[0][0]["role"] == "system" else ""
        contents = [message["content"] for message in chats[0][bool(system) :]]
        history = [contents[i : i + 2] for i in range(0, len(contents) - 2, 2)]
        values: dict[str, str | list[list[str]]] = {"prompt": contents[-2], "query": ""}
        if len(chats) == 1:
            values["response"] = contents[-1]
        else:
            values |= {"chosen": contents[-1], "rejected": chats[1][-1]["content"]}
        values |= {"system": system, "history": history}
        return {self.columns[name]: value for name, value in values.items()}


LAYOUTS = {
    "alpaca": Layout("alpaca", ALPACA_COLUMNS | COMMON_COLUMNS, {}),
    "sharegpt": Layout("sharegpt", CHAT_COLUMNS | COMMON_COLUMNS, TAGS),
    "openai": Layout("sharegpt", {"messages": "messages"} | COMMON_COLUMNS, OPENAI_TAGS),
}


def text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidLine(field, "is no text")
    return value


def said(value: Any, field: str) -> str:
    """What is said in a message: a text that is not empty."""
    if value is None:
        raise InvalidLine(field, "missing")
    if not text(value, field) or value.isspace():
        raise InvalidLine(field, "empty")
    return value


def format_of(record: Mapping[str, Any]) -> str | None:
    """What a record is in: a key of `LAYOUTS`, "minimind", or None where no format is known by its fields."""
    messages = record.get("conversations")
    if isinstance(messages, list):
        first = messages[0] if messages else None
        return "sharegpt" if isinstance(first, dict) and "from" in first else "minimind"
    if "messages" in record:
        return "openai"
    if "instruction" in record:
        return "alpaca"
    if "text" in record or isinstance(record.get("chosen"), list):
        return "minimind"
    return None
