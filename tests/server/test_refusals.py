"""What the server does not answer, and what it says then: to mistakes, to long prompts, to strangers."""

from __future__ import annotations

import json

import openai
import pytest

from .live import ASK, CHAT, COMPLETE, TOKENIZER, Live, chat_ids, running, served


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


def refused(live: Live, body, path: str = CHAT) -> dict:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = live.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "required"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].type",
            "'text'",
        ),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content", "NUL"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", "0"),
        ({"temperature": 2.5}, "temperature", "2"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 1.5}, "top_p", "1"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": 10**30}, "max_tokens", "2147483647"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, None, "one of them"),
        ({"n": 0}, "n", "1"),
        ({"n": 100}, None, "room"),
        ({"seed": 2**63}, "seed", ""),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": [1]}, "stop[0]", "string"),
        ({"stop": "a\0"}, "stop", "NUL"),
        ({"stream": 1}, "stream", "boolean"),
        ({"stream_options": {"include": True}}, "stream_options.include", "no field"),
        ({"top_logprobs": 3}, None, "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"temprature": 1}, "temprature", "no field"),
        ({"\ud800": 1}, None, "half a character"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "is not supported"),
        ({"model": 3}, "model", "string"),
        ({"min_p": 2}, "min_p", "1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "0.01"),
    ],
)
def test_wrong_fields_are_named(live, change, param, words):
    error = refused(live, {"messages": ASK, "max_tokens": 2} | change)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2]}, "prompt[0]"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
    ],
)
def test_wrong_completions_are_refused(live, change, param):
    assert refused(live, change, COMPLETE)["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"5",
        b'"a"',
        b"{}\0",
        b"[" * 100_000,
        b'{"messages": NaN}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    ],
)
def test_what_is_no_json_object_is_refused(live, body):
    assert refused(live, body)["message"]


def test_a_body_that_is_not_called_json_is_refused(live):
    response = live.http.post(CHAT, content=json.dumps({"messages": ASK}))
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("POST", "/v1/models", 405), ("GET", "/v1/files", 404), ("POST", "/v2", 404)],
)
def test_other_addresses_are_told_in_the_same_shape(live, method, path, status):
    response = live.http.request(method, path)
    assert response.status_code in (status, 405)
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_prompt_that_is_too_long_is_refused_whole(live):
    """256 positions, an answer takes at least one."""
    fixed = len(chat_ids([{"role": "user", "content": ""}]))
    a = TOKENIZER.encode("猫")
    just_fits = "猫" * ((255 - fixed) // len(a))
    while len(chat_ids([{"role": "user", "content": just_fits}])) < 255:
        just_fits += "。"
    found = live.chat([{"role": "user", "content": just_fits}], max_tokens=100)
    assert found.usage.prompt_tokens == 255
    assert found.usage.completion_tokens == 1
    for text in (just_fits + "。", "猫" * 300, "猫" * 300_000):
        with pytest.raises(openai.BadRequestError, match="must fit in 256") as error:
            live.chat([{"role": "user", "content": text}])
        assert error.value.code == "context_length_exceeded"
        assert error.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="the messages take at least 1000"):
        live.chat([{"role": "user", "content": ""}] * 1000)
    with pytest.raises(openai.BadRequestError, match="the prompt take") as error:
        live.openai.completions.create(model="minimind", prompt=["a", "猫" * 300])
    assert error.value.code == "context_length_exceeded"


def test_a_pretrained_model_has_no_chat():
    with running([served(stage="pretrain")]) as live:
        with pytest.raises(openai.BadRequestError, match="/v1/completions"):
            live.chat()
        assert live.openai.completions.create(model="minimind", prompt="a").usage.completion_tokens == 16


# ---- Who may ask ----


def test_with_a_key_only_its_owner_is_answered(tmp_path):
    (tmp_path / "index.html").write_text("<title>MiniMind</title>")
    with running(key="secret-123", page=tmp_path) as live:
        assert live.chat().choices
        for wrong in ("secret-12", "secret-1234", "", "secret-123 x"):
            other = live.openai.with_options(api_key=wrong or "none")
            with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer") as error:
                other.models.list()
            assert error.value.code == "invalid_api_key"
        bare = {"Authorization": ""}
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing", CHAT):
            assert live.http.get(path, headers=bare).status_code == 401
        assert live.http.post(CHAT, headers=bare, content=b"x" * 5_000_000).status_code == 401
        assert live.http.get("/health", headers=bare).json() == {"status": "ok"}
        assert "MiniMind" in live.http.get("/", headers=bare).text
        assert live.http.get("/page/index.html", headers=bare).status_code == 200
        assert live.http.get("/v1/models", headers={"Host": "example.com"}).status_code == 200


def test_without_a_key_other_names_of_this_machine_are_not_answered_to(live):
    for host in ("localhost", "127.0.0.1:8000", "[::1]:80", "LOCALHOST"):
        assert live.http.get("/v1/models", headers={"Host": host}).status_code == 200
    for host in ("example.com", "localhost.example.com:8000", "10.0.0.1", "[::", "127.0.0.1.nip.io"):
        response = live.http.get("/v1/models", headers={"Host": host})
        assert response.status_code == 403
        assert "localhost only" in response.json()["error"]["message"]


def test_the_page_is_served_and_nothing_beside_it(tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<title>MiniMind</title>")
    (tmp_path / "page" / "chat.js").write_text("1")
    (tmp_path / "secret").write_text("secret")
    with running(page=tmp_path / "page") as live:
        for path in ("/", "/page/", "/page/index.html"):
            response = live.http.get(path)
            assert "MiniMind" in response.text
            assert response.headers["Content-Security-Policy"].startswith(
                "default-src 'none'; script-src 'self'"
            )
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            etag = {"If-None-Match": response.headers["ETag"]}
            assert live.http.get(path, headers=etag).status_code == 304
        assert live.http.get("/chat.js").text == live.http.get("/page/chat.js").text == "1"
        for path in ("/../secret", "/%2e%2e/secret", "/page/..%2fsecret", "/page/%00", "/" + "x" * 5000):
            assert live.http.get(path).status_code in (400, 404)
