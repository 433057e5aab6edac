"""Initial weights in a file, which is written once and then only read, memory-mapped."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from topkast._errors import ReservoirError
from topkast._progress import chunks

Vector = np.ndarray[Any, Any]

_FORMAT = "topkast-reservoir-1"
_HEADER = 4096  # bytes: the weights begin at a page of memory
_SUFFIX = ".reservoir"
_PART = ".reservoir.part"  # of a file that is being written
_MAX_NAME = 2048  # bytes of a tensor's name in the header
_LOCKED_AFTER = 60.0  # seconds: an empty file may not be locked yet

_CHANGED = (
    "{} was changed while it was in use, and the weights outside B are lost: continue from a "
    "checkpoint whose file is intact, and keep other programs from writing to it"
)

_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


class FileBase:
    """The initial weights of one tensor in a file, named by tensor and content.

    The file is written beside its final place and moved there when it is complete, so that a file
    of this name holds all weights or does not exist. Nothing writes to it afterwards.

    Attributes
    ----------
    path
        The file.
    name
        Name of the tensor; that of many tensors ranked as one is shortened.
    digest
        BLAKE2 digest of the weights, in hexadecimal digits.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from topkast.reservoirs import FileBase
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     base = FileBase.create(folder, "layer.weight", np.asarray([0.5, 0.25], np.float32))
    ...     base.path.name.startswith("layer.weight-"), base.read(0, 1), base.disk_bytes
    (True, array([0.5], dtype=float32), 4104)
    """

    nbytes = 0

    def __init__(self, path: Path, header: dict[str, Any], *, created: Any = None) -> None:
        self.path, self.header = Path(path).absolute(), header
        self._created = created  # the identity of the file, if only this object needs it
        self.name, self.digest = header["name"], header["digest"]
        self.size, self.dtype = header["size"], header["dtype"]
        self._weights, self._mapped = _map(path, header)

    @classmethod
    def create(cls, folder: Any, name: str, weights: Vector) -> FileBase:
        """Write the weights (n,) of a tensor to a file in `folder`.

        Raises
        ------
        ReservoirError
            If the folder cannot be written to, or its disk is full. No file is left then.
        """
        folder, name = Path(folder).absolute(), _shorten(name)
        stem = re.sub(r"[^\w.+-]+", "_", name, flags=re.ASCII)[:100]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            header: dict[str, Any] = {"format": _FORMAT, "name": name}
            header |= {"size": weights.size, "dtype": weights.dtype.name}
            with _open_part(folder, stem) as (part, file):
                file.write(bytes(_HEADER))
                header["digest"] = _digest(_write_chunks(file, weights, name))
                file.seek(0)
                file.write(json.dumps(header).encode().ljust(_HEADER, b" "))
                file.flush()
                os.fsync(file.fileno())
                created = _identity(os.fstat(file.fileno()))
                key = hashlib.blake2b(f"{header['digest']} {name}".encode(), digest_size=8)
                path = folder / f"{stem}-{key.hexdigest()}{_SUFFIX}"
                is_new = not path.exists()
                if _fcntl is None:
                    file.close()  # Windows moves no open file
                part.replace(path)  # an existing file has the same content, unless it is damaged
            _sync_folder(folder)
        except OSError as error:
            raise ReservoirError(
                f"the weights of {name} ({weights.nbytes:,} bytes) cannot be written to {folder}: "
                f"{error}. Free the space or choose another reservoir_path"
            ) from error
        return cls(path, header, created=created if is_new else None)

    @classmethod
    def from_description(cls, saved: dict[str, Any], folder: Any = None) -> FileBase:
        """Open the file that a checkpoint describes, in `folder` or where it was, and check it.

        Raises
        ------
        ReservoirError
            If it does not exist, is damaged, or belongs to another tensor.
        """
        recorded = Path(saved["path"])
        places = [recorded] if folder is None else [Path(folder) / recorded.name, recorded]
        path = next((place for place in places if place.exists()), None)
        if path is None:
            raise ReservoirError(
                f"the checkpoint needs the file {recorded.name}, which holds the weights of "
                f"{saved['name']} outside B, but it is not in "
                f"{' or '.join(str(place.parent) for place in places)}: copy it there"
            )
        base = cls(path, _read_header(path))
        for field in ("name", "size", "dtype", "digest"):
            if base.header[field] != saved[field]:
                raise ReservoirError(
                    f"{path} belongs to another tensor or run: its {field} is "
                    f"{base.header[field]!r}, the checkpoint has {saved[field]!r}"
                )
        if not base._has_digest():
            raise ReservoirError(f"{path} is damaged: its weights do not have its digest")
        return base

    def read(self, start: int, stop: int) -> Vector:
        """The weights of a range of flat indices, as a new array."""
        self._check_length()
        return np.array(self._weights[start:stop])

    def take(self, indices: Vector) -> Vector:
        """The weights at flat indices (k,)."""
        self._check_length()
        return np.asarray(self._weights.take(indices))

    def describe(self) -> dict[str, Any]:
        """Numbers and strings by which the file is found and recognised.

        Raises
        ------
        ReservoirError
            If the file was removed or replaced, and cannot be written again.
        """
        self._keep()
        fields = ("name", "size", "dtype", "digest")
        return {field: self.header[field] for field in fields} | {"path": str(self.path)}

    @property
    def disk_bytes(self) -> int:
        """Bytes of the file."""
        return _HEADER + self._weights.nbytes

    def discard(self, kept: Iterable[Any] = ()) -> None:
        """Remove a file that this object created, unless something needs it.

        That is a checkpoint, one of the bases that are `kept`, a copy of this object, or another
        run, which has written the same file again.
        """
        needed = {base.path.resolve() for base in kept if isinstance(base, FileBase)}
        if self._created is not None and self.path.resolve() not in needed:
            with suppress(OSError):
                if _identity(self.path.stat()) == self._created:
                    self.path.unlink()
            self._created = None

    def _keep(self) -> None:
        """Leave the file to a checkpoint, which needs it from now on.

        If it was removed or replaced since, it is written again from what is mapped.
        """
        self._created = None
        if not self._is_intact():
            FileBase.create(self.path.parent, self.name, self._weights)

    def _is_intact(self) -> bool:
        """Whether the file at the path has the weights: it is read only if its stamp is another.

        Raises :class:`ReservoirError` if the mapped file itself was changed.
        """
        try:
            status = self.path.stat()
        except OSError:
            return False
        if _stamp(status) == self._mapped:
            return True
        if _identity(status) == self._mapped[:2]:
            self._check_length()
            if _read_header(self.path) != self.header or not self._has_digest():
                raise ReservoirError(_CHANGED.format(self.path))
        else:
            try:
                present = FileBase(self.path, self.header)
                is_intact = _read_header(self.path) == self.header and present._has_digest()
            except ReservoirError:
                return False
            if not is_intact:
                return False
            self._weights = present._weights
        self._mapped = _stamp(status)
        return True

    def _check_length(self) -> None:
        """Raise :class:`ReservoirError` if the mapped file was cut off: reading it would crash."""
        try:
            status = self.path.stat()
        except OSError:
            return  # removed: what is mapped stays
        if _identity(status) == self._mapped[:2] and status.st_size < self.disk_bytes:
            raise ReservoirError(_CHANGED.format(self.path))

    def _has_digest(self) -> bool:
        """Whether the weights have the digest of the header; reads them all."""
        ranges = chunks(self.size, f"checking {self.path.name}")
        digest: str = self.digest
        return _digest(self.read(start, stop) for start, stop in ranges) == digest

    def __deepcopy__(self, memo: Any) -> FileBase:
        self._created = None  # the copy needs it too
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._keep()
        return {"path": self.path, "header": self.header}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path, header = state["path"], state["header"]
        FileBase.__init__(self, path, header)


def _write_chunks(file: BinaryIO, weights: Vector, name: str) -> Iterable[Vector]:
    """Write the weights chunk by chunk, and yield each chunk."""
    for start, stop in chunks(weights.size, f"writing the weights of {name}"):
        chunk = np.ascontiguousarray(weights[start:stop])
        file.write(chunk.astype(chunk.dtype.newbyteorder("<"), copy=False).data)
        yield chunk


def _digest(pieces: Iterable[Vector]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece.data)
    return digest.hexdigest()


def _read_header(path: Path) -> dict[str, Any]:
    """The header of a file; raises :class:`ReservoirError` if it is not one of ours."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER))
    except OSError as error:
        raise ReservoirError(f"{path} cannot be read: {error}") from error
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        version = header.get("format") if isinstance(header, dict) else None
        raise ReservoirError(
            f"{path} is not a reservoir of this version of topkast: its format is {version!r}, "
            f"expected {_FORMAT!r}"
        )
    return header


