"""The lanes of one register, 16 integers of 32 bits with AVX-512 or 8 with AVX2, in compiled code.

A loop that keeps some entries of a vector and drops others branches on each, unless the lanes to
keep are packed. AVX-512 has an instruction for it; AVX2 permutes lanes by a table that has a row
for each mask. LLVM finds neither by itself: these functions emit them. A mask is a uint16 with one
bit for each lane. Addresses are integers, in bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, register_model


def _find_features() -> set[str]:
    """What numba compiles for: its variables can exclude what the processor has."""
    features = config.CPU_FEATURES
    present = get_host_cpu_features() if features is None else features
    return set(present.split(","))


_FEATURES = _find_features()
_IS_WIDE = {"+avx512f", "+avx512bw", "+avx512vl"} <= _FEATURES
HAS_LANES = _IS_WIDE or "+avx2" in _FEATURES
LANES = 16 if _IS_WIDE else 8
LANE_BYTES = 4
EVERY = np.uint16((1 << LANES) - 1)  # the mask of all lanes

_INT32 = ir.IntType(32)
_LANES = ir.VectorType(_INT32, LANES)
_BYTES, _SHORTS = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(ir.IntType(16), LANES)
_TABLE = ir.VectorType(ir.IntType(16), 2 * LANES)
_FLAGS, _BITS = ir.VectorType(ir.IntType(1), LANES), ir.IntType(LANES)


class LanesType(types.Type):  # type: ignore[misc]
    """numba's type of the lanes of one register."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _LANES)


_TYPE = LanesType()
_MASK = types.uint16


def _flags(builder: Any, mask: Any) -> Any:
    bits = mask if _IS_WIDE else builder.trunc(mask, _BITS)
    return builder.bitcast(bits, _FLAGS)


def _mask(builder: Any, flags: Any) -> Any:
    bits = builder.bitcast(flags, _BITS)
    return bits if _IS_WIDE else builder.zext(bits, ir.IntType(16))


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call a function of LLVM."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, arguments)


def _read(builder: Any, vector_type: Any, address: Any, align: int) -> Any:
    loaded = builder.load(builder.inttoptr(address, vector_type.as_pointer()))
    loaded.align = align
    return loaded


def _load(builder: Any, vector_type: Any, suffix: str, address: Any, mask: Any) -> Any:
    pointer = builder.inttoptr(address, vector_type.as_pointer())
    name, align = f"llvm.masked.load.v{LANES}{suffix}.p0", ir.Constant(_INT32, 1)
    zeros = ir.Constant(vector_type, None)
    return _call(builder, name, vector_type, pointer, align, _flags(builder, mask), zeros)


def _store(builder: Any, value: Any, address: Any, mask: Any, suffix: str) -> None:
    pointer = builder.inttoptr(address, value.type.as_pointer())
    name, align = f"llvm.masked.store.v{LANES}{suffix}.p0", ir.Constant(_INT32, 1)
    _call(builder, name, ir.VoidType(), value, pointer, align, _flags(builder, mask))


def _permute(builder: Any, vector: Any, numbers: Any) -> Any:
    """The lanes with these numbers, of which AVX2 reads the lowest three bits."""
    return _call(builder, "llvm.x86.avx2.permd", _LANES, vector, numbers)


def _look_up(builder: Any, first: Any, second: Any, offsets: Any) -> Any:
    """The lanes at some offsets in two registers."""
    if _IS_WIDE:
        return _call(builder, "llvm.x86.avx512.vpermi2var.d.512", _LANES, first, offsets, second)
    is_first = builder.icmp_signed("<", offsets, ir.Constant(_LANES, [LANES] * LANES))
    found = [_permute(builder, vector, offsets) for vector in (first, second)]
    return builder.select(is_first, *found)


def _read_order(builder: Any, mask: Any) -> Any:
    """The numbers of the lanes in a mask of eight, which are read from a table of all masks."""
    name, module = "topkast.orders", builder.module
    rows = ir.ArrayType(_BYTES, 1 << LANES)
    if name in module.globals:
        table = module.globals[name]
    else:
        lanes = [[lane for lane in range(LANES) if bits >> lane & 1] for bits in range(1 << LANES)]
        orders = [ir.Constant(_BYTES, (row + [0] * LANES)[:LANES]) for row in lanes]
        table = cgutils.global_constant(module, name, ir.Constant(rows, orders))
    bits = builder.zext(builder.trunc(mask, _BITS), _INT32)
    row = builder.gep(table, [_INT32(0), bits], inbounds=True)
    return builder.zext(builder.load(row), _LANES)


