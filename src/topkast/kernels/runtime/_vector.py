"""The innermost loops as LLVM vector code, like C with SIMD intrinsics but without a C compiler.

Each function is a numba intrinsic. The type of its first argument, `zero`, sets the floating-point
type. Addresses are integers, in bytes. A tile is ``registers`` vectors wide.
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

# Entries: values are prefetched this far ahead, since those of a transpose are scattered.
PREFETCH_DISTANCE = 32


class Emitter:
    """Emits loads, stores and products of whole vectors at a byte address."""

    def __init__(self, builder: Any, numba_type: Any) -> None:
        self.builder = builder
        self.size = numba_type.bitwidth // 8
        self.scalar = ir.FloatType() if self.size == 4 else ir.DoubleType()
        self.lanes = VECTOR_BYTES // self.size
        self.vector = ir.VectorType(self.scalar, self.lanes)

    def load_element(self, address: Any, index: Any, element_type: Any) -> Any:
        pointer = self.builder.inttoptr(address, element_type.as_pointer())
        return self.builder.load(self.builder.gep(pointer, [index]))

    def load_uint16(self, address: Any, index: Any) -> Any:
        """An element of a uint16 array, as int64."""
        return self.builder.zext(self.load_element(address, index, _INT16), _INT64)

    def load_int32(self, address: Any, index: Any) -> Any:
        """An element of an int32 array, as int64."""
        return self.builder.sext(self.load_element(address, index, _INT32), _INT64)

    def load_vector(self, address: Any, register: int, vector_type: Any = None) -> Any:
        loaded = self.builder.load(self._pointer(address, register, vector_type or self.vector))
        loaded.align = self.size
        return loaded

    def store_vector(self, value: Any, address: Any, register: int) -> None:
        self.builder.store(value, self._pointer(address, register, value.type)).align = self.size

    def prefetch(self, address: Any, index: Any) -> None:
        """Prefetch a scalar into the cache."""
        builder, pointer = self.builder, self.builder.inttoptr(address, self.scalar.as_pointer())
        opaque = builder.bitcast(builder.gep(pointer, [index]), cgutils.voidptr_t)
        function_type = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        read, locality, data_cache = (ir.Constant(_INT32, flag) for flag in (0, 3, 1))
        builder.call(function, [opaque, read, locality, data_cache])

    def broadcast(self, value: Any) -> Any:
        undefined = ir.Constant(self.vector, ir.Undefined)
        first_lane = self.builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
        return self.shuffle(first_lane, undefined, [0] * self.lanes)

    def shuffle(self, first: Any, second: Any, lanes: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes)
        return self.builder.shuffle_vector(first, second, mask)

    def multiply_add(self, first: Any, second: Any, third: Any) -> Any:
        name = f"llvm.fma.v{self.lanes}f{8 * self.size}"
        function_type = ir.FunctionType(self.vector, [self.vector] * 3)
        fma = cgutils.get_or_insert_function(self.builder.module, function_type, name)
        return self.builder.call(fma, [first, second, third])

    def row_address(self, start: Any, row: Any, stride: Any) -> Any:
        """Address of a row, given the address of row 0."""
        return self.builder.add(start, self.builder.mul(row, stride))

    def accumulate(self, entry: Any, start: Any, stop: Any, out: Any, registers: int) -> None:
        """out[:] += Σ value · row, with ``value, row_address = entry(k)``, k from start to stop."""
        builder, indices = self.builder, range(registers)
        sums = [cgutils.alloca_once(builder, self.vector) for _ in indices]
        for register in indices:
            builder.store(self.load_vector(out, register), sums[register])
        with cgutils.for_range_slice(builder, start, stop, ir.Constant(_INT64, 1)) as (k, _):
            value, row = entry(k)
            factor = self.broadcast(value)
            for register in indices:
                vector, total = self.load_vector(row, register), builder.load(sums[register])
                builder.store(self.multiply_add(factor, vector, total), sums[register])
        for register in indices:
            self.store_vector(builder.load(sums[register]), out, register)

    def sum_lanes(self, vectors: list[Any]) -> Any:
        """Sum the lanes of each vector; lane i of the result is the sum over vector i.

        The number of vectors is a power of two. Pairs are merged, even lanes plus odd ones, until
        one vector is left: a third of the instructions of summing each by itself.
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

    def add_lanes(self, vector: Any, count: int, address: Any, is_adding: Any) -> None:
        """Write the first `count` lanes to an address, added to its contents if `is_adding`."""
        first = 0
        while first < count:
            lanes = 1 << ((count - first).bit_length() - 1)
            addend = self.shuffle(vector, vector, list(range(first, first + lanes)))
            target = self.builder.add(address, ir.Constant(_INT64, first * self.size))
            zeros = ir.Constant(addend.type, None)
            old = self.builder.select(is_adding, self.load_vector(target, 0, addend.type), zeros)
            self.store_vector(self.builder.fadd(old, addend), target, 0)
            first += lanes

    def _pointer(self, address: Any, register: int, pointee: Any) -> Any:
        shifted = self.builder.add(address, ir.Constant(_INT64, register * VECTOR_BYTES))
        return self.builder.inttoptr(shifted, pointee.as_pointer())


