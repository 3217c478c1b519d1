"""Text in pieces of any size: what is shown is a whole text cut at its stop string, and never more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.chat.reasoning import split_reasoning
from minimind.chat.sampling import TokenLogprobs
from minimind.data.records import TAGS
from minimind.server.text import AnswerText, Piece, StopStrings
from minimind.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load()
BYTE = {TOKENIZER.token_bytes.index(bytes([b])): b for b in range(256)}  # the token of each single byte
TOKEN_OF = {b: token for token, b in BYTE.items()}

LETTERS = st.text("ab猫🦉", max_size=12)
STOPS = st.lists(st.text("ab猫🦉", min_size=1, max_size=4), max_size=3)
TAGGED = st.lists(st.sampled_from([*TAGS, "a", " ", "\n", "<", "</th", "猫"]), max_size=12).map("".join)


def byte_tokens(text: str) -> list[int]:
    """The worst case: every character is split over tokens."""
    return [TOKEN_OF[b] for b in text.encode()]


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, found one character after another."""
    for end in range(len(text) + 1):
        for start in range(end):
            if text[start:end] in stops:
                return text[:start]
    return text


def read(answer: AnswerText, tokens: list[int]) -> list[Piece]:
    pieces = []
    for token in tokens:
        pieces.append(answer.push(token))
        if pieces[-1].finished:
            return pieces
    return [*pieces, answer.finish("length")]


@given(LETTERS, STOPS, st.data())
def test_text_ends_before_its_stop_string_however_it_is_cut(text, stops, data):
    stream, shown, rest = StopStrings(stops), "", text
    while rest and not stream.found:
        size = data.draw(st.integers(1, len(rest)))
        shown += stream.push(rest[:size])
        assert cut(text, stops).startswith(shown)  # nothing of a stop string has passed
        rest = rest[size:]
    shown += "" if stream.found else stream.flush()
    assert shown == cut(text, stops)
    assert stream.found == (shown != text)


def test_what_cannot_be_part_of_a_stop_string_passes_at_once():
    stream = StopStrings(["\n\nUser:"])
    assert [stream.push(piece) for piece in ("a\n", "\nUse", "d", "\n\nUser", "…")] == [
        "a",
        "",
        "\n\nUsed",
        "",
        "\n\nUser…",
    ]


@given(LETTERS, STOPS)
def test_characters_split_over_tokens_are_shown_whole(text, stops):
    pieces = read(AnswerText(TOKENIZER, stops), byte_tokens(text))
    assert "".join(piece.answer for piece in pieces) == cut(text, stops)
    assert not any("\ufffd" in piece.answer for piece in pieces)
    assert pieces[-1].finished == ("length" if cut(text, stops) == text else "stop")


def test_half_a_character_at_the_end_is_not_shown():
    pieces = read(AnswerText(TOKENIZER), byte_tokens("猫🦉")[:-1])
    assert "".join(piece.answer for piece in pieces) == "猫"


@given(TAGGED, st.sampled_from([[], ["a猫"], ["</think>"]]))
def test_thoughts_and_answer_are_told_apart_as_in_the_whole_text(text, stops):
    pieces = read(AnswerText(TOKENIZER, stops, reasons=True), byte_tokens(text))
    shown = "".join(piece.thinking for piece in pieces), "".join(piece.answer for piece in pieces)
    assert shown == split_reasoning(cut(text, stops))


@given(LETTERS, STOPS)
def test_log_probabilities_belong_to_the_tokens_that_are_shown(text, stops):
    answer, tokens = AnswerText(TOKENIZER, stops), byte_tokens(text)
    whole = Piece()
    for place, token in enumerate(tokens):
        whole = whole.followed_by(answer.push(token, TokenLogprobs(-float(place), [])))
        assert len(b"".join(TOKENIZER.token_bytes[t.token] for t in whole.tokens)) >= len(
            whole.answer.encode()
        )
        if whole.finished:
            break
    else:
        whole = whole.followed_by(answer.finish("stop"))
    assert bytes(BYTE[told.token] for told in whole.tokens) == whole.answer.encode()
    assert [told.logprobs.chosen for told in whole.tokens] == [-float(i) for i in range(len(whole.tokens))]
    starts = [told.start for told in whole.tokens]
    assert starts == [i for i, character in enumerate(whole.answer) for _ in character.encode()]


@pytest.mark.parametrize("reasons", [False, True])
def test_an_answer_of_nothing_ends(reasons):
    assert AnswerText(TOKENIZER, ["x"], reasons).finish("stop") == Piece(finished="stop")
