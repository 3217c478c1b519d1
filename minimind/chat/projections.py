"""How the weights of a matrix are held while answering. Reading them is most of what a token costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.chat.tiles import WIDTH, ZERO, Packed, multiply

Projection = Callable[[Tensor], Tensor]
Pack = Callable[[Tensor], Projection]


def projection(weight: Tensor, kind: str) -> Projection:
    """What multiplies by a weight (O, I), held in one of the ways of `options.WEIGHTS`: x (M, I) → (M, O).

    On a CPU x and the sums are fp32, but for int8, and a row's result does not depend on the rows beside it.
    """
    if weight.device.type == "cpu":
        return PackedProjection(weight, kind)
    weight = weight.to(torch.float32 if kind == "fp32" else torch.bfloat16, copy=True)
    return lambda x: F.linear(x.to(weight.dtype), weight).type_as(x)


class PackedProjection:
    def __init__(self, weight: Tensor, kind: str) -> None:
        self.matrix = PACKS[kind](weight)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(multiply(x.numpy(), self.matrix))


def full(weight: Tensor) -> Packed:
    """fp32, as the model was trained."""
    return in_floats(weight.float())


def half(weight: Tensor) -> Packed:
    """fp16, as weight files store them. Multiplied in fp32, they lose nothing more."""
    limit = torch.finfo(torch.half).max
    return in_floats(weight.clamp(-limit, limit).half().view(torch.uint16))


def in_floats(weight: Tensor) -> Packed:
    blocks = in_blocks(weight).transpose(1, 2).contiguous()  # (B, I, WIDTH)
    return Packed(len(weight), blocks.numpy())


def int8(weight: Tensor) -> Packed:
    """8 bits a weight, with one scale for each output; inputs are rounded too, with one step for each row.

    Their products are summed as integers, exactly. Absolute maxima as scales: Dettmers et al. 2022,
    arXiv:2208.07339, 2.1.
    """
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # (O,)
    rounded = (weight / scale[:, None]).round().to(torch.int8)
    blocks = in_blocks(F.pad(rounded, (0, -weight.shape[1] % 4)))  # (B, WIDTH, I)
    start = -ZERO * blocks.sum(2, dtype=torch.int32)  # inputs have ZERO added
    fours = blocks.unflatten(2, (-1, 4)).transpose(1, 2).contiguous()  # (B, I / 4, WIDTH, 4)
    return Packed(len(weight), fours.numpy(), start.numpy(), in_blocks(scale).numpy())


def in_blocks(weight: Tensor) -> Tensor:
    """(O, …) → (B, WIDTH, …), with zeros at the end."""
    filled = F.pad(weight, (0, 0) * (weight.dim() - 1) + (0, -len(weight) % WIDTH))
    return filled.unflatten(0, (-1, WIDTH))


PACKS: dict[str, Callable[[Tensor], Packed]] = {"fp32": full, "half": half, "int8": int8}
