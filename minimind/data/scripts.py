"""The languages of texts, told by the script of their letters: Chinese, English and other."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

LANGUAGES = ("chinese", "english", "other")
NAMED_OTHERWISE = "\u212a\u212bℲⅎↃ"  # Latin letters: the signs for kelvin and ångström, turned F, reversed C
NO_LETTER = len(LANGUAGES)  # digits, punctuation, white space, symbols


def language_of(letter: str) -> str:
    """By the name that Unicode gives it. Japanese written in Han characters passes for Chinese."""
    name = unicodedata.name(letter, "")
    if name.startswith("CJK ") or letter in "々〇":
        return "chinese"
    return "english" if "LATIN " in name or letter in NAMED_OTHERWISE else "other"


@cache
def languages_of_characters() -> np.ndarray:
    """(0x110000,) uint8: the index in `LANGUAGES` of every code point, or `NO_LETTER`."""
    characters = map(chr, range(0x110000))
    indices = {language: i for i, language in enumerate(LANGUAGES)}
    of_characters = (
        indices[language_of(character)] if character.isalpha() or character == "〇" else NO_LETTER
        for character in characters
    )
    return np.fromiter(of_characters, np.uint8, 0x110000)


class LanguageCount:
    """Letters by language, and texts by the language that most of their letters are of."""

    def __init__(self) -> None:
        self.letters = np.zeros(len(LANGUAGES), np.int64)
        self.texts = np.zeros(len(LANGUAGES) + 1, np.int64)  # the last: without letters
        self.characters = 0

    def add(self, texts: Sequence[str]) -> None:
        """Count `texts`, none of them empty."""
        if not texts:
            return
        points = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
        starts = np.cumsum([0, *map(len, texts[:-1])])
        languages = languages_of_characters()[points]
        of_texts = np.stack(
            [np.add.reduceat(languages == i, starts, dtype=np.int64) for i in range(NO_LETTER)]
        )
        mainly = np.where(of_texts.any(axis=0), of_texts.argmax(axis=0), NO_LETTER)
        self.letters += of_texts.sum(axis=1)
        self.texts += np.bincount(mainly, minlength=NO_LETTER + 1)
        self.characters += len(points)

    def shares(self) -> dict[str, float]:
        """Of all letters."""
        total = max(int(self.letters.sum()), 1)
        return {name: int(count) / total for name, count in zip(LANGUAGES, self.letters, strict=True)}

    def records(self) -> dict[str, int]:
        return {name: int(count) for name, count in zip((*LANGUAGES, "none"), self.texts, strict=True)}
