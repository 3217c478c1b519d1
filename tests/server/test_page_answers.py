"""The chat page while answers come: streaming, thinking, stopping, settings, copying."""

from __future__ import annotations

from threading import Event

from minimind.chat.options import SamplingOptions
from server.steps import ask, at_second, button, ended, texts, titles, type_and_send
from server.stub import Answer

PHONE = {"width": 360, "height": 640}


def test_an_answer_is_shown_while_it_comes(stub, visit):
    hold = Event()
    stub.answers = [Answer(["春天", "来了", "。"], hold=hold)]
    page = visit(stub.url)
    type_and_send(page, "写一句话")
    page.get_by_text("春天来了").wait_for()
    assert page.locator(".foot").is_hidden()
    assert button(page, "停止").is_visible()
    hold.set()
    ended(page.locator(".answer"))
    assert texts(page) == ["写一句话", "春天来了。"]
    assert button(page, "发送").is_visible()


def test_figures_are_those_of_the_server(stub, visit):
    hold = Event()
    stub.answers = [Answer(["字"] * 41, hold=hold)]
    page = visit(stub.url)
    at_second(page, 10)
    type_and_send(page, "说")
    page.get_by_text("字" * 40).wait_for()
    at_second(page, 12)
    hold.set()
    ended(page.locator(".answer"))
    figures = page.locator(".figures").inner_text().split(" · ")
    # 40 tokens in the 2 seconds after the first
    assert figures == ["41 token", "20 token/s", "上下文 65 / 2,048"]


def test_thinking_is_folded_away_and_unfolds(stub, visit):
    hold = Event()
    stub.answers = [Answer(["答案是 3。"], ["先算", "速度", "之和"], hold=hold)]
    page = visit(stub.url)
    at_second(page, 10)
    type_and_send(page, "几小时？")
    page.get_by_text("思考中… 0 秒").wait_for()
    at_second(page, 11.5)
    page.get_by_text("思考中… 1 秒").wait_for()
    assert page.get_by_text("先算速度").is_hidden()
    page.locator("summary").click()
    page.get_by_text("先算速度之和").wait_for()
    hold.set()
    ended(page.locator(".answer"))
    assert page.locator("summary").inner_text().startswith("思考了 ")
    assert page.get_by_text("先算速度之和").is_visible()  # stays as the person left it
    page.reload()
    page.get_by_text("思考了 ").wait_for()
    assert page.get_by_text("先算速度之和").is_hidden()


def test_thoughts_are_not_sent_back(stub, visit):
    stub.answers = [Answer(["三"], ["一加二"])]
    page = visit(stub.url)
    ask(page, "一加二？")
    ask(page, "再加一？")
    assert stub.requests[-1]["messages"] == [
        {"role": "user", "content": "一加二？"},
        {"role": "assistant", "content": "三"},
        {"role": "user", "content": "再加一？"},
    ]


def test_the_oldest_turns_are_left_out_when_they_would_not_fit(stub, visit):
    stub.answers = [Answer(["答"] * 4, prompt=1900)]  # for 4 characters, and the model takes 2,048 tokens
    page = visit(stub.url)
    ask(page, "问题一。")
    figures = ask(page, "问题二。").locator(".figures").inner_text()
    assert [message["content"] for message in stub.requests[-1]["messages"]] == ["问题二。"]
    assert "最早 1 轮没有发送" in figures


def test_the_server_says_that_turns_do_not_fit(stub, visit):
    page = visit(stub.url)
    for question in "一二三四五":
        ask(page, question)
    full = Answer(status=400, error="too long", code="context_length_exceeded")
    stub.answers = [full, full, Answer(["好"])]
    figures = ask(page, "六").locator(".figures").inner_text()
    sent = [
        [m["content"] for m in request["messages"] if m["role"] == "user"] for request in stub.requests[-3:]
    ]
    assert sent == [list("一二三四五六"), list("三四五六"), list("四五六")]
    assert "最早 3 轮没有发送" in figures

    stub.answers = [full]
    assert "too long" in ask(page, "七").locator(".problem").inner_text()
    assert [message["content"] for message in stub.requests[-1]["messages"]] == ["七"]


def test_stopping_keeps_what_came_and_tells_the_server(stub, visit):
    stub.answers = [Answer(["字"] * 400, pause=0.02), Answer(["好"])]
    page = visit(stub.url)
    type_and_send(page, "写很多字")
    page.get_by_text("字字字").last.wait_for()
    button(page, "停止").click()
    ended(page.locator(".answer"))
    assert "已停止" in page.locator(".figures").inner_text()
    assert stub.left.wait(5)
    kept = texts(page)[1]
    assert set(kept) == {"字"}
    ask(page, "继续")
    assert stub.requests[-1]["messages"][1] == {"role": "assistant", "content": kept}


