"""What the GPU benchmark trains on: the beginning of the real files, or made-up text where there are none.

Speed depends on how long the documents are, not on what they say: about 200 tokens in the mean for texts, 100
for answers, a few many times as long.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

RECORDS = 20_000  # 8,000 rows of 512 tokens; an epoch then begins anew
WORDS = (
    "的 是 在 了 和 有 人 这 中国 我们 可以 一个 学习 时间 历史 因为 所以 模型 语言 城市 山水 春天 朋友 老师 "
    "问题 方法 科学 研究 文化 发展 生活 "
    "the of and to in is that model language water light small large answer because"
).split()
WEIGHTS = [1 / rank for rank in range(1, len(WORDS) + 1)]  # Zipf's law
FILES = {  # stage -> the data file it reads, without .jsonl
    "pretrain": "pretrain_hq",
    "sft": "sft_mini_512",
    "lora": "lora_medical",
    "dpo": "dpo",
    "reason": "r1_mix_1024",
    "distill": "sft_mini_512",
}


def write_data(folder: Path, data_dir: Path, records: int) -> dict[str, str]:
    """Write a file for each stage into `folder`; returns where each came from, by the file's name."""
    origins = {}
    for stage, name in FILES.items():
        found = [
            path for path in (data_dir / f"{name}.jsonl", data_dir / f"{name}.jsonl.gz") if path.is_file()
        ]
        lines = beginning(found[0], records) if found else generated(stage, records)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        origins[name] = f"the first {records:,} records of the real file" if found else "generated"
    return origins


def beginning(path: Path, records: int) -> Iterator[str]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        yield from itertools.islice(file, records)


def generated(stage: str, records: int) -> Iterator[str]:
    rng = random.Random(stage)
    make = {"pretrain": text, "dpo": pair, "reason": reasoning}.get(stage, conversation)
    for _ in range(records):
        yield json.dumps(make(rng), ensure_ascii=False) + "\n"


def say(rng: random.Random, mean_words: int) -> str:
    count = int(mean_words * rng.lognormvariate(-0.3, 0.8))  # exp(-0.3 + 0.8² / 2) is about 1
    return "".join(rng.choices(WORDS, WEIGHTS, k=min(max(count, 3), 3 * mean_words))) + "。"


def text(rng: random.Random) -> dict:
    return {"text": say(rng, 180)}


def turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversation(rng: random.Random) -> dict:
    return {"conversations": turns(say(rng, 20), say(rng, 90))}


def pair(rng: random.Random) -> dict:
    question = say(rng, 20)
    return {"chosen": turns(question, say(rng, 90)), "rejected": turns(question, say(rng, 90))}


def reasoning(rng: random.Random) -> dict:
    answer = f"<think>\n{say(rng, 150)}\n</think>\n<answer>\n{say(rng, 60)}\n</answer>"
    return {"conversations": turns(say(rng, 20), answer)}
