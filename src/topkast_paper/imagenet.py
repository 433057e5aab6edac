"""Images in folders, one for each class, and the order in which training reads them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from topkast_paper import PaperError

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = (".jpeg", ".jpg", ".png")
LAYOUT = (
    "expected are the folders train and val, and in each of them one folder of JPEG or PNG images "
    "for each class, with the same names in both"
)
SOURCE = (
    "ImageNet (ILSVRC 2012, 'CLS-LOC') is given out for research by image-net.org, after "
    "registration; its validation images come in one folder and have to be sorted into those of "
    "their classes"
)

Key: TypeAlias = tuple[int, int]  # epoch, and number of the image
Crop: TypeAlias = Callable[["Image", "np.random.Generator", int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Listing:
    """The images of one of the folders train and val.

    Attributes
    ----------
    folder
        The folder of the class folders.
    classes
        Names of the class folders, in order: the number of a class is its index.
    paths
        Path of each image below `folder`, as bytes.
    labels
        Number of the class of each image.
    """

    folder: Path
    classes: tuple[str, ...]
    paths: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)


def find_images(folder: Path) -> tuple[Listing, Listing]:
    """List the images for training and for validation.

    Parameters
    ----------
    folder
        The folder with the folders train and val.

    Raises
    ------
    PaperError
        If a folder is missing or has no images, if the classes of train and val differ, or if
        Pillow is not installed.
    """
    _import_pillow()
    train, val = (folder / name for name in ("train", "val"))
    for path in (folder, train, val):
        if not path.is_dir():
            raise PaperError(f"there is no folder {path}: {LAYOUT}. {SOURCE}")
    listings = _list(train), _list(val)
    names = [set(listing.classes) for listing in listings]
    if names[0] != names[1]:
        first = min(names[0] ^ names[1])
        has, lacks = (train, val) if first in names[0] else (val, train)
        raise PaperError(
            f"{has} has a folder {first}, but {lacks} has none, and {len(names[0] ^ names[1])} "
            f"classes are missing in one of the two: {LAYOUT}"
        )
    return listings


def _list(folder: Path) -> Listing:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        classes = [entry for entry in entries if entry.is_dir()]
        if not classes:
            loose = sum(entry.name.lower().endswith(_SUFFIXES) for entry in entries)
            found = f"{loose:,} images, but no class folders" if loose else "no class folders"
            raise PaperError(f"{folder} has {found}: {LAYOUT}. {SOURCE}")
        paths: list[bytes] = []
        labels: list[int] = []
        for label, entry in enumerate(classes):
            files = sorted(
                file.name for file in os.scandir(entry) if file.name.lower().endswith(_SUFFIXES)
            )
            if not files:
                raise PaperError(
                    f"the class folder {folder / entry.name} has no JPEG or PNG image: {LAYOUT}"
                )
            paths += [os.fsencode(f"{entry.name}/{name}") for name in files]
            labels += [label] * len(files)
    except OSError as error:
        raise PaperError(f"{error.filename} cannot be read: {error.strerror}") from None
    names = tuple(entry.name for entry in classes)
    return Listing(folder, names, np.asarray(paths), np.asarray(labels))


class ImageFolder(Dataset[Any]):
    """Images as tensors of bytes, (3, size, size), with the numbers of their classes.

    Parameters
    ----------
    listing
        The images, by :func:`find_images`.
    size
        Height and width of the result.
    seed
        Seed of random crops and flips, which depend on it, the epoch and the image alone. None: the
        centre of the image.
    """

    def __init__(self, listing: Listing, *, size: int, seed: int | None) -> None:
        self._listing = listing
        self._size = size
        self._seed = seed

    def __len__(self) -> int:
        return len(self._listing)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """Read an image; raises :class:`PaperError` if it cannot be read."""
        epoch, number = key
        path = self._listing.folder / os.fsdecode(bytes(self._listing.paths[number]))
        image = read_image(path)
        if self._seed is None:
            pixels = crop_centre(image, self._size)
        else:
            pixels = crop_at_random(
                image, np.random.default_rng((self._seed, epoch, number)), self._size
            )
        channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return torch.from_numpy(channels_first), int(self._listing.labels[number])

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        """Read a batch; an error is an item, since a worker would wrap it in many lines."""
        try:
            return [self[key] for key in keys]
        except PaperError as error:
            return [error]


def collate(items: list[Any]) -> Any:
    """Make a batch of images (n, 3, size, size) and labels (n,), or pass an error on."""
    if isinstance(items[0], PaperError):
        return items[0]
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


def read_image(path: Path) -> Image:
    """Read an image in RGB; raises :class:`PaperError` if it cannot be read."""
    module = _import_pillow()
    try:
        with module.open(path) as image:
            converted: Image = image.convert("RGB")
            return converted
    except (OSError, SyntaxError, ValueError, EOFError, module.DecompressionBombError) as error:
        raise PaperError(f"the image {path} cannot be read: {error}") from None


def crop_at_random(image: Image, random: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """A random part of the image in a random shape, scaled, and flipped in half of the cases.

    Its area is 0.08 to 1 of the image's, its ratio of width to height 3/4 to 4/3 (Szegedy et al.,
    2015).
    """
    box = _random_box(image.width, image.height, random)
    pixels = _resize(image, box, size)
    return pixels[:, ::-1] if random.random() < 0.5 else pixels


def crop_centre(image: Image, size: int) -> NDArray[np.uint8]:
    """The central square, of 224/256 of the image's shorter side, scaled."""
    side = min(image.width, image.height) * 224 / 256
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _resize(image, (left, top, left + side, top + side), size)


