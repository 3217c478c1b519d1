"""Arithmetic word problems of two or three steps, with the working that leads to the answer."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import NamedTuple

from minimind.demo.data import Problem

NAMES = ("小明", "小红", "小刚", "小丽", "小华", "小芳", "小军", "小梅")


class Story(NamedTuple):
    """A situation in which something grows and shrinks; `{n}` is a number, `{name}` and `{other}` people."""

    begins: str
    grows: tuple[str, ...]
    shrinks: tuple[str, ...]
    asks: str


STORIES = (
    Story(
        "{name}有{n}个苹果",
        ("又买来{n}个", "妈妈又给了{n}个", "又摘了{n}个"),
        ("送给{other}{n}个", "吃掉{n}个", "卖掉{n}个"),
        "{name}现在有多少个苹果？",
    ),
    Story(
        "公交车上有{n}人",
        ("到站上来{n}人", "又上车{n}人"),
        ("到站下去{n}人", "又下车{n}人"),
        "现在车上有多少人？",
    ),
    Story(
        "图书馆有{n}本故事书",
        ("新买了{n}本", "还回来{n}本"),
        ("借出{n}本", "捐出{n}本"),
        "图书馆现在有多少本故事书？",
    ),
    Story(
        "{name}存了{n}元钱",
        ("爸爸又给了{n}元", "卖旧书得到{n}元", "帮{other}做事得到{n}元"),
        ("买书用去{n}元", "买文具用去{n}元", "借给{other}{n}元"),
        "{name}还有多少元钱？",
    ),
    Story(
        "停车场里有{n}辆车",
        ("开进来{n}辆", "又来了{n}辆"),
        ("开走{n}辆", "又开走了{n}辆"),
        "停车场里现在有多少辆车？",
    ),
    Story(
        "{name}有{n}张邮票",
        ("{other}送来{n}张", "又收集到{n}张"),
        ("送给{other}{n}张", "丢了{n}张"),
        "{name}现在有多少张邮票？",
    ),
    Story(
        "果园里有{n}棵树",
        ("春天种下{n}棵", "秋天又种下{n}棵"),
        ("移走{n}棵", "砍掉{n}棵"),
        "果园里现在有多少棵树？",
    ),
    Story(
        "商店里有{n}箱牛奶",
        ("运来{n}箱", "又进货{n}箱"),
        ("卖出{n}箱", "送走{n}箱"),
        "商店里现在有多少箱牛奶？",
    ),
)


class WordProblem(NamedTuple):
    question: str
    steps: list[Problem]  # each begins with the result of the one before

    @property
    def result(self) -> int:
        return self.steps[-1].result

    def reasoned(self) -> str:
        """The answer as the reasoning stage wants it: the working of every step, then the number."""
        working = "\n".join(step.worked() for step in self.steps)
        return f"<think>\n{working}\n</think>\n<answer>\n{self.result}\n</answer>"


def word_problems(pairs: Collection[frozenset[int]], count: int, rng: random.Random) -> list[WordProblem]:
    """`count` different problems, half of two steps and half of three.

    Args: pairs: the operands that a step may add or subtract, all from 10 to 99.
    """
    partners: dict[int, list[int]] = {}
    for pair in sorted(map(sorted, pairs)):
        partners.setdefault(pair[0], []).append(pair[-1])
        if pair[0] != pair[-1]:
            partners.setdefault(pair[-1], []).append(pair[0])
    problems: dict[str, WordProblem] = {}
    while len(problems) < count:
        steps = _steps(partners, 2 + len(problems) % 2, rng)
        if steps:
            question = _told(steps, rng)
            problems[question] = WordProblem(question, steps)
    return list(problems.values())


def _steps(partners: dict[int, list[int]], count: int, rng: random.Random) -> list[Problem] | None:
    """A random chain of steps; None when it came to an end too early.

    All results but the last are two-digit numbers, so that every step is one that the model was taught.
    """
    value = rng.choice(list(partners))
    steps: list[Problem] = []
    for left in reversed(range(count)):
        if value not in partners:
            return None
        step = Problem(value, rng.choice(partners[value]), rng.choice("+-"))
        if step.result < 0 or (left and not 10 <= step.result <= 99):
            return None
        steps.append(step)
        value = step.result
    return steps


def _told(steps: list[Problem], rng: random.Random) -> str:
    story = rng.choice(STORIES)
    name, other = rng.sample(NAMES, 2)
    parts = [story.begins.format(name=name, n=steps[0].a)]
    for step in steps:
        part = rng.choice(story.grows if step.operator == "+" else story.shrinks)
        parts.append(part.format(other=other, n=step.b))
    return "，".join(parts) + "。" + story.asks.format(name=name)
