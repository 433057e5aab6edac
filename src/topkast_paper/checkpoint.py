"""Checkpoints, which are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from topkast_paper import PaperError

NAME = "checkpoint.pt"
VERSION = "1"  # change it with the meaning of the settings or of the content


def prepare(output: Path) -> None:
    """Make the output folder; raises :class:`PaperError` if nothing can be written to it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise PaperError(f"{output} cannot be written to: {error.strerror}") from None


def save(output: Path, identity: dict[str, str], content: dict[str, Any]) -> None:
    """Replace the checkpoint of the folder `output`, atomically."""
    beside = output / f"{NAME}.{os.getpid()}.part"
    try:
        torch.save({"identity": {"version": VERSION, **identity}, **content}, beside)
        os.replace(beside, output / NAME)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        with contextlib.suppress(OSError):
            beside.unlink()
        raise PaperError(f"the checkpoint {output / NAME} cannot be written: {error}") from None


def load(output: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """Read the checkpoint of the folder `output`; None if there is none.

    Raises
    ------
    PaperError
        If it is damaged, or belongs to a run with another `identity`.
    """
    path = output / NAME
    if not path.exists():
        return None
    content: Any = None
    with contextlib.suppress(Exception):  # other files make the unpickler raise anything
        content = torch.load(path, map_location="cpu", weights_only=True)
    found = content.get("identity") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise PaperError(
            f"{path} is no checkpoint, or is damaged: delete it, and the run begins again"
        )
    expected = {"version": VERSION, **identity}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise PaperError(
                f"{path} belongs to another run: {name} is {found.get(name)} there, and "
                f"{expected.get(name)} here. Choose another output folder, or delete it"
            )
    return dict(content)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, atomically; raises :class:`PaperError` if it cannot be written."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise PaperError(f"{path} cannot be written: {error.strerror}") from None