def _row_product(registers: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def row_product(  # type: ignore[no-untyped-def]
        _, zero, values, columns, start, stop, x, stride, out
    ) -> Any:
        """out[:] += Σ values[k] · x[columns[k]], k from start to stop; columns int32."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, values, columns, start, stop, x, stride, out = arguments
            emitter = Emitter(builder, signature.args[0])

            def entry(k: Any) -> tuple[Any, Any]:
                value = emitter.load_element(values, k, emitter.scalar)
                return value, emitter.row_address(x, emitter.load_int32(columns, k), stride)

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

        Columns are uint16. Rows of `x` are as wide as `out`.
        """

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, values, value_index, columns, start, stop, x, out = arguments
            emitter = Emitter(builder, signature.args[0])
            stride = ir.Constant(_INT64, registers * VECTOR_BYTES)

            def entry(k: Any) -> tuple[Any, Any]:
                later = builder.add(k, ir.Constant(_INT64, PREFETCH_DISTANCE))
                emitter.prefetch(values, emitter.load_int32(value_index, later))
                value = emitter.load_element(
                    values, emitter.load_int32(value_index, k), emitter.scalar
                )
                return value, emitter.row_address(x, emitter.load_uint16(columns, k), stride)

            emitter.accumulate(entry, start, stop, out, registers)
            return context.get_dummy_value()

        return types.void(zero, *[types.intp] * 7), emit

    return indexed_product


def _dot_products(registers: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def dot_products(  # type: ignore[no-untyped-def]
        _, zero, columns, start, stop, x, stride, y, out, is_first
    ) -> Any:
        """out[k] += y · x[columns[k]], k from start to stop; columns int32.

        If `is_first` is not 0, `out` is overwritten instead.
        """

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, columns, start, stop, x, stride, y, out, is_first = arguments
            emitter = Emitter(builder, signature.args[0])
            is_adding = builder.icmp_signed("==", is_first, ir.Constant(_INT64, 0))

            def emit_group(first: Any, count: int) -> None:
                """Dot products of `count` entries, which share the loads of `y`."""
                entries = [builder.add(first, ir.Constant(_INT64, index)) for index in range(count)]
                rows = [
                    emitter.row_address(x, emitter.load_int32(columns, entry), stride)
                    for entry in entries
                ]
                sums: list[Any] = [ir.Constant(emitter.vector, [0.0] * emitter.lanes)] * count
                for register in range(registers):
                    shared = emitter.load_vector(y, register)
                    sums = [
                        emitter.multiply_add(shared, emitter.load_vector(row, register), total)
                        for row, total in zip(rows, sums, strict=True)
                    ]
                power_of_two = 1 << (count - 1).bit_length()
                sums += [ir.Constant(emitter.vector, None)] * (power_of_two - count)
                dots = emitter.sum_lanes(sums)
                size = ir.Constant(_INT64, emitter.size)
                emitter.add_lanes(
                    dots, count, builder.add(out, builder.mul(first, size)), is_adding
                )

            size = ir.Constant(_INT64, _GROUP_ENTRIES)
            groups = builder.sdiv(builder.sub(stop, start), size)
            with cgutils.for_range(builder, groups) as loop:
                emit_group(builder.add(start, builder.mul(loop.index, size)), _GROUP_ENTRIES)
            done = builder.add(start, builder.mul(groups, size))
            end = builder.append_basic_block("end")
            switch = builder.switch(builder.sub(stop, done), end)
            for count in range(1, _GROUP_ENTRIES):  # the last, smaller group
                case = builder.append_basic_block(f"last_{count}")
                switch.add_case(ir.Constant(_INT64, count), case)
                builder.position_at_end(case)
                emit_group(done, count)
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(zero, *[types.intp] * 8), emit

    return dot_products


# Entries whose dot products are summed together: the lanes of a vector of doubles.
_GROUP_ENTRIES = VECTOR_BYTES // 8

# row_product(zero, values, columns, start, stop, x, stride, out), by the vectors in `out`.
row_product_1, row_product_2, row_product_4, row_product_8 = map(_row_product, (1, 2, 4, 8))

# indexed_product(zero, values, value_index, columns, start, stop, x, out), by the vectors in `out`.
indexed_product_1, indexed_product_2, indexed_product_4, indexed_product_8 = map(
    _indexed_product, (1, 2, 4, 8)
)

# dot_products(zero, columns, start, stop, x, stride, y, out, is_first), by the vectors in `y`.
dot_products_1, dot_products_2, dot_products_4, dot_products_8 = map(_dot_products, (1, 2, 4, 8))


@intrinsic  # type: ignore[untyped-decorator]
def transpose_square(  # type: ignore[no-untyped-def]
    _, zero, source, source_stride, target, target_stride
) -> Any:
    """Transpose a square whose side is the number of lanes of a vector; strides in bytes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, source_stride, target, target_stride = arguments
        emitter = Emitter(builder, signature.args[0])
        side = emitter.lanes

        def row_address(start: Any, stride: Any, row: int) -> Any:
            return builder.add(start, builder.mul(stride, ir.Constant(_INT64, row)))

        rows = [
            emitter.load_vector(row_address(source, source_stride, row), 0) for row in range(side)
        ]
        distance = 1
        while distance < side:  # swap the off-diagonal quadrants of squares of side 2 · distance
            upper = [lane - distance + side if lane & distance else lane for lane in range(side)]
            lower = [lane + side if lane & distance else lane + distance for lane in range(side)]
            for row in range(side):
                if not row & distance:
                    pair = rows[row], rows[row + distance]
                    rows[row] = emitter.shuffle(*pair, upper)
                    rows[row + distance] = emitter.shuffle(*pair, lower)
            distance *= 2
        for row in range(side):
            emitter.store_vector(rows[row], row_address(target, target_stride, row), 0)
        return context.get_dummy_value()

    return types.void(zero, *[types.intp] * 4), emit


@intrinsic  # type: ignore[untyped-decorator]
def copy_vectors(_, zero, source, target, count) -> Any:  # type: ignore[no-untyped-def]
    """target[:count] = source[:count] in whole vectors: too short for a library call to pay."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, target, count = arguments
        emitter = Emitter(builder, signature.args[0])
        vectors = builder.sdiv(count, ir.Constant(_INT64, emitter.lanes))
        with cgutils.for_range(builder, vectors) as loop:
            start = builder.mul(loop.index, ir.Constant(_INT64, VECTOR_BYTES))
            value = emitter.load_vector(builder.add(source, start), 0)
            emitter.store_vector(value, builder.add(target, start), 0)
        return context.get_dummy_value()

    return types.void(zero, *[types.intp] * 3), emit


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_, zero, address, start, stop) -> Any:  # type: ignore[no-untyped-def]
    """Prefetch the first and the last element of ``array[start:stop]``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, start, stop = arguments
        emitter = Emitter(builder, signature.args[0])
        emitter.prefetch(address, start)
        emitter.prefetch(address, builder.sub(stop, ir.Constant(_INT64, 1)))
        return context.get_dummy_value()

    return types.void(zero, *[types.intp] * 3), emit


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(_: Any, address: Any) -> Any:
    """Atomically increment the int64 at `address` and return its old value."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_INT64, 1), "acq_rel")

    return types.intp(types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add_many(_: Any, address: Any, number: Any) -> Any:
    """Atomically add to the int64 at `address` and return its old value."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.intp(types.intp, types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def as_pointer(_: Any, address: Any) -> Any:
    """An address as the pointer that ``numba.carray`` needs."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def keep(_: Any, array: Any) -> Any:
    """Keep an array alive until here: numba does not see that memory is used by its address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), emit
