"""The files of the chat page: whole, self-contained, in two languages."""

from __future__ import annotations

import re

import pytest

from minimind.chat.options import SamplingOptions
from server.stub import PAGE

FILES = sorted(path for path in PAGE.iterdir() if path.suffix in (".html", ".js", ".css", ".svg"))
ALL = {path.name: path.read_text(encoding="utf-8") for path in FILES}
SCRIPTS = {name: text for name, text in ALL.items() if name.endswith(".js")}
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def table(language: str) -> dict[str, str]:
    return dict(re.findall(r'^  (\w+):\s+"(.*)",$', ALL[f"strings_{language}.js"], re.MULTILINE))


def test_both_tables_have_the_same_strings_with_the_same_values_in_them():
    zh, en = table("zh"), table("en")
    assert list(zh) == list(en)
    assert len(zh) > 90
    for key, text in zh.items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", en[key])), key
    assert [key for key, text in en.items() if CHINESE.search(text)] == [
        "example4",
        "example4_pretrain",
    ]


def test_every_string_is_used_and_every_used_one_is_there():
    rest = "\n".join(text for name, text in ALL.items() if not name.startswith("strings_"))
    used = set(re.findall(r'\bt\(\s*"(\w+)"', rest)) | set(
        re.findall(r'data-(?:text|label|placeholder)="(\w+)"', rest)
    )
    known = set(table("zh"))
    assert used <= known
    # The others are named by a value: error_{kind}, stage_{stage}, a setting and its note, {key}_{stage}.
    used |= {key for key in known if key.removesuffix("_pretrain") in used}
    built = {key for key in known - used if not re.search(rf'"{key}"', rest)}
    fields = set(re.findall(r"^  (\w+): {", ALL["settings.js"], re.MULTILINE)) | {"seed"}
    assert built <= {key for key in known if key.startswith(("error_", "stage_"))} | fields | {
        f"{f}Note" for f in fields
    }


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("strings_zh")])
def test_words_stand_in_the_tables_only(name):
    code = re.sub(r"/\*.*?\*/|//.*|<noscript>.*?</noscript>|\{ zh: .*", "", ALL[name], flags=re.DOTALL)
    code = re.sub(r'example4(_pretrain)?: ".*"', "", code)
    assert not CHINESE.search(code)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_parses_text_as_html_or_code(name):
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|srcdoc", SCRIPTS[name])
    assert not re.search(r"\beval\b|new Function|DOMParser|createContextualFragment", SCRIPTS[name])


def test_no_file_names_another_host():
    found = {url for text in ALL.values() for url in re.findall(r"https?://[a-z0-9.]+", text)}
    assert found <= {"http://www.w3.org", "https://example.com"}  # the name of SVG, and a comment


def test_the_page_needs_nothing_inline():
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", ALL["index.html"])


def test_files_are_short():
    assert {name: text.count("\n") for name, text in ALL.items() if text.count("\n") >= 400} == {}
    assert {
        f"{name}: {line}" for name, text in SCRIPTS.items() for line in text.splitlines() if len(line) > 120
    } == set()


def test_defaults_are_those_of_the_sampler():
    starts = dict(re.findall(r"^  (\w+): {.* start: ([\d.]+) }", ALL["settings.js"], re.MULTILINE))
    options = SamplingOptions()
    assert {name: float(value) for name, value in starts.items()} == {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k or 0,
        "repetition_penalty": options.repetition_penalty,
        "max_tokens": options.max_new_tokens,
    }
