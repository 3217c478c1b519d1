"""Records, files and stores that the tests of preparation share."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from minimind.data.store import TokenStore

TEXTS = [{"text": text} for text in ("床前明月光，疑是地上霜。", "a", "Hello, world!\n<|im_end|>", "😀" * 50)]
CHATS = [
    {"conversations": [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]},
    {
        "conversations": [
            {"role": "system", "content": "简短回答。"},
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "你好！"},
            {"role": "user", "content": "再见"},
            {"role": "assistant", "content": "再见。"},
        ]
    },
]
PAIRS = [
    {
        "chosen": chat["conversations"],
        "rejected": [*chat["conversations"][:-1], {"role": "assistant", "content": "?"}],
    }
    for chat in CHATS
]


def big_file(folder: Path, megabytes: float) -> Path:
    """Chinese text that is not the same on any two lines."""
    letters = random.Random(0)
    path = folder / "big.jsonl"
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            text = "".join(chr(0x4E00 + int(letters.expovariate(0.01)) % 3000) for _ in range(400))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def arrays(store: TokenStore) -> dict[str, np.ndarray | None]:
    return {name: getattr(store, name) for name in ("tokens", "weights", "offsets", "lines", "fingerprints")}
