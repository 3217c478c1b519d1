"""Products of a few rows with a packed matrix, as fast as a core multiplies or memory is read.

A matrix is packed in blocks of WIDTH outputs, which are read from end to end. What takes the time is a tile:
up to ROWS rows times one block, whose sums stay in registers while the inputs go by (Goto and van de Geijn
2008, "Anatomy of high-performance matrix multiplication", doi:10.1145/1356052.1356053). LLVM makes no such
code of loops in Python, so a tile is written in LLVM's own operations, on vectors of LANES numbers.

A sum takes its inputs one by one, in their order, however many rows there are: what a row gives does not
depend on the rows beside it.

Shapes: M rows, I inputs, O outputs, B blocks.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from minimind.chat.vectors import (
    F16,
    F32,
    FEATURES,
    I8,
    I32,
    I64,
    LANES,
    at,
    call,
    largest_magnitude_of,
    load,
    picked,
    spread,
    vector,
)
from minimind.loops import compiled

# Sums fill 2 · ROWS registers. AVX-512 has 32 of 16 numbers, AVX2 16 of 8; some must be left for the factors.
ROWS = 8 if LANES == 16 else 6
WIDTH = 2 * LANES
# Whether fp16 can be read: x86 learnt it in 2012, and some virtual machines hide it.
HALVES = "+f16c" in FEATURES or platform.machine() not in ("x86_64", "AMD64")
VNNI = not FEATURES.isdisjoint({"+avx512vnni"} if LANES == 16 else {"+avx512vnni", "+avxvnni"})

# Weights are fetched so many bytes before their turn. Left to itself, memory waits while a tile computes.
AHEAD, LINE = 8192, 64  # LINE: how many come at once
ZERO = 128  # what stands for zero in uint8


class Packed(NamedTuple):
    """A matrix (O, I). Zeros fill up the last block, and in int8 the last four inputs.

    In int8 an output is a sum that begins at `start`, times a step of its row, times `scale`.
    """

    outputs: int  # O
    weight: np.ndarray  # (B, I, WIDTH) of fp32, or of fp16 as uint16; (B, I / 4, WIDTH, 4) of int8
    start: np.ndarray | None = None  # (B, WIDTH) of int32
    scale: np.ndarray | None = None  # (B, WIDTH) of fp32


@compiled(parallel=True)
def multiply(x, matrix):
    """x (M, I) in fp32 times a packed matrix → (M, O) in fp32."""
    inputs, scaling = inputs_of(x, matrix)
    rows, blocks = len(x), len(matrix.weight)
    out = np.empty((rows, blocks * WIDTH), np.float32)
    tiles = (rows + ROWS - 1) // ROWS
    for block in prange(blocks):
        later = matrix.weight[block].ctypes.data + AHEAD
        for number in range(tiles):
            first, last = rows * number // tiles, rows * (number + 1) // tiles
            if number == 0:
                tile(inputs, matrix.weight, out, block, first, last, scaling, later)
            else:  # the core's own cache has the block now
                tile(inputs, matrix.weight, out, block, first, last, scaling, None)
    return out if out.shape[1] == matrix.outputs else np.ascontiguousarray(out[:, : matrix.outputs])


def inputs_of(x, matrix):
    """x (M, I) in fp32 as a matrix is multiplied by it, and what becomes of the sums then."""


@overload(inputs_of)
def _inputs_of(x, matrix):
    def in_int8(x, matrix):
        rounded, steps = round_rows(x)
        return rounded, (matrix.start, steps, matrix.scale)

    weight = matrix[Packed._fields.index("weight")]
    return in_int8 if weight.dtype == types.int8 else lambda x, matrix: (x, None)


@compiled()
def round_rows(x):
    """x (M, I) → in uint8 ZERO plus the nearest multiples of a step for each row, and the steps (M,).

    Rows are filled up to whole fours of inputs, as the weights are.
    """
    rows, inputs = x.shape
    rounded, steps = np.zeros((rows, (inputs + 3) // 4 * 4), np.uint8), np.empty(rows, np.float32)
    for row in range(rows):
        step = max(largest_magnitude_of(x[row]), np.float32(1e-12)) / np.float32(127)
        factor = np.float32(1) / step
        for i in range(inputs):
            rounded[row, i] = np.int32(np.rint(x[row, i] * factor)) + ZERO
        steps[row] = step
    return rounded, steps


# The code of a tile.


class Kind(NamedTuple):
    """What a tile does for weights of one kind, in a step of its loop."""

    inputs: int
    x: ir.Type  # holds so many inputs
    weights: ir.VectorType  # of LANES outputs
    sums: ir.VectorType  # one for each output, or two, which are added up at the end
    multiply_add: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]  # sums + x · weights


def multiply_add_floats(builder: ir.IRBuilder, sums: ir.Value, x: ir.Value, weights: ir.Value) -> ir.Value:
    product = builder.fmul(spread(builder, x), builder.fpext(weights, sums.type), flags=("contract",))
    return builder.fadd(sums, product, flags=("contract",))


def multiply_add_fours(builder: ir.IRBuilder, sums: ir.Value, x: ir.Value, weights: ir.Value) -> ir.Value:
    """By VNNI, which multiplies the four weights of each output, and adds them up, at once."""
    factors = [spread(builder, x), builder.bitcast(weights, sums.type)]
    return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", sums.type, [sums, *factors])


def multiply_add_pairs(builder: ir.IRBuilder, sums: ir.Value, x: ir.Value, weights: ir.Value) -> ir.Value:
    """With two sums for each output: neighbours are added up by an instruction of every x86-64."""
    wide = vector(I32, 4 * LANES)
    x = builder.zext(builder.bitcast(spread(builder, x), weights.type), wide)
    return builder.add(sums, add_neighbours(builder, builder.mul(x, builder.sext(weights, wide))))


def add_neighbours(builder: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    count = numbers.type.count
    return builder.add(*(picked(builder, numbers, range(side, count, 2)) for side in (0, 1)))


INT8 = vector(I8, 4 * LANES)
KINDS = {  # by the bits of a weight
    32: Kind(1, F32, vector(F32), vector(F32), multiply_add_floats),
    16: Kind(1, F32, vector(F16), vector(F32), multiply_add_floats),
    8: Kind(4, I32, INT8, vector(I32), multiply_add_fours)
    if VNNI
    else Kind(4, I32, INT8, vector(I32, 2 * LANES), multiply_add_pairs),
}


def rescaled(
    builder: ir.IRBuilder, sums: ir.Value, start: ir.Value, step: ir.Value, scale: ir.Value
) -> ir.Value:
    """(start + sums) · step · scale in fp32; all but the step are vectors."""
    if sums.type != start.type:
        sums = add_neighbours(builder, sums)
    total = builder.sitofp(builder.add(sums, start), scale.type)
    return builder.fmul(builder.fmul(total, spread(builder, step)), scale)


def fetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Have the line at an address brought into the core's cache, without waiting for it."""
    how = [I32(0), I32(2), I32(1)]  # for reading, into the second level, of data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [address, *how])


