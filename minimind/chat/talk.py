"""Questions in, answers out: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TextIO

from minimind.chat.options import SamplingOptions
from minimind.chat.reasoning import stream_reasoning
from minimind.chat.session import ChatSession
from minimind.errors import UserError
from minimind.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from minimind.chat.engine import Engine

YOU, MODEL = "你 / you> ", "MiniMind> "
HEADINGS = {"thinking": "思考 / thinking:", "answer": "回答 / answer:"}
COMMANDS = "/clear 清空对话 forgets what was said; Ctrl-C 停止回答 stops an answer; /exit 结束 ends"
DIM = "\x1b[2m{}\x1b[0m"


@dataclass
class Talk:
    """A model's engine, what has been said, and where to write what is not part of an answer."""

    engine: Engine
    session: ChatSession
    options: SamplingOptions
    notes: TextIO
    questions: Sequence[str]  # of the automatic test
    reasons: bool = False  # whether answers have thoughts and tags in them

    def answer(self, text: str) -> None:
        """Stream the answer to `text` to stdout, then note its speed. Ctrl-C passes on after that.

        Raises: UserError when `text` is too long.
        """
        prompt_ids = self.session.prompt_ids(text)
        options = replace(self.options, max_new_tokens=self.session.answer_room(prompt_ids))
        decoder = StreamDecoder(self.session.tokenizer)  # not flushed: a character cut in half is not shown
        pieces: list[str] = []  # one a token

        def stream() -> Iterator[str]:
            for token in self.engine.stream(prompt_ids, options):
                pieces.append(decoder.push(token))
                yield pieces[-1]

        start = time.perf_counter()
        try:
            self.show(stream())
        finally:
            speed = len(pieces) / (time.perf_counter() - start)
            print(f"[{len(pieces)} tokens, {speed:.1f} tokens/s]", file=self.notes)
            # R1 forgets its thoughts, to save context. Here the tags and all that is in them are kept: so
            # earlier answers look in training, and a small model copies the form of what it reads.
            self.session.add(text, "".join(pieces))

    def show(self, texts: Iterable[str]) -> None:
        """Print an answer as its `texts` come; a reasoning model's in two parts, each under a heading.

        Headings and thoughts are notes, so a script that reads stdout gets the answer alone.
        """
        parts = stream_reasoning(texts) if self.reasons else (("answer", text) for text in texts)
        files = {"thinking": self.notes, "answer": sys.stdout}
        shown = None if self.reasons else "answer"
        try:
            for part, text in parts:
                if part != shown:
                    if shown:
                        print(file=files[shown], flush=True)
                    print(HEADINGS[part], file=self.notes, flush=True)
                    shown = part
                dim = part == "thinking" and self.notes.isatty()
                print(DIM.format(text) if dim else text, end="", file=files[part], flush=True)
        finally:
            print(file=files[shown or "answer"], flush=True)
            if shown == "thinking" and self.notes is not sys.stdout:
                print(flush=True)  # a script gets a line for each question, if an empty one
                print("no answer: the thinking does not end", file=self.notes)

    def interactively(self) -> None:
        """Answer the automatic questions or typed ones, until there are no more."""
        with contextlib.suppress(ImportError):  # line editing where the system has it
            import readline  # noqa: F401
        for text in self.asked():
            print(MODEL, end="", flush=True)
            try:
                self.answer(text)
            except KeyboardInterrupt:
                print("（已停止 / stopped）")
            except UserError as error:
                print(error)
        print("再见 / bye")

    def asked(self) -> Iterator[str]:
        """What to answer, one by one; anything but 0 and 1 at the first prompt is already a question."""
        choice = read_line("[0] 自动测试 / automatic test\n[1] 手动输入 / your own input\n> ")
        if choice == "0":
            for question in self.questions:
                print(f"\n{YOU}{question}")
                yield question
            return
        if choice is None:
            return
        print(COMMANDS)
        if choice not in ("", "1"):
            yield choice
        while (text := read_line(f"\n{YOU}")) is not None and text not in ("/exit", "/quit"):
            if text == "/clear":
                self.session.clear()
                print("对话已清空 / forgotten")
            elif text in ("/", "/help", "/?"):
                print(COMMANDS)
            elif text:
                yield text


def read_line(prompt: str) -> str | None:
    """A line without the white space around it; None at the end of the input or on Ctrl-C."""
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: standard input is closed
        print()
        return None
