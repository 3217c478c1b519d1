"""The pictures of the chat page in docs/images: `python -m tests.server.screenshots`."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import Image

from .browser import chromium
from .stub import MODELS, Answer, Stub, model

IMAGES = Path(__file__).resolve().parents[2] / "docs/images"
WIDE = {"width": 1280, "height": 820}
PHONE = {"width": 360, "height": 720}
PAUSE = 0.02  # seconds between tokens

POEM = """《秋夕》

梧桐叶落小窗前，
一盏清茶对月圆。
莫道秋风吹梦远，
且听雁语过江天。

这首诗写的是秋夜独坐：

- **梧桐叶落**、**雁语**点出季节；
- “清茶”“月圆”写夜里的安静；
- 末句一转，把秋风的凉意化成远行的消息。"""
PYTHON = """可以用 `collections.Counter`，它会数出每个元素出现的次数：

```python
from collections import Counter

def most_common_word(text: str) -> tuple[str, int]:
    \"\"\"出现最多的词和它的次数。\"\"\"
    words = text.lower().split()
    return Counter(words).most_common(1)[0]
```

各种写法的比较：

| 写法 | 时间复杂度 | 代码行数 |
|---|:---:|---:|
| `Counter` | O(n) | 2 |
| `dict.get` | O(n) | 5 |
| `list.count` | O(n²) | 3 |

文档见 https://docs.python.org/3/library/collections.html。"""
LEAVES = """Leaves look green because of **chlorophyll**, the pigment that catches light for photosynthesis.

1. In summer a tree keeps making chlorophyll, so its green covers everything else.
2. In autumn days grow short and the tree stops. The green fades first.
3. What remains are *carotenoids* (yellow, orange), which were there all along, and *anthocyanins* (red), \
which some trees make late in the year.

> Cold nights and sunny days make the strongest reds.

So the colours of autumn are mostly **not new**: they were hidden."""
TRAIN_THOUGHTS = """先求两列火车的速度之和：60 + 90 = 150（千米/时）。

它们相向而行，路程是 450 千米，所以相遇时间是 450 ÷ 150 = 3（小时）。

再验算：3 小时里第一列走了 180 千米，第二列走了 270 千米，180 + 270 = 450，对。"""
TRAIN = """两列火车 **3 小时**后相遇。

相向而行时速度相加：60 + 90 = 150（千米/时），450 ÷ 150 = 3（小时）。"""


def pieces(text: str) -> list[str]:
    """A text in tokens of two characters, as a stream brings them."""
    return [text[at : at + 2] for at in range(0, len(text), 2)]


def ask(page, stub: Stub, question: str, answer: str, thinking: str = "") -> None:
    stub.answers = [Answer(pieces(answer), pieces(thinking), pause=PAUSE)]
    page.get_by_role("textbox").first.fill(question)
    page.keyboard.press("Enter")
    page.locator(".answer").last.locator(".figures").wait_for()


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    stub = Stub()

    def shoot(name: str) -> None:
        page.wait_for_timeout(400)
        picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
        # 128 colours are enough for grounds, text and its smoothing, and a third of the size.
        picture.quantize(128, dither=Image.Dither.NONE).save(IMAGES / f"page_{name}.png", optimize=True)

    def visit(**options):
        page = browser.new_context(**options).new_page()
        page.goto(stub.url)
        return page

    with chromium() as browser:
        page = visit(locale="zh-CN", viewport=WIDE)
        for question in ("推荐三道简单的家常菜", "“画蛇添足”是什么意思？", "感冒了可以喝绿茶吗"):
            ask(page, stub, question, "好的。")
            page.get_by_role("button", name="新对话").first.click()
        ask(page, stub, "写一首关于秋天的短诗", POEM)
        ask(page, stub, "怎么用 Python 找出一段文字里出现最多的词？", PYTHON)
        page.mouse.move(700, 300)
        shoot("chinese_light")
        page.get_by_role("button", name="设置").click()
        shoot("settings")

        page = visit(locale="en-GB", viewport=WIDE, color_scheme="dark")
        for question in ("Introduce yourself", "Write a haiku about the sea"):
            ask(page, stub, question, "Hello.")
            page.get_by_role("button", name="New chat").first.click()
        page.mouse.move(700, 300)
        ask(page, stub, "Why do leaves change colour in autumn?", LEAVES)
        shoot("english_dark")

        stub.models = [model("minimind", "reason", reasoning=True), *MODELS[1:]]
        page = visit(locale="zh-CN", viewport=WIDE)
        ask(
            page,
            stub,
            "两列火车相向而行，时速 60 和 90 千米，相距 450 千米，几小时后相遇？",
            TRAIN,
            TRAIN_THOUGHTS,
        )
        page.locator("summary").click()
        page.mouse.move(700, 600)
        shoot("thinking")

        page = visit(locale="zh-CN", viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
        ask(page, stub, "写一首关于秋天的短诗", POEM)
        shoot("phone")
    stub.close()


if __name__ == "__main__":
    main()
