"""What a person does on the chat page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page


def type_and_send(page: Page, text: str) -> None:
    page.locator(".composer textarea").fill(text)
    page.locator(".composer textarea").press("Enter")


def ask(page: Page, text: str) -> Locator:
    """Ask, and wait for the end of the answer. Returns what was answered."""
    count = page.locator(".answer").count()
    type_and_send(page, text)
    answer = page.locator(".answer").nth(count)
    ended(answer)
    return answer


def ended(answer: Locator) -> None:
    answer.locator(".foot").wait_for()


def button(page: Page | Locator, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def texts(page: Page) -> list[str]:
    """What stands in the conversation, message by message."""
    return page.locator(".bubble, .answer > .markdown").all_inner_texts()


def titles(page: Page) -> list[str]:
    return page.locator(".chat-title").all_inner_texts()


def at_second(page: Page, second: float) -> None:
    """Stop the page's clocks there: what it measures hangs no more on how busy we are. Timers run on."""
    page.evaluate("now => { Date.now = performance.now = () => now }", 1000 * second)
