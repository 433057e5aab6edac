"""XLA's call frame, read by words of 8 bytes: buffers, errors, the handshake, and threads.

The numbers are offsets in the structures of ``xla/ffi/api/c_api.h``; :func:`check_header` compares
them with the header that jaxlib ships.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import carray, njit

from topkast.kernels.runtime._vector import as_pointer, keep
from topkast.kernels.xla._native import call_api, call_kernel, link, symbol_address

# XLA_FFI_CallFrame
EXTENSION, API, CONTEXT = 1, 2, 3
ARGUMENT_COUNT, ARGUMENTS = 7, 9
RESULT_COUNT, RESULTS = 12, 14
# XLA_FFI_Extension_Base and XLA_FFI_Metadata_Extension
EXTENSION_TYPE, NEXT_EXTENSION, METADATA = 1, 2, 3
METADATA_TYPE = 1
# XLA_FFI_Metadata: both numbers of the version are int32, in one word
VERSION = 3
# XLA_FFI_Api
CREATE_ERROR, DESTROY_ERROR, SCHEDULE, COUNT_THREADS = 6, 8, 17, 18
# XLA_FFI_Buffer
DTYPE, DATA, RANK, DIMENSIONS = 2, 3, 4, 5

SINGLE, DOUBLE = 11, 12  # XLA_FFI_DataType
_INVALID_ARGUMENT = 3  # XLA_FFI_Error_Code

BAD_INDICES, BAD_STRUCTURE, BAD_BUFFERS = 1, 2, 3
_TEXTS = {
    BAD_INDICES: "topkast: the indices of A and of B∖A must ascend inside the weight. Pass a "
    "structure of topkast_jax.sparsify, and do not change its arrays",
    BAD_STRUCTURE: "topkast: this structure does not belong to these indices, values or shapes. "
    "Pass state.structures[name] beside the values of forward_params(params, state) of the same "
    "name and state",
    BAD_BUFFERS: "topkast: expected buffers of one dtype, float32 or float64, whose shapes fit. "
    "Call topkast_jax.sparse_linear, which checks them, instead of the kernel",
}
_texts = symbol_address("topkast_xla_texts")
_version = symbol_address("topkast_xla_version")


def link_frame(version: tuple[int, int]) -> None:
    """Link the texts of errors, and the version of the interface that handlers answer."""
    texts = (ctypes.c_char_p * (len(_TEXTS) + 1))()
    for code, text in _TEXTS.items():
        texts[code] = text.encode()
    link("topkast_xla_texts", texts)
    link("topkast_xla_version", (ctypes.c_int32 * 2)(*version))


@njit(inline="always")  # type: ignore[untyped-decorator]
def words(address: Any, count: Any) -> Any:
    """The int64 words at an address."""
    return carray(as_pointer(address), count, np.int64)


@njit  # type: ignore[untyped-decorator]
def answer_handshake(frame: Any) -> Any:
    """Whether XLA asks for the version of the interface, which is then written."""
    extension = words(frame, EXTENSION + 1)[EXTENSION]
    while extension != 0:
        fields = words(extension, METADATA + 1)
        if fields[EXTENSION_TYPE] & 0xFFFFFFFF == METADATA_TYPE:
            words(fields[METADATA], VERSION + 1)[VERSION] = words(_version(), 1)[0]
            return True
        extension = fields[NEXT_EXTENSION]
    return False


@njit  # type: ignore[untyped-decorator]
def count_arguments(frame: Any) -> Any:
    """Number of arguments of a call."""
    return words(frame, ARGUMENT_COUNT + 1)[ARGUMENT_COUNT]


@njit  # type: ignore[untyped-decorator]
def argument(frame: Any, number: Any) -> Any:
    """The words of an argument's buffer."""
    buffers = words(words(frame, ARGUMENTS + 1)[ARGUMENTS], number + 1)
    return words(buffers[number], DIMENSIONS + 1)


@njit  # type: ignore[untyped-decorator]
def result(frame: Any, number: Any) -> Any:
    """The words of a result's buffer."""
    buffers = words(words(frame, RESULTS + 1)[RESULTS], number + 1)
    return words(buffers[number], DIMENSIONS + 1)


@njit  # type: ignore[untyped-decorator]
def length_of(buffer: Any, axis: Any) -> Any:
    """Length of an axis of a buffer, counted from its last axis, which is 0; 1 if there is none."""
    rank = buffer[RANK]
    return words(buffer[DIMENSIONS], rank)[rank - 1 - axis] if axis < rank else 1


@njit  # type: ignore[untyped-decorator]
def size_of(buffer: Any) -> Any:
    """Number of elements of a buffer."""
    size = 1
    for length in words(buffer[DIMENSIONS], buffer[RANK]):
        size *= length
    return size


@njit  # type: ignore[untyped-decorator]
def dtype_of(buffer: Any) -> Any:
    """Number of a buffer's dtype."""
    return buffer[DTYPE] & 0xFFFFFFFF


@njit  # type: ignore[untyped-decorator]
def fail(frame: Any, code: Any) -> Any:
    """Make the error with the text of a code."""
    texts = words(_texts(), code + 1)
    fields = np.empty(4, dtype=np.int64)  # size, extension, message, code
    fields[0], fields[1], fields[2], fields[3] = 28, 0, texts[code], _INVALID_ARGUMENT
    create = words(words(frame, API + 1)[API], CREATE_ERROR + 1)[CREATE_ERROR]
    error = call_api(create, fields.ctypes.data)
    keep(fields)
    return error


@njit  # type: ignore[untyped-decorator]
def count_threads(frame: Any) -> Any:
    """Number of threads in XLA's pool; 1 if there is no pool."""
    fixed = words(frame, CONTEXT + 1)
    count, fields = np.ones(1, dtype=np.int64), np.empty(4, dtype=np.int64)
    fields[0], fields[1], fields[2], fields[3] = 32, 0, fixed[CONTEXT], count.ctypes.data
    error = call_api(words(fixed[API], COUNT_THREADS + 1)[COUNT_THREADS], fields.ctypes.data)
    keep(fields)
    keep(count)
    if error != 0:
        _destroy(fixed[API], error)
        return 1
    return max(1, count[0])


@njit  # type: ignore[untyped-decorator]
def schedule(frame: Any, task: Any, data: Any) -> Any:
    """Whether XLA's pool accepted the task ``void(int64)`` at an address, to be run on `data`."""
    fixed, fields = words(frame, CONTEXT + 1), np.empty(5, dtype=np.int64)
    fields[0], fields[1], fields[2] = 40, 0, fixed[CONTEXT]
    fields[3], fields[4] = task, data
    error = call_api(words(fixed[API], SCHEDULE + 1)[SCHEDULE], fields.ctypes.data)
    keep(fields)
    if error != 0:
        _destroy(fixed[API], error)
    return error == 0


@njit  # type: ignore[untyped-decorator]
def _destroy(api: Any, error: Any) -> None:
    fields = np.empty(3, dtype=np.int64)
    fields[0], fields[1], fields[2] = 24, 0, error
    call_kernel(words(api, DESTROY_ERROR + 1)[DESTROY_ERROR], fields.ctypes.data)
    keep(fields)
