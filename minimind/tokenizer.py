"""Text to token ids and back: byte-level BPE, chat rendering with an answer mask, streaming.

The shipped tokenizer (`minimind/assets/tokenizer`, its README says how it was made) has 6,400 entries. Ids 0,
1 and 2 are `<|endoftext|>` (also padding), `<|im_start|>` and `<|im_end|>`. Any other directory with a
`tokenizer.json` whose first three ids are these works too, the published MiniMind2 tokenizer for one.

One rule holds at every entry: **text is never a control token**. What a user wrote is encoded with special
tokens off, so a message that contains `<|im_end|>` costs a few ordinary ids; ids 0 to 2 come from the chat
template alone.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import tokenizers

from minimind.bulk_encoding import BulkEncoder, bulk_encoder, replace_surrogates
from minimind.chat_template import compile_template, without_marks
from minimind.errors import UserError
from minimind.paths import TOKENIZER_DIR

END_OF_TEXT, IM_START, IM_END = CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

MOST_KEPT_ROLES = 64  # messages of a conversation whose template is kept
TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")

# How text falls into words before BPE joins bytes; no token crosses a border between words. This is Qwen2's
# split (llama.cpp calls it "qwen2", so exports need no new code there). Alternative by alternative: English
# contractions; a run of letters with the one space or mark before it; a single digit; other marks, with the
# newlines that follow; newlines; spaces.
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRANSFORMERS_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": IM_START,
    "eos_token": IM_END,
    "pad_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 32768,
}

Message = dict[str, str]  # {"role": "user", "content": "…"}


class Tokenizer:
    """A byte-level BPE vocabulary with its chat template. Build one with `Tokenizer.load`.

    Attributes:
        vocab_size: number of ids, control tokens included.
        pad_id, bos_id, eos_id: 0, 1, 2.
        fingerprint: SHA-256 (hex) over `tokenizer.json` and the chat template; two tokenizers with the same
            fingerprint give the same ids for everything.
        token_bytes: the bytes each id stands for, indexed by id; `b""` for control tokens.
        path: the directory it was loaded from.
        tokenizer_json, chat_template: the texts of its files; the template is "" when there is none.
    """

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(
        self, tokenizer_json: str, chat_template: str, template_variables: dict[str, str], path: Path
    ):
        self._source = (tokenizer_json, chat_template, template_variables, path)
        self.path = path
        self.tokenizer_json = tokenizer_json
        self.chat_template = chat_template
        self._template_variables = template_variables
        # Two copies, because whether special tokens are recognised is a switch on the object: one for text
        # that people wrote, one for the template's own pieces.
        self._text_encoder = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._text_encoder.encode_special_tokens = True  # "encode them as text", in this library's words
        self._template_encoder = tokenizers.Tokenizer.from_str(tokenizer_json)
        for encoder in (self._text_encoder, self._template_encoder):
            encoder.no_truncation()  # transformers saves the last batch's settings along
            encoder.no_padding()

        self.vocab_size = self._text_encoder.get_vocab_size()
        self.token_bytes = _token_bytes(self._text_encoder)
        template = without_marks(chat_template)  # marks change no id
        self.fingerprint = hashlib.sha256(f"{tokenizer_json}\0{template}".encode()).hexdigest()
        self._template = lru_cache(maxsize=1)(self._compile_template)
        self._chat_pieces = lru_cache(maxsize=4096)(self._encode_chat_pieces)

    def __reduce__(self):
        """Pickle as the texts it was made from, so a worker process gets exactly this tokenizer."""
        return Tokenizer, self._source

    @classmethod
    def load(cls, path: str | Path | None = None) -> Tokenizer:
        """Read a tokenizer directory; without `path`, the one that ships with MiniMind.

        Raises:
            UserError: a file is missing or broken, or ids 0, 1, 2 are not the control tokens.
        """
        path = TOKENIZER_DIR if path is None else Path(path)
        file = path / "tokenizer.json"
        tokenizer_json = _read(
            file, f"give a directory that contains tokenizer.json, such as {TOKENIZER_DIR}"
        )
        try:
            added = tokenizers.Tokenizer.from_str(tokenizer_json).get_added_tokens_decoder()
        except Exception as error:  # the library raises a bare Exception for anything it cannot parse
            raise UserError(f"{file} is not a tokenizer: {error}. Copy or train it again.") from None
        found = tuple(added[i].content if i in added and added[i].special else None for i in range(3))
        if found != CONTROL_TOKENS:
            raise UserError(
                f"{file}: the special tokens 0, 1, 2 are {found}, but MiniMind needs {CONTROL_TOKENS}. "
                "Use MiniMind's own tokenizer, or train one with `minimind tokenizer`."
            )
        try:
            return cls(tokenizer_json, *_read_template(path), path)
        except (KeyError, TypeError) as error:  # a character that stands for no byte, an id for nothing
            raise UserError(
                f"{file} is not byte-level BPE (it holds {error}): use one like GPT-2's"
            ) from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without loss: `decode(encode(text)) == text`. Never contains ids 0, 1 or 2."""
        try:
            return self._text_encoder.encode(text, add_special_tokens=False).ids
        except TypeError:
            return self._text_encoder.encode(replace_surrogates(text), add_special_tokens=False).ids

    def encode_document(self, text: str) -> list[int]:
        """One pretraining document: `<|im_start|>`, the text, `<|im_end|>` (the convention of MiniMind2)."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        """`encode_document` for many texts, one after the other: (tokens,) uint32.

        The same ids, about four times as fast with a tokenizer like ours.
        """
        fast = self._bulk_encoder
        parts = [np.empty(0, np.uint32)]
        for in_bulk, run in itertools.groupby(texts, lambda text: fast is not None and fast.takes(text)):
            if fast and in_bulk:
                parts.append(fast.encode_documents(list(run)))
            else:
                ids = itertools.chain.from_iterable(map(self.encode_document, run))
                parts.append(np.fromiter(ids, np.uint32))
        return np.concatenate(parts)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` for many texts, in bulk like `encode_documents`."""
        documents = self.encode_documents(texts)
        ids, ends = documents.tolist(), self.document_ends(documents).tolist()
        return [ids[start + 1 : end - 1] for start, end in itertools.pairwise([0, *ends])]

    def document_ends(self, documents: np.ndarray) -> np.ndarray:
        """Where each of `encode_documents` ends: (texts,) int64."""
        return np.flatnonzero(documents == self.eos_id) + 1  # which is nowhere in a text

    @cached_property
    def _bulk_encoder(self) -> BulkEncoder | None:
        return bulk_encoder(self._source[0], WORD, self.token_bytes, self.bos_id, self.eos_id)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        if skip_special_tokens:
            parts = (self.token_bytes[i] for i in ids)
        else:
            parts = (self.token_bytes[i] or (self._text_encoder.id_to_token(i) or "").encode() for i in ids)
        return b"".join(parts).decode("utf-8", errors="replace")

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it: transformers' `apply_chat_template(tokenize=False)`.

        For people to look at; do not encode it, `encode_chat` keeps contents and control tokens apart.

        Raises:
            UserError: there is no template, or it is broken, or it refuses these messages.
        """
        from jinja2 import TemplateError

        try:
            return self._template().render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._template_variables
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"the chat template in {self.path} cannot render these messages: {reason}"
            ) from None

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation and a mask of the same length: 1 on what the model must learn to write.

        That is each assistant message and the `<|im_end|>` that closes it; everything else is 0.

        Raises:
            UserError: as `render_chat`, or a role that is not a plain word.
        """
        contents = [self.encode(message["content"]) for message in messages]
        return self._join_chat(messages, contents, add_generation_prompt)

    def encode_chat_batch(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[tuple[list[int], list[int]]]:
        """`encode_chat` for many conversations; all contents are encoded in one call, which is faster."""
        contents = iter(self.encode_batch([m["content"] for messages in conversations for m in messages]))
        return [
            self._join_chat(messages, list(itertools.islice(contents, len(messages))), False)
            for messages in conversations
        ]

    def _join_chat(
        self, messages: Sequence[Message], contents: list[list[int]], add_generation_prompt: bool
    ) -> tuple[list[int], list[int]]:
        roles = tuple(message["role"] for message in messages)
        ids: list[int] = []
        mask: list[int] = []
        # Long ones are not kept: a server may be sent no end of them, all different.
        pieces_of = self._chat_pieces if len(roles) <= MOST_KEPT_ROLES else self._encode_chat_pieces
        for piece, piece_mask, index in pieces_of(roles, add_generation_prompt):
            ids += piece
            mask += piece_mask
            if index is not None:
                ids += contents[index]
                mask += [int(roles[index] == "assistant")] * len(contents[index])
        return ids, mask

    def _encode_chat_pieces(
        self, roles: tuple[str, ...], add_generation_prompt: bool
    ) -> list[tuple[list[int], list[int], int | None]]:
        """What the template writes around the contents of messages with these roles.

        Returns `(ids, mask, index)` triples: the ids of a piece of template, their mask, and the index of the
        message whose content follows (None at the end). The template is rendered once with a placeholder for
        each content, so any template works that copies contents as they are.
        """
        for role in roles:
            # The role becomes part of the template's text, where control tokens are live.
            if not re.fullmatch(r"\w+", role):
                raise UserError(f"the role {role!r} is not a plain word; use system, user or assistant")
        placeholders = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        rendered = self.render_chat(placeholders, add_generation_prompt)

        pieces: list[tuple[list[int], list[int], int | None]] = []
        after_assistant = False
        for text, index in _split_at_placeholders(rendered):
            ids = self._template_encoder.encode(text, add_special_tokens=False).ids
            closing = ids.index(self.eos_id) + 1 if after_assistant and self.eos_id in ids else 0
            pieces.append((ids, [1] * closing + [0] * (len(ids) - closing), index))
            after_assistant = index is not None and roles[index] == "assistant"
        return pieces

    def _compile_template(self):
        if not self.chat_template:
            raise UserError(
                f"{self.path} has no chat template: add a chat_template.jinja beside tokenizer.json"
            )
        return compile_template(self.chat_template)


class StreamDecoder:
    """Decodes ids one at a time and returns text as soon as it is whole: never half a Chinese character."""

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; often empty in the middle of a character."""
        return self._decoder.decode(self._token_bytes[token_id])

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else empty. Then starts afresh."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _read(file: Path, mend: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): {mend}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: {mend}") from None


def _read_template(path: Path) -> tuple[str, dict[str, str]]:
    """The chat template of a tokenizer directory ("" when it has none) and the token names it may use."""
    config = {}
    if (path / "tokenizer_config.json").exists():
        try:
            config = json.loads(_read(path / "tokenizer_config.json", "copy it again"))
            if not isinstance(config, dict):
                raise ValueError("it holds no object")
        except ValueError as error:
            raise UserError(
                f"{path / 'tokenizer_config.json'} is not JSON: {error}. Copy it again."
            ) from None
    if (path / "chat_template.jinja").exists():
        template = _read(path / "chat_template.jinja", "copy it again")
    else:
        template = config.get("chat_template", "")
        template = template if isinstance(template, str) else ""  # several, by name
    variables = {"bos_token": IM_START, "eos_token": IM_END, "pad_token": END_OF_TEXT}
    variables |= {
        name: token for name, token in config.items() if name in TOKEN_NAMES and isinstance(token, str)
    }
    return template, variables


def _token_bytes(vocabulary: tokenizers.Tokenizer) -> list[bytes]:
    """The bytes of each id. Byte-level BPE writes byte b as the character `_byte_alphabet()[b]`."""
    byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
    added = vocabulary.get_added_tokens_decoder()
    table = []
    for i in range(vocabulary.get_vocab_size()):
        if i in added:
            table.append(b"" if added[i].special else added[i].content.encode())
        else:
            table.append(bytes(byte_of[character] for character in vocabulary.id_to_token(i) or ""))
    return table


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins: visible Latin-1 characters are themselves, the rest follow U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = itertools.count(0x100)
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


def _split_at_placeholders(rendered: str) -> Iterator[tuple[str, int | None]]:
    """Cut a rendered template into `(text, index of the message that follows)`; the last index is None."""
    parts = re.split("\ue000([0-9]+)\ue001", rendered)
    indices = [int(index) for index in parts[1::2]]
    return zip(parts[::2], [*indices, None], strict=True)
