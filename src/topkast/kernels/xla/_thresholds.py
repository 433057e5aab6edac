"""The k-th largest of integers, by three histograms: a tenth of the passes of a bisection."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import THREAD_COUNTER, array_at, define_arguments
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import as_pointer, fetch_add, keep
from topkast.kernels.xla._frame import (
    BAD_BUFFERS,
    DATA,
    answer_handshake,
    argument,
    fail,
    result,
    size_of,
)
from topkast.kernels.xla._native import link, symbol_address
from topkast.kernels.xla._threads import run, threads_for

_CHUNK = 1 << 16  # keys that a thread counts at a time
_BINS = 1 << 11
_SHIFTS = (20, 10, 0)  # digits of 11, 10 and 10 bits: the sign bit is not among them

_COUNT = define_arguments("keys", "size", "shift", "above", "histograms")
_WORDS = len(_COUNT.names or ())
_count_address = symbol_address("topkast_xla_count_digits")


def link_thresholds() -> None:
    """Link the kernel that this handler runs."""
    link("topkast_xla_count_digits", _count_digits.address)


@kernel(types.void(types.intp))
def _count_digits(address: Any) -> None:
    """Count the next digits of the keys whose digits above are `above`, by thread."""
    arguments = carray(as_pointer(address), 1, _COUNT)[0]
    keys = array_at(arguments.keys, arguments.size, np.int32)
    thread = fetch_add(address + THREAD_COUNTER)
    histogram = array_at(arguments.histograms + 8 * _BINS * thread, _BINS, np.int64)
    shift, above = arguments.shift, np.int32(arguments.above)
    bits = 11 if shift == 20 else 10
    mask = np.int32((1 << bits) - 1)
    while True:
        start = fetch_add(address) * _CHUNK
        if start >= len(keys):
            break
        for k in range(start, min(start + _CHUNK, len(keys))):
            digits = keys[k] >> shift
            if digits >> bits == above:
                histogram[np.uint32(digits & mask)] += 1


@njit  # type: ignore[untyped-decorator]
def _digit_of(frame: Any, keys: Any, shift: Any, above: Any, remaining: Any) -> Any:
    """The digit of the `remaining`-th largest key, and how many larger ones; -1 if too few."""
    size = size_of(keys)
    threads = threads_for(frame, size // _CHUNK + 1)
    histograms = np.zeros((threads, _BINS), dtype=np.int64)
    record = np.zeros(_WORDS, dtype=np.int64)
    arguments = carray(as_pointer(record.ctypes.data), 1, _COUNT)[0]
    arguments.keys, arguments.size = keys[DATA], size
    arguments.shift, arguments.above = shift, above
    arguments.histograms = histograms.ctypes.data
    run(frame, _count_address(), record.ctypes.data, threads)
    keep(record)
    larger = 0
    for digit in range(_BINS - 1, -1, -1):
        count = histograms[:, digit].sum()
        if larger + count >= remaining:
            return digit, larger
        larger += count
    return -1, larger


@kernel(types.intp(types.intp))
def kth_largest(frame: Any) -> Any:
    """(keys, k) -> the largest t of at least -1 that k keys reach; int32."""
    if answer_handshake(frame):
        return 0
    keys, count, out = argument(frame, 0), argument(frame, 1), result(frame, 0)
    if size_of(count) != 1 or size_of(out) != 1:
        return fail(frame, BAD_BUFFERS)
    remaining, threshold = np.int64(array_at(count[DATA], 1, np.int32)[0]), 0
    for shift in _SHIFTS:
        if remaining < 1:  # no key has to reach it
            break
        digit, larger = _digit_of(frame, keys, shift, threshold, remaining)
        if digit < 0:
            threshold = -1
            break
        threshold = (threshold << (11 if shift == 20 else 10)) | digit
        remaining -= larger
    if remaining < 1:
        threshold = 0x7FFFFFFF
    array_at(out[DATA], 1, np.int32)[0] = threshold
    return 0
