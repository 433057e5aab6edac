"""The innermost loops of units, as LLVM vector code: each load of activations serves r products.

A unit is r weights below each other, whose values are contiguous. A tile is `registers` vectors
wide. Each function holds a loop for each pair of r and `registers` that fits the processor's
registers. See :mod:`topkast.kernels.runtime._vector`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from topkast.kernels.runtime._vector import VECTOR_BYTES, Emitter

_INT64 = ir.IntType(64)

ROWS = (2, 4, 8)  # of a unit

# Vectors of sums that a loop holds: half of the registers, since factors need some too.
_SUMS = 16 if VECTOR_BYTES == 64 else 8

# Vectors of a tile, by rows of a unit. More than 4 gain nothing.
REGISTERS = {rows: tuple(count for count in (4, 2, 1) if rows * count <= _SUMS) for rows in ROWS}


def _constant(number: int) -> Any:
    return ir.Constant(_INT64, number)


def _switch(builder: Any, number: Any, cases: Mapping[int, Callable[[], None]]) -> None:
    """Emit the case of a number; another number does nothing."""
    end = builder.append_basic_block("end")
    switch = builder.switch(number, end)
    for key, emit_case in cases.items():
        block = builder.append_basic_block(f"case_{key}")
        switch.add_case(_constant(key), block)
        builder.position_at_end(block)
        emit_case()
        builder.branch(end)
    builder.position_at_end(end)


def _switch_tiles(
    builder: Any, rows: Any, registers: Any, emit_case: Callable[[int, int], None]
) -> None:
    """Emit the cases of all pairs of the rows of a unit and the registers of a tile."""
    cases = {
        8 * r + count: (lambda r=r, count=count: emit_case(r, count))
        for r, counts in REGISTERS.items()
        for count in counts
    }
    _switch(builder, builder.add(builder.mul(rows, _constant(8)), registers), cases)


def _factor(emitter: Emitter, values: Any, k: Any, rows: int, i: int) -> Any:
    """The value of row i of unit k, in all lanes."""
    position = emitter.builder.add(emitter.builder.mul(k, _constant(rows)), _constant(i))
    return emitter.broadcast(emitter.load_element(values, position, emitter.scalar))


@intrinsic  # type: ignore[untyped-decorator]
def unit_product(  # type: ignore[no-untyped-def]
    _, zero, rows, registers, values, columns, start, stop, x, stride, bias, out, out_stride
) -> Any:
    """out[i] = bias[i] + Σ values[k, i] · x[columns[k]] for each row i of a unit, k from start on.

    Rows of `x` are `stride` bytes apart, rows of `out` `out_stride` bytes.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows, registers, values, columns, start, stop, x, stride, *last = arguments
        bias, out, out_stride = last
        emitter = Emitter(builder, signature.args[0])

        def emit_case(rows: int, registers: int) -> None:
            targets = [
                (emitter.row_address(out, _constant(i), out_stride), register)
                for i in range(rows)
                for register in range(registers)
            ]
            sums = [cgutils.alloca_once(builder, emitter.vector) for _ in targets]
            for i in range(rows):
                first = emitter.broadcast(emitter.load_element(bias, _constant(i), emitter.scalar))
                for total in sums[i * registers : (i + 1) * registers]:
                    builder.store(first, total)
            with cgutils.for_range_slice(builder, start, stop, _constant(1)) as (k, _):
                row = emitter.row_address(x, emitter.load_int32(columns, k), stride)
                vectors = [emitter.load_vector(row, register) for register in range(registers)]
                for i in range(rows):
                    factor = _factor(emitter, values, k, rows, i)
                    for register, vector in enumerate(vectors):
                        total = sums[i * registers + register]
                        added = emitter.multiply_add(factor, vector, builder.load(total))
                        builder.store(added, total)
            for target, total in zip(targets, sums, strict=True):
                emitter.store_vector(builder.load(total), *target)

        _switch_tiles(builder, rows, registers, emit_case)
        return context.get_dummy_value()

    return types.void(zero, *[types.intp] * 11), emit