@intrinsic  # type: ignore[untyped-decorator]
def splat(_: Any, number: Any) -> Any:
    """The same number in all lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = builder.insert_element(ir.Constant(_LANES, ir.Undefined), arguments[0], _INT32(0))
        return builder.shuffle_vector(vector, vector, ir.Constant(_LANES, [0] * LANES))

    return _TYPE(types.int32), emit


@intrinsic  # type: ignore[untyped-decorator]
def broadcast(_: Any, vector: Any) -> Any:
    """The first lane in all lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = arguments[0]
        return builder.shuffle_vector(vector, vector, ir.Constant(_LANES, [0] * LANES))

    return _TYPE(_TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def numbers(_: Any) -> Any:
    """0 to the number of lanes less 1."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_LANES, list(range(LANES)))

    return _TYPE(), emit


@intrinsic  # type: ignore[untyped-decorator]
def load(_: Any, address: Any, mask: Any) -> Any:
    """Read the lanes of a mask from memory; the others are 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, _LANES, "i32", *arguments)

    return _TYPE(types.intp, _MASK), emit


@intrinsic  # type: ignore[untyped-decorator]
def store(_: Any, vector: Any, address: Any, mask: Any) -> Any:
    """Write the lanes of a mask to memory."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, address, mask = arguments
        _store(builder, vector, address, mask, "i32")
        return context.get_dummy_value()

    return types.void(_TYPE, types.intp, _MASK), emit


@intrinsic  # type: ignore[untyped-decorator]
def load_flags(_: Any, address: Any, mask: Any) -> Any:
    """Mask of the bytes in memory that are not 0, among the lanes of a mask."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        loaded = _load(builder, _BYTES, "i8", *arguments)
        return _mask(builder, builder.icmp_signed("!=", loaded, ir.Constant(_BYTES, None)))

    return _MASK(types.intp, _MASK), emit


@intrinsic  # type: ignore[untyped-decorator]
def load_short(_: Any, address: Any, mask: Any) -> Any:
    """Read the lanes of a mask from integers of 16 bits in memory; the others are 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(_load(builder, _SHORTS, "i16", *arguments), _LANES)

    return _TYPE(types.intp, _MASK), emit


@intrinsic  # type: ignore[untyped-decorator]
def store_short(_: Any, vector: Any, address: Any, mask: Any) -> Any:
    """Write the low 16 bits of the lanes of a mask to memory."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, address, mask = arguments
        _store(builder, builder.trunc(vector, _SHORTS), address, mask, "i16")
        return context.get_dummy_value()

    return types.void(_TYPE, types.intp, _MASK), emit


@intrinsic  # type: ignore[untyped-decorator]
def look_up(_: Any, address: Any, offsets: Any) -> Any:
    """The integers at offsets in those at an address, twice as many as there are lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, offsets = arguments
        later = builder.add(address, ir.Constant(address.type, LANES * LANE_BYTES))
        first, second = (_read(builder, _LANES, one, LANE_BYTES) for one in (address, later))
        return _look_up(builder, first, second, offsets)

    return _TYPE(types.intp, _TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def gather(_: Any, address: Any, positions: Any, mask: Any) -> Any:
    """The integers at some positions of an array, for the lanes of a mask; the others are 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, positions, mask = arguments
        pointer = builder.inttoptr(address, cgutils.voidptr_t)
        zeros, flags = ir.Constant(_LANES, None), _flags(builder, mask)
        if _IS_WIDE:
            name, scale = "llvm.x86.avx512.mask.gather.dpi.512", ir.Constant(_INT32, LANE_BYTES)
        else:
            name, scale = "llvm.x86.avx2.gather.d.d.256", ir.Constant(ir.IntType(8), LANE_BYTES)
            flags = builder.sext(flags, _LANES)
        return _call(builder, name, _LANES, zeros, pointer, positions, flags, scale)

    return _TYPE(types.intp, _TYPE, _MASK), emit


