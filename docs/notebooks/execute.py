"""Run the notebooks of this folder, and store what they print and draw.

``python docs/notebooks/execute.py`` runs all of them, ``execute.py NAME`` one. Run it after each
change of their code: the tests refuse a notebook whose outputs belong to other code.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
PATHS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_hash(notebook: Any) -> str:
    """A hash of the code of all cells, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def execute(notebook: Any) -> None:
    """Run all cells in a new kernel, in a folder of its own; an error in a cell is raised."""
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=240,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()
    notebook.metadata["topkast"] = {"code_sha256": code_hash(notebook)}


def shrink_pictures(notebook: Any) -> None:
    """Store pictures with 64 colours, in a third of the bytes."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                buffer = io.BytesIO()
                few = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
                few.save(buffer, format="png", optimize=True)
                output.data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def main(names: list[str]) -> None:
    for path in PATHS:
        if not names or path.stem in names:
            notebook = read(path)
            execute(notebook)
            shrink_pictures(notebook)
            nbformat.write(notebook, path)
            print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
