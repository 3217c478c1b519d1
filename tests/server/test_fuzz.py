"""Requests of all kinds: each is answered or refused with a reason, none breaks the server or keeps a row.

    FUZZ_REQUESTS=5000 python -m pytest -n 0 tests/server/test_fuzz.py

sends more than the 150 of each kind that the suite does.
"""

from __future__ import annotations

import json
import os
import socket

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind.server.schemas import ONLY_AS, WITHOUT_EFFECT, ChatRequest, CompletionRequest

from .live import Live, running, served

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_REQUESTS", 150)),
    suppress_health_check=list(HealthCheck),
)
PATHS = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}

TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=40),  # lone surrogates and NUL too
    st.sampled_from(["<|im_end|>\n<|im_start|>system\n", "<|endoftext|>", "\0", "\ud800", "猫" * 100]),
)
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, -(2**63) - 1, 1e308, 10**400])
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROLES = st.sampled_from(["system", "developer", *["user", "assistant"] * 4, "tool", "<|im_end|>"])
TYPES = st.sampled_from([*["text"] * 4, "image_url"])
PARTS = st.lists(st.fixed_dictionaries({"type": TYPES, "text": TEXT}), max_size=2)
MESSAGE = {"role": ROLES, "content": TEXT | PARTS}
MESSAGES = st.lists(
    st.fixed_dictionaries(MESSAGE, optional={"reasoning_content": TEXT, "name": JSON}),
    max_size=3,
)
LIKELY = {  # values that often pass, so that others are looked at too
    "messages": MESSAGES,
    "prompt": TEXT | st.lists(TEXT, max_size=3),
    "stop": TEXT | st.lists(TEXT, max_size=3),
    "stream": st.booleans(),
    "n": st.integers(0, 4),
    "max_tokens": st.integers(0, 5),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 10),
    "model": st.just("minimind"),
}


@st.composite
def bodies(draw, path: str) -> dict:
    """An object with the fields of a request, most of them sensible."""
    needed = ("messages",) if "chat" in path else ("prompt",)
    fields = {name: draw(LIKELY[name]) for name in needed}
    known = [name for name in LIKELY if name in PATHS[path].model_fields]
    for name in draw(st.lists(st.sampled_from(known), max_size=5)):
        fields[name] = draw(LIKELY[name])
    if draw(st.booleans()):
        names = st.sampled_from([*PATHS[path].model_fields, *ONLY_AS, *sorted(WITHOUT_EFFECT)])
        fields |= draw(st.dictionaries(names | TEXT, JSON, max_size=2))
    return {"max_tokens": 2} | fields


@st.composite
def contents(draw, path: str) -> bytes:
    """A body as bytes: JSON, JSON that is cut or changed somewhere, or anything."""
    kind = draw(st.sampled_from(["object"] * 6 + ["any", "cut", "changed", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=100))
    value = draw(JSON if kind == "any" else bodies(path))
    text = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    place = draw(st.integers(0, len(text))) if kind in ("cut", "changed") else len(text)
    return text[:place] + (draw(st.binary(max_size=3)) + text[place:] if kind == "changed" else b"")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    page = tmp_path_factory.mktemp("page")
    (page / "index.html").touch()
    with running([served(max_length=64)], page=page) as live:
        yield live
        assert live.eventually("answers_running", 0)
        assert live.http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


@FUZZ
@given(st.data(), st.sampled_from([*PATHS]))
def test_any_body_is_answered_or_refused_with_a_reason(live: Live, data, path):
    content = data.draw(contents(path))
    response = live.http.post(path, content=content, headers={"Content-Type": "application/json"})
    text = response.content.decode()  # always UTF-8
    if response.status_code == 200:
        streamed = response.headers["content-type"].startswith("text/event-stream")
        events = text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1] if streamed else [text]
        assert text.endswith("data: [DONE]\n\n") or not streamed
        assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events)
    else:
        assert 400 <= response.status_code < 500, text
        error = json.loads(text)["error"]
        assert error["message"]
        assert len(error["message"]) < 600
        assert error["type"] == "invalid_request_error"


METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "X"])
ADDRESSES = st.sampled_from([*PATHS, "/", "/health", "/metrics", "/v1/models", "/v1/models/x", "/page/"])
NAMES = ["Host", "Content-Type", "Accept", "Authorization", "Range", "Upgrade", "Expect", "Cookie"]
HEADERS = st.dictionaries(
    st.sampled_from(NAMES),
    st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=30),
    max_size=3,
)


@FUZZ
@given(METHODS, ADDRESSES | TEXT.map(lambda text: "/" + text), HEADERS)
def test_any_address_and_header_is_answered_or_refused(live: Live, method, address, headers):
    address = address.encode("utf-8", "replace").decode()
    try:
        request = live.http.build_request(method, address, headers=headers)
    except (httpx.InvalidURL, UnicodeError):  # not even this client sends that
        return
    try:
        assert live.http.send(request).status_code < 500
    except (httpx.LocalProtocolError, httpx.UnsupportedProtocol):
        return


BEGINNINGS = [b"", b"GET / HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"]


@FUZZ
@given(st.binary(max_size=60), st.sampled_from(BEGINNINGS))
def test_any_bytes_leave_the_server_whole(live: Live, noise, beginning):
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connected:
        connected.sendall(beginning + noise)
        connected.shutdown(socket.SHUT_WR)
        answer = connected.recv(1000)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), answer
