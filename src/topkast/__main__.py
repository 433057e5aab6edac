"""Entry point of ``python -m topkast`` and of the command ``topkast``."""

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies or the demo; returns the exit status."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:  # after --help and --version too, which raise SystemExit
            sys.stdout.flush()
    except BrokenPipeError:  # `topkast study --list | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["study"]:
        from topkast_study.cli import main as study

        return study(arguments[1:])
    from topkast_demo.cli import main as demo

    return demo(arguments)


if __name__ == "__main__":
    sys.exit(main())
