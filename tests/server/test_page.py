"""The chat page with any server: these hold for whatever the model answers."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.request import urlopen

from server.steps import ask, button, texts, titles


def test_a_question_is_answered_and_both_are_there_after_a_reload(site, visit):
    page = visit(site)
    answer = ask(page, "你好，你是谁？")
    said = texts(page)
    assert said[0] == "你好，你是谁？"
    assert "token" in answer.locator(".figures").inner_text()
    page.reload()
    page.locator(".answer .foot").wait_for()
    assert texts(page) == said
    assert titles(page) == ["你好，你是谁？"]


def test_models_and_adapters_are_those_of_the_server(site, visit):
    listed = [model["id"] for model in json.load(urlopen(f"{site}/v1/models"))["data"]]
    page = visit(site)
    options = page.locator(".model option").evaluate_all("nodes => nodes.map((node) => node.value)")
    assert sorted(options) == sorted(listed)
    assert page.locator(".model").input_value() == "minimind"
    page.locator(".model").select_option(listed[-1])
    assert ask(page, "hello").locator(".problem").is_hidden()
    page.reload()
    page.locator(".model:enabled").wait_for()
    assert page.locator(".model").input_value() == listed[-1]


def test_regenerate_answers_the_same_question_again(site, visit):
    page = visit(site)
    ask(page, "一")
    ask(page, "二")
    button(page, "重新回答").click()
    page.locator(".answer .foot").nth(1).wait_for()
    assert [page.locator(".question").count(), page.locator(".answer").count()] == [2, 2]
    assert button(page, "重新回答").count() == 1  # only the last can be
    assert page.locator(".composer textarea").evaluate("area => area === document.activeElement")


def test_a_conversation_longer_than_the_context_goes_on(site, visit):
    page = visit(site)
    for number in range(8):
        answer = ask(page, f"第{number}个问题很长：" + "为什么天空是蓝色的？" * 8)
        assert answer.locator(".problem").is_hidden()


def test_an_edited_message_replaces_what_followed_it(site, visit):
    page = visit(site)
    ask(page, "第一个问题")
    ask(page, "第二个问题")
    page.locator(".question").first.hover()
    button(page, "修改这条消息").first.click()
    area = page.locator(".edit-area")
    assert area.input_value() == "第一个问题"
    area.fill("不要了")
    area.press("Escape")
    assert texts(page)[0] == "第一个问题"
    button(page, "修改这条消息").first.click()
    area.fill("改过的问题")
    area.press("Enter")
    page.locator(".answer .foot").wait_for()
    assert page.locator(".bubble").all_inner_texts() == ["改过的问题"]
    assert titles(page) == ["改过的问题"]
    assert page.locator(".composer textarea").evaluate("area => area === document.activeElement")


def test_several_conversations_are_kept_renamed_deleted_and_brought_back(site, visit):
    page = visit(site)
    ask(page, "苹果")
    button(page, "新对话").first.click()
    assert texts(page) == []
    ask(page, "香蕉")
    assert titles(page) == ["香蕉", "苹果"]

    button(page, "苹果").click()
    assert texts(page)[0] == "苹果"
    button(page, "重命名“苹果”").click()
    page.keyboard.type("水果")
    page.keyboard.press("Enter")
    assert titles(page) == ["香蕉", "水果"]

    button(page, "删除“水果”").click()
    assert titles(page) == ["香蕉"]
    assert texts(page) == []
    button(page, "撤销").click()
    assert titles(page) == ["香蕉", "水果"]
    assert texts(page)[0] == "苹果"

    button(page, "删除“香蕉”").click()
    page.reload()
    page.locator(".answer .foot").wait_for()
    assert titles(page) == ["水果"]


def test_all_are_deleted_and_brought_back(site, visit):
    page = visit(site)
    for text in ("苹果", "香蕉"):
        button(page, "新对话").first.click()
        ask(page, text)
    button(page, "设置").click()
    button(page, "全部删除").click()
    assert [titles(page), texts(page)] == [[], []]
    button(page, "撤销").click()
    assert titles(page) == ["香蕉", "苹果"]


def test_back_leads_to_the_conversation_before(site, visit):
    page = visit(site)
    ask(page, "苹果")
    button(page, "新对话").first.click()
    ask(page, "香蕉")
    button(page, "苹果").click()
    page.go_back()
    page.get_by_text("香蕉").nth(1).wait_for()
    assert texts(page)[0] == "香蕉"


def test_export_and_import(site, visit, tmp_path: Path):
    page = visit(site)
    ask(page, "带走我")
    said = texts(page)
    button(page, "设置").click()
    with page.expect_download() as download:
        button(page, "导出全部对话").click()
    file = tmp_path / "chats.json"
    download.value.save_as(file)

    page = visit(site)
    button(page, "设置").click()
    page.locator(".file").set_input_files(file)
    page.get_by_text("已导入 1 个对话").wait_for()
    button(page, "带走我").click()
    assert texts(page) == said


def test_a_file_of_something_else_is_refused(site, visit, tmp_path: Path):
    page = visit(site)
    for text in ("", "[]", '{"format": "minimind-conversations"}', "{", "\x00\xff", '{"conversations": [1]}'):
        (tmp_path / "wrong.json").write_text(text)
        button(page, "设置").click()
        page.locator(".file").set_input_files(tmp_path / "wrong.json")
        page.get_by_text("这个文件不是从 MiniMind 导出的对话").wait_for()
        page.locator("#toast").get_by_role("button").click()
    assert titles(page) == []


def test_language_follows_the_browser_and_can_be_switched(site, visit):
    page = visit(site, locale="en-GB")
    assert page.locator("html").get_attribute("lang") == "en"
    button(page, "Settings").click()
    page.get_by_label("中文").check()
    page.get_by_role("heading", name="采样").wait_for()
    page.keyboard.press("Escape")
    ask(page, "你好")
    assert button(page, "重新回答").count() == 1
    page.reload()
    assert page.locator(".new-chat").inner_text() == "新对话"
    assert page.locator("html").get_attribute("lang") == "zh-CN"


def test_theme_follows_the_system_and_can_be_set(site, visit):
    page = visit(site, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    # A function: Playwright would hand an expression to eval(), which the page's policy forbids.
    page.wait_for_function(f"dark => {ground} !== dark", arg=dark)
    button(page, "设置").click()
    page.get_by_label("深色").check()
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark


def test_the_policy_of_the_server_forbids_scripts_in_the_page(site, browser):
    policy = urlopen(site).headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    page = browser.new_page()  # one that nobody watches for what is tried here
    page.goto(site)
    # Straight into the browser, as if the page had a fault: an attribute and an inline script must not run.
    page.evaluate(
        """() => {
          const image = document.createElement("img");
          try { image.setAttribute("onerror", "window.broken = 1"); } catch {}
          image.src = "data:,";
          const script = document.createElement("script");
          try { script.textContent = "window.broken = 2"; } catch {}
          document.body.append(image, script);
        }"""
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.broken") is None


def test_nothing_sticks_out_of_a_phone(site, visit):
    page = visit(site, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    parts = "button, select, textarea, .bubble, .markdown, dialog[open] *"
    outside = """() => [...document.querySelectorAll(PARTS)]
      .map((node) => [node, node.getBoundingClientRect()])
      .filter(([node, box]) => box.width && node.checkVisibility({visibilityProperty: true}) &&
        (box.left < 0 || box.right > innerWidth)).map(([node]) => node.outerHTML)""".replace(
        "PARTS", f"'{parts}'"
    )
    assert page.evaluate(outside) == []
    ask(page, "一个很长很长的问题，" * 30 + "https://example.com/" + "a" * 200)
    assert page.evaluate(outside) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".log").evaluate("log => log.scrollWidth - log.clientWidth") == 0
    page.locator(".open-settings").click()
    page.wait_for_timeout(300)  # it slides in
    assert page.evaluate(outside) == []


def test_the_list_lies_over_a_phone_and_goes_away(site, visit):
    page = visit(site, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    ask(page, "苹果")
    assert page.locator(".sidebar").is_hidden()
    button(page, "显示或隐藏对话记录").click()
    button(page, "苹果").wait_for()
    assert page.locator(".main").evaluate("node => node.inert")
    page.keyboard.press("Escape")
    page.locator(".sidebar").wait_for(state="hidden")
    assert button(page, "显示或隐藏对话记录").evaluate("node => node === document.activeElement")
    button(page, "显示或隐藏对话记录").click()
    button(page, "新对话").first.click()
    page.locator(".sidebar").wait_for(state="hidden")
    assert texts(page) == []
