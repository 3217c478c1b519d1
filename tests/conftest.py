"""What all tests share."""

from __future__ import annotations

import torch

# Small models are no faster with more threads, and tests run side by side.
torch.set_num_threads(1)
