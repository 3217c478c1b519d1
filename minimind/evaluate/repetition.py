"""Does an answer end by saying the same thing over and over? Small language models often do."""

from __future__ import annotations

MAX_UNIT = 20  # characters
MIN_REPEATS = 4
MIN_COVERED = 16  # characters; lets through "哈哈哈哈" and "……", which people write too


def ends_in_loop(text: str) -> bool:
    """Whether the tail of `text` is one unit of 1 to 20 characters, at least 4 times in a row.

    The repetition must cover the last 16 characters or more and reach the end of the text (white space at
    the end does not count). The last unit may be cut short, as it is where the token limit struck.
    """
    text = text.rstrip()
    units = range(1, MAX_UNIT + 1)
    return any(_periodic_tail(text, unit) >= max(MIN_REPEATS * unit, MIN_COVERED) for unit in units)


def _periodic_tail(text: str, period: int) -> int:
    """Length of the longest suffix in which every character equals the one `period` places before it."""
    start = len(text) - period
    while start > 0 and text[start - 1] == text[start - 1 + period]:
        start -= 1
    return len(text) - max(start, 0)
