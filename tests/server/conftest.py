"""The chat page in Chromium, served by the stub or by the real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_model import random_model

from minimind.config import ModelConfig
from minimind.lora import attach, save_lora
from minimind.weights import save_weights
from server.browser import Watch
from server.stub import Stub

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

REAL = "MINIMIND_PAGE_URL"  # the address of a running server without an API key, in place of one made here
TIMEOUT = 10_000  # milliseconds that a test waits for what it expects
# A model of random weights does not end by itself: its answers are kept short.
SHORT = """try { localStorage["minimind.settings"] ??= '{"max_tokens": 24}'; } catch {}"""


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.close()


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `minimind serve` with a small random model and an adapter."""
    if os.environ.get(REAL):
        yield os.environ[REAL]
        return
    for package in ("fastapi", "uvicorn", "minimind.server.cli"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    folder = tmp_path_factory.mktemp("out")
    write_model(folder)
    shape = ["--hidden_size", "64", "--num_hidden_layers", "2", "--lora_name", "lora_medical"]
    command = [sys.executable, "-m", "minimind", "serve", "--port", "0", "--max_seq_len", "512", *shape]
    with subprocess.Popen([*command, "--out_dir", str(folder)], stdout=subprocess.PIPE, text=True) as server:
        said = iter(server.stdout.readline, "")
        address = next((line for line in said if line.startswith("page: ")), None)
        assert address, "the server ended before it said where it listens"
        yield address.split()[1].rstrip("/")
        server.terminate()


def write_model(folder: Path) -> None:
    model = random_model(ModelConfig(hidden_size=64, num_hidden_layers=2))
    save_weights(model, folder / "full_sft_64.pth")
    attach(model)
    (folder / "lora").mkdir()
    save_lora(model.state_dict(), folder / "lora" / "lora_medical_64.pth")


@pytest.fixture(params=["stub", "app"])
def site(request: pytest.FixtureRequest) -> str:
    """The address of a server: tests with it hold for whatever a model says."""
    return request.getfixturevalue("app") if request.param == "app" else request.getfixturevalue("stub").url


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open an address as a new person: `visit(url, **options of the context)`, by default in Chinese."""
    contexts, watches = [], []

    def open_page(url: str, init: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"locale": "zh-CN", **options})
        context.set_default_timeout(TIMEOUT)
        contexts.append(context)
        page = context.new_page()
        for script in (init, SHORT):
            page.add_init_script(script)
        watches.append(Watch(page, url))
        page.goto(url)
        page.locator(".model:enabled, .banner:visible, dialog[open]").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [fault for watch in watches for fault in watch.faults] == []
