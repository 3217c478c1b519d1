"""Many streams at one server: are all answers right, how soon do they begin, how fast are they together.

    python -m benchmarks.serve_load --out_dir out --preset small

starts `minimind serve` in a process of its own. Each question is first asked alone, greedily; then all of
them are asked again, 64 at a time, and every streamed answer is compared with the one alone. Weights are
fp32: products of 64 rows are rounded otherwise than those of one, which in bf16 often decides between two
tokens, and in fp32 only where both are equally likely to some six digits. An answer that differs only after
such a tie (the two likeliest tokens less than `--tie` apart, in natural logarithms) is counted as rounded,
any other that differs as wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import write_results
from minimind.config import PRESETS
from minimind.errors import UserError, run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import ROOT

TOPICS = ("天空", "数学", "北京", "猫", "电脑", "春天", "历史", "the sea", "music", "bread")


@dataclass(frozen=True)
class LoadOptions:
    out_dir: Path | None = flag(None, "folder of full_sft weights; without it random ones are made")
    preset: str = flag("small", "model size", choices=tuple(PRESETS))
    requests: int = flag(2000, "questions, all different")
    streams: int = flag(64, "how many are asked at a time")
    new_tokens: int = flag(64, "longest answer; each question asks for a quarter of it to all of it")
    rows: int = flag(64, "rows of the server")
    tie: float = flag(1e-4, "difference of two log-probabilities that rounding may decide")
    json: Path = flag(ROOT / "benchmarks/results/serve_load.json", "where the results are written")


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    first: float  # seconds to the first text
    seconds: float  # to the end


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(LoadOptions, argv, __doc__)
    load_before = round(os.getloadavg()[0], 1)  # of others
    with tempfile.TemporaryDirectory() as folder:
        out_dir = options.out_dir or make_weights(options.preset, Path(folder))
        command = [sys.executable, "-m", "minimind", "serve", "--out_dir", str(out_dir)]
        command += ["--preset", options.preset, "--weights", "fp32", "--rows", str(options.rows)]
        command += ["--queue", str(options.streams), "--max_seq_len", "1024"]
        command += ["--port", "0", "--device", "cpu"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
            try:
                port = next((port_of(line) for line in server.stdout if line.startswith("page: ")), None)
                if port is None:
                    raise UserError(f"the server did not start: {' '.join(command)}")
                results = asyncio.run(measure(port, options))
            finally:
                server.terminate()
    report(results | {"load_average_before": load_before}, options)
    return int(results["lost"] + results["wrong"] > 0)


def make_weights(preset: str, folder: Path) -> Path:
    """Random weights, wide enough for answers to differ."""
    import torch

    from minimind.model import MiniMind
    from minimind.weights import save_weights

    torch.manual_seed(0)
    model = MiniMind(PRESETS[preset])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    save_weights(model, folder / f"full_sft_{model.config.name}.pth")
    return folder


def port_of(line: str) -> int:
    return int(line.split()[1].rstrip("/").rpartition(":")[2])


def questions(count: int, new_tokens: int) -> list[dict[str, Any]]:
    """Bodies of different requests, of 10 to 200 tokens, for greedy answers of different lengths."""
    random = Random(0)
    bodies = []
    for number in range(count):
        words = "、".join(random.choices(TOPICS, k=random.randint(0, 40)))
        topic, other = random.choice(TOPICS), random.randint(1, 99)
        text = f"第{number}问：{words}。请介绍一下{topic}，再算{number}加{other}。"
        length = random.randint(max(1, new_tokens // 4), new_tokens)
        fixed = {"temperature": 0, "repetition_penalty": 1, "max_tokens": length}
        bodies.append({"messages": [{"role": "user", "content": text}], **fixed})
    return bodies


async def measure(port: int, options: LoadOptions) -> dict[str, Any]:
    bodies = questions(options.requests, options.new_tokens)
    alone, seconds_alone = await ask_all(port, bodies, 1, "alone")
    together, seconds = await ask_all(port, bodies, options.streams, "together")
    verdicts = [
        await judge(port, body, own, found, options.tie)
        for body, own, found in zip(bodies, alone, together, strict=True)
    ]
    counts = {name: verdicts.count(name) for name in ("same", "rounded", "wrong", "lost")}
    return counts | {
        "different_answers": len({answer.text for answer in alone if answer}),
        "alone": speeds(alone, seconds_alone),
        "together": speeds(together, seconds),
    }


async def ask_all(
    port: int, bodies: Sequence[dict[str, Any]], streams: int, name: str
) -> tuple[list[Answer | None], float]:
    """The answers in order (None: there was none), `streams` at a time, and the seconds that took."""
    answers: list[Answer | None] = [None] * len(bodies)
    numbers = iter(range(len(bodies)))

    async def worker() -> None:
        for number in numbers:
            answers[number] = await ask_one(port, bodies[number])
            if number % 100 == 0:
                print(f"{name}: {number} of {len(bodies)} asked", flush=True)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(streams)))
    return answers, time.perf_counter() - began


async def ask_one(port: int, body: dict[str, Any]) -> Answer | None:
    """One streamed answer, over a connection of its own."""
    began, first, text, tokens, whole = time.perf_counter(), 0.0, "", 0, False
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(body | stream))
        async for line in reader:  # the server sends each event in one piece
            if line == b"data: [DONE]\n":
                whole = True
            elif line.startswith(b"data: "):
                chunk = json.loads(line[6:])
                piece = "".join(choice["delta"].get("content", "") for choice in chunk.get("choices", ()))
                first = first or (time.perf_counter() - began if piece else 0.0)
                text += piece
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    finally:
        writer.close()
    return Answer(text, tokens, first, time.perf_counter() - began) if whole else None


async def judge(port: int, body: dict[str, Any], own: Answer | None, found: Answer | None, tie: float) -> str:
    """Whether an answer is the one alone, left it at a tie, is another, or is missing."""
    if own is None or found is None:
        return "lost"
    if own.text == found.text:
        return "same"
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own.text, found.text, strict=False)))
    differ_at = len(own.text[: same + 1].encode())  # bytes
    place = 0
    for token in await likeliest(port, body):
        best, second = (top["logprob"] for top in token["top_logprobs"])
        if best - second < tie:
            return "rounded"
        place += len(token["bytes"])
        if place >= differ_at:
            break
    return "wrong"


async def likeliest(port: int, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens of an answer alone, each with the two likeliest at its place."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes(body | {"logprobs": True, "top_logprobs": 2}))
    answer = await reader.read()
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["logprobs"]["content"]


def request_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def speeds(answers: Sequence[Answer | None], seconds: float) -> dict[str, Any]:
    there = [answer for answer in answers if answer]
    tokens = sum(answer.tokens for answer in there)

    def shares(value: Callable[[Answer], float]) -> dict[str, float]:
        percents = statistics.quantiles(map(value, there), n=100)
        return {f"p{percent}": round(percents[percent - 1], 4) for percent in (50, 95, 99)}

    return {
        "seconds": round(seconds, 2),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "first_token_s": shares(lambda answer: answer.first),
        "answer_s": shares(lambda answer: answer.seconds),
    }


def report(results: dict[str, Any], options: LoadOptions) -> None:
    table = Table("", "tokens/s", "first token s: p50", "p95", "p99", "answer s: p50", "p99")
    for name in ("alone", "together"):
        found = results[name]
        first, answer = found["first_token_s"], found["answer_s"]
        numbers = (found["tokens_per_s"], *first.values(), answer["p50"], answer["p99"])
        table.add_row(name, *(f"{number:,.3g}" if number < 100 else f"{number:,.0f}" for number in numbers))
    Console().print(table)
    counts = ", ".join(f"{results[name]} {name}" for name in ("same", "rounded", "wrong", "lost"))
    print(f"{options.requests} answers, {options.streams} at a time: {counts}")
    given = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    weights = "trained" if options.out_dir else "random"
    write_results(options.json, options, {"options": given | {"weights": weights}} | results)


if __name__ == "__main__":
    run_cli(main)
