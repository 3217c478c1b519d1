"""The chat page when things go wrong: a server that fails, storage that is full, text that means harm."""

from __future__ import annotations

import json

from server.steps import ask, at_second, button, ended, texts, titles, type_and_send
from server.stub import Answer, Stub, delta, model

HARM = """<script>window.broken = 1</script> <img src=x onerror="window.broken = 2">
[click](javascript:window.broken=3) [click](data:text/html,<script>1</script>) ![x](https://example.com/x.png)
<svg/onload=window.broken=4> <a href="javascript:1">a</a> &lt;b&gt;

```html"><script>window.broken = 5</script>
</code></pre><script>window.broken = 6</script>
```

| <b>a</b> | b |
|---|---|
| <iframe src=//example.com> | `<i>` |
"""


def chunk(text: str) -> bytes:
    return f"data: {json.dumps(delta({'content': text}))}\n\n".encode()


def test_what_a_model_says_is_never_a_tag(stub, visit):
    stub.answers = [Answer([HARM], [HARM])]
    page = visit(stub.url)
    answer = ask(page, HARM)
    page.locator("summary").click()
    page.get_by_text("window.broken = 6").nth(1).wait_for()
    assert texts(page)[0] == HARM.strip()
    said = answer.locator("> .markdown").inner_text()
    for part in (
        '<script>window.broken = 1</script> <img src=x onerror="window.broken = 2">',
        "&lt;b&gt;",
        "<b>a</b>",
    ):
        assert part in said
    found = page.locator(".messages *").evaluate_all(
        "nodes => [...new Set(nodes.map((node) => node.localName))]"
    )
    assert set(found) & {"script", "img", "iframe", "b", "i", "object"} == {"i"}  # the dots while one waits
    assert (
        answer.locator("a").evaluate_all("nodes => nodes.map((node) => [node.href, node.rel, node.target])")
        == [["https://example.com/x.png", "noopener noreferrer", "_blank"]] * 2
    )
    assert page.evaluate("window.broken") is None


def test_what_a_server_says_is_never_a_tag(stub, visit):
    stub.models = [
        model("minimind", "<b>x</b>"),
        model("minimind:<i>", "full_sft", "<img src=x onerror=alert(1)>"),
    ]
    stub.answers = [Answer(status=500, error="<b>bad</b>")]
    page = visit(stub.url)
    assert "<b>x</b>" in page.locator(".model").inner_text()
    answer = ask(page, "你好")
    assert "<b>bad</b>" in answer.locator(".problem").inner_text()


FAILED = [
    (Answer(status=500, error="CUDA out of memory"), "服务器出错了：CUDA out of memory"),
    (Answer(status=400, error="too long"), "服务器拒绝了请求：too long"),
    (Answer(["一半"], finish=None), "连接中断"),
    (Answer(raw=b""), "连接中断"),
    (Answer(raw=b"data: {not json}\n\n"), "连接中断"),
    (Answer(raw=b"data: [1]\n\ndata: 5\n\n"), "连接中断"),
    (Answer(raw=b'data: {"error": {"message": "the engine died"}}\n\n'), "the engine died"),
    (Answer(raw=b'data: {"choices": [{"delta": {"content": 5}}]}\n\n'), "连接中断"),
    (Answer(raw=chunk("一") + b"data: \xff\xfe\n\n"), "连接中断"),
]


def test_a_failed_answer_is_said_and_can_be_tried_again(stub, visit):
    page = visit(stub.url)
    for answer, words in FAILED:
        button(page, "新对话").first.click()
        stub.answers = [answer, Answer(["好了"])]
        failed = ask(page, "你好")
        assert words in failed.locator(".problem").inner_text()
        button(failed, "重试").click()
        page.locator(".answer", has_text="好了").wait_for()
        ended(page.locator(".answer"))
        assert texts(page) == ["你好", "好了"]
        assert stub.requests[-2] == stub.requests[-1]


def test_every_way_to_write_server_sent_events(stub, visit):
    page = visit(stub.url)
    for raw in (
        b": a comment\r\n\r\n" + chunk("你好").replace(b"\n", b"\r\n") + b"event: x\r\ndata: [DONE]\r\n\r\n",
        b'data: {"choices": [{"delta":\ndata: {"content": "\xe4\xbd\xa0\xe5\xa5\xbd"}}]}\n\ndata:[DONE]\n\n',
        chunk("你") + chunk("好") + b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n',
    ):
        button(page, "新对话").first.click()
        stub.answers = [Answer(raw=raw)]
        assert ask(page, "问").locator(".problem").is_hidden()
        assert texts(page) == ["问", "你好"]


def test_a_busy_server_is_waited_for(stub, visit):
    stub.answers = [Answer(status=429, error="queue full", headers={"Retry-After": "2"}), Answer(["到你了"])]
    page = visit(stub.url)
    at_second(page, 10)
    answer = ask(page, "你好")
    assert "服务器正忙" in answer.locator(".problem").inner_text()
    assert answer.locator(".problem button").is_disabled()
    page.get_by_text("2 秒后可重试").wait_for()
    at_second(page, 11.5)
    page.get_by_text("1 秒后可重试").wait_for()
    at_second(page, 12)
    button(answer, "重试").click()  # waits until it can be pressed
    page.locator(".answer", has_text="到你了").wait_for()


