"""Many texts to ids: tiktoken's BPE, about four times as fast as that of `tokenizers`, where both agree.

All texts go in one call, with marks between them that it takes for control tokens: a call for each text and
lists of Python's integers took a quarter of the time.

tiktoken knows no list of merges: it joins the neighbours whose joint token has the lowest id. That is the
same if merges make tokens in the order of their ids, and if every token's bytes alone are merged to that
token. For suppose the list left two neighbours apart whose bytes together are a token: within those bytes it
made the same merges as it does when they stand alone, and there it arrives at the token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tokenizers

if TYPE_CHECKING:
    import numpy as np
    import tiktoken

LONGEST = (
    100_000  # characters of a text; the regular expressions' engine gives up at a million spaces in a row
)
BEGIN, END = "\ufdd0", "\ufdd1"  # Unicode keeps these code points for what a program does within itself


class BulkEncoder:
    """Encodes texts that `takes` allows. `bulk_encoder` makes one."""

    def __init__(self, encoding: tiktoken.Encoding):
        self._encoding = encoding

    def takes(self, text: str) -> bool:
        return len(text) <= LONGEST and BEGIN not in text and END not in text

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Ids of all texts, each between the ids that stand for its begin and end: (tokens,) uint32."""
        marked = BEGIN + f"{END}{BEGIN}".join(texts) + END
        marks = {BEGIN, END}
        try:
            return self._encoding.encode_to_numpy(marked, allowed_special=marks)
        except UnicodeEncodeError:
            return self._encoding.encode_to_numpy(replace_surrogates(marked), allowed_special=marks)


def bulk_encoder(
    tokenizer_json: str, word: str, token_bytes: list[bytes], begin_id: int, end_id: int
) -> BulkEncoder | None:
    """What encodes plain text like the tokenizer in `tokenizer_json`, or None when that is not certain.

    Args:
        word: a pattern of words that is known to cut text alike in both libraries.
        token_bytes: the bytes of each id; none for a control token.
        begin_id, end_id: control tokens, to stand before and after each text.
    """
    data = json.loads(tokenizer_json)
    model = data["model"]
    special = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    plain = (
        not data["normalizer"]
        and splits(data["pre_tokenizer"]) == [word]
        and all(token["special"] for token in data["added_tokens"])
        and model["type"] == "BPE"
        and not any(model.get(name) for name in special)
    )
    if not plain:
        return None
    tokens = {token: i for token, i in model["vocab"].items() if token_bytes[i]}
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    made = [tokens.get("".join(pair), -1) for pair in pairs]
    bpe = tokenizers.Tokenizer.from_str(tokenizer_json).model
    if -1 in made or made != sorted(set(made)) or any(len(bpe.tokenize(token)) > 1 for token in tokens):
        return None
    import tiktoken

    ranks = {token_bytes[i]: i for i in tokens.values()}
    if not all(bytes([byte]) in ranks for byte in range(256)):
        return None
    marks = {BEGIN: begin_id, END: end_id}
    return BulkEncoder(
        tiktoken.Encoding("minimind", pat_str=word, mergeable_ranks=ranks, special_tokens=marks)
    )


def replace_surrogates(text: str) -> str:
    """Text that UTF-8 can hold: pairs of surrogates joined, lone ones as in JSON's "\\ud800", as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def splits(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """The patterns by which text falls to words, of a pre-tokenizer that does nothing else to it."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    patterns = []
    for part in parts:
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
                pass
            case _:
                return []
    return patterns
