"""A reasoning model's answer taken apart while it comes: what it thinks, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Literal

from minimind.data.records import TAG, TAGS

Part = Literal["thinking", "answer"]


class ReasoningStream:
    """Sorts text that comes in pieces of any size by the tags in it; the tags themselves are dropped.

    `<think>` begins thinking and every other tag ends it, wherever it comes. So all that a model writes is
    shown, whatever it forgets: without tags all is answer, and thinking that is never closed is thinking. A
    stretch of a part comes without the white space at its ends.
    """

    def __init__(self) -> None:
        self._part: Part = "answer"
        self._begun = False  # whether this stretch has a text yet
        self._space = ""  # white space that belongs to the stretch if it goes on
        self._tag = ""  # what may be the beginning of a tag

    def push(self, text: str) -> list[tuple[Part, str]]:
        """What `text` adds, in order. White space at its end, and what may begin a tag, wait for the next."""
        *pieces, last = TAG.split(self._tag + text)  # text, tag, text, tag, … text
        tag_at = last.rfind("<")
        held = tag_at >= 0 and any(tag.startswith(last[tag_at:]) for tag in TAGS)
        self._tag = last[tag_at:] if held else ""
        pieces.append(last.removesuffix(self._tag))
        return [found for piece in pieces for found in self._sort(piece)]

    def flush(self) -> list[tuple[Part, str]]:
        """What was held back, now that nothing follows."""
        held, self._tag = self._tag, ""
        return list(self._sort(held))

    def _sort(self, piece: str) -> Iterator[tuple[Part, str]]:
        """Take in a tag, or a text without tags."""
        if piece in TAGS:
            part: Part = "thinking" if piece == "<think>" else "answer"
            if part != self._part:
                self._part, self._begun, self._space = part, False, ""
            return
        text = self._space + piece if self._begun else piece.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._begun = True
            yield self._part, kept


def stream_reasoning(texts: Iterable[str]) -> Iterator[tuple[Part, str]]:
    """The parts of an answer while its `texts` come."""
    stream = ReasoningStream()
    for text in texts:
        yield from stream.push(text)
    yield from stream.flush()


def split_reasoning(text: str) -> tuple[str, str]:
    """(thinking, answer) of a whole text, "" where there is none."""
    stretches: dict[Part, list[str]] = {"thinking": [], "answer": []}
    for part, pieces in groupby(stream_reasoning([text]), itemgetter(0)):
        stretches[part].append("".join(piece for _, piece in pieces))
    return "\n".join(stretches["thinking"]), "\n".join(stretches["answer"])