def test_the_key_is_asked_for_once_and_forgotten_with_the_tab(stub, visit):
    stub.key = "secret"
    page = visit(stub.url)
    field = page.get_by_label("API 密钥", exact=True)
    for wrong in ("wrong", "密钥"):  # the second cannot even be sent
        field.fill(wrong)
        field.press("Enter")
        page.get_by_text("这个密钥不对").wait_for()
    field.fill(stub.key)
    field.press("Enter")
    page.locator(".model:enabled").wait_for()
    assert ask(page, "你好").locator(".problem").is_hidden()
    page.reload()
    page.locator(".model:enabled").wait_for()
    assert page.evaluate("sessionStorage.getItem('minimind.key')") == stub.key
    assert stub.key not in page.evaluate("JSON.stringify(localStorage)")


def test_without_a_key_the_page_says_what_it_needs(stub, visit):
    stub.key = "secret"
    page = visit(stub.url)
    button(page, "取消").click()
    page.get_by_text("需要正确的 API 密钥").wait_for()
    type_and_send(page, "你好")
    page.locator("dialog[open]").wait_for()
    page.keyboard.press("Escape")
    ended(page.locator(".answer"))
    assert "需要正确的 API 密钥" in page.locator(".problem").inner_text()
    button(page.locator(".problem"), "重试").click()
    page.get_by_label("API 密钥", exact=True).fill("secret")
    page.keyboard.press("Enter")
    page.locator(".answer", has_text="你好，我是 MiniMind。").wait_for()


def test_a_server_that_is_gone_is_said_and_looked_for_again(visit, stub):
    page = visit(stub.url)
    port = stub.server.server_port
    stub.close()
    assert "连不上服务器" in ask(page, "你好").locator(".problem").inner_text()
    again = Stub(port)
    button(page, "重试").click()
    page.locator(".answer", has_text="你好，我是 MiniMind。").wait_for()
    again.close()


def test_models_that_cannot_be_read_are_said(stub, visit):
    stub.models = None
    page = visit(stub.url)
    page.locator(".banner", has_text="读不到模型列表").wait_for()
    stub.models = [model("minimind", "full_sft")]
    button(page, "重试").click()
    page.locator(".model:enabled").wait_for()
    assert page.locator(".banner").is_hidden()


def test_full_storage_is_said_and_the_conversation_goes_on(stub, visit):
    page = visit(stub.url)
    page.evaluate("""() => {
      for (let size = 1 << 22; size >= 1; size >>= 1)
        for (const name of ["filler-a", "filler-b"])
          try { localStorage.setItem(name + size, "x".repeat(size)); } catch {}
    }""")
    ask(page, "放得下吗？" * 100)
    page.get_by_text("浏览器的存储空间已满").wait_for()
    ask(page, "再来")
    assert page.locator(".answer").count() == 2
    page.evaluate("""() => {
      const fillers = Object.keys(localStorage).filter((name) => name.startsWith("filler"));
      for (const name of fillers) localStorage.removeItem(name);
    }""")
    ask(page, "现在呢？")
    assert page.locator(".banner").is_hidden()
    page.reload()
    page.locator(".answer .foot").nth(2).wait_for()


def test_a_browser_without_storage_still_talks(stub, visit):
    refuse = """for (const name of ["localStorage", "sessionStorage"])
      Object.defineProperty(window, name, {get() { throw new DOMException("no", "SecurityError"); }});"""
    stub.key = "secret"
    page = visit(stub.url, init=refuse)
    page.get_by_label("API 密钥", exact=True).fill("secret")
    page.keyboard.press("Enter")
    page.locator(".model:enabled").wait_for()
    ask(page, "你好")
    page.get_by_text("浏览器禁止本页存储数据").wait_for()
    ask(page, "再见")
    assert titles(page) == ["你好"]
    button(page, "设置").click()
    page.get_by_label("English").check()
    page.get_by_role("heading", name="Sampling").wait_for()


def test_damaged_entries_in_the_storage_are_passed_over(stub, visit):
    page = visit(stub.url)
    damaged = [
        "not json",
        "[]",
        '{"id": "a", "messages": []}',
        '{"id": "a", "messages": [{"role": "system", "content": "x"}]}',
        '{"id": "a", "messages": [{"role": "user", "content": {"x": 1}}]}',
        '{"id": "<b>", "messages": [{"role": "user", "content": "x"}]}',
        '{"id": "a", "messages": [null]}',
    ]
    page.evaluate(
        "texts => texts.forEach((text, index) => localStorage.setItem('minimind.chat.' + index, text))",
        damaged,
    )
    page.evaluate("""() => localStorage.setItem("minimind.settings", '{"temperature": "x", "system": 5}')""")
    page.goto(f"{stub.url}/#a")
    page.reload()
    page.locator(".model:enabled").wait_for()
    assert titles(page) == []
    ask(page, "你好")
    assert stub.requests[-1]["temperature"] == 0.85


def test_two_tabs_do_not_overwrite_each_other(stub, visit):
    page = visit(stub.url)
    ask(page, "第一页")
    other = page.context.new_page()
    other.goto(stub.url)
    ask(other, "第二页")
    page.get_by_text("第二页").wait_for()
    assert titles(page) == ["第二页", "第一页"]
    button(other, "第一页").click()
    ask(other, "接着说")
    page.get_by_text("接着说").wait_for()
    assert texts(page) == texts(other)
    ask(page, "我也说")
    page.reload()
    page.locator(".answer .foot").nth(2).wait_for()
    assert titles(page) == ["第一页", "第二页"]
