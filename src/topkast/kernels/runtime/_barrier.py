"""Stages of a parallel region: threads may wait until all have left an earlier stage.

A stage begins with atomic counters: the threads that have entered it, and those that have left it.
Threads take work items inside, and a thread leaves when it finds no more. So a stage is done once a
thread has left it and as many have left as had entered: nobody needs to know the number of threads,
and one thread alone never waits. Both counters are counted by
:func:`~topkast.kernels.runtime._vector.fetch_add`.
"""

from __future__ import annotations

import os
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_INT64 = ir.IntType(64)
_IS_X86 = binding.get_process_triple().startswith(("x86_64", "i686"))
_SPINS = 4096  # before a waiting thread offers its core to another thread


@njit  # type: ignore[untyped-decorator]
def wait_until_done(entered: Any, left: Any) -> None:
    """Wait until all threads that have entered a stage have left it; the caller has."""
    spins = 0
    while True:
        # In this order: no thread leaves before it enters, and none enters with an item any more.
        gone = _load(left)
        if gone == _load(entered):
            break
        spins += 1
        if spins % _SPINS:
            _pause()
        else:
            yield_core()


@intrinsic  # type: ignore[untyped-decorator]
def _load(_: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.intp(types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def _pause(_: Any) -> Any:
    """Tell the core that this thread spins."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _IS_X86:
            function_type = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic  # type: ignore[untyped-decorator]
def yield_core(_: Any) -> Any:
    """Let another thread run, where the system has ``sched_yield``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if os.name == "posix":
            function_type = ir.FunctionType(ir.IntType(32), [])
            name = "sched_yield"
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [])
        return context.get_dummy_value()

    return types.void(), emit
