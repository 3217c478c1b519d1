"""The load benchmark: all answers are asked for and judged, and a wrong one is seen."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks import serve_load
from benchmarks.serve_load import Answer, judge, main


def test_a_small_run_finds_all_answers_right(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "results.json"
    sizes = {"requests": 12, "streams": 4, "rows": 4, "new_tokens": 5}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert main(["--preset", "tiny", "--json", str(path), *flags]) == 0
    results = json.loads(path.read_text())
    assert results["same"] + results["rounded"] == 12
    assert results["wrong"] == results["lost"] == 0
    assert results["different_answers"] > 6
    for name in ("alone", "together"):
        assert 12 < results[name]["tokens"] < 12 * 5
        assert 0 < results[name]["first_token_s"]["p50"] < results[name]["answer_s"]["p50"]


def token(text: str, gap: float) -> dict:
    return {"bytes": list(text.encode()), "top_logprobs": [{"logprob": -1.0}, {"logprob": -1.0 - gap}]}


@pytest.mark.parametrize(
    ("found", "gaps", "verdict"),
    [
        ("猫很好", (1, 1, 1), "same"),
        ("猫不好", (1, 1e-6, 1), "rounded"),
        ("猫不好", (1, 1, 1e-6), "wrong"),  # the tie comes after the difference
        ("狗", (1, 1, 1), "wrong"),
        ("猫", (1, 1, 1), "wrong"),
        (None, (1, 1, 1), "lost"),
    ],
)
def test_only_what_leaves_at_a_tie_is_excused(found, gaps, verdict, monkeypatch):
    async def likeliest(port, body):
        return [token(text, gap) for text, gap in zip("猫很好", gaps, strict=True)]

    monkeypatch.setattr(serve_load, "likeliest", likeliest)
    answers = (text and Answer(text, 3, 0.1, 0.2) for text in ("猫很好", found))
    assert asyncio.run(judge(0, {}, *answers, tie=1e-4)) == verdict


def test_a_stream_that_breaks_off_is_lost():
    async def cut(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices":[{"delta":{"content":"a"}}]}\n\n')
        writer.close()

    async def run():
        server = await asyncio.start_server(cut, "127.0.0.1", 0)
        async with server:
            return await serve_load.ask_one(server.sockets[0].getsockname()[1], {})

    assert asyncio.run(run()) is None
