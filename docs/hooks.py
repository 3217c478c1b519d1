"""What the site makes of its pages beyond Markdown. The pages read well without it, too.

A link that stands alone on its line is a link where the repository is read. On the site it becomes what it
points to, which so cannot be older than the code:

    [`dpo_loss`](../../minimind/train/preference.py#dpo_loss)      the source of a function, class, constant
    [speeds](../../benchmarks/results/stage_speed.json#stages/tokens_per_s,peak_gb)      a table of a result

Equations become MathML, which browsers draw by themselves; figures from elsewhere in the repository are
copied; links to its other files become their names.
"""

from __future__ import annotations

import ast
import html
import json
import posixpath
import re
import statistics
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
ALONE = re.compile(r"^\[[^\]]+\]\((\.\./[^)#]+)(?:#([^)]+))?\)$", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
CHINESE = "[\u2014\u2018-\u201d\u2026\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"


# ---- What mkdocs calls ----


def on_config(config: MkDocsConfig) -> None:
    """The navigation has the pages that there are, and all of them."""
    there = {path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md")}
    nav = [
        {title: [name for name in names if name in there]}
        for group in config.nav
        for title, names in group.items()
    ]
    named = {name for group in nav for names in group.values() for name in names}
    config.nav = [group for group in nav if any(group.values())] + sorted(there - named)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """What both languages share."""
    for name in ("site.css", "iframe-worker.js"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / "docs" / name)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = Path(page.file.abs_src_path).parent
    pieces = FENCE.split(markdown)  # every second one is a block of code
    for place in range(0, len(pieces), 2):
        text = ALONE.sub(lambda link: shown(folder, link[1], link[2]), pieces[place])
        # A line's end is a space, except that Chinese has none.
        text = re.sub(f"(?<={CHINESE})\n *(?={CHINESE})", "", text)
        pieces[place] = LINK.sub(lambda link: resolved(link, page, config, files), text)
    return "".join(pieces)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    def mathml(found: re.Match[str]) -> str:
        equation = html.unescape(found[2]).strip()
        drawn = latex2mathml.converter.convert(equation, display="block" if found[1] == "div" else "inline")
        if "\\" in drawn:  # a command that it does not know
            raise PluginError(f"{page.file.src_path}: {equation} cannot be drawn: {drawn}")
        return drawn

    return re.sub(
        r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', mathml, content, flags=re.DOTALL
    )


def on_page_context(context: dict[str, Any], page: Page, config: MkDocsConfig, **_: Any) -> None:
    """The switch between the languages leads to the same page."""
    other = other_language(config)
    name = page.file.src_uri if (other / page.file.src_uri).is_file() else "index.md"
    there = name.removesuffix(".md") + ".html"
    links = {"zh": there, "en": f"en/{there}"} if other.name == "en" else {"zh": f"../{there}", "en": there}
    config.extra["alternate"] = [
        {"name": "中文", "link": links["zh"], "lang": "zh"},
        {"name": "English", "link": links["en"], "lang": "en"},
    ]


# ---- Links ----


def other_language(config: MkDocsConfig) -> Path:
    """The folder of the pages in the other language."""
    here = Path(config.docs_dir)
    return here.parent / ("en" if here.name == "zh" else "zh")


def resolved(link: re.Match[str], page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link out of the folder of this language, as the site can have it."""
    is_image, text, target, anchor = link.groups()
    path = (Path(page.file.abs_src_path).parent / target).resolve()
    if not path.exists():
        raise PluginError(f"{page.file.src_path}: {target} does not exist")
    if is_image:
        name = f"images/{path.name}"
        if name not in files.src_uris:
            files.append(File.generated(config, name, abs_src_path=str(path)))
        return f"![{text}]({posixpath.relpath(name, posixpath.dirname(page.file.src_uri))})"
    other = other_language(config)
    if path.is_relative_to(other):
        up = "en" if other.name == "en" else ".."
        url = f"{up}/{path.relative_to(other).with_suffix('.html').as_posix()}{anchor or ''}"
        return f'<a href="{url}">{html.escape(text)}</a>'
    return text


def shown(folder: Path, target: str, anchor: str | None) -> str:
    """What a link that stands alone points to."""
    path = (folder / target).resolve()
    if path.parent.name in ("zh", "en"):
        return ""  # the same page in the other language; the site has a switch for that
    if not anchor or path.suffix not in INCLUDED:
        raise PluginError(f"{target} stands alone; name what to show of it: .py#name or .json#table/columns")
    return INCLUDED[path.suffix](path, anchor)


# ---- Parts of files ----


def source(path: Path, name: str) -> str:
    """A block with the source of `name` (function, class, constant or `Class.method`), lines numbered."""
    text = path.read_text(encoding="utf-8")
    node = find(ast.parse(text), name.split("."))
    if node is None:
        raise PluginError(f"{path} has no {name} any more")
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    lines = textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))
    return f'```python title="{path.relative_to(ROOT).as_posix()}" linenums="{first}"\n{lines}\n```'


def find(tree: ast.AST, names: list[str]) -> ast.stmt | None:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = names[0] in (target.id for target in targets if isinstance(target, ast.Name))
        else:
            found = getattr(node, "name", None) == names[0]
        if found and isinstance(node, ast.stmt):
            return find(node, names[1:]) if names[1:] else node
    return None


def table(path: Path, anchor: str) -> str:
    """A table of a result of benchmarks/results: `key/column,column`; without columns, one number a row.

    A key of a key has a dot between: `settings.0.tokens_per_s`.
    """
    result = json.loads(path.read_bytes())
    key, _, columns = anchor.partition("/")
    rows = result
    for part in filter(None, key.split(".")):
        rows = rows[int(part)] if isinstance(rows, list) else rows[part]
    names = columns.split(",") if columns else [key.split(".")[-1]]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row, values in rows.items():
        cells = [values[name] for name in names] if columns else [values]
        lines.append(f"| {row} | {' | '.join(map(shown_value, cells))} |")
    return "\n".join(lines) + "\n\n" + "".join(origin(path, result))


def shown_value(value: Any) -> str:
    """A number with three digits that say something; of the rounds of a measurement, the median."""
    if isinstance(value, list):
        value = statistics.median(value)
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def origin(path: Path, result: dict[str, Any]) -> Iterator[str]:
    """Where numbers come from: the file, and what it says of its making."""
    yield f"`{path.relative_to(ROOT).as_posix()}`"
    if "command" in result:
        yield f": `{result['command'].strip()}`"
    if machine := result.get("machine"):
        yield f", {machine['processor']}, {machine['cores']} cores, PyTorch {machine['PyTorch']}"


INCLUDED: dict[str, Callable[[Path, str], str]] = {".py": source, ".json": table}
