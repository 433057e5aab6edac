"""The scales of a study, from some seconds to hours."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topkast_demo.settings import OPTIMIZERS
from topkast_study import StudyError
from topkast_study.methods import METHODS
from topkast_study.runs import Run

# The backward sparsity that goes with a forward sparsity, where a study does not vary it: the
# paper's for the first three.
PAIRS = {0.8: 0.5, 0.9: 0.8, 0.95: 0.9, 0.98: 0.95, 0.99: 0.95}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Network and length of the runs, and how many settings a study has."""

    name: str
    about: str
    hidden: tuple[int, ...]  # multiples of 16, which blocks divide
    batch: int
    steps: int
    text_width: int
    text_batch: int
    text_steps: int
    sparsities: tuple[float, ...]  # of table1
    wide_sparsities: tuple[float, ...]  # of figure2
    multiples: tuple[int, ...] = (1, 2)  # of the steps, in figure2
    is_hidden: bool = False
    needs_data: bool = False  # whether images come from a file
    data: str = "digits"
    data_path: Path | None = None

    def images(self, method: str, fwd: float = 0.0, bwd: float | None = None, **others: Any) -> Run:
        """A run on images; `bwd` is by default the one that goes with `fwd`."""
        steps = self.steps * others.get("multiple", 1)
        settings: dict[str, Any] = {
            "task": "images",
            "data": self.data,
            "widths": self.hidden,
            "batch": self.batch,
            "lr": OPTIMIZERS["adam"]["digits"],
        }
        return _run(method, fwd, bwd, steps, settings, others)

    def text(self, method: str, fwd: float = 0.0, bwd: float | None = None, **others: Any) -> Run:
        """A run on characters."""
        settings: dict[str, Any] = {
            "task": "text",
            "data": "the topics of Python's help()",
            "widths": (self.text_width,),
            "batch": self.text_batch,
            "lr": OPTIMIZERS["adam"]["text"],
        }
        return _run(method, fwd, bwd, self.text_steps, settings, others)


def _run(
    method: str,
    fwd: float,
    bwd: float | None,
    steps: int,
    settings: dict[str, Any],
    others: dict[str, Any],
) -> Run:
    entry = METHODS[method]
    backward = entry.bwd(fwd, PAIRS.get(fwd, 0.0)) if bwd is None else bwd
    every = entry.refresh_every(steps)
    known = {"method": method, "fwd": fwd, "bwd": backward, "refresh_every": every, "steps": steps}
    return Run(**settings | known | others)


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="tiny",
            about="for tests",
            hidden=(16, 16),
            batch=20,
            steps=8,
            text_width=8,
            text_batch=2,
            text_steps=4,
            sparsities=(0.9, 0.95),
            wide_sparsities=(0.9,),
            is_hidden=True,
        ),
        Scale(
            name="quick",
            about="scikit-learn's digits; some minutes a study on one core",
            hidden=(96, 96),
            batch=50,
            steps=400,
            text_width=64,
            text_batch=8,
            text_steps=400,
            sparsities=(0.9, 0.95),
            wide_sparsities=(0.8, 0.95, 0.99),
        ),
        Scale(
            name="full",
            about="images of an IDX file such as MNIST's, given with --data; an hour or more",
            hidden=(304, 304),
            batch=100,
            steps=2400,
            text_width=128,
            text_batch=8,
            text_steps=2400,
            sparsities=(0.8, 0.9, 0.95),
            wide_sparsities=(0.8, 0.9, 0.95, 0.98, 0.99),
            needs_data=True,
        ),
    )
}


def find_scale(name: str, data: Path | None) -> Scale:
    """Find a scale, with the images of `data` if it needs any."""
    if name == "paper":
        raise StudyError(
            "the scale paper, ResNet-50 on ImageNet, is not there yet: choose quick or full"
        )
    if name not in SCALES:
        known = ", ".join(scale.name for scale in SCALES.values() if not scale.is_hidden)
        raise StudyError(f"scale must be one of {known}, got {name!r}")
    scale = SCALES[name]
    if scale.needs_data != (data is not None):
        raise StudyError(
            f"the scale {name} needs --data, a gzipped IDX file of images such as MNIST's"
            if scale.needs_data
            else f"the scale {name} has data of its own: leave out --data, or add --scale full"
        )
    if data is None:
        return scale
    content = vars(scale) | {"data": f"{data.name} {_digest(data)}", "data_path": data}
    return Scale(**content)


@functools.lru_cache(maxsize=4)
def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}") from None
