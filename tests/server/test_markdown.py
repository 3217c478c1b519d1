"""The page's Markdown beside a peer's (markdown-it), and what no text may do to it."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from server.stub import Stub

VOID = {"br", "hr"}
BLOCKS = {"root", "ul", "ol", "blockquote", "table", "thead", "tbody", "tr"}

RENDER = """async (text) => {
  const { renderMarkdown } = await import("/page/markdown.js");
  const root = document.createElement("div");
  renderMarkdown(root, text, () => document.createElement("header"));
  const tree = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    if (node.className === "table") return tree(node.firstChild);
    const children = [...node.childNodes].map(tree).filter((child) => child !== "");
    if (node.className === "code") return ["pre " + node.dataset.language, children[1][1]];
    const facts = [node.localName, node.getAttribute("href"), node.getAttribute("start"), node.className];
    return [facts.filter(Boolean).join(" "), ...children];
  };
  return [...root.childNodes].map(tree);
}"""


class Tree(HTMLParser):
    """HTML as nested lists: [name and facts, child, child, …], text as strings."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[list[Any]] = [["root"]]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        side = (given.get("style") or "").removeprefix("text-align:").replace("left", "")
        node = [" ".join(filter(None, [tag, given.get("href"), given.get("start"), side]))]
        if tag == "code" and self.open[-1][0] == "pre":
            self.open[-1][0] = "pre " + (given.get("class") or "").removeprefix("language-")
        self.open[-1].append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, text: str) -> None:
        name = self.open[-1][0]
        if len(self.open) > 1 and self.open[-2][0].startswith("pre "):
            text = text.removesuffix("\n")
        elif name in BLOCKS or name.startswith("ol") or (text.isspace() and "\n" in text):
            return
        else:
            text = text.strip("\n")
        if text:
            self.open[-1].append(text)


def peer(text: str) -> list[Any]:
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    tree = Tree()
    tree.feed(markdown.render(text).replace("<s>", "<del>").replace("</s>", "</del>"))
    return tree.open[0][1:]


@pytest.fixture(scope="module")
def page(browser):
    stub = Stub()
    page = browser.new_page()
    page.goto(stub.url)
    yield page
    page.close()
    stub.close()


@pytest.mark.parametrize(
    "text",
    [
        "一段话\n第二行\n\n另一段",
        "# 一\n## 二 ##\n###### 六\n####### 七\n#无空格",
        "**粗** *斜* ***都是*** __粗__ _斜_ ~~删~~",
        "**粗里有 *斜* 和 `代码`**，*斜里有 **粗***",
        "**一** 和 **二**，*三* 与 *四*",
        "没有结束的 **粗 和 *斜",
        "2 * 3 * 4，some_snake_case_name，** 空格 **",
        "`code` ``a ` b`` ` `` ` `没有结束",
        "`**不是粗**` 和 **`是粗`**",
        r"\*不斜\* \`不是代码\` \[不是链接\](x) 反斜杠 \a",
        "[字](https://example.com/a?b=c) [**粗**](https://example.com/ \"题目\")",
        "[a [b](https://example.com/b) c](x)",
        "[没有](地址 空格) [没有] [没有](",
        "<https://example.com/a_b*c*>",
        "[括号](https://example.com/a_(b))",
        "- 一\n- 二\n- 三",
        "* 一\n* 二\n\n+ 另一个",
        "1. 一\n2. 二\n3. 三",
        "3. 三\n4. 四",
        "1) 一\n2) 二",
        "- 一\n  - 一之一\n    - 一之一之一\n- 二",
        "1. 一\n   - 甲\n   - 乙\n2. 二",
        "- 一\n\n- 二\n\n- 三",
        "- 一\n\n  第二段\n- 二",
        "- 一\n接着一\n- 二",
        "- \n- 二\n-\n- 四",
        "话：\n- 一\n- 二\n\n完",
        "话\n1. 一\n2. 二",
        "话里的\n2020. 年",
        "1. 代码：\n   ```python\n   x = 1\n     y\n   ```\n2. 完",
        "```python\ndef f():\n    return '<b>'\n```",
        "~~~\n```\n~~~",
        "````\n```\n````",
        "```js\n没有结束",
        "```\n```",
        "话\n```\n代码\n```\n话",
        "> 引\n> 用\n\n话",
        "> 一\n> > 二\n>\n> - 三",
        "话\n> 引用\n\n***\n\n---\n_ _ _\n",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| **3** | `4` |\n\n完",
        "| 左 | 中 | 右 |\n|:---|:---:|---:|\n| 1 | 2 | 3 |",
        "a | b\n--|--\n1 | 2",
        "| a \\| b | c |\n|---|---|\n| 1 | 2 | 3 |",
        "话：\n\n| a |\n|---|\n| 1 |",
        "| 不是 | 表 |\n|---|\n",
        "<script>alert(1)</script> <b>x</b>\n\n<div>\n",
        "a\r\nb\r\n\r\nc",
        "",
        "\n\n\n",
        "- - - a",
        "*a **b** c* **a *b* c**",
        "***a** b*",
    ],
)  # fmt: skip
def test_it_is_read_as_the_peer_reads_it(text, page):
    assert page.evaluate(RENDER, text) == peer(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Where CommonMark helps no Chinese reader, or a model's habits are clear.
        ("**中文。**后面", [["p", ["strong", "中文。"], "后面"]]),
        ("他说**“好”**吗", [["p", "他说", ["strong", "“好”"], "吗"]]),
        ("**一**、**二**点", [["p", ["strong", "一"], "、", ["strong", "二"], "点"]]),
        ("2*3*4", [["p", "2*3*4"]]),
        ("(5-2)*$6 = 6 *.5*6", [["p", "(5-2)*$6 = 6 *.5*6"]]),
        ("见 *注* (*x*)", [["p", "见 ", ["em", "注"], " (", ["em", "x"], ")"]]),
        ("    缩进的诗", [["p", "缩进的诗"]]),
        ("1. 一\n  - 甲", [["ol", ["li", "一", ["ul", ["li", "甲"]]]]]),
        ("列：\n| a |\n|---|", [["p", "列："], ["table", ["thead", ["tr", ["th", "a"]]], ["tbody"]]]),
        ("题\n---", [["p", "题"], ["hr"]]),
        ("见https://a.b/c(d)。好", [["p", "见", ["a https://a.b/c(d)", "https://a.b/c(d)"], "。好"]]),
        ("(https://a.b/), x", [["p", "(", ["a https://a.b/", "https://a.b/"], "), x"]]),
        ("![图](https://example.com/x.png)", [["p", ["a https://example.com/x.png", "图"]]]),
        ("[x](javascript:alert(1))", [["p", "[x](javascript:alert(1))"]]),
        ("[x](JAVASCRIPT:alert(1))", [["p", "[x](JAVASCRIPT:alert(1))"]]),
        ("[x](//example.com)", [["p", "[x](//example.com)"]]),
        ("[x](data:text/html,1)", [["p", "[x](data:text/html,1)"]]),
        ("https://", [["p", "https://"]]),
        ("[](https://a.b/)", [["p", ["a https://a.b/", "https://a.b/"]]]),
        ("**a*b*c**", [["p", ["strong", "a*b*c"]]]),
        ("&lt;b&gt; &amp;", [["p", "&lt;b&gt; &amp;"]]),
    ],
)  # fmt: skip
def test_it_is_read_as_people_mean_it(text, expected, page):
    assert page.evaluate(RENDER, text) == expected


