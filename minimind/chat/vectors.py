"""Operations on vectors that LLVM makes worse code of when they are written as loops.

Some are for loops that Numba compiles; the others write LLVM's own code, for the tiles of `tiles.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

FEATURES = frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
LANES = 16 if "+avx512f" in FEATURES else 8  # numbers of fp32 in a register
MOST = 65504  # the largest number of fp16
MAGNITUDE = 0x7FFFFFFF  # all bits of a number but its sign; such are ordered as the numbers are
FIRST = -1  # what `in_order` puts before all others

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def vector(of: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(of, lanes)


def at(builder: ir.IRBuilder, address: ir.Value, of: ir.Type, place: ir.Value) -> ir.Value:
    return builder.gep(builder.bitcast(address, of.as_pointer()), [place])


def load(builder: ir.IRBuilder, address: ir.Value, of: ir.Type, place: ir.Value) -> ir.Value:
    return builder.load(at(builder, address, of, place), align=1)


def picked(builder: ir.IRBuilder, numbers: ir.Value, places: Sequence[int]) -> ir.Value:
    """A vector of those of another that stand at some places."""
    which = ir.Constant(vector(I32, len(places)), [I32(place) for place in places])
    return builder.shuffle_vector(numbers, ir.Constant(numbers.type, ir.Undefined), which)


def spread(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """A vector of one number."""
    undefined = ir.Constant(vector(number.type), ir.Undefined)
    return picked(builder, builder.insert_element(undefined, number, I32(0)), [0] * LANES)


@intrinsic
def as_held(typing_context: Any, number: types.Float, array: types.Array) -> Any:
    """A number of fp32 as an array of fp32, or of fp16 as uint16, holds it: at most MOST there."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        number, most, least = values[0], F32(MOST), F32(-MOST)
        if array.dtype == types.float32:
            return number
        number = builder.select(builder.fcmp_ordered(">", number, most), most, number)
        number = builder.select(builder.fcmp_ordered("<", number, least), least, number)
        return builder.bitcast(builder.fptrunc(number, F16), I16)

    return array.dtype(number, array), generate


Combine = Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]
Change = Callable[[ir.IRBuilder, ir.Value], ir.Value]


def as_they_are(builder: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    return numbers


def reduction(of: ir.Type, combine: Combine, nothing: float, each: Change, back: Change = as_they_are) -> Any:
    """For loops: contiguous numbers (I,) in fp32 combined to one, always in one order.

    LLVM, let to choose it, takes another at every place where it compiles a loop.

    Args:
        of: what the bits of a number are taken for.
        nothing: what, once `each` is done to it, changes no number that it is combined with.
        each, back: done to the numbers before, and to the one that is left.
    """
    several = 4  # results for each lane: an addition takes as many clock cycles

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        array = context.make_array(signature.args[0])(context, builder, values[0])
        count = cgutils.unpack_tuple(builder, array.shape)[0]
        whole = builder.udiv(count, I64(several * LANES))
        nothings = ir.Constant(vector(of), [of(nothing)] * LANES)
        places = [cgutils.alloca_once_value(builder, each(builder, nothings)) for _ in range(several)]

        def add(place: ir.Value, numbers: ir.Value) -> None:
            builder.store(combine(builder, builder.load(place), each(builder, numbers)), place)

        with cgutils.for_range(builder, whole) as loop:
            for part, place in enumerate(places):
                column = builder.add(builder.mul(loop.index, I64(several)), I64(part))
                add(place, load(builder, array.data, vector(of), column))
        for part, place in enumerate(places):
            column = builder.add(builder.mul(whole, I64(several)), I64(part))
            left = builder.sub(count, builder.mul(column, I64(LANES)))
            add(place, load_first(builder, at(builder, array.data, vector(of), column), left, nothings))
        rest = [builder.load(place) for place in places]
        while len(rest) > 1:
            rest = [combine(builder, *pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
        return builder.bitcast(back(builder, lanes_combined(builder, rest[0], combine)), F32)

    @intrinsic
    def reduce(typing_context: Any, numbers: types.Array) -> Any:
        return types.float32(numbers), generate

    return reduce


def load_first(builder: ir.IRBuilder, address: ir.Value, count: ir.Value, otherwise: ir.Value) -> ir.Value:
    """A vector of the first numbers at an address, up to LANES, and of others after them."""
    order = ir.Constant(vector(I64), [I64(lane) for lane in range(LANES)])
    wanted = builder.icmp_signed("<", order, spread(builder, count))
    kind = "f32" if otherwise.type.element == F32 else "i32"
    arguments = [address, I32(1), wanted, otherwise]
    return call(builder, f"llvm.masked.load.v{LANES}{kind}.p0", otherwise.type, arguments)


def lanes_combined(builder: ir.IRBuilder, numbers: ir.Value, combine: Combine) -> ir.Value:
    """Halves are combined with each other until one number is left."""
    while (count := numbers.type.count) > 1:
        halves = range(count // 2), range(count // 2, count)
        numbers = combine(builder, *(picked(builder, numbers, half) for half in halves))
    return builder.extract_element(numbers, I32(0))


def call(builder: ir.IRBuilder, name: str, of: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
    """One of LLVM's own functions."""
    signature = ir.FunctionType(of, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def larger(builder: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_signed(">", first, second), first, second)


def in_order(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Bits of numbers such that they are ordered as the numbers are; and back."""

    def same(number: int) -> ir.Value:
        return ir.Constant(bits.type, [number] * LANES if isinstance(bits.type, ir.VectorType) else number)

    return builder.xor(bits, builder.and_(builder.ashr(bits, same(31)), same(MAGNITUDE)))


def magnitude(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    return builder.and_(bits, ir.Constant(bits.type, [MAGNITUDE] * LANES))


total = reduction(F32, lambda builder, first, second: builder.fadd(first, second), 0.0, as_they_are)
# One that is no number, if there is any.
largest_of = reduction(I32, larger, FIRST, in_order, in_order)
largest_magnitude_of = reduction(I32, larger, 0, magnitude)
