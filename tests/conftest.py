"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from server.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Small models are no faster with more threads, and tests run side by side.
torch.set_num_threads(1)
# Nor shall the threads of the processes that tests start hold a core while they wait.
os.environ["OMP_WAIT_POLICY"] = "passive"
# And how long an example takes depends on what runs beside it.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


def pytest_xdist_auto_num_workers() -> int:
    """How many tests run at once: some wait, for a browser, a time limit or processes that start."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for a module: Playwright starts no second beside it, nor does `asyncio.run` work until its end."""
    with chromium() as found:
        yield found
