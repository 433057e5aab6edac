"""The installed adapters, by the package of an optimizer or of a model; and packages of extras."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from topkast._errors import AdapterNotFoundError

# The entry-point group of adapters. An entry maps the package of an optimizer to the function that
# wraps it; the adapter's other functions are found in the same module.
ENTRY_POINTS = "topkast.adapters"

# The extra that installs the adapter's requirements, by the package of an optimizer.
EXTRAS = {"torch": "torch", "optax": "jax"}


def find_entry(value: Any) -> EntryPoint | None:
    """Find the adapter for an optimizer or a model by the packages of its type and of its bases.

    Raises :class:`topkast.AdapterNotFoundError` if this project has the adapter but it is not
    installed.
    """
    roots = [base.__module__.partition(".")[0] for base in type(value).__mro__]
    entries = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    for root in roots:
        if root in entries:
            return entries[root]
    for root in roots:
        if root in EXTRAS:
            raise AdapterNotFoundError(
                f"the adapter for {root} is not installed: pip install 'topkast[{EXTRAS[root]}]'"
            )
    return None


def load(entry: EntryPoint, function: str | None = None) -> Any:
    """Load the object that an entry point names, or another function of its module.

    Raises :class:`topkast.AdapterNotFoundError` if a requirement is not installed, or if the
    adapter has no such function.
    """
    try:
        module = importlib.import_module(entry.module)
        loaded = entry.load()
    except ModuleNotFoundError as error:
        missing = find_missing_package(error)
        if missing is None:
            raise AdapterNotFoundError(
                f"the adapter for {entry.name} cannot be imported: {error}"
            ) from error
        extra = EXTRAS.get(entry.name)
        remedy = f"pip install 'topkast[{extra}]'" if extra else f"install {missing}"
        raise AdapterNotFoundError(
            f"the adapter for {entry.name} needs {missing}, which is not installed: {remedy}"
        ) from error
    except AttributeError as error:
        raise AdapterNotFoundError(
            f"the adapter for {entry.name} has the entry point {entry.value}, which cannot be "
            f"loaded: {error}. Register a function of a module, as 'package.module:wrap'"
        ) from error
    if function is None:
        return loaded
    if not hasattr(module, function):
        raise AdapterNotFoundError(f"the adapter for {entry.name} has no function {function}")
    return getattr(module, function)


def find_missing_package(error: ModuleNotFoundError) -> str | None:
    """The package that is not installed; None if a module of a package that was found is missing.

    A file ``torch.py`` in the folder of a script hides PyTorch: then ``torch.nn`` is missing, and
    an installation would not help.
    """
    root = (error.name or "").partition(".")[0]
    return root if root and sys.modules.get(root) is None else None


def name_extra(
    error: ModuleNotFoundError, what: str, extra: str, *packages: str
) -> ModuleNotFoundError:
    """An error that names the extra which installs a missing one of `packages`.

    The error of any other module is returned as it is.

    Examples
    --------
    >>> name_extra(ModuleNotFoundError(name="pandas"), "tables need", "frames", "pandas")
    ModuleNotFoundError("tables need pandas: pip install 'topkast[frames]'")
    """
    missing = find_missing_package(error)
    if missing not in packages:
        return error
    return ModuleNotFoundError(f"{what} {missing}: pip install 'topkast[{extra}]'", name=missing)


def known_packages() -> list[str]:
    """Packages whose optimizers can be wrapped, perhaps after installing an extra."""
    return sorted({*EXTRAS, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})
