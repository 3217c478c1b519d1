"""What the automatic test asks: questions that the model at hand was trained for."""

from __future__ import annotations

from collections.abc import Sequence

BEGINNINGS = [  # for a pretrained model, which continues texts
    "长城是",
    "水在一个标准大气压下的沸点是",
    "春天来了，",
    "人工智能的主要应用包括",
    "学好数学的方法是",
    "The sun is",
]
GENERAL = [
    "你好，请介绍一下自己。",
    "中国的首都是哪里？",
    "天空为什么是蓝色的？",
    "12+35等于几？",
    "成语“画蛇添足”是什么意思？",
    "写一首关于秋天的短诗。",
    "What can you do?",
]
WORD_PROBLEMS = [  # for a reasoning model
    "小明有15个苹果，送给小红6个，又买来8个。小明现在有多少个苹果？",
    "一支铅笔2元，一本练习本5元。买3支铅笔和2本练习本一共要多少元？",
    "一辆汽车每小时行60千米，行驶3小时后离目的地还有45千米。全程多少千米？",
    "Tom reads 12 pages every day. His book has 96 pages. How many days does he need to read it?",
    "A shop sold 48 cakes on Monday and half as many on Tuesday. How many cakes did it sell in all?",
]
ABOUT = {  # a word in an adapter's name -> questions
    "medical": [
        "感冒和流感的症状有什么区别？",
        "高血压患者在饮食上应该注意什么？",
        "最近总是失眠，可能是什么原因？",
        "孩子发烧到39度应该怎么处理？",
        "糖尿病有哪些常见的并发症？",
    ],
    "identity": [
        "你是谁？",
        "你叫什么名字？",
        "你是谁开发的？",
        "你是ChatGPT吗？",
        "Who are you?",
        "Who created you?",
    ],
}


def questions_for(stage: str, adapters: Sequence[str]) -> list[str]:
    """What to ask a model that `stage` made and to which `adapters` are added."""
    if stage == "pretrain":
        return BEGINNINGS
    learnt = [word for word in ABOUT if any(word in name for name in adapters)]
    if learnt:
        return [question for word in learnt for question in ABOUT[word]]
    return WORD_PROBLEMS if stage == "reason" else GENERAL