@intrinsic  # type: ignore[untyped-decorator]
def unit_scatter(  # type: ignore[no-untyped-def]
    _, zero, rows, registers, values, columns, start, stop, y, y_stride, out, stride
) -> Any:
    """out[columns[k]] += Σ values[k, i] · y[i] over the rows i of a unit, k from start to stop.

    The rows of `y` stay in registers, so that an update of `out` serves as many products.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows, registers, values, columns, start, stop, y, y_stride, out, stride = arguments
        emitter = Emitter(builder, signature.args[0])

        def emit_case(rows: int, registers: int) -> None:
            held = [
                [
                    emitter.load_vector(emitter.row_address(y, _constant(i), y_stride), register)
                    for register in range(registers)
                ]
                for i in range(rows)
            ]
            with cgutils.for_range_slice(builder, start, stop, _constant(1)) as (k, _):
                target = emitter.row_address(out, emitter.load_int32(columns, k), stride)
                totals = [emitter.load_vector(target, register) for register in range(registers)]
                for i in range(rows):
                    factor = _factor(emitter, values, k, rows, i)
                    totals = [
                        emitter.multiply_add(factor, vector, total)
                        for vector, total in zip(held[i], totals, strict=True)
                    ]
                for register, total in enumerate(totals):
                    emitter.store_vector(total, target, register)

        _switch_tiles(builder, rows, registers, emit_case)
        return context.get_dummy_value()

    return types.void(zero, *[types.intp] * 10), emit


@intrinsic  # type: ignore[untyped-decorator]
def unit_dots(  # type: ignore[no-untyped-def]
    _,
    zero,
    rows,
    columns,
    start,
    stop,
    x,
    stride,
    x_step,
    y,
    y_stride,
    y_step,
    steps,
    vectors,
    out,
    is_first,
) -> Any:
    """out[k, i] += Σ y[step, i] · x[step, columns[k]] for each row i, k from start to stop.

    The sums are over `steps`, which are `x_step` and `y_step` bytes apart, and `vectors`. If
    `is_first` is not 0, `out` is overwritten instead.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows, columns, start, stop, x, stride, x_step, y, y_stride, y_step, *last = arguments
        steps, vectors, out, is_first = last
        emitter = Emitter(builder, signature.args[0])
        is_adding = builder.icmp_signed("==", is_first, _constant(0))
        zeros = ir.Constant(emitter.vector, None)

        def emit_group(first: Any, count: int, rows: int) -> None:
            """Dot products of `count` units, which share the loads of `y`."""
            sums = [cgutils.alloca_once(builder, emitter.vector) for _ in range(rows * count)]
            units = [builder.add(first, _constant(k)) for k in range(count)]
            x_rows = [
                emitter.row_address(x, emitter.load_int32(columns, unit), stride) for unit in units
            ]
            y_rows = [emitter.row_address(y, _constant(i), y_stride) for i in range(rows)]
            for total in sums:
                builder.store(zeros, total)
            with cgutils.for_range(builder, steps) as outer:
                x_start, y_start = (builder.mul(outer.index, step) for step in (x_step, y_step))
                with cgutils.for_range(builder, vectors) as inner:
                    shift = builder.mul(inner.index, _constant(VECTOR_BYTES))
                    x_shift, y_shift = (builder.add(begin, shift) for begin in (x_start, y_start))
                    held = [emitter.load_vector(builder.add(row, y_shift), 0) for row in y_rows]
                    for k, row in enumerate(x_rows):
                        vector = emitter.load_vector(builder.add(row, x_shift), 0)
                        for i in range(rows):
                            total = sums[k * rows + i]
                            added = emitter.multiply_add(held[i], vector, builder.load(total))
                            builder.store(added, total)
            loaded = [builder.load(total) for total in sums]
            target = builder.add(out, builder.mul(first, _constant(rows * emitter.size)))
            for begin in range(0, len(loaded), emitter.lanes):
                part = loaded[begin : begin + emitter.lanes]
                padding = (1 << (len(part) - 1).bit_length()) - len(part)
                dots = emitter.sum_lanes(part + [zeros] * padding)
                address = builder.add(target, _constant(begin * emitter.size))
                emitter.add_lanes(dots, len(part), address, is_adding)

        def emit_case(rows: int) -> None:
            group = _SUMS // rows
            groups = builder.sdiv(builder.sub(stop, start), _constant(group))
            with cgutils.for_range(builder, groups) as loop:
                first = builder.add(start, builder.mul(loop.index, _constant(group)))
                emit_group(first, group, rows)
            done = builder.add(start, builder.mul(groups, _constant(group)))
            smaller = {
                count: (lambda count=count: emit_group(done, count, rows))
                for count in range(1, group)
            }
            _switch(builder, builder.sub(stop, done), smaller)

        cases = {r: (lambda r=r: emit_case(r)) for r in ROWS}
        _switch(builder, rows, cases)
        return context.get_dummy_value()

    return types.void(zero, *[types.intp] * 14), emit
