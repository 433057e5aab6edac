"""Arrays that are made when a product first needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


class Deferred(Generic[T]):
    """The result of `make`, which is called at most once in each thread.

    Parameters
    ----------
    make
        A function, which holds `nbytes` bytes of its own. It is dropped when its result is there.
    """

    def __init__(self, make: Callable[[], T], nbytes: int = 0) -> None:
        self._make: Callable[[], T] | None = make
        self._nbytes = nbytes
        self._made: T | None = None

    def get(self) -> T:
        """The result."""
        make, made = self._make, self._made  # in this order: another thread may make it now
        if made is None:
            assert make is not None
            made = self._made = make()
            self._make = None
        return made

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        made = self._made
        return self._nbytes if made is None else made.nbytes