@intrinsic
def tile(
    typing_context: Any,
    x: types.Array,
    weight: types.Array,
    out: types.Array,
    block: types.Integer,
    first: types.Integer,
    last: types.Integer,
    scaling: types.Type,
    later: types.Type,
) -> Any:
    """Write x times one block of weights, for the rows `first` to `last`, to that block of `out`.

    x (rows, inputs) and out (rows, blocks · WIDTH) have contiguous rows. Weights, as in `Packed`, may have
    room for more inputs. scaling: None, or `start` (blocks, WIDTH), steps (rows,), `scale` (blocks, WIDTH).
    later: None, or the address of as much as is read here, to be fetched meanwhile.
    """
    signature = types.void(x, weight, out, block, first, last, scaling, later)
    bits = weight.dtype.bitwidth

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        def array(kind: types.Array, value: ir.Value) -> Any:
            return context.make_array(kind)(context, builder, value)

        x, weight, out = (array(*pair) for pair in zip(signature.args[:3], values[:3], strict=True))
        scales = []
        if scaling != types.none:
            members = cgutils.unpack_tuple(builder, values[6])
            scales = [array(*pair).data for pair in zip(scaling, members, strict=True)]
        address = None if later == types.none else builder.inttoptr(values[7], I8.as_pointer())
        block, first, last = values[3:6]
        write_tile(builder, bits, x, weight, out, block, first, last, scales, address)
        return context.get_dummy_value()

    return signature, generate


def write_tile(
    builder: ir.IRBuilder,
    bits: int,
    x: Any,
    weight: Any,
    out: Any,
    block: ir.Value,
    first: ir.Value,
    last: ir.Value,
    scales: Sequence[ir.Value],
    later: ir.Value | None,
) -> None:
    """The code of `tile`: one loop for each number of rows."""
    kind = KINDS[bits]
    halves = range(WIDTH // LANES)
    bytes_in_step = kind.inputs * WIDTH * bits // 8
    length = builder.udiv(cgutils.unpack_tuple(builder, x.shape)[1], I64(kind.inputs))

    def part(array: Any, *numbers: ir.Value) -> ir.Value:
        """The address of array[numbers]."""
        address = builder.bitcast(array.data, I8.as_pointer())
        for number, stride in zip(numbers, cgutils.unpack_tuple(builder, array.strides), strict=False):
            address = builder.gep(address, [builder.mul(number, stride)])
        return address

    columns = [builder.add(builder.mul(block, I64(len(halves))), I64(half)) for half in halves]  # of vectors
    zeros = ir.Constant(kind.sums, None)
    end = builder.append_basic_block()
    switch = builder.switch(builder.sub(last, first), end)
    for number in range(1, ROWS + 1):
        switch.add_case(I64(number), case := builder.append_basic_block())
        builder.position_at_end(case)
        rows = [builder.add(first, I64(row)) for row in range(number)]
        inputs = [part(x, row) for row in rows]
        sums = [[cgutils.alloca_once_value(builder, zeros) for _ in halves] for _ in rows]
        with cgutils.for_range(builder, length) as loop:
            for line in range(0, bytes_in_step if later else 0, LINE):
                place = builder.add(builder.mul(loop.index, I64(bytes_in_step)), I64(line))
                fetch(builder, at(builder, later, I8, place))
            weights = part(weight, block, loop.index)
            factors = [load(builder, weights, kind.weights, I64(half)) for half in halves]
            for own_inputs, own_sums in zip(inputs, sums, strict=True):
                value = load(builder, own_inputs, kind.x, loop.index)
                for place, factor in zip(own_sums, factors, strict=True):
                    builder.store(kind.multiply_add(builder, builder.load(place), value, factor), place)
        for row, own_sums in zip(rows, sums, strict=True):
            for column, place in zip(columns, own_sums, strict=True):
                total = builder.load(place)
                if scales:
                    start, steps, scale = scales
                    total = rescaled(
                        builder,
                        total,
                        load(builder, start, vector(I32), column),
                        load(builder, steps, F32, row),
                        load(builder, scale, vector(F32), column),
                    )
                builder.store(total, at(builder, part(out, row), vector(F32), column), align=1)
        builder.branch(end)
    builder.position_at_end(end)
