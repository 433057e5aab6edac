"""Interleaved timing, the description of the machine, and tables, for all benchmarks."""

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
    """Times of one side in milliseconds, and their ratios to the baseline of the same round."""

    median: float
    min: float
    max: float
    ratio: float  # median over the rounds of this side / baseline
    min_ratio: float
    max_ratio: float

    def divided(self, count: int) -> Timing:
        """Return the timing of one call, if `count` calls were timed together."""
        times = self.median / count, self.min / count, self.max / count
        return Timing(*times, self.ratio, self.min_ratio, self.max_ratio)


def interleave(
    sides: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 2
) -> dict[str, Timing]:
    """Time the sides in turn, A B C A B C …; the first side is the baseline of the ratios."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_index in range(warm_up + rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if round_index >= warm_up:
                times[name].append(1e3 * elapsed)
    baseline = times[next(iter(sides))]
    timings = {}
    for name, side_times in times.items():
        ratios = [ms / base for ms, base in zip(side_times, baseline, strict=True)]
        timings[name] = Timing(
            statistics.median(side_times),
            min(side_times),
            max(side_times),
            statistics.median(ratios),
            min(ratios),
            max(ratios),
        )
    return timings


_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # flags of processors, the widest first


def describe_environment(
    threads: int, packages: Sequence[str] = ("numpy", "torch")
) -> dict[str, Any]:
    """Return the processor, threads and versions, on which every result depends."""
    return {
        "processor": _processor(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("topkast", *packages)},
    }


def peak_memory() -> int:
    """Largest memory of this process so far, in bytes (Linux)."""
    return _memory_status("VmHWM")


def restart_peak_memory() -> int:
    """Have :func:`peak_memory` start from the present memory, which is returned in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_status("VmRSS")


def _memory_status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def make_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Make a parser of the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    return parser


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    return format_table(head, rows, markdown=True)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {path}", file=sys.stderr)


def _version(package: str) -> str:
    """Return the version of a package, or of an imported module whose package has another name."""
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
            kinds = [kind for flag, kind in _VECTORS.items() if flag in text.split()]
            return ", ".join([names[0], *kinds[:1]])
    return platform.processor() or platform.machine()