@pytest.mark.parametrize(
    "text",
    ["*a", "**a ", "a**", "*a **b ", "_a ", "~~a", "`a", "```a``", "[", "[a](", "[a](b ", "](", "![", "> ",
     "- ", "-", "1. ", "  - a\n", "> - ", "|", "|-", "|a|b|\n|-|-|\n", "#", "# ", "\\", "<https://a", "https://a.)",
     "https://a(((", " ", "\n", "\t", "a\n", "```\n", "a*b_c", "*_", "**a**b", "([a](https://x.y)",
     "\n\n- a\n\n  b", "\u202e", "\0", "a" * 50,
     "*a " * 10_000 + "b* " * 10_000, "_a " * 10_000 + "b* " * 10_000,
     "[" * 10_000 + "a](https://a.b)" * 3_000],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_no_text_takes_long_or_nests_without_end(text, page):
    seconds, depth = page.evaluate(
        """async (text) => {
          const { renderMarkdown } = await import("/page/markdown.js");
          const root = document.createElement("div");
          const begin = performance.now();
          renderMarkdown(root, text, () => document.createElement("header"));
          const took = (performance.now() - begin) / 1000;
          const deep = (node) => 1 + Math.max(0, ...[...node.children].slice(0, 100).map(deep));
          return [took, deep(root)];
        }""",
        text * (60_000 // len(text)) + "x",
    )
    assert depth < 60  # layout is recursive
    assert seconds < 4  # many more, if it grew with the square of the length


def test_blocks_that_do_not_change_stay_while_an_answer_grows(page):
    text = "# 题\n\n一段\n\n```python\nx = 1\ny = 2\n```\n\n- 一\n- 二"
    kept, code = page.evaluate(
        """async (text) => {
          const { renderMarkdown } = await import("/page/markdown.js");
          const root = document.createElement("div");
          const head = () => document.createElement("header");
          let first, code;
          for (let length = 1; length <= text.length; length++) {
            renderMarkdown(root, text.slice(0, length), head);
            if (length === 8) first = root.children[0];
            if (text.slice(0, length).endsWith("x =")) code = root.querySelector("pre");
          }
          return [root.children[0] === first, root.querySelector("pre") === code];
        }""",
        text,
    )
    assert kept
    assert code
