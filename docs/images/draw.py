"""Draw the figures of docs/analysis.md, for light and dark pages: python docs/images/draw.py.

The page's examples are run, and its figures drawn from their results.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.figure
from PIL import Image

from topkast import plot

FOLDER = Path(__file__).parent


def run_page() -> dict[str, Any]:
    """Run the examples of the page, and return their variables."""
    page = (FOLDER.parent / "analysis.md").read_text(encoding="utf-8")
    variables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for example in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            exec(example, variables)
    return variables


def save(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Save with a transparent background and 256 colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, transparent=True)
    Image.open(buffer).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{os.path.relpath(path)}: {path.stat().st_size:,} bytes")


def main(folder: Path = FOLDER) -> None:
    page = run_page()
    for style in ("light", "dark"):
        figures = {
            "costs": plot.costs(page["costs"], style=style),
            "densities": plot.densities(page["optimizer"], style=style),
            "dynamics": plot.dynamics(page["history"], style=style),
            "mask": plot.mask(page["optimizer"], name="2.weight", style=style),
            "masks": plot.masks(page["optimizer"], style=style),
            "overlap": plot.overlap(page["match"], style=style),
        }
        for name, figure in figures.items():
            save(figure, folder / f"{name}-{style}.png")


if __name__ == "__main__":
    main()