def _map(path: Path, header: dict[str, Any]) -> tuple[Vector, tuple[int, ...]]:
    """Map the weights of a file into memory, to be read only; also return the file's stamp."""
    dtype, size = np.dtype(header["dtype"]).newbyteorder("<"), header["size"]
    try:
        status = path.stat()
        actual = status.st_size
        if actual != _HEADER + size * dtype.itemsize:
            raise ReservoirError(
                f"{path} has {actual:,} bytes, but its header asks for "
                f"{_HEADER + size * dtype.itemsize:,}: it is damaged"
            )
        return np.memmap(path, dtype, "r", _HEADER, (size,)), _stamp(status)
    except OSError as error:
        if isinstance(error, ReservoirError):
            raise
        raise ReservoirError(f"{path} cannot be read: {error}") from error


def _shorten(name: str) -> str:
    """A name that leaves the header space for its other fields; a shortened name stays as it is."""
    if len(json.dumps(name)) <= _MAX_NAME:
        return name
    return f"{name[:100]}… {hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"


def _identity(status: os.stat_result) -> tuple[int, int]:
    """What distinguishes a file from others that had its path."""
    return status.st_dev, status.st_ino


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What changes if another file takes the path, or the file is written to."""
    return (*_identity(status), status.st_size, status.st_mtime_ns)


@contextmanager
def _open_part(folder: Path, stem: str) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file, locked while it is written, and removed at the end unless it was moved."""
    part = folder / f".{stem}.{secrets.token_hex(4)}{_PART}"
    try:
        with part.open("xb") as file:
            if _fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    _fcntl.flock(file, _fcntl.LOCK_EX)
            yield part, file
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove incomplete files that no process of any machine still writes."""
    for part in folder.glob(f".*{_PART}"):
        with suppress(OSError):
            if _fcntl is None:
                part.unlink()  # Windows refuses this for open files
                continue
            with part.open("rb") as file:
                status = os.fstat(file.fileno())
                if not status.st_size and time.time() - status.st_mtime < _LOCKED_AFTER:
                    continue
                _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
                part.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the file's new name survive a loss of power, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
