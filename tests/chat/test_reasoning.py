"""Thoughts and answers are told apart alike however the text is cut, and nothing a model writes is lost."""

from __future__ import annotations

from itertools import groupby, pairwise
from operator import itemgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.chat.reasoning import ReasoningStream, split_reasoning
from minimind.data.records import TAG, TAGS


def stretches(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one part joined."""
    return [(part, "".join(text for _, text in group)) for part, group in groupby(found, itemgetter(0))]


def parts_of(*pieces: str) -> list[tuple[str, str]]:
    stream = ReasoningStream()
    return stretches([found for piece in pieces for found in stream.push(piece)] + stream.flush())


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>\n1+1\n</think>\n<answer>\n2\n</answer>", "1+1", "2"),
        ("\n <think>a\n\nb</think> \u3000<answer>2 \n 3</answer>\n", "a\n\nb", "2 \n 3"),
        ("<think>\n</think>\n<answer>\n2\n</answer>", "", "2"),
        # What models forget.
        ("2", "", "2"),
        ("", "", ""),
        ("<think>\n1+1", "1+1", ""),
        ("<think>\n1+1\n</think>\n2", "1+1", "2"),
        ("<think>\n1+1\n<answer>\n2", "1+1", "2"),
        ("<answer>2</answer>", "", "2"),
        ("1+1\n</think>\n<answer>\n2\n</answer>", "", "1+1\n\n\n2"),
        ("Well.\n<think>\n1+1</think>2</answer>", "1+1", "Well.\n2"),
        ("<think>a</think>b<think>c</think>d", "a\nc", "b\nd"),
        # What is no tag.
        ("<think>a < b, <thinks> </answer", "a < b, <thinks> </answer", ""),
        ("if a<b: think", "", "if a<b: think"),
    ],
)
def test_a_text_is_split(text, thinking, answer):
    assert split_reasoning(text) == (thinking, answer)


FRAGMENTS = st.sampled_from([*TAGS, "<", "</", "<thi", "answer>", ">", " ", "\n", "\n\n", "a", "想", "think"])
TEXTS = st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join)


@given(TEXTS, st.data())
def test_it_does_not_matter_how_the_text_is_cut(text, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    bounds = [0, *sorted(cuts), len(text)]
    whole = parts_of(text)
    assert parts_of(*(text[start:end] for start, end in pairwise(bounds))) == whole
    assert parts_of(*text) == whole
    # All is there but tags and white space, and a part has no white space at its ends.
    assert "".join("".join(part for _, part in whole).split()) == "".join(TAG.sub("", text).split())
    assert all(part == part.strip() != "" for _, part in whole)


def test_only_what_may_begin_a_tag_is_held_back():
    stream = ReasoningStream()
    assert stream.push("a") == [("answer", "a")]
    assert stream.push("<") == stream.push("th") == []
    assert stream.push("e") == [("answer", "<the")]
    assert stream.push("<think") == []
    assert stream.push(">\n1") == [("thinking", "1")]
    assert stream.push("\n") == []
    assert stream.push("2</thi") == [("thinking", "\n2")]
    assert stream.flush() == [("thinking", "</thi")]
