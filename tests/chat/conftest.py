"""One thread for models this small: waiting for the others would take far longer than the work."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
