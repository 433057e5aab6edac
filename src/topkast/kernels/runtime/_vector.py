"""The innermost loops, emitted as vector code of LLVM: what C with intrinsics would be, uncompiled.

Each function is an intrinsic for numba, generic in the floating-point type by its first argument.
Addresses are integers, in bytes. A tile is ``registers`` vectors wide.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_INT16, _INT32, _INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _host_vector_bytes() -> int:
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


VECTOR_BYTES = _host_vector_bytes()

# Entries by which values are prefetched: those of a transpose lie apart.
AHEAD = 32


class _Emitter:
    """Emits loads, stores and products of whole vectors at a byte address."""

    def __init__(self, builder: Any, numba_type: Any) -> None:
        self.builder = builder
        self.size = numba_type.bitwidth // 8
        self.scalar = ir.FloatType() if self.size == 4 else ir.DoubleType()
        self.lanes = VECTOR_BYTES // self.size
        self.vector = ir.VectorType(self.scalar, self.lanes)

    def element(self, address: Any, index: Any, kind: Any) -> Any:
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.load(self.builder.gep(pointer, [index]))

    def index(self, address: Any, index: Any) -> Any:
        """A uint16 of an array, as int64."""
        return self.builder.zext(self.element(address, index, _INT16), _INT64)

    def position(self, address: Any, index: Any) -> Any:
        """An int32 of an array, as int64."""
        return self.builder.sext(self.element(address, index, _INT32), _INT64)

    def load(self, address: Any, place: int, vector: Any = None) -> Any:
        loaded = self.builder.load(self._pointer(address, place, vector or self.vector))
        loaded.align = self.size
        return loaded

    def store(self, value: Any, address: Any, place: int) -> None:
        self.builder.store(value, self._pointer(address, place, value.type)).align = self.size

    def prefetch(self, address: Any, index: Any) -> None:
        """Ask for a scalar that will be wanted soon."""
        builder, pointer = self.builder, self.builder.inttoptr(address, self.scalar.as_pointer())
        opaque = builder.bitcast(builder.gep(pointer, [index]), cgutils.voidptr_t)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _INT32, _INT32, _INT32])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        for_reading, for_long, of_data = (ir.Constant(_INT32, flag) for flag in (0, 3, 1))
        builder.call(fetch, [opaque, for_reading, for_long, of_data])

    def broadcast(self, value: Any) -> Any:
        nothing = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(nothing, value, ir.Constant(_INT32, 0))
        return self.shuffle(first, nothing, [0] * self.lanes)

    def shuffle(self, first: Any, second: Any, places: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(_INT32, len(places)), places)
        return self.builder.shuffle_vector(first, second, mask)

    def multiply_add(self, first: Any, second: Any, third: Any) -> Any:
        name = f"llvm.fma.v{self.lanes}f{8 * self.size}"
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        fma = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(fma, [first, second, third])

    def row(self, start: Any, number: Any, stride: Any) -> Any:
        """Address of a row, from that of row 0."""
        return self.builder.add(start, self.builder.mul(number, stride))

    def accumulate(self, entry: Any, start: Any, stop: Any, out: Any, registers: int) -> None:
        """Add to `out` the product of scalar and row, as `entry` names them, of each entry."""
        builder, places = self.builder, range(registers)
        sums = [cgutils.alloca_once(builder, self.vector) for _ in places]
        for place in places:
            builder.store(self.load(out, place), sums[place])
        with cgutils.for_range_slice(builder, start, stop, ir.Constant(_INT64, 1)) as (k, _):
            value, row = entry(k)
            factor = self.broadcast(value)
            for place in places:
                found = self.multiply_add(factor, self.load(row, place), builder.load(sums[place]))
                builder.store(found, sums[place])
        for place in places:
            self.store(builder.load(sums[place]), out, place)

    def sums(self, vectors: list[Any]) -> Any:
        """The sum over each of these vectors (as many as a power of two), as one vector.

        Pairs are merged, even lanes plus odd ones, until one vector is left: a third of the
        instructions of summing each by itself.
        """
        count = len(vectors)
        while len(vectors) > 1:
            lanes = vectors[0].type.count
            even, odd = (
                [*range(first, lanes, 2), *range(lanes + first, 2 * lanes, 2)] for first in (0, 1)
            )
            vectors = [
                self.builder.fadd(self.shuffle(a, b, even), self.shuffle(a, b, odd))
                for a, b in zip(vectors[0::2], vectors[1::2], strict=True)
            ]
        total = vectors[0]
        while total.type.count > count:
            even, odd = (list(range(first, total.type.count, 2)) for first in (0, 1))
            total = self.builder.fadd(
                self.shuffle(total, total, even), self.shuffle(total, total, odd)
            )
        return total

    def add(self, vector: Any, count: int, address: Any, adding: Any) -> None:
        """Add the first `count` lanes to as many numbers at an address, or to zeros."""
        first = 0
        while first < count:
            lanes = 1 << ((count - first).bit_length() - 1)
            part = self.shuffle(vector, vector, list(range(first, first + lanes)))
            target = self.builder.add(address, ir.Constant(_INT64, first * self.size))
            zeros = ir.Constant(part.type, None)
            present = self.builder.select(adding, self.load(target, 0, part.type), zeros)
            self.store(self.builder.fadd(present, part), target, 0)
            first += lanes

    def _pointer(self, address: Any, place: int, kind: Any) -> Any:
        shifted = self.builder.add(address, ir.Constant(_INT64, place * VECTOR_BYTES))
        return self.builder.inttoptr(shifted, kind.as_pointer())


def _row_product(registers: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def row_product(  # type: ignore[no-untyped-def]
        _, zero, values, columns, start, stop, x, stride, out
    ) -> Any:
        """out[:] += Σ values[k] · x[columns[k]], k from start to stop; columns int32."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, values, columns, start, stop, x, stride, out = arguments
            emitter = _Emitter(builder, signature.args[0])

            def entry(k: Any) -> tuple[Any, Any]:
                value = emitter.element(values, k, emitter.scalar)
                return value, emitter.row(x, emitter.position(columns, k), stride)

            emitter.accumulate(entry, start, stop, out, registers)
            return context.get_dummy_value()

        return types.void(zero, *[types.intp] * 7), emit

    return row_product


