"""Chromium for the tests of the chat page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from shutil import which
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Containers have no user namespaces for the browser's own sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watch:
    """What a page may never do: throw, break its content security policy, ask another host for anything."""

    def __init__(self, page: Page, url: str) -> None:
        self.faults: list[str] = []
        host = urlsplit(url).netloc
        page.on("pageerror", lambda error: self.faults.append(f"thrown: {error}"))
        page.on("console", lambda message: self.note(message.type, message.text))
        page.on("request", lambda request: self.check(request.url, host))

    def note(self, kind: str, text: str) -> None:
        if kind == "error" and not text.startswith(
            "Failed to load resource"
        ):  # the server's errors are wanted
            self.faults.append(f"console: {text}")

    def check(self, url: str, host: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.netloc != host:
            self.faults.append(f"request to {url}")
