"""The loops that Numba compiles against NumPy and PyTorch."""

from __future__ import annotations

import errno
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba.core import caching

from minimind.chat import kernels
from minimind.chat.cache import Stretch
from minimind.chat.inference import InferenceModel
from minimind.paths import ROOT

from .models import SHAPES, random_model


def test_exp():
    x = np.linspace(-87, 87, 100_001).astype(np.float32)
    found = np.array([kernels.exp(number) for number in x])
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 3e-7
    assert kernels.exp(np.float32(-1e9)) < 2e-38


def test_swiglu():
    x = torch.tensor([[*torch.linspace(-1000, 1000, 401), *torch.randn(401)]])
    gate, up = x.chunk(2, dim=1)
    torch.testing.assert_close(torch.from_numpy(kernels.swiglu(x.numpy())), F.silu(gate) * up)


def test_rows_are_rounded_to_the_nearest_step():
    x = np.array(
        [[1.0, -2.0, 0.51, 0.49, 127.0], [-0.0, 0.0, 0.0, 0.0, 0.0], [254.0, -254.0, 3.1, 2.9, 1e-9]]
    )
    rounded, steps = kernels.round_rows(x.astype(np.float32))
    assert rounded.tolist() == [[1, -2, 1, 0, 127], [0, 0, 0, 0, 0], [127, -127, 2, 1, 0]]
    assert steps[[0, 2]].tolist() == [1, 2]


@pytest.mark.parametrize("rows", [1, 2, 16, 33])
@pytest.mark.parametrize("exact", [True, False])
def test_integer_sums_are_exact(rows, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(kernels, "pytorch_is_exact", lambda: False)
    x = torch.randint(-127, 128, (rows, 1408), dtype=torch.int8)
    weight = torch.randint(-127, 128, (33, 1408), dtype=torch.int8)
    x[0] = weight[0] = 127
    expected = x.long() @ weight.long().t()
    assert torch.from_numpy(kernels.integer_product(x.numpy(), weight.numpy())).equal(expected.int())


EXACT = """
import numpy as np
from minimind.chat import kernels
largest = np.full((2, 64), 127, np.int8)
print(kernels.pytorch_is_exact(), kernels.integer_product(largest, largest).tolist())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN has this way on x86 alone")
def test_on_a_processor_without_vnni_sums_are_exact_too(monkeypatch):
    """Zen 3, Core of the ninth generation and older."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    done = subprocess.run([sys.executable, "-c", EXACT], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"False {[[64 * 127 * 127] * 2] * 2}\n", done.stderr


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", ["half", "int8"])
def test_a_row_is_the_same_alone_and_among_others(shape, weights):
    """Alone, in int8, products are a loop; among others they are PyTorch's."""
    ready, ids = InferenceModel(random_model(SHAPES[shape]), weights), torch.randint(3, 300, (4, 21)).tolist()

    def logits(rows: list[list[int]]) -> torch.Tensor:
        cache = ready.cache(len(rows), 21)
        ready.read([Stretch(row, 0, prompt[:15]) for row, prompt in enumerate(rows)], cache)
        steps = [ready.next_logits([row[i] for row in rows], [i] * len(rows), cache) for i in range(15, 21)]
        return torch.stack(steps, dim=1)

    together = logits(ids)
    assert all(logits([row]).equal(together[i : i + 1]) for i, row in enumerate(ids))


def test_attention_is_that_of_pytorchs_operations():
    """Which stand in for the loop on a GPU."""
    model = InferenceModel(random_model(), "fp32")
    ways, places = [model.cache(3, 12) for _ in range(2)], [4, 11, 0]
    ways[0].buffer.normal_()
    ways[1].buffer.copy_(ways[0].buffer)
    qkv = torch.randn(3, model.config.num_attention_heads + 2 * model.config.num_key_value_heads, 8)
    loop = ways[0]._by_kernel(places)(1, qkv.clone())
    operations = ways[1]._by_operations(places)(1, qkv.clone())
    torch.testing.assert_close(loop, operations)
    torch.testing.assert_close(ways[0].buffer, ways[1].buffer)


def test_what_is_no_number_stays_visible():
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    ready = InferenceModel(model, "fp32")
    assert ready.next_logits([5], [0], ready.cache(1, 4)).isnan().all()


def twice(x):
    return 2 * x


def no_place(monkeypatch) -> None:
    """As for a user who owns nothing."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])


def no_room(monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", full)


@pytest.mark.parametrize(("obstacle", "kept"), [(no_place, 0), (no_room, 0), (lambda _: None, 1)])
def test_code_is_kept_where_that_can_be(obstacle, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.numba.config, "CACHE_DIR", str(tmp_path))
    obstacle(monkeypatch)
    for hits in 0, kept:  # each a process of its own, as far as Numba is concerned
        function = kernels.compiled()(twice)
        assert function(21) == 42
        assert sum(function.stats.cache_hits.values()) == hits


THREADS = """
import torch
from minimind.chat import kernels
torch.set_num_threads(1)
kernels.share_threads()
print(torch.get_num_threads(), kernels.numba.get_num_threads())
"""


def test_the_loops_leave_pytorch_the_threads_it_has(monkeypatch):
    """One OpenMP serves both, and training, whose sums depend on them, may go on after an answer."""
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1 1\n", done.stderr
