"""The loops that Numba compiles against NumPy and PyTorch."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit
from numba.core import caching

from minimind import loops
from minimind.chat import draws, kernels, vectors
from minimind.chat.inference import InferenceModel
from minimind.chat.network import Stretch
from minimind.chat.operations import Attention, KVCache
from minimind.chat.options import WEIGHTS
from minimind.chat.tiles import WIDTH
from minimind.paths import ROOT

from .models import DENSE, SHAPES, random_model


def test_exp():
    x = np.linspace(-87, 87, 100_001).astype(np.float32)
    found = np.array([kernels.exp(number) for number in x])
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 3e-7
    assert kernels.exp(np.float32(-1e9)) < 2e-38


def test_swiglu():
    x = torch.tensor([[*torch.linspace(-1000, 1000, 401), *torch.randn(401)]])
    gate, up = x.chunk(2, dim=1)
    torch.testing.assert_close(torch.from_numpy(kernels.swiglu(x.numpy())), F.silu(gate) * up)


def test_keys_and_values_beyond_16_bits_become_their_largest():
    held = np.zeros((1, 6, WIDTH), np.uint16), np.zeros((1, 2, WIDTH), np.uint16)
    numbers = np.array([1e6, -1e6, np.nan, np.inf, 0.5, -65504], np.float32)
    kernels.keep(numbers, numbers, np.array([1, 0] * 3, np.float32), *held, 1)
    expected = [65504, -65504, np.nan, np.nan, 0.5, -65504]  # a rotation mixes no number with its neighbour
    np.testing.assert_equal(held[0].view(np.float16)[0, :, 1].tolist(), expected)
    np.testing.assert_equal(
        held[1].view(np.float16)[0, 1, :6].tolist(), [65504, -65504, np.nan, 65504, 0.5, -65504]
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_row_is_the_same_alone_and_among_others(shape, weights):
    ready, ids = InferenceModel(random_model(SHAPES[shape]), weights), torch.randint(3, 300, (4, 21)).tolist()

    def logits(rows: list[list[int]]) -> torch.Tensor:
        cache = ready.cache(len(rows), 21)
        ready.read([Stretch(row, 0, prompt[:15]) for row, prompt in enumerate(rows)], cache)
        steps = [ready.next_logits([row[i] for row in rows], [i] * len(rows), cache) for i in range(15, 21)]
        return torch.stack(steps, dim=1)

    together = logits(ids)
    assert all(logits([row]).equal(together[i : i + 1]) for i, row in enumerate(ids))


@pytest.mark.parametrize(("weights", "tolerance"), [("fp32", 1e-5), ("half", 2e-3)])
@pytest.mark.parametrize(
    "shape", [{}, {"hidden_size": 320}, {"num_attention_heads": 16, "num_key_value_heads": 1}]
)
def test_attention_is_that_of_pytorchs_operations(weights, tolerance, shape):
    """Those that a GPU has: of prompts, then of tokens at far positions, then in a row that was moved."""
    network = InferenceModel(random_model(replace(DENSE, **shape)), weights).network
    config, length = network.config, 70  # more than two blocks of any processor
    rotation = torch.view_as_complex(torch.from_numpy(network.weights.rotation).unflatten(1, (-1, 2)))
    packed, plain = network.cache(3, length), KVCache(config, rotation, 3, length, torch.float32)

    def compare(attention: Attention, rows: list[int], positions: list[int]) -> None:
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        qkv = torch.randn(len(rows), heads, config.head_dim)
        where = (
            network.weights.rotation,
            packed.keys[1],
            packed.values[1],
            np.array(rows),
            np.array(positions),
        )
        ours = torch.from_numpy(kernels.attend(qkv.numpy().copy(), *where))
        torch.testing.assert_close(ours, attention(1, qkv), atol=tolerance, rtol=tolerance)

    for start, end in (0, 1), (1, 40), (40, 69):
        stretches = [Stretch(row, start, range(start, end)) for row in (2, 0, 1)]
        rows = [row for row in (2, 0, 1) for _ in range(start, end)]
        compare(plain.stretches(stretches), rows, 3 * list(range(start, end)))
    compare(plain.one_token_each([69, 31, 64]), [0, 1, 2], [69, 31, 64])
    for cache in packed, plain:
        cache.move(2, 0, 64)
    compare(plain.one_token_each([64, 32, 65]), [0, 1, 2], [64, 32, 65])


@pytest.mark.parametrize(
    "numbers", [[3.0], [-2.0, -0.5, -7], [1, 9, 9, 2] * 40, [-np.inf, -1e30], [0.0, np.inf]]
)
def test_the_first_place_of_the_largest(numbers):
    numbers = np.array(numbers, np.float32)
    largest_of = njit(lambda numbers: vectors.largest_of(numbers))  # not kept, so always of today's code
    assert largest_of(numbers) == numbers.max()
    assert draws.place_of(numbers.max(), numbers) == numbers.argmax()
    assert np.isnan(largest_of(np.append(numbers, np.float32(np.nan))))


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


@pytest.mark.parametrize("file", ["*.nbc", "*.nbi"])
@pytest.mark.parametrize("length", [0, 40])
def test_kept_code_that_was_cut_short_is_made_again(file, length, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.numba.config, "CACHE_DIR", str(tmp_path))
    hits = []
    for _ in range(4):
        function = kernels.compiled()(twice)
        assert function(21) == 42
        hits.append(sum(function.stats.cache_hits.values()))
        if len(hits) == 2:
            [path] = tmp_path.rglob(file)
            path.write_bytes(path.read_bytes()[:length])
    assert hits == [0, 1, 0, 1]


def test_code_is_old_when_a_file_beside_it_changes(tmp_path, monkeypatch):
    """It may hold loops of that file."""
    monkeypatch.setattr(kernels.numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_loop.py").write_text("def twice(x):\n    return 2 * x\n")
    from own_loop import twice

    def hits() -> int:
        loops.stamp_of.cache_clear()
        function = loops.compiled()(twice)
        assert function(21) == 42
        return sum(function.stats.cache_hits.values())

    assert [hits(), hits()] == [0, 1]
    (tmp_path / "beside.py").write_text("")
    assert [hits(), hits()] == [0, 1]


ATTENTION = """
import hashlib, numpy as np
from minimind.chat import draws, kernels
random = np.random.default_rng(0)
qkv, rotation = (random.standard_normal(shape, np.float32) for shape in ((16, 12, 64), (160, 64)))
keys = random.integers(0, 15000, (16, 2, 5 * 32 // kernels.WIDTH, 64, kernels.WIDTH), np.uint16)
values = random.integers(0, 15000, (16, 2, 64 // kernels.WIDTH, 160, kernels.WIDTH), np.uint16)
found = kernels.attend(qkv, rotation, keys, values, np.arange(16), np.full(16, 97))
print(sum(kernels.attend.stats.cache_hits.values()), hashlib.md5(found.tobytes()).hexdigest())
"""


def test_kept_code_rounds_as_it_did_when_it_was_made(monkeypatch, tmp_path):
    """Which copy of a loop is called differs between the two, and so must not the order of its sums."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    made, kept = (
        subprocess.run(
            [sys.executable, "-c", ATTENTION], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
        for _ in range(2)
    )
    assert made == ["0", made[1]]
    assert kept == ["1", made[1]]


THREADS = """
import torch
from minimind import loops
from minimind.chat import draws, kernels
torch.set_num_threads(1)
kernels.share_threads()
print(torch.get_num_threads(), kernels.numba.get_num_threads())
"""


def test_the_loops_leave_pytorch_the_threads_it_has(monkeypatch):
    """One OpenMP serves both, and training, whose sums depend on them, may go on after an answer."""
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1 1\n", done.stderr