@intrinsic  # type: ignore[untyped-decorator]
def look_up_short(_: Any, address: Any, offsets: Any) -> Any:
    """:func:`look_up` in integers of 16 bits; the high bits of each lane have no meaning."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, offsets = arguments
        table = _read(builder, _TABLE, address, 2)
        if _IS_WIDE:
            name = "llvm.x86.avx512.permvar.hi.512"
            found = _call(builder, name, _TABLE, table, builder.bitcast(offsets, _TABLE))
            return builder.bitcast(found, _LANES)
        first, second = (
            builder.zext(builder.shuffle_vector(table, table, ir.Constant(_LANES, half)), _LANES)
            for half in (list(range(LANES)), list(range(LANES, 2 * LANES)))
        )
        return _look_up(builder, first, second, offsets)

    return _TYPE(types.intp, _TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def subtract(_: Any, first: Any, second: Any) -> Any:
    """The difference in each lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sub(*arguments)

    return _TYPE(_TYPE, _TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def add(_: Any, first: Any, second: Any) -> Any:
    """The sum in each lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.add(*arguments)

    return _TYPE(_TYPE, _TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def without_sign(_: Any, vector: Any) -> Any:
    """The keys of floats, whose bits are in the lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.and_(arguments[0], ir.Constant(_LANES, [0x7FFFFFFF] * LANES))

    return _TYPE(_TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def at_least(_: Any, first: Any, second: Any) -> Any:
    """Mask of the lanes where the first is as large or larger."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _mask(builder, builder.icmp_signed(">=", *arguments))

    return _MASK(_TYPE, _TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def below(_: Any, first: Any, second: Any) -> Any:
    """Mask of the lanes where the first is smaller."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _mask(builder, builder.icmp_signed("<", *arguments))

    return _MASK(_TYPE, _TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def below_unsigned(_: Any, first: Any, second: Any) -> Any:
    """Mask of the lanes where the first is smaller, as integers without a sign."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _mask(builder, builder.icmp_unsigned("<", *arguments))

    return _MASK(_TYPE, _TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def equal(_: Any, first: Any, second: Any) -> Any:
    """Mask of the lanes that are equal."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _mask(builder, builder.icmp_signed("==", *arguments))

    return _MASK(_TYPE, _TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def pack(_: Any, vector: Any, mask: Any) -> Any:
    """The lanes of a mask moved to the front, in their order; what follows has no meaning."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, mask = arguments
        if not _IS_WIDE:
            return _permute(builder, vector, _read_order(builder, mask))
        name, zeros = "llvm.x86.avx512.mask.compress.v16i32", ir.Constant(_LANES, None)
        return _call(builder, name, _LANES, vector, zeros, _flags(builder, mask))

    return _TYPE(_TYPE, _MASK), emit


@intrinsic  # type: ignore[untyped-decorator]
def select(_: Any, mask: Any, first: Any, second: Any) -> Any:
    """The first in the lanes of a mask, the second in the others."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        mask, first, second = arguments
        return builder.select(_flags(builder, mask), first, second)

    return _TYPE(_MASK, _TYPE, _TYPE), emit


@intrinsic  # type: ignore[untyped-decorator]
def first_of(_: Any, mask: Any) -> Any:
    """The number of the first lane in a mask that is not empty."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros = builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))
        return builder.zext(zeros, ir.IntType(64))

    return types.int64(_MASK), emit


@intrinsic  # type: ignore[untyped-decorator]
def count(_: Any, mask: Any) -> Any:
    """The number of lanes in a mask."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ones = builder.ctpop(arguments[0])
        return builder.zext(ones, ir.IntType(64))

    return types.int64(_MASK), emit


@njit(inline="always")  # type: ignore[untyped-decorator]
def first_lanes(number: Any) -> Any:
    """Mask of the first lanes: all if `number` is that of lanes or more."""
    return types.uint16((1 << min(number, LANES)) - 1)


@njit(inline="always")  # type: ignore[untyped-decorator]
def append(vector: Any, mask: Any, place: Any, end: Any) -> None:
    """Write the lanes of a mask, in their order, to an address; up to `end`, any bits follow."""
    if place + LANE_BYTES * LANES <= end:  # AVX2 stores with a mask slowly
        store(pack(vector, mask), place, EVERY)
    else:
        store(pack(vector, mask), place, first_lanes(count(mask)))
