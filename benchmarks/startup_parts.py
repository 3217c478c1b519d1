"""A pretraining that times the parts of its start, and ends when its first step is done.

`benchmarks.startup` runs this with a training's flags. The last line on stdout is the seconds of each part.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

        return call

    def end(*_: object) -> None:
        print(f"\n{json.dumps(seconds)}", flush=True)
        os._exit(0)  # without evaluating and saving

    timed("import of PyTorch", lambda: __import__("torch"))()
    loop = timed("other imports", import_loop)()
    loop.setup = timed("device and processes", loop.setup)
    loop.Tokenizer.load = timed("tokenizer", loop.Tokenizer.load)
    loop.initial_model = timed("random weights", loop.initial_model)
    loop.load_datasets = timed("data, from the cache", loop.load_datasets)
    loop.build_engine = timed("optimizer", loop.build_engine)
    loop.matmul_rate = timed("rate of matrix products", loop.matmul_rate)
    loop.optimizer_step = timed("first step", loop.optimizer_step)
    loop.Monitor.step = end

    from minimind.stages.pretrain import main as pretrain

    pretrain()


def import_loop() -> Any:
    from minimind.train import loop

    return loop


if __name__ == "__main__":
    main()
