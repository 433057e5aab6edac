"""The handlers: packing, the products, and values on B read from and written into a weight."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._layout import LAYOUT
from topkast.kernels._packing import PACK, _pack_double, _pack_single
from topkast.kernels._products import MULTIPLY, _multiply_double, _multiply_single
from topkast.kernels._sampling import SAMPLE, _sample_double, _sample_single
from topkast.kernels.runtime._arguments import array_at
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import VECTOR_BYTES, as_pointer, keep
from topkast.kernels.xla._build import build, link_build
from topkast.kernels.xla._frame import (
    BAD_BUFFERS,
    BAD_INDICES,
    BAD_STRUCTURE,
    DATA,
    DOUBLE,
    SINGLE,
    answer_handshake,
    argument,
    count_arguments,
    dtype_of,
    fail,
    length_of,
    link_frame,
    result,
    size_of,
)
from topkast.kernels.xla._native import link, symbol_address
from topkast.kernels.xla._structure import (
    ACTIVE,
    EXPLORING,
    HEADER_LENGTH,
    MAGIC,
    TRANSPOSED,
    fill_layout,
    header_at,
    section_at,
)
from topkast.kernels.xla._threads import link_threads, run, threads_for
from topkast.kernels.xla._thresholds import kth_largest, link_thresholds
from topkast.kernels.xla._values import (
    COPY,
    RANGE,
    link_values,
    read_double_address,
    read_single_address,
    write_double_address,
    write_single_address,
)

_KERNELS = {
    "topkast_xla_pack_single": _pack_single,
    "topkast_xla_pack_double": _pack_double,
    "topkast_xla_multiply_single": _multiply_single,
    "topkast_xla_multiply_double": _multiply_double,
    "topkast_xla_sample_single": _sample_single,
    "topkast_xla_sample_double": _sample_double,
}
_pack_single_address, _pack_double_address = map(symbol_address, [*_KERNELS][0:2])
_multiply_single_address, _multiply_double_address = map(symbol_address, [*_KERNELS][2:4])
_sample_single_address, _sample_double_address = map(symbol_address, [*_KERNELS][4:6])

_LAYOUT_WORDS = len(LAYOUT.names or ())
_PACK_WORDS, _COPY_WORDS = len(PACK.names or ()), len(COPY.names or ())
_MULTIPLY_WORDS, _SAMPLE_WORDS = len(MULTIPLY.names or ()), len(SAMPLE.names or ())


def handlers(version: tuple[int, int]) -> dict[str, Any]:
    """Compile the handlers for a version of the interface, that of :func:`check_header`.

    Returns
    -------
    dict of str to function
        ctypes functions by the name of the target.
    """
    link_frame(version)
    link_threads()
    link_build()
    link_thresholds()
    link_values()
    for name, function in _KERNELS.items():
        link(name, function.address)
    targets = {
        "topkast_build": build,
        "topkast_kth_largest": kth_largest,
        "topkast_pack": _pack,
        "topkast_multiply": _multiply,
        "topkast_multiply_transposed": _multiply_transposed,
        "topkast_sample": _sample,
        "topkast_gather": _gather,
        "topkast_put": _put,
    }
    return {name: target.ctypes for name, target in targets.items()}


@njit  # type: ignore[untyped-decorator]
def _itemsize(buffer: Any) -> Any:
    """Bytes of an element of float32 or float64; 0 for other dtypes."""
    dtype = dtype_of(buffer)
    return 4 if dtype == SINGLE else 8 if dtype == DOUBLE else 0


@njit  # type: ignore[untyped-decorator]
def _registers(buffer: Any) -> Any:
    """Vectors in a row of packed activations; 0 if they do not fill 1, 2, 4 or 8."""
    row_bytes = length_of(buffer, 0) * _itemsize(buffer)
    registers = row_bytes // VECTOR_BYTES
    is_whole = registers * VECTOR_BYTES == row_bytes
    return registers if is_whole and registers in (1, 2, 4, 8) else 0


@njit  # type: ignore[untyped-decorator]
def _belongs(structure: Any, indices: Any) -> Any:
    """Whether a vector of layouts can be that of these indices.

    The kernels read columns from the indices, without bounds.
    """
    if size_of(structure) < HEADER_LENGTH:
        return False
    header, count = header_at(structure[DATA]), size_of(indices)
    if header.magic != MAGIC or header.length != size_of(structure) or header.backward != count:
        return False
    return _are_inside(indices, header.forward, header.rows * header.width)


@njit  # type: ignore[untyped-decorator]
def _are_inside(indices: Any, forward: Any, size: Any) -> Any:
    """Whether the first and the last index of A and of B∖A lie in a weight of this size."""
    count = size_of(indices)
    entries = array_at(indices[DATA], count, np.int32)
    if not 0 <= forward <= count:
        return False
    if forward > 0 and not (entries[0] >= 0 and entries[forward - 1] < size):
        return False
    return forward == count or (entries[forward] >= 0 and entries[count - 1] < size)


@kernel(types.intp(types.intp))
def _pack(frame: Any) -> Any:
    """Activations (batch, features) -> (tiles, features, width)."""
    if answer_handshake(frame):
        return 0
    source, target = argument(frame, 0), result(frame, 0)
    batch, features = length_of(source, 1), length_of(source, 0)
    count, width = length_of(target, 2), length_of(target, 0)
    itemsize = _itemsize(source)
    if (
        itemsize == 0
        or dtype_of(source) != dtype_of(target)
        or length_of(target, 1) != features
        or not (count - 1) * width < batch <= count * width
    ):
        return fail(frame, BAD_BUFFERS)
    record = np.zeros(_PACK_WORDS, dtype=np.int64)
    arguments = carray(as_pointer(record.ctypes.data), 1, PACK)[0]
    arguments.source, arguments.target = source[DATA], target[DATA]
    arguments.count, arguments.batch = count, batch
    arguments.features, arguments.width = features, width
    address = _pack_single_address() if itemsize == 4 else _pack_double_address()
    run(frame, address, record.ctypes.data, threads_for(frame, count))
    keep(record)
    return 0


@njit  # type: ignore[untyped-decorator]
def _run_multiply(frame: Any, number: Any) -> Any:
    """(structure, indices, values, packed x[, bias]) -> (batch, rows), with one of the layouts."""
    structure, indices, values = argument(frame, 0), argument(frame, 1), argument(frame, 2)
    x, out = argument(frame, 3), result(frame, 0)
    has_bias = count_arguments(frame) > 4
    if not _belongs(structure, indices) or size_of(values) != size_of(indices):
        return fail(frame, BAD_STRUCTURE)
    section = section_at(structure[DATA], number)
    tiles, width, batch = length_of(x, 2), length_of(x, 0), length_of(out, 1)
    registers = _registers(x)
    if (
        registers == 0
        or dtype_of(values) != dtype_of(x)
        or dtype_of(out) != dtype_of(x)
        or length_of(x, 1) != section.width
        or length_of(out, 0) != section.rows
        or batch > tiles * width
    ):
        return fail(frame, BAD_BUFFERS)
    layout = np.zeros(_LAYOUT_WORDS, dtype=np.int64)
    fill_layout(layout.ctypes.data, structure[DATA], number, indices[DATA])
    record = np.zeros(_MULTIPLY_WORDS, dtype=np.int64)
    arguments = carray(as_pointer(record.ctypes.data), 1, MULTIPLY)[0]
    if has_bias:
        bias = argument(frame, 4)
        if dtype_of(bias) != dtype_of(x) or size_of(bias) != section.rows:
            return fail(frame, BAD_BUFFERS)
        arguments.bias = bias[DATA]
    threads = threads_for(frame, tiles * section.chunks)
    scratch_rows, row_bytes = threads * section.chunk_size, registers * VECTOR_BYTES
    scratch = np.empty(scratch_rows * row_bytes + VECTOR_BYTES, dtype=np.uint8)
    arguments.layout, arguments.values = layout.ctypes.data, values[DATA]
    arguments.x, arguments.out = x[DATA], out[DATA]
    arguments.scratch = -(-scratch.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES
    arguments.max_chunk_rows = section.chunk_size
    arguments.tiles, arguments.registers, arguments.batch = tiles, registers, batch
    is_single = dtype_of(x) == SINGLE
    address = _multiply_single_address() if is_single else _multiply_double_address()
    run(frame, address, record.ctypes.data, threads)
    keep(record)
    keep(layout)
    keep(scratch)
    return 0


@kernel(types.intp(types.intp))
def _multiply(frame: Any) -> Any:
    """X -> x · Wᵀ + bias."""
    return 0 if answer_handshake(frame) else _run_multiply(frame, ACTIVE)


@kernel(types.intp(types.intp))
def _multiply_transposed(frame: Any) -> Any:
    """X -> x · W + bias."""
    return 0 if answer_handshake(frame) else _run_multiply(frame, TRANSPOSED)


@kernel(types.intp(types.intp))
def _sample(frame: Any) -> Any:
    r"""(structure, indices, packed y, packed x) -> (yᵀ · x) on B, (1, \|B\|)."""
    if answer_handshake(frame):
        return 0
    structure, indices = argument(frame, 0), argument(frame, 1)
    y, x, out = argument(frame, 2), argument(frame, 3), result(frame, 0)
    if not _belongs(structure, indices) or size_of(out) != size_of(indices):
        return fail(frame, BAD_STRUCTURE)
    section, registers = section_at(structure[DATA], ACTIVE), _registers(x)
    if (
        registers == 0
        or _registers(y) != registers
        or dtype_of(x) != dtype_of(y)
        or dtype_of(out) != dtype_of(x)
        or length_of(x, 2) != length_of(y, 2)
        or length_of(x, 1) != section.width
        or length_of(y, 1) != section.rows
    ):
        return fail(frame, BAD_BUFFERS)
    layouts = np.zeros((2, _LAYOUT_WORDS), dtype=np.int64)
    fill_layout(layouts[0].ctypes.data, structure[DATA], ACTIVE, indices[DATA])
    fill_layout(layouts[1].ctypes.data, structure[DATA], EXPLORING, indices[DATA])
    record = np.zeros(_SAMPLE_WORDS, dtype=np.int64)
    arguments = carray(as_pointer(record.ctypes.data), 1, SAMPLE)[0]
    header = header_at(structure[DATA])
    arguments.layout = layouts[0].ctypes.data
    if header.backward > header.forward:
        arguments.other = layouts[1].ctypes.data
    arguments.columns = arguments.other_columns = indices[DATA]
    arguments.pitch, arguments.stride = section.width, registers * VECTOR_BYTES
    arguments.x, arguments.y, arguments.out = x[DATA], y[DATA], out[DATA]
    arguments.image_groups = length_of(x, 2)
    arguments.image_group_length = section.width * registers
    arguments.plane_length = arguments.positions = arguments.registers = registers
    is_single = dtype_of(x) == SINGLE
    address = _sample_single_address() if is_single else _sample_double_address()
    run(frame, address, record.ctypes.data, threads_for(frame, section.chunks))
    keep(record)
    keep(layouts)
    return 0


@njit  # type: ignore[untyped-decorator]
def _run_copy(
    frame: Any, flat: Any, indices: Any, forward: Any, values: Any, is_reading: Any
) -> Any:
    """Copy between a weight and its values at ascending indices of A, then of B∖A."""
    if size_of(forward) != 1:
        return fail(frame, BAD_BUFFERS)
    split = array_at(forward[DATA], 1, np.int32)[0]
    if not _are_inside(indices, split, size_of(flat)):
        return fail(frame, BAD_INDICES)
    count, size, itemsize = size_of(indices), size_of(flat), _itemsize(flat)
    if itemsize == 0 or dtype_of(flat) != dtype_of(values) or size_of(values) != count:
        return fail(frame, BAD_BUFFERS)
    record = np.zeros(_COPY_WORDS, dtype=np.int64)
    arguments = carray(as_pointer(record.ctypes.data), 1, COPY)[0]
    arguments.flat, arguments.size = flat[DATA], size
    arguments.indices, arguments.values, arguments.count = indices[DATA], values[DATA], count
    arguments.forward = split
    if itemsize == 4:
        address = read_single_address() if is_reading else write_single_address()
    else:
        address = read_double_address() if is_reading else write_double_address()
    run(frame, address, record.ctypes.data, threads_for(frame, -(-size // RANGE)))
    keep(record)
    return 0


@kernel(types.intp(types.intp))
def _gather(frame: Any) -> Any:
    r"""(indices, \|A\|, weight) -> the weight's values on B."""
    if answer_handshake(frame):
        return 0
    indices, forward, flat = argument(frame, 0), argument(frame, 1), argument(frame, 2)
    return _run_copy(frame, flat, indices, forward, result(frame, 0), True)


@kernel(types.intp(types.intp))
def _put(frame: Any) -> Any:
    r"""(indices, \|A\|, weight, values) -> the weight with these values on B, in its memory."""
    if answer_handshake(frame):
        return 0
    indices, forward, flat = argument(frame, 0), argument(frame, 1), argument(frame, 2)
    values, out = argument(frame, 3), result(frame, 0)
    if flat[DATA] != out[DATA]:
        return fail(frame, BAD_BUFFERS)
    return _run_copy(frame, out, indices, forward, values, False)
