"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from server.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Small models are no faster with more threads, and tests run side by side.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One for all tests of a process: Playwright does not start a second one beside it."""
    with chromium() as found:
        yield found