def test_a_question_whose_answer_never_began_is_not_sent_again(stub, visit):
    stub.answers = [Answer(["来"], pause=30), Answer(["好"])]
    page = visit(stub.url)
    type_and_send(page, "没有回答的")
    page.locator(".waiting").wait_for()
    page.locator(".composer textarea").press("Escape")
    ended(page.locator(".answer"))
    ask(page, "有回答的")
    assert [message["content"] for message in stub.requests[-1]["messages"]] == ["有回答的"]


def test_an_answer_goes_on_while_another_conversation_is_shown(stub, visit):
    hold = Event()
    stub.answers = [Answer(["苹果", "很甜"], hold=hold), Answer(["香蕉很软"])]
    page = visit(stub.url)
    type_and_send(page, "苹果？")
    page.get_by_text("苹果", exact=True).wait_for()
    button(page, "新对话").first.click()
    assert button(page, "发送").is_visible()
    assert texts(page) == []
    ask(page, "香蕉？")
    hold.set()
    page.locator(".chats .busy").wait_for(state="detached")
    button(page, "苹果？").click()
    assert texts(page) == ["苹果？", "苹果很甜"]


def test_a_conversation_that_is_deleted_while_its_answer_comes_stays_deleted(stub, visit):
    stub.answers = [Answer(["字"] * 400, pause=0.02)]
    page = visit(stub.url)
    type_and_send(page, "苹果？")
    page.get_by_text("字字字").last.wait_for()
    button(page, "删除“苹果？”").click()
    assert stub.left.wait(5)
    page.wait_for_timeout(1200)  # longer than a save waits
    page.reload()
    page.locator(".model:enabled").wait_for()
    assert [titles(page), texts(page)] == [[], []]


def test_what_had_come_survives_closing_the_tab(stub, visit):
    stub.answers = [Answer(["半句", "话"], hold=Event())]
    page = visit(stub.url)
    type_and_send(page, "说")
    kept = "() => Object.values(localStorage).some((text) => text.includes('半句'))"
    page.wait_for_function(kept)  # before the end, for a browser may also crash
    page.reload()
    page.locator(".foot").wait_for()
    assert texts(page) == ["说", "半句"]
    assert "收到的部分已保留" in page.locator(".problem").inner_text()


def test_settings_are_sent_and_kept(stub, visit):
    page = visit(stub.url)
    button(page, "设置").click()
    values = {
        "温度": "0.3",
        "top_p": "0.9",
        "top_k": "40",
        "重复惩罚": "1.2",
        "最多生成": "256",
        "随机种子": "7",
    }
    for label, value in values.items():
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_label(label, exact=True).press("Tab")
    page.get_by_label("系统提示词").fill("你是老师。")
    page.reload()
    ask(page, "你好")
    request = stub.requests[-1]
    assert request["messages"][0] == {"role": "system", "content": "你是老师。"}
    expected = {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.2,
        "max_tokens": 256,
        "seed": 7,
    }
    assert {name: request[name] for name in expected} == expected
    assert request["stream_options"] == {"include_usage": True}


def test_reset_gives_the_defaults_of_the_sampler(stub, visit):
    page = visit(stub.url)
    button(page, "设置").click()
    for label in ("温度", "top_k", "随机种子"):
        page.get_by_label(label, exact=True).fill("2")
        page.get_by_label(label, exact=True).press("Tab")
    button(page, "恢复默认").click()
    page.reload()
    ask(page, "你好")
    request, default = stub.requests[-1], SamplingOptions()
    assert request["temperature"] == default.temperature
    assert request["top_p"] == default.top_p
    assert request["repetition_penalty"] == default.repetition_penalty
    assert request["max_tokens"] == default.max_new_tokens
    assert [request.get("top_k"), request.get("seed")] == [default.top_k, default.seed]
    assert not {"top_k", "seed"} & set(request)


def test_a_setting_that_makes_no_sense_becomes_the_nearest_that_does(stub, visit):
    page = visit(stub.url)
    button(page, "设置").click()
    for label, typed, kept in [
        ("温度", "-1", "0"),
        ("温度", "99", "2"),
        ("温度", "", "0.85"),
        ("top_p", "0", "0.05"),
        ("top_k", "3.7", "4"),
        ("重复惩罚", "0.1", "1"),
        ("最多生成", "1000000", "2048"),  # the model's max_length
        ("随机种子", "-5", "0"),
        ("随机种子", "1e30", "9007199254740991"),
    ]:
        field = page.get_by_label(label, exact=True)
        field.fill(typed)
        field.press("Tab")
        assert (label, typed, field.input_value()) == (label, typed, kept)


