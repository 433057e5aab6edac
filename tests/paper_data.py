"""Tiny made data in the layout of the paper's data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, *, classes: int = 4, train: int = 6, val: int = 2) -> Path:
    """Noise around a colour of each class, 40 × 40, as JPEG and PNG."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            path = folder / split / f"n{label:02}"
            path.mkdir(parents=True)
            colour = np.random.default_rng(label).integers(256, size=3)
            for number in range(count):
                noise = random.normal(0, 20, (40, 40, 3))
                pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                suffix = "JPEG" if number % 2 else "png"
                Image.fromarray(pixels).save(path / f"{number}.{suffix}")
    return folder


def write_enwik8(folder: Path, size: int = 2000) -> Path:
    """Repeated words with random bytes among them."""
    random = np.random.default_rng(0)
    text = np.frombuffer(b"the cat sat on the mat. " * (size // 24 + 1), np.uint8)[:size].copy()
    noise = random.random(size) < 0.1
    text[noise] = random.integers(97, 123, int(noise.sum()))
    folder.mkdir(exist_ok=True)
    (folder / "enwik8").write_bytes(text.tobytes())
    return folder


def write_wikitext(folder: Path) -> Path:
    """Lines of frequent and rare words, in the form of WikiText-103."""
    random = np.random.default_rng(0)
    words = ["the", "of", "<unk>", *(f"word{number}" for number in range(27))]
    shares = 1 / np.arange(1, len(words) + 1)
    folder.mkdir(exist_ok=True)
    for split, lines in (("train", 60), ("valid", 12), ("test", 12)):
        text = [" \n = Title = \n"]
        for _ in range(lines):
            text.append(f" {' '.join(random.choice(words, 12, p=shares / shares.sum()))} \n")
        if split == "train":
            text.append(f" {' '.join(words)} \n")
        (folder / f"wiki.{split}.tokens").write_text("".join(text), encoding="utf-8")
    return folder
