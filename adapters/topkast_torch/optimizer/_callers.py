"""Who is calling, where another library leaves no other sign of what it is about to do."""

from __future__ import annotations

import sys
from types import FrameType


def is_called_by(function: str, kind: str) -> bool:
    """Whether a method of this name is running, of an object with a class of the name `kind`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function:
            owner = type(frame.f_locals.get("self"))
            if any(one.__name__ == kind for one in owner.__mro__):
                return True
        frame = frame.f_back
    return False
