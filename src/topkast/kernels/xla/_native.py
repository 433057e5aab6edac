"""What a handler needs below numba: calls by address, atomic words, memory, and linked symbols.

Addresses that are known at run time only, those of other kernels and of texts, are symbols that the
linker of numba resolves when it loads a handler. So a handler in the on-disk cache serves every
process.
"""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_INT64 = ir.IntType(64)
_linked: list[Any] = []  # objects whose addresses handlers hold


def link(symbol: str, value: Any) -> None:
    """Give a symbol the address of a ctypes object, or an address, before handlers are loaded."""
    address = value
    if not isinstance(value, int):
        _linked.append(value)
        address = ctypes.addressof(value)
    binding.add_symbol(symbol, address)


def symbol_address(symbol: str) -> Any:
    """An intrinsic that returns the address of a linked symbol."""

    @intrinsic  # type: ignore[untyped-decorator]
    def address(_: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            function_type = ir.FunctionType(ir.VoidType(), [_INT64])
            function = cgutils.get_or_insert_function(builder.module, function_type, symbol)
            return builder.ptrtoint(function, _INT64)

        return types.intp(), emit

    return address


@intrinsic  # type: ignore[untyped-decorator]
def call_kernel(_: Any, kernel: Any, argument: Any) -> Any:
    """Call the function ``void(int64)`` at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [_INT64])
        function = builder.inttoptr(arguments[0], function_type.as_pointer())
        builder.call(function, [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def call_api(_: Any, function: Any, argument: Any) -> Any:
    """Call a function of XLA's interface, which takes a structure and returns an error or 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(_INT64, [_INT64])
        pointer = builder.inttoptr(arguments[0], function_type.as_pointer())
        return builder.call(pointer, [arguments[1]])

    return types.intp(types.intp, types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def add_atomically(_: Any, address: Any, summand: Any) -> Any:
    """Add to the int64 at `address`, and return its old value; orders all reads and writes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.intp(types.intp, types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def allocate(_: Any, size: Any) -> Any:
    """The address of `size` bytes, which any thread may release."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(context.nrt.allocate(builder, arguments[0]), _INT64)

    return types.intp(types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def release(_: Any, address: Any) -> Any:
    """Release what :func:`allocate` returned."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        context.nrt.free(builder, builder.inttoptr(arguments[0], cgutils.voidptr_t))
        return context.get_dummy_value()

    return types.void(types.intp), emit
