"""Results into the READMEs, the documentation and the figures, so that none is older than its JSON.

    python -m benchmarks.readme

writes from benchmarks/results/*.json, in README.md, README_en.md and docs/, what stands between
`<!-- result: NAME -->` and `<!-- end -->`, and draws benchmarks/results/*.svg. A benchmark that writes its
result there does the same at its end. NAME is one of `BLOCKS` in benchmarks/tables.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pictures import PICTURES
from benchmarks.tables import BLOCKS, Pick, origin
from minimind.errors import UserError, run_cli
from minimind.files import write_text
from minimind.flags import parse_flags
from minimind.paths import ROOT

RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- result: ", "<!-- end -->"
PART = re.compile(rf"^{BEGIN}([^\n]+) -->$(.*?)^{END}$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class ReadmeOptions:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    parse_flags(ReadmeOptions, argv, __doc__)
    for path in refresh():
        print(f"{path.relative_to(ROOT)} has changed")
    return 0


def refresh(root: Path = ROOT) -> list[Path]:
    """Draw the figures, and write the pages that differ from their results; returns those pages.

    Raises: UserError when a page or a result is not as it must be; no page is then changed.
    """
    changed = [(path, new) for path, old, new in rendered(root) if new != old]
    draw(root / "benchmarks/results")
    for path, text in changed:
        write_text(path, text)
    return [path for path, _ in changed]


def rendered(root: Path = ROOT) -> Iterator[tuple[Path, str, str]]:
    """Each page that has results: its text as it is, and as it should be."""
    pages = [root / "README.md", root / "README_en.md", *sorted(root.glob("docs/*/*.md"))]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if BEGIN in text:
            chinese = page.name == "README.md" or page.parent.name == "zh"
            yield page, text, with_results(page, text, root / "benchmarks/results", chinese)


def with_results(page: Path, text: str, results: Path, chinese: bool) -> str:
    if not len(PART.findall(text)) == text.count(BEGIN) == text.count(END):
        raise UserError(f"{page}: each line `{BEGIN}NAME -->` needs a line `{END}` of its own after it")

    def pick(zh: str, en: str) -> str:
        return zh if chinese else en

    def part(found: re.Match[str]) -> str:
        if found[1] not in BLOCKS:
            raise UserError(f"{page} wants the result {found[1]!r}; there are {', '.join(BLOCKS)}")
        return f"{BEGIN}{found[1]} -->\n{block(found[1], results, pick)}{END}"

    return PART.sub(part, text)


def block(name: str, results: Path, pick: Pick) -> str:
    """Nothing where it was not measured."""
    file, markdown = BLOCKS[name]
    result = read(results / f"{file}.json")
    if result is None:
        return ""
    with told(results, file):
        return f"\n{markdown(result, pick)}\n\n{origin(result, pick)}\n\n"


def draw(results: Path) -> None:
    """What was measured of it."""
    for name, (draw_picture, files) in PICTURES.items():
        found = [read(results / f"{file}.json") for file in files]
        if any(found):
            with told(results, *files):
                draw_picture(results / name, *found)


def read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None


@contextmanager
def told(results: Path, *files: str) -> Iterator[None]:
    """Raises: UserError for what a result has not that is shown of it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        names = " or ".join(f"{file}.json" for file in files)
        raise UserError(
            f"{results}: {names} has not what is shown of it ({error!r}); measure again"
        ) from None


if __name__ == "__main__":
    run_cli(main)
