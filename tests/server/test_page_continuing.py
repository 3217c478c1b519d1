"""The chat page beside a pretrained model: it continues texts, and knows no turns."""

from __future__ import annotations

import json

import pytest

from server.live import COMPLETE, running, served
from server.steps import ask, button, texts
from server.stub import Answer, model

KEPT = {"temperature": 0, "repetition_penalty": 1, "max_tokens": 24, "system": "你是老师。"}
SETTINGS = f"localStorage['minimind.settings'] ??= {json.dumps(json.dumps(KEPT))};"


def test_a_text_is_continued_as_the_api_does(visit):
    with running([served(stage="pretrain")]) as live:
        page = visit(live.url, init=SETTINGS)
        answer = ask(page, "春天来了")
        assert answer.locator(".problem").is_hidden()
        assert "24 token" in answer.locator(".figures").inner_text()
        asked = {name: KEPT[name] for name in ("temperature", "repetition_penalty", "max_tokens")}
        body = {"prompt": "春天来了", **asked}
        said = live.http.post(COMPLETE, json=body).json()["choices"][0]["text"]
    kept = page.evaluate("Object.entries(localStorage).find(([key]) => key.startsWith('minimind.chat.'))[1]")
    assert said == json.loads(kept)["messages"][1]["content"] != ""


def test_each_text_is_sent_alone(stub, visit):
    stub.models = [model("minimind", "pretrain")]
    stub.answers = [Answer(["，花", "开了。"])]
    page = visit(stub.url, init=SETTINGS)
    ask(page, "春天来了")
    ask(page, "秋天来了")
    assert texts(page) == ["春天来了", "，花开了。", "秋天来了", "，花开了。"]
    assert [(body.get("prompt"), "messages" in body) for body in stub.requests] == [
        ("春天来了", False),
        ("秋天来了", False),
    ]
    assert page.locator(".figures", has_text="没有发送").count() == 0


@pytest.mark.parametrize(
    ("stage", "greeting", "example", "caution"),
    [
        ("pretrain", "Begin a text, and the model goes on", "The sun is", "only continues texts"),
        ("full_sft", "What shall we talk about?", "Suggest three simple dishes for tonight", "may be wrong"),
    ],
)
def test_the_page_says_what_the_model_does(stub, visit, stage, greeting, example, caution):
    stub.models = [model("minimind", stage)]
    page = visit(stub.url)
    button(page, "设置").click()
    page.get_by_label("English").check()
    page.keyboard.press("Escape")
    page.get_by_role("heading", name=greeting).wait_for()
    assert caution in page.locator(".dock .note").inner_text()
    button(page, example).click()
    page.locator(".answer .foot").wait_for()
    assert texts(page)[0] == example
