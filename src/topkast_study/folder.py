"""The folder of a study: finished runs, so that a study that was killed can go on."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from topkast_study import StudyError
from topkast_study.runs import Result, Run
from topkast_study.scales import Scale

VERSION = 2  # of the files; change it with the meaning of a run's settings or of its results


class Folder:
    """The output folder of one study at one scale.

    Raises :class:`StudyError` if it holds another study, or other files.
    """

    def __init__(self, path: Path, study: str, scale: Scale) -> None:
        self.path = path
        claim(path, study=study, scale=scale.name, data=scale.data)

    def load(self, run: Run) -> Result | None:
        """The result of a finished run, or None."""
        path = self.path / "runs" / f"{run.id}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["run"] != run.to_dict():
                raise KeyError("run")
            return Result.from_dict(content["result"])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StudyError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{path} is not the result of its run ({type(error).__name__}): delete it, and it "
                "is trained again"
            ) from None

    def save(self, run: Run, result: Result) -> None:
        self._write(f"runs/{run.id}.json", {"run": run.to_dict(), "result": result.to_dict()})

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all: beside it first, then renamed."""
        write_whole(self.path / name, text)

    def write_json(self, name: str, content: Any) -> None:
        self._write(name, content)

    def _write(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=1, allow_nan=False) + "\n")


def claim(path: Path, *, study: str, scale: str, data: str) -> None:
    """Make an output folder with a folder for its runs, and note in study.json what it is of.

    Raises :class:`StudyError` if it holds another study or other files, or cannot be written to.
    """
    identity = {"study": study, "scale": scale, "data": data, "version": VERSION}
    try:
        _check(path, identity)
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / "study.json", json.dumps(identity, indent=1) + "\n")
        (path / "runs").mkdir(exist_ok=True)
    except OSError as error:
        raise StudyError(f"{path} cannot be written to: {error.strerror}") from None


def write_whole(target: Path, text: str) -> None:
    """Write a file beside its place first, and then rename it.

    Raises :class:`StudyError` if it cannot be written.
    """
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise StudyError(f"{target} cannot be written: {error.strerror}") from None


def _check(path: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder with other contents."""
    if path.exists() and not path.is_dir():
        raise StudyError(f"{path} is a file: choose another folder with --output")
    try:
        found = json.loads((path / "study.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        # A study that was killed as it began may have left a part of study.json.
        if path.exists() and any(file.suffix != ".part" for file in path.iterdir()):
            raise StudyError(
                f"{path} has files but no study.json: choose an empty or new folder with --output"
            ) from None
        return
    except ValueError:
        found = None
    if found != identity:
        raise StudyError(
            f"{path} holds {_describe(found)}, not {_describe(identity)}: choose another folder "
            "with --output"
        )


def _describe(identity: Any) -> str:
    if not isinstance(identity, dict):
        return "a damaged study.json"
    return (
        f"the study {identity.get('study')} at scale {identity.get('scale')} on "
        f"{identity.get('data')} (version {identity.get('version')})"
    )
