"""A server that is full, left, starved, broken or told to stop: no slot is lost, and everybody is told."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from minimind.chat.generate import generate
from minimind.chat.options import SamplingOptions
from minimind.server import connection, guard

from .live import ASK, CHAT, Live, chat_ids, eventually, running, served, shown


class Gate:
    """Lets an engine step only while it is open."""

    def __init__(self, engine) -> None:
        self.open = threading.Event()
        step = engine.step

        def gated():
            self.open.wait(30)
            return step()

        engine.step = gated


@pytest.fixture
def gated():
    """A server with 2 rows and a queue of 2, whose engine waits for `gate.open`."""
    model = served(rows=2)
    gate = Gate(model.engine)
    with running([model], queue=2) as live:
        yield live, gate
        gate.open.set()


def ask(live: Live, **more) -> httpx.Response:
    return live.http.post(CHAT, json={"messages": ASK, "max_tokens": 5} | more)


# ---- Full ----


def test_a_full_queue_says_when_to_come_again(gated):
    live, gate = gated
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(ask, live) for _ in range(4)]
        assert live.eventually("answers_waiting", 2)
        response = ask(live)
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            live.openai.chat.completions.create(model="minimind", messages=ASK, n=2)
        gate.open.set()
        assert [request.result().status_code for request in waiting] == [200] * 4
    assert ask(live).status_code == 200
    patient = live.openai.with_options(max_retries=3)
    assert patient.chat.completions.create(model="minimind", messages=ASK, max_tokens=1)


def test_all_answers_of_a_request_find_room_or_none_does(gated):
    live, gate = gated
    with ThreadPoolExecutor(1) as threads:
        three = threads.submit(ask, live, n=3)
        assert live.eventually("answers_waiting", 1)
        assert ask(live, n=2).status_code == 429
        response = ask(live, n=5)  # more than there is room for at any time
        assert response.status_code == 400
        assert "room for (4)" in response.json()["error"]["message"]
        gate.open.set()
        assert len(three.result().json()["choices"]) == 3


# ---- Together ----


def test_many_at_once_share_steps_and_keep_their_own_answers():
    model = served(rows=8)
    rows, feed = [], model.engine.model.next_logits

    def counted(ids, positions, cache):
        rows.append(len(ids))
        time.sleep(0.01)  # as a larger model: requests come while others are answered
        return feed(ids, positions, cache)

    model.engine.model.next_logits = counted
    questions = [f"{i} 加 {i * i} 等于几？" for i in range(40)]
    with running([model]) as live:

        def answer(text: str) -> str:
            stream = live.openai.chat.completions.create(
                model="minimind",
                messages=[{"role": "user", "content": text}],
                temperature=0,
                max_tokens=12,
                stream=True,
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        with ThreadPoolExecutor(20) as threads:
            found = list(threads.map(answer, questions))
        assert max(rows) == 8
        assert sum(rows) / len(rows) > 4
        assert live.eventually("answers_running", 0)
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    for text, own in zip(questions, found, strict=True):
        prompt = chat_ids([{"role": "user", "content": text}])
        assert own == shown(generate(model.engine.model, prompt, options))


# ---- Clients that leave, or never come ----


def raw(live: Live, text: bytes) -> socket.socket:
    connected = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    connected.sendall(text)
    return connected


def read_all(connected: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    parts = []
    while part := connected.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def request_bytes(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["waiting", "running"])
def test_a_client_that_leaves_frees_its_row(gated, stream, when):
    live, gate = gated
    body = {"messages": ASK, "stream": stream, "n": 4}
    connected = raw(live, request_bytes(body))
    assert live.eventually("answers_waiting", 2)
    if when == "running":
        gate.open.set()
        assert live.eventually("answers_running", 2)
        gate.open.clear()
    connected.close()
    assert eventually(lambda: live.metric("answers_cancelled_total") > 0)
    gate.open.set()
    assert live.eventually("answers_running", 0)
    assert live.eventually("answers_waiting", 0)
    assert live.metric("answer_tokens_total") < 4 * 200
    assert ask(live).status_code == 200


def test_headers_that_do_not_end_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    with running() as live:
        slow = raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        silent = raw(live, b"")
        again = raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert again.recv(1000).startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /hea")  # a second request on the same connection
        for drop in b"X-A: b\r\n":  # some bytes now and then do not help
            time.sleep(0.05)
            slow.sendall(bytes([drop]))
        assert read_all(slow).startswith(b"HTTP/1.1 408 ")
        assert read_all(silent).startswith(b"HTTP/1.1 408 ")
        assert b"HTTP/1.1 408 " in read_all(again)
        assert live.http.get("/health").status_code == 200


def test_only_so_many_connections_are_kept(monkeypatch):
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 5)
    with running() as live:
        kept = [raw(live, b"") for _ in range(5)]
        assert read_all(raw(live, b"")).startswith(b"HTTP/1.1 429 ")
        for connected in kept:
            connected.close()
        assert eventually(lambda: live.http.get("/health").status_code == 200)


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with running() as live:
        connected = raw(live, request_bytes({"messages": ASK})[:-5])
        answer = read_all(connected)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not come within 0.3 seconds" in answer


@pytest.mark.parametrize("announced", [True, False])
def test_a_huge_body_is_refused_before_it_is_read(announced):
    size = 64 << 20

    def parts():
        for _ in range(size >> 16):
            yield b"x" * (1 << 16)

    headers = {"Content-Type": "application/json"} | ({"Content-Length": str(size)} if announced else {})
    with running() as live:
        response = live.http.post(CHAT, content=parts(), headers=headers)
        assert response.status_code == 413
        assert "larger than 2 MiB" in response.json()["error"]["message"]
        assert ask(live).status_code == 200


def test_an_answer_that_is_not_read_does_not_hold_its_connection(monkeypatch, tmp_path):
    monkeypatch.setattr(connection, "STALLED_SECONDS", 0.3)
    (tmp_path / "index.html").write_bytes(b"x" * (64 << 20))
    with running(page=tmp_path) as live:
        connected = raw(live, b"GET /index.html HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(1.5)
        assert 0 < len(read_all(connected)) < 32 << 20  # what the system has buffered


def test_broken_http_is_refused(live_server):
    for text in (b"\0\0\0\r\n\r\n", b"GET /\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        assert raw(live_server, text).recv(1000).startswith(b"HTTP/1.1 400 ")
    many = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000
    with contextlib.suppress(ConnectionError):  # the system may refuse the rest before the answer is read
        assert raw(live_server, many).recv(1000).startswith(b"HTTP/1.1 400 ")
    assert live_server.http.get("/health").status_code == 200


@pytest.fixture(scope="module")
def live_server():
    with running() as live:
        yield live


# ---- A broken engine ----


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_engine_is_told_to_everybody(stream):
    model, told = served(), []
    gate = Gate(model.engine)
    with running([model], on_failure=lambda: told.append(1)) as live, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(ask, live, stream=stream)
        assert eventually(lambda: bool(live.service.scheduler._open["minimind"]))

        def broken():
            raise RuntimeError("out of luck")

        model.engine.step = broken
        gate.open.set()
        response = waiting.result()
        if stream:
            assert '"type":"server_error"' in response.text
            assert "[DONE]" not in response.text
        else:
            assert response.status_code == 503
            assert "stopped with an error" in response.json()["error"]["message"]
        assert ask(live).status_code == 503
        assert live.http.get("/health").status_code == 503
        assert told == [1]
