"""What the model gets to read: a conversation that always fits, trimmed by whole turns."""

from __future__ import annotations

from minimind.errors import UserError
from minimind.tokenizer import Message, Tokenizer


class ChatSession:
    """A conversation with one user.

    Args:
        history_cnt: how many earlier messages the model is reminded of, an even number (a question and its
            answer are two); 0: none.
        max_seq_len: tokens that prompt and answer may take together.
        max_new_tokens: tokens that an answer may take at most.
        chat: False for a pretrained model, which has no questions and answers: it continues a text.
    Raises: UserError when `history_cnt` is odd or negative, or `max_seq_len` leaves room for nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        history_cnt: int = 0,
        max_seq_len: int = 8192,
        max_new_tokens: int = 1024,
        chat: bool = True,
    ) -> None:
        if history_cnt < 0 or history_cnt % 2:
            raise UserError(
                f"history_cnt counts questions and their answers: 0, 2, 4, … and not {history_cnt}"
            )
        if max_seq_len < 2:
            raise UserError(f"max_seq_len must hold a prompt and an answer, and {max_seq_len} tokens do not")
        self.tokenizer = tokenizer
        self.history_cnt = history_cnt
        self.max_seq_len = max_seq_len
        self.max_new_tokens = max_new_tokens
        self.chat = chat
        self.messages: list[Message] = []  # user and assistant in turn

    def prompt_ids(self, text: str) -> list[int]:
        """What the model reads to answer `text`.

        Room is kept for an answer of `max_new_tokens`, or a quarter of `max_seq_len` if that is less. The
        oldest turns are left out, each as a whole, until the rest fits beside it.

        Raises: UserError when `text` does not fit even alone.
        """
        most = self.max_seq_len - min(self.max_new_tokens, max(1, self.max_seq_len // 4))
        history = self.messages[-self.history_cnt :] if self.history_cnt and self.chat else []
        ids = self._encode(history, text)
        while len(ids) > most and history:
            history = history[2:]
            ids = self._encode(history, text)
        if len(ids) > most:
            raise UserError(
                f"this message takes {len(ids)} tokens, but --max_seq_len {self.max_seq_len} leaves {most} "
                "beside an answer; shorten the message or raise --max_seq_len"
            )
        return ids

    def answer_room(self, prompt_ids: list[int]) -> int:
        """Tokens that the answer to a prompt of `prompt_ids` may take, at least 1."""
        return min(self.max_new_tokens, self.max_seq_len - len(prompt_ids))

    def add(self, text: str, answer: str) -> None:
        """Remember a question and its answer. One that was stopped before its first word is forgotten."""
        if answer:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def clear(self) -> None:
        self.messages = []

    def _encode(self, history: list[Message], text: str) -> list[int]:
        if not self.chat:
            return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]
        messages = [*history, {"role": "user", "content": text}]
        return self.tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
