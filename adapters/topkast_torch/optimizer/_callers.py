"""Find callers on the stack, for libraries that announce their intent in no other way."""

from __future__ import annotations

import sys
from types import FrameType


def is_called_by(method: str, class_name: str) -> bool:
    """Whether `method` of a class named `class_name`, or of a subclass, is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == method:
            caller = type(frame.f_locals.get("self"))
            if any(base.__name__ == class_name for base in caller.__mro__):
                return True
        frame = frame.f_back
    return False