def test_enter_while_an_input_method_composes_sends_nothing(stub, visit):
    page = visit(stub.url)
    area = page.locator(".composer textarea")
    area.focus()
    keys = page.context.new_cdp_session(page)
    keys.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6})
    assert area.input_value() == "ni hao"
    area.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
    area.evaluate("""area => area.dispatchEvent(Object.defineProperty(
        new KeyboardEvent("keydown", {key: "Enter"}), "keyCode", {value: 229}))""")  # Safari's last
    assert page.locator(".question").count() == 0
    keys.send("Input.insertText", {"text": "你好"})
    area.press("Enter")
    page.locator(".foot").wait_for()
    assert texts(page)[0] == "你好"


def test_shift_enter_is_a_new_line(stub, visit):
    page = visit(stub.url)
    area = page.locator(".composer textarea")
    low = area.bounding_box()["height"]
    area.press_sequentially("一")
    area.press("Shift+Enter")
    area.press_sequentially("二")
    assert area.bounding_box()["height"] > low
    area.press("Enter")
    page.locator(".foot").wait_for()
    assert stub.requests[-1]["messages"][-1]["content"] == "一\n二"
    assert area.bounding_box()["height"] == low


def test_enter_sends_nothing_while_an_answer_comes_or_nothing_was_written(stub, visit):
    hold = Event()
    stub.answers = [Answer(["好", "的"], hold=hold)]
    page = visit(stub.url)
    page.locator(".composer textarea").press("Enter")
    type_and_send(page, "  \n ")
    assert page.locator(".question").count() == 0
    type_and_send(page, "一")
    type_and_send(page, "二")
    assert page.locator(".composer textarea").input_value() == "二"
    hold.set()
    ended(page.locator(".answer"))
    assert len(stub.requests) == 1


def test_the_log_follows_only_a_reader_at_its_end(stub, visit):
    stub.answers = [Answer(["一行\n\n"] * 60), Answer(["一行\n\n"] * 100, pause=0.02)]
    page = visit(stub.url, viewport=PHONE)
    ask(page, "写六十行")
    log = page.locator(".log")
    rest = "log => log.scrollHeight - log.scrollTop - log.clientHeight"
    assert log.evaluate(rest) < 2
    assert button(page, "回到最新").is_hidden()

    type_and_send(page, "再写")
    page.locator(".answer").nth(1).get_by_text("一行").nth(20).wait_for()
    assert log.evaluate(rest) < 60  # it follows
    log.evaluate("log => log.scrollTo(0, 100)")
    page.locator(".answer").nth(1).get_by_text("一行").nth(60).wait_for()
    assert log.evaluate("log => log.scrollTop") == 100
    button(page, "回到最新").click()
    page.locator(".foot").nth(1).wait_for()
    assert log.evaluate(rest) < 2


def test_copying_an_answer_and_a_block_of_code(stub, visit):
    stub.answers = [Answer(["**看**：\n\n```python\n", "print('<b>')\n", "```\n"])]
    page = visit(stub.url, permissions=["clipboard-read", "clipboard-write"])
    answer = ask(page, "代码")
    button(answer, "复制").click()
    page.locator("#status", has_text="已复制").wait_for(state="attached")
    assert page.evaluate("navigator.clipboard.readText()") == "**看**：\n\n```python\nprint('<b>')\n```\n"
    button(answer, "复制代码").click()
    page.wait_for_function("async () => await navigator.clipboard.readText() === `print('<b>')`")


def test_copying_where_the_browser_has_no_clipboard_for_the_page(stub, visit):
    gone = (
        "Object.defineProperty(navigator, 'clipboard', {value: undefined})"  # plain http from another machine
    )
    page = visit(stub.url, init=gone)
    answer = ask(page, "你好")
    button(answer, "复制").click()
    page.locator("#status", has_text="已复制").wait_for(state="attached")
    area = page.locator(".composer textarea")
    area.press("Control+v")
    assert area.input_value() == "你好，我是 MiniMind。"


def test_screen_readers_hear_the_beginning_and_the_whole_answer(stub, visit):
    hold = Event()
    stub.answers = [Answer(["三", "点"], hold=hold)]
    page = visit(stub.url)
    type_and_send(page, "几点了？")
    page.locator("#status", has_text="正在回答").wait_for(state="attached")
    hold.set()
    page.locator("#status", has_text="回答完毕：三点").wait_for(state="attached")
    assert page.locator(".messages").get_attribute("aria-live") == "off"  # not every token


def test_a_long_answer_in_small_pieces_leaves_the_page_usable(stub, visit):
    text = "这是一段*文字*，里面有 `code` 和 [链接](https://example.com)。\n\n- 一\n- 二\n\n"
    stub.answers = [Answer([text] * 400)]  # 20,000 characters as fast as they go
    page = visit(stub.url)
    page.evaluate("""() => {
      window.longest = 0;
      let before = performance.now();
      setInterval(() => {
        const now = performance.now();
        window.longest = Math.max(window.longest, now - before);
        before = now;
      }, 0);
    }""")
    answer = ask(page, "长")
    assert answer.locator("li").count() == 800
    assert page.evaluate("window.longest") < 3000  # milliseconds without an answer to a click