def _random_box(
    width: int, height: int, random: np.random.Generator
) -> tuple[float, float, float, float]:
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            left = int(random.integers(width - columns + 1))
            top = int(random.integers(height - rows + 1))
            return left, top, left + columns, top + rows
    # Too narrow an image: the largest central part whose shape is allowed.
    columns = min(width, round(height * 4 / 3))
    rows = min(height, round(width * 4 / 3))
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows


def _resize(image: Image, box: tuple[float, float, float, float], size: int) -> NDArray[np.uint8]:
    bicubic = _import_pillow().Resampling.BICUBIC
    return np.asarray(image.resize((size, size), bicubic, box=box))


@functools.cache
def _import_pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise PaperError(
            "reading images needs Pillow, which is not installed: pip install 'topkast[demo]'"
        ) from None
    return Image


class Stream(Sampler[list[Key]]):
    """Micro-batches of all updates from one on: epochs in random order, one after the other.

    Updates take their images from one sequence, so that an epoch may end inside a batch. The order
    depends on the seed and the epoch alone.

    Parameters
    ----------
    count
        Number of images.
    batch, micro_batch
        Images of an update, and the largest number of them in memory at a time.
    steps
        First update, from 0, and the end of the updates.
    seed
        Seed of the order.

    Examples
    --------
    >>> from topkast_paper.imagenet import Stream
    >>> whole = list(Stream(5, batch=4, micro_batch=3, steps=(0, 3), seed=0))
    >>> [len(keys) for keys in whole]
    [3, 1, 3, 1, 3, 1]
    >>> sorted(number for epoch, number in sum(whole, []) if epoch == 0)
    [0, 1, 2, 3, 4]
    >>> list(Stream(5, batch=4, micro_batch=3, steps=(1, 3), seed=0)) == whole[2:]
    True
    """

    def __init__(
        self, count: int, *, batch: int, micro_batch: int, steps: tuple[int, int], seed: int
    ) -> None:
        self._count = count
        self._batch = batch
        self._micro_batch = micro_batch
        self._steps = steps
        self._seed = seed

    def __len__(self) -> int:
        return self.parts_per_step * max(0, self._steps[1] - self._steps[0])

    @property
    def parts_per_step(self) -> int:
        """Micro-batches of an update."""
        return math.ceil(self._batch / self._micro_batch)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(*self._steps):
            for start in range(0, self._batch, self._micro_batch):
                keys: list[Key] = []
                for offset in range(start, min(start + self._micro_batch, self._batch)):
                    passed, position = divmod(step * self._batch + offset, self._count)
                    if passed != epoch:
                        epoch = passed
                        order = np.random.default_rng((self._seed, epoch)).permutation(self._count)
                    keys.append((epoch, int(order[position])))
                yield keys
