"""Progress of long work: a line on a terminal, records of a logger elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator

_LOGGER = logging.getLogger("topkast")

CHUNK = 1 << 21  # entries
_SILENT = 2.0  # seconds of work before the first message
_TERMINAL_PAUSE, _LOG_PAUSE = 0.2, 10.0  # seconds between two messages


def chunks(size: int, work: str) -> Iterator[tuple[int, int]]:
    """Half-open ranges that cover `size` entries; reports how much of the `work` is done."""
    started = time.monotonic()
    due, was_shown = started + _SILENT, False
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    try:
        for start in range(0, size, CHUNK):
            now = time.monotonic()
            if now >= due:
                was_shown = True
                due = now + (_TERMINAL_PAUSE if is_terminal else _LOG_PAUSE)
                left = (now - started) * (size - start) / max(start, 1)
                message = f"topkast: {work}: {start / size:.0%}, {left:.0f} s left"
                if is_terminal:
                    sys.stderr.write(f"\r{message}\x1b[K")
                    sys.stderr.flush()
                else:
                    _LOGGER.info(message)
            yield start, min(start + CHUNK, size)
    finally:
        if was_shown and is_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
