"""Timing of interleaved sides, description of the machine, and tables, for all benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from topkast._table import format_table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one side, and its ratio to the baseline of the same round."""

    median: float
    least: float
    most: float
    ratio: float  # median over the rounds of this side / baseline
    least_ratio: float
    most_ratio: float

    def divided(self, count: int) -> Timing:
        """That of one, where so many were timed together."""
        times = self.median / count, self.least / count, self.most / count
        return Timing(*times, self.ratio, self.least_ratio, self.most_ratio)


def interleave(
    sides: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 2
) -> dict[str, Timing]:
    """Time the sides in turn, A B C A B C …; the first one is the baseline of the ratios."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for place in range(warm_up + rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if place >= warm_up:
                times[name].append(1e3 * elapsed)
    baseline = times[next(iter(sides))]
    timings = {}
    for name, taken in times.items():
        ratios = [one / base for one, base in zip(taken, baseline, strict=True)]
        timings[name] = Timing(
            statistics.median(taken),
            min(taken),
            max(taken),
            statistics.median(ratios),
            min(ratios),
            max(ratios),
        )
    return timings


def environment(threads: int, packages: Sequence[str] = ("numpy", "torch")) -> dict[str, Any]:
    """Processor, threads and versions: a figure means nothing without them."""
    return {
        "processor": _processor(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("topkast", *packages)},
    }


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    return parser


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return format_table(head, rows, markdown=True)


def write(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {path}", file=sys.stderr)


def _version(package: str) -> str:
    """Of an installed package; of a module that is imported, where it goes by another name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "not installed"))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        names = [
            line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line
        ]
        if names:
            return names[0] + (", AVX-512" if "avx512f" in text else "")
    return platform.processor() or platform.machine()