def _indexed_product(registers: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def indexed_product(  # type: ignore[no-untyped-def]
        _, zero, values, value_index, columns, start, stop, x, out
    ) -> Any:
        """out[:] += Σ values[value_index[k]] · x[columns[k]], k from start to stop.

        The columns are uint16, and those of a tile as wide as `out`.
        """

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, values, value_index, columns, start, stop, x, out = arguments
            emitter = _Emitter(builder, signature.args[0])
            stride = ir.Constant(_INT64, registers * VECTOR_BYTES)

            def entry(k: Any) -> tuple[Any, Any]:
                later = builder.add(k, ir.Constant(_INT64, AHEAD))
                emitter.prefetch(values, emitter.position(value_index, later))
                value = emitter.element(values, emitter.position(value_index, k), emitter.scalar)
                return value, emitter.row(x, emitter.index(columns, k), stride)

            emitter.accumulate(entry, start, stop, out, registers)
            return context.get_dummy_value()

        return types.void(zero, *[types.intp] * 7), emit

    return indexed_product


def _dot_products(registers: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def dot_products(  # type: ignore[no-untyped-def]
        _, zero, columns, start, stop, x, stride, y, out, fresh
    ) -> Any:
        """out[k] += y · x[columns[k]], k from start to stop; columns int32.

        If `fresh` is not 0, `out` counts as zeros, whatever it holds.
        """

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, columns, start, stop, x, stride, y, out, fresh = arguments
            emitter = _Emitter(builder, signature.args[0])
            adding = builder.icmp_signed("==", fresh, ir.Constant(_INT64, 0))

            def several(first: Any, count: int) -> None:
                """So many entries at once, which share what they load of y."""
                entries = [
                    builder.add(first, ir.Constant(_INT64, member)) for member in range(count)
                ]
                rows = [
                    emitter.row(x, emitter.position(columns, entry), stride) for entry in entries
                ]
                sums: list[Any] = [ir.Constant(emitter.vector, [0.0] * emitter.lanes)] * count
                for place in range(registers):
                    shared = emitter.load(y, place)
                    sums = [
                        emitter.multiply_add(shared, emitter.load(row, place), total)
                        for row, total in zip(rows, sums, strict=True)
                    ]
                wanted = 1 << (count - 1).bit_length()
                sums += [ir.Constant(emitter.vector, None)] * (wanted - count)
                found = emitter.sums(sums)
                size = ir.Constant(_INT64, emitter.size)
                emitter.add(found, count, builder.add(out, builder.mul(first, size)), adding)

            size = ir.Constant(_INT64, _GROUP)
            groups = builder.sdiv(builder.sub(stop, start), size)
            with cgutils.for_range(builder, groups) as loop:
                several(builder.add(start, builder.mul(loop.index, size)), _GROUP)
            done = builder.add(start, builder.mul(groups, size))
            end = builder.append_basic_block("end")
            others = builder.switch(builder.sub(stop, done), end)
            for count in range(1, _GROUP):  # what is left is one group, too
                block = builder.append_basic_block(f"last_{count}")
                others.add_case(ir.Constant(_INT64, count), block)
                builder.position_at_end(block)
                several(done, count)
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(zero, *[types.intp] * 8), emit

    return dot_products


# Entries whose products are summed together: as many as a vector of doubles has lanes.
_GROUP = VECTOR_BYTES // 8

# row_product(zero, values, columns, start, stop, x, stride, out), by the vectors of `out`.
row_product_1, row_product_2, row_product_4, row_product_8 = map(_row_product, (1, 2, 4, 8))

# indexed_product(zero, values, value_index, columns, start, stop, x, out), by the width of a tile.
indexed_product_1, indexed_product_2, indexed_product_4, indexed_product_8 = map(
    _indexed_product, (1, 2, 4, 8)
)

# dot_products(zero, columns, start, stop, x, stride, y, out, fresh), by the vectors of `y`.
dot_products_1, dot_products_2, dot_products_4, dot_products_8 = map(_dot_products, (1, 2, 4, 8))


@intrinsic  # type: ignore[untyped-decorator]
def transpose_block(  # type: ignore[no-untyped-def]
    _, zero, source, source_stride, target, target_stride
) -> Any:
    """Transpose a square as wide as a vector; strides in bytes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, source_stride, target, target_stride = arguments
        emitter = _Emitter(builder, signature.args[0])
        side = emitter.lanes

        def line(start: Any, stride: Any, number: int) -> Any:
            return builder.add(start, builder.mul(stride, ir.Constant(_INT64, number)))

        lines = [emitter.load(line(source, source_stride, row), 0) for row in range(side)]
        distance = 1
        while distance < side:  # exchange the off-diagonal squares of all squares of this size
            upper = [lane - distance + side if lane & distance else lane for lane in range(side)]
            lower = [lane + side if lane & distance else lane + distance for lane in range(side)]
            for row in range(side):
                if not row & distance:
                    pair = lines[row], lines[row + distance]
                    lines[row] = emitter.shuffle(*pair, upper)
                    lines[row + distance] = emitter.shuffle(*pair, lower)
            distance *= 2
        for row in range(side):
            emitter.store(lines[row], line(target, target_stride, row), 0)
        return context.get_dummy_value()

    return types.void(zero, *[types.intp] * 4), emit


@intrinsic  # type: ignore[untyped-decorator]
def copy_run(_, zero, source, target, count) -> Any:  # type: ignore[no-untyped-def]
    """target[:count] = source[:count], for whole vectors; runs are too short for a call to pay."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, target, count = arguments
        emitter = _Emitter(builder, signature.args[0])
        vectors = builder.sdiv(count, ir.Constant(_INT64, emitter.lanes))
        with cgutils.for_range(builder, vectors) as loop:
            start = builder.mul(loop.index, ir.Constant(_INT64, VECTOR_BYTES))
            value = emitter.load(builder.add(source, start), 0)
            emitter.store(value, builder.add(target, start), 0)
        return context.get_dummy_value()

    return types.void(zero, *[types.intp] * 3), emit


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_, zero, address, start, stop) -> Any:  # type: ignore[no-untyped-def]
    """Ask for the first and the last one of the numbers from `start` to `stop` of an array."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, start, stop = arguments
        emitter = _Emitter(builder, signature.args[0])
        emitter.prefetch(address, start)
        emitter.prefetch(address, builder.sub(stop, ir.Constant(_INT64, 1)))
        return context.get_dummy_value()

    return types.void(zero, *[types.intp] * 3), emit


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(_: Any, address: Any) -> Any:
    """The int64 at `address`, which is counted up: no two threads are given the same."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_INT64, 1), "monotonic")

    return types.intp(types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def as_pointer(_: Any, address: Any) -> Any:
    """An address as the pointer that ``numba.carray`` wants."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), emit
