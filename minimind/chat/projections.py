"""How the weights of a matrix are held while answering: for one token, reading them is nearly all the work.

Each way takes a weight (out, in) in fp32 and gives what multiplies by it, x (M, in) → (M, out).
Measured on two cores of a Xeon with AMX, one token through all matrices of the `small` preset: fp16 packed
1.8 ms, int8 1.1 ms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.chat import kernels

Projection = Callable[[Tensor], Tensor]
Pack = Callable[[Tensor], Projection]


def full(weight: Tensor) -> Projection:
    """fp32, as the model was trained."""
    weight = weight.clone()
    return lambda x: F.linear(x, weight)


def half(weight: Tensor) -> Projection:
    """16 bits a weight, as weight files store them.

    FBGEMM, which x86 builds of PyTorch have, multiplies fp16 weights with fp32 inputs and sums in fp32.
    Nothing is lost then, and a row's result does not depend on the rows beside it. Elsewhere both factors
    are bf16.
    """
    if weight.device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines:
        packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    weight = weight.bfloat16()
    return lambda x: F.linear(x.bfloat16(), weight).type_as(x)


class Int8:
    """8 bits a weight, with one scale for each output; inputs are rounded too, with one step for each row.

    Their products are summed as integers, exactly. Absolute maxima as scales: Dettmers et al. 2022,
    arXiv:2208.07339, 2.1.
    """

    def __init__(self, weight: Tensor) -> None:
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # (out,)
        rounded = (weight / scale[:, None]).round().to(torch.int8)  # (out, in)
        self.arrays = rounded.numpy(), scale.numpy()

    def __call__(self, x: Tensor) -> Tensor:
        weight, scale = self.arrays
        rounded, steps = kernels.round_rows(x.numpy())
        return torch.from_numpy(kernels.rescale(kernels.integer_product(rounded, weight), steps, scale))


PACKS: dict[str, Pack] = {"half": half, "int8": Int8, "fp32": full}  # by their names in `options.WEIGHTS`
