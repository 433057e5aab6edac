"""Entry point of ``python -m topkast``."""

import sys

from topkast_demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
