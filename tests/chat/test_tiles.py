"""Products with packed matrices against PyTorch's, with the vector instructions of several processors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llvmlite.binding import get_host_cpu_features
from numba import njit

from minimind.chat import tiles, vectors
from minimind.chat.options import WEIGHTS
from minimind.chat.packed import PACKS
from minimind.paths import ROOT

NEAR = {"fp32": 1e-6, "half": 4e-3, "int8": 0.02}
SHAPES = [(1, 4), (48, 64), (33, 67), (160, 300)]  # (O, I): some fill no block, and no four inputs


def projection(weight: torch.Tensor, weights: str) -> Callable[[torch.Tensor], torch.Tensor]:
    matrix = PACKS[weights](weight)
    return lambda x: torch.from_numpy(tiles.multiply(x.numpy(), matrix))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_near_those_of_fp32(weights, shape):
    weight, x = torch.randn(shape), torch.randn(5, shape[1])
    expected = F.linear(x, weight)
    assert (projection(weight, weights)(x) - expected).norm() <= NEAR[weights] * expected.norm()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(weights, shape):
    project, x = projection(torch.randn(shape), weights), torch.randn(35, shape[1])
    together = project(x)
    assert all(project(x[:rows]).equal(together[:rows]) for rows in range(1, 35))


def test_half_precision_keeps_what_16_bits_can_hold():
    weight, x = torch.randn(40, 24).half().float(), torch.randn(3, 24)
    torch.testing.assert_close(projection(weight, "half")(x), F.linear(x, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not tiles.HALVES, reason="this processor has no fp16")
def test_a_weight_beyond_16_bits_becomes_their_largest():
    assert projection(torch.tensor([[1e6, 0.0]]), "half")(torch.ones(1, 2)).item() == 65504


def whole_numbers(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a weight that int8 holds as they are, since 127 is the largest of each row."""
    x, weight = (torch.randint(-127, 128, (n, 1407)).float() for n in (rows, 37))
    x[:, 5] = weight[:, 9] = 127
    x[0] = weight[0] = 127
    weight[1] = -127
    return x, weight


@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_sums_in_int8_are_exact(rows):
    x, weight = whole_numbers(rows)
    assert projection(weight, "int8")(x).equal((x.double() @ weight.double().t()).float())


def test_int8_of_nothing_is_nothing():
    assert projection(torch.zeros(8, 16), "int8")(torch.zeros(2, 16)).equal(torch.zeros(2, 8))


def test_rows_are_rounded_to_the_nearest_step():
    x = np.array(
        [[1.0, -2.0, 0.51, 0.49, 127.0], [-0.0, 0.0, 0.0, 0.0, 0.0], [254.0, -254.0, 3.1, 2.9, 1e-9]]
    )
    rounded, steps = tiles.round_rows(x.astype(np.float32))
    assert rounded.shape == (3, 8)
    found = rounded[:, :5].astype(int) - tiles.ZERO
    assert found.tolist() == [[1, -2, 1, 0, 127], [0, 0, 0, 0, 0], [127, -127, 2, 1, 0]]
    assert steps[[0, 2]].tolist() == [1, 2]


def test_a_total_is_of_all_numbers_and_of_no_more():
    total = njit(lambda numbers: vectors.total(numbers))  # not kept, so always of today's code
    numbers = np.random.default_rng(0).integers(-1000, 1000, 300).astype(np.float32)  # their sums are exact
    assert [total(numbers[:count]) for count in range(300)] == [numbers[:count].sum() for count in range(300)]


PROCESSORS = {  # by their names at LLVM: what of their instructions tiles use
    "nehalem": ("+sse4.2", 8, False),
    "haswell": ("+avx2,+fma,+f16c", 8, False),
    "alderlake": ("+avx2,+fma,+f16c,+avxvnni", 8, True),
    "skylake-avx512": ("+avx512f,+avx512bw,+avx512vl,+avx2,+fma,+f16c", 16, False),
}
HOST = f"""
from minimind.chat import tiles, vectors
import pytest, sys
print(tiles.LANES, tiles.VNNI)
sys.exit(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", {__file__!r}, "-k", "not processor"]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these processors are x86-64's")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_same_on_a_processor_with(processor, tmp_path):
    """Code for another processor, run on this one, which must know its instructions."""
    features, lanes, vnni = PROCESSORS[processor]
    own = {"+" + name for name, there in get_host_cpu_features().items() if there}
    if lacking := set(features.split(",")) - own:
        pytest.skip(f"this processor lacks {', '.join(sorted(lacking))}")
    names = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", HOST]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | names, capture_output=True, text=True)
    assert done.stdout.startswith(f"{lanes} {vnni}\n"), done.stderr
    assert done.returncode == 0, done.stdout
