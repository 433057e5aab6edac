"""Text as numbers of characters or words, and the segments that training reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkast_paper import PaperError

Numbers: TypeAlias = NDArray[Any]  # bytes or int32

ENWIK8_SIZES = (90_000_000, 5_000_000, 5_000_000)
_ENWIK8 = (
    "expected is a folder with the file enwik8, unpacked, of {:,} bytes. It is on Matt Mahoney's "
    "page 'Large Text Compression Benchmark' (mattmahoney.net), as enwik8.zip"
)
_WIKITEXT = (
    "expected is a folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens. They are "
    "the word-level WikiText-103 of Merity et al. (2016), wikitext-103-v1, by Salesforce Research, "
    "now in the data set Salesforce/wikitext on huggingface.co"
)
END_OF_LINE = "<eos>"
_UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Corpus:
    """A text in three parts, as numbers from 0 to `size` - 1.

    Attributes
    ----------
    size
        Number of different characters or words.
    train, valid, test
        The parts, in reading order.
    """

    size: int
    train: Numbers
    valid: Numbers
    test: Numbers

    @property
    def about(self) -> str:
        """Sizes, in words."""
        parts = ", ".join(f"{len(part):,}" for part in (self.train, self.valid, self.test))
        return f"{parts} tokens of {self.size:,} kinds"


def load_enwik8(folder: Path, sizes: tuple[int, int, int] = ENWIK8_SIZES) -> Corpus:
    """Read enwik8 byte by byte; characters are the 256 bytes.

    Parameters
    ----------
    folder
        The folder with the file enwik8.
    sizes
        Bytes of the parts for training, validation and test, which must be all of the file.

    Raises
    ------
    PaperError
        If the file is missing, cannot be read, or has another size.
    """
    path = folder / "enwik8"
    layout = _ENWIK8.format(sum(sizes))
    try:
        content = np.frombuffer(path.read_bytes(), np.uint8)
    except FileNotFoundError:
        raise PaperError(f"there is no file {path}: {layout}") from None
    except OSError as error:
        raise PaperError(f"{path} cannot be read: {error.strerror}: {layout}") from None
    if len(content) != sum(sizes):
        raise PaperError(f"{path} has {len(content):,} bytes: {layout}")
    train, valid, test = np.split(content, np.cumsum(sizes)[:2])
    return Corpus(256, train, valid, test)


def load_wikitext103(folder: Path) -> Corpus:
    """Read WikiText-103 word by word; the end of a line is a word, too.

    Words are numbered by falling frequency in the training part, as adaptive softmax needs; equally
    frequent ones in alphabetical order.

    Parameters
    ----------
    folder
        The folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens.

    Raises
    ------
    PaperError
        If a file is missing, cannot be read or is empty, or has a word that the training part
        lacks, if that has no ``<unk>``.
    """
    paths = [folder / f"wiki.{part}.tokens" for part in ("train", "valid", "test")]
    for path in paths:
        if not path.is_file():
            raise PaperError(f"there is no file {path}: {_WIKITEXT}")
    counts: Counter[str] = Counter()
    for line in _lines(paths[0]):
        counts.update(line)
    words = sorted(counts, key=lambda word: (-counts[word], word))
    numbers = {word: number for number, word in enumerate(words)}
    train, valid, test = (_encode(path, numbers) for path in paths)
    return Corpus(len(words), train, valid, test)


def _lines(path: Path) -> Iterator[list[str]]:
    is_empty = True
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                words = line.split()
                is_empty = is_empty and not words
                yield [*words, END_OF_LINE]
    except OSError as error:
        raise PaperError(f"{path} cannot be read: {error.strerror}: {_WIKITEXT}") from None
    except UnicodeDecodeError as error:
        raise PaperError(f"{path} is not text in UTF-8: {error.reason}") from None
    if is_empty:
        raise PaperError(f"{path} has no words: {_WIKITEXT}")


def _encode(path: Path, numbers: dict[str, int]) -> Numbers:
    unknown = numbers.get(_UNKNOWN)

    def find() -> Iterator[int]:
        for line in _lines(path):
            for word in line:
                number = numbers.get(word, unknown)
                if number is None:
                    raise PaperError(
                        f"{path} has the word {word!r}, which wiki.train.tokens lacks, and so is "
                        f"{_UNKNOWN}: {_WIKITEXT}"
                    )
                yield number

    return np.fromiter(find(), np.int32)


@dataclass(frozen=True)
class Segments:
    """A text cut into `streams` rows of equal length, which are read side by side.

    Attributes
    ----------
    tokens
        The text; what does not fill the last column is left out.
    streams
        Number of rows.
    window
        Tokens of a segment.

    Raises
    ------
    PaperError
        If the text is too short for one segment.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast_paper.language import Segments
    >>> segments = Segments(np.arange(11), streams=2, window=2)
    >>> len(segments)
    2
    >>> inputs, targets = segments[1]
    >>> inputs.tolist(), targets.tolist()
    ([[2, 3], [7, 8]], [[3, 4], [8, 9]])
    """

    tokens: Numbers
    streams: int
    window: int

    def __post_init__(self) -> None:
        if not len(self):
            raise PaperError(
                f"a text of {len(self.tokens):,} tokens is too short for {self.streams} streams of "
                f"at least one segment of {self.window} tokens: choose a smaller batch or window"
            )

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return len(self.tokens) // self.streams

    def __len__(self) -> int:
        return max(0, (self.length - 1) // self.window)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Segment `number` of each row, and the tokens that follow: (streams, window) each."""
        return self.slice(number * self.window, self.window)

    def slice(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens from `start` on of each row, and the tokens that follow them."""
        rows = self.tokens[: self.streams * self.length].reshape(self.streams, self.length)
        part = torch.from_numpy(rows[:, start : start + length + 1].astype(np.int64))
        return part[:, :-1], part[:, 1:]

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All segments, with a last one that may be shorter."""
        for number in range(math.ceil((self.length - 1) / self.window)):
            yield self[number]
