"""The chat page in Chromium, served by the stub or by the real server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.browser import Watch, chromium
from tests.server.stub import Stub

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

REAL = "MINIMIND_PAGE_URL"  # the address of a running server that has no API key
TIMEOUT = 10_000  # milliseconds that a test waits for what it expects


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.close()


@pytest.fixture(params=["stub", "app"])
def site(request: pytest.FixtureRequest) -> str:
    """The address of a server: tests with it hold for whatever a model says."""
    if request.param == "stub":
        return request.getfixturevalue("stub").url
    if not os.environ.get(REAL):
        pytest.skip(f"name a running server in {REAL}")
    return os.environ[REAL]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open an address as a new person: `visit(url, **options of the context)`, by default in Chinese."""
    contexts, watches = [], []

    def open_page(url: str, init: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"locale": "zh-CN", **options})
        context.set_default_timeout(TIMEOUT)
        contexts.append(context)
        page = context.new_page()
        if init:
            page.add_init_script(init)
        watches.append(Watch(page, url))
        page.goto(url)
        page.locator(".model:enabled, .banner:visible, dialog[open]").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [fault for watch in watches for fault in watch.faults] == []
