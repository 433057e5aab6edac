"""Comparison of the call frame with the header that jaxlib ships."""

from __future__ import annotations

import re

_BASE = "size_t struct_size", "XLA_FFI_Extension_Base* extension_start"

# The structures that handlers read and write: all fields, in order.
_STRUCTURES = {
    "XLA_FFI_Extension_Base": (
        "size_t struct_size",
        "XLA_FFI_Extension_Type type",
        "struct XLA_FFI_Extension_Base* next",
    ),
    "XLA_FFI_Api_Version": (*_BASE, "int major_version", "int minor_version"),
    "XLA_FFI_Error_Create_Args": (*_BASE, "const char* message", "XLA_FFI_Error_Code errc"),
    "XLA_FFI_Error_Destroy_Args": (*_BASE, "XLA_FFI_Error* error"),
    "XLA_FFI_Buffer": (
        *_BASE,
        "XLA_FFI_DataType dtype",
        "void* data",
        "int64_t rank",
        "int64_t* dims",
    ),
    "XLA_FFI_Args": (*_BASE, "int64_t size", "XLA_FFI_ArgType* types", "void** args"),
    "XLA_FFI_Rets": (*_BASE, "int64_t size", "XLA_FFI_RetType* types", "void** rets"),
    "XLA_FFI_CallFrame": (
        *_BASE,
        "const XLA_FFI_Api* api",
        "XLA_FFI_ExecutionContext* ctx",
        "XLA_FFI_ExecutionStage stage",
        "XLA_FFI_Args args",
        "XLA_FFI_Rets rets",
        "XLA_FFI_Attrs attrs",
        "XLA_FFI_Future* future",
    ),
    "XLA_FFI_ThreadPool_Schedule_Args": (
        *_BASE,
        "XLA_FFI_ExecutionContext* ctx",
        "XLA_FFI_Task* task",
        "void* data",
    ),
    "XLA_FFI_ThreadPool_NumThreads_Args": (
        *_BASE,
        "XLA_FFI_ExecutionContext* ctx",
        "int64_t* num_threads",
    ),
    "XLA_FFI_Metadata": (
        "size_t struct_size",
        "XLA_FFI_Api_Version api_version",
        "XLA_FFI_Handler_Traits traits",
        "XLA_FFI_TypeId state_type_id",
    ),
    "XLA_FFI_Metadata_Extension": (
        "XLA_FFI_Extension_Base extension_base",
        "XLA_FFI_Metadata* metadata",
    ),
}
# The first functions of XLA_FFI_Api, which follow these fields; others may be added behind them.
_API_FIELDS = (
    *_BASE,
    "XLA_FFI_Api_Version api_version",
    "const XLA_FFI_InternalApi* internal_api",
)
_FUNCTIONS = (
    "Error_Create",
    "Error_GetMessage",
    "Error_Destroy",
    "Handler_Register",
    "Stream_Get",
    "Type_Register",
    "ExecutionContext_Get",
    "State_Set",
    "State_Get",
    "DeviceMemory_Allocate",
    "DeviceMemory_Free",
    "ThreadPool_Schedule",
    "ThreadPool_NumThreads",
)
_CONSTANTS = {
    "XLA_FFI_Extension_Metadata": 1,
    "XLA_FFI_Error_Code_INVALID_ARGUMENT": 3,
    "XLA_FFI_DataType_F32": 11,
    "XLA_FFI_DataType_F64": 12,
}
_MAJOR = 0
# Beginnings of names in jaxlib 0.11 and later, and what earlier headers call the same.
_RENAMED = {
    "XLA_FFI_InternalExtension_Type": "XLA_FFI_Extension_Type",
    "XLA_FFI_InternalExtension": "XLA_FFI_Extension_Base",
    "XLA_FFI_InvokeContext": "XLA_FFI_ExecutionContext",
    "XLA_FFI_Error_GetDetails": "XLA_FFI_Error_GetMessage",
}


class IncompatibleHeaderError(Exception):
    """The header differs from what the handlers read."""


def check_header(text: str) -> tuple[int, int]:
    """Compare the text of ``xla/ffi/api/c_api.h`` with what handlers read and write.

    Returns
    -------
    major, minor
        The version of the interface, which handlers answer.

    Raises
    ------
    IncompatibleHeaderError
        If a structure has other fields, if a constant has another value, or for another major
        version.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    for later, earlier in _RENAMED.items():
        text = text.replace(later, earlier)
    for name, expected in _STRUCTURES.items():
        _compare(name, _fields(text, name), expected)
    api = _fields(text, "XLA_FFI_Api")
    functions = tuple(f"_XLA_FFI_API_STRUCT_FIELD(XLA_FFI_{name})" for name in _FUNCTIONS)
    expected = (*_API_FIELDS, *functions)
    _compare("XLA_FFI_Api", api[: len(expected)], expected)
    for name, value in _CONSTANTS.items():
        _compare(name, _number(rf"\b{name}\s*=\s*(\d+)", text), value)
    major = _number(r"#define\s+XLA_FFI_API_MAJOR\s+(\d+)", text)
    minor = _number(r"#define\s+XLA_FFI_API_MINOR\s+(\d+)", text)
    _compare("XLA_FFI_API_MAJOR", major, _MAJOR)
    if minor is None:
        raise IncompatibleHeaderError("XLA_FFI_API_MINOR is not defined")
    return _MAJOR, minor


def _compare(name: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise IncompatibleHeaderError(f"{name} is {actual}, expected {expected}")


def _number(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text)
    return None if match is None else int(match[1])


def _fields(text: str, name: str) -> tuple[str, ...]:
    """Declarations of the fields of a structure, with single spaces; empty if it is missing."""
    match = re.search(rf"\bstruct\s+{name}\s*\{{(.*?)\}}", text, flags=re.DOTALL)
    declarations = [] if match is None else match[1].split(";")
    return tuple(" ".join(field.split()) for field in declarations if field.strip())
