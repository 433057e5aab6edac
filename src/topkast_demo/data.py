"""Real data without a download: bundled with scikit-learn and Python, or in the user's files."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topkast_demo import DemoError


@dataclass(frozen=True)
class Images:
    """Images as rows of pixels in [0, 1], with the class number of each."""

    source: str
    classes: int
    train_pixels: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_pixels: NDArray[np.float32]
    test_labels: NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """Text as a sequence of character numbers, in the order of Unicode."""

    source: str
    characters: int  # number of distinct characters
    train: NDArray[np.int64]
    valid: NDArray[np.int64]


def load_images(path: Path | None = None) -> Images:
    """Load scikit-learn's digits, or an IDX file and its labels; the last 20 % are for testing."""
    if path is None:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        source = "scikit-learn's digits"
        pixels, labels, max_value = digits.data, digits.target, 16
    else:
        source = path.name
        pixels, max_value = read_idx(path), 255
        labels = read_idx(_labels_path(path))
        if pixels.ndim < 2 or labels.shape != pixels.shape[:1]:
            raise DemoError(
                f"{path}: expected images and one label for each, got images of shape "
                f"{pixels.shape} and labels of shape {labels.shape}"
            )
    count = len(pixels)
    train_size = count * 4 // 5
    if train_size == 0:
        raise DemoError(f"{source}: {count} images are too few to train and test on")
    scaled = pixels.reshape(count, -1).astype(np.float32) / np.float32(max_value)
    classes = labels.astype(np.int64)
    return Images(
        source,
        int(classes.max()) + 1,
        scaled[:train_size],
        classes[:train_size],
        scaled[train_size:],
        classes[train_size:],
    )


def load_text(path: Path | None = None, *, min_valid_size: int = 1) -> Text:
    """Load Python's language reference, or a text file; the last 10 % are for validation.

    `min_valid_size` is the minimum number of characters for validation.
    """
    if path is None:
        from pydoc_data.topics import topics

        source = "the topics of Python's help()"
        text = "".join(topics[name] for name in sorted(topics))
    else:
        source = path.name
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DemoError(f"{path} is not text in UTF-8: {error.reason}") from None
        except OSError as error:
            raise DemoError(f"{path} cannot be read: {error.strerror}") from None
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    alphabet, numbers = np.unique(code_points, return_inverse=True)
    train_size = len(numbers) * 9 // 10
    if len(numbers) - train_size < min_valid_size:
        raise DemoError(
            f"{source} has {len(numbers):,} characters: at least {10 * min_valid_size:,} are "
            "needed, a tenth of them for validation"
        )
    numbers = numbers.astype(np.int64)
    return Text(source, len(alphabet), numbers[:train_size], numbers[train_size:])


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of bytes: 0, 0, 8, number of dimensions, their sizes, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DemoError(f"{path} is not a gzipped IDX file: {error}") from None
    except OSError as error:
        raise DemoError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DemoError(
            f"{path} is not an IDX file of bytes: it begins with {content[:4]!r}. To train on "
            "text, add --task text"
        )
    dimensions = content[3]
    header = 4 * (1 + dimensions)
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    if len(content) != header + math.prod(shape):
        raise DemoError(
            f"{path}: an IDX file of shape {tuple(shape)} must have "
            f"{header + math.prod(shape):,} bytes, got {len(content):,}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _labels_path(path: Path) -> Path:
    if "images-idx3" not in path.name:
        raise DemoError(
            f"{path}: the name of an image file must contain 'images-idx3', because the labels are "
            "read from the file with 'labels-idx1' in its place"
        )
    return path.with_name(path.name.replace("images-idx3", "labels-idx1"))
