"""A study: rows of a table, each the same run with several seeds, and what the paper says."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from topkast_study.runs import Result, Run
from topkast_study.scales import Scale

Labels: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A row of a study's table; the labels are its first cells, and differ between rows."""

    labels: Labels
    run: Run


@dataclass(frozen=True)
class Outcome:
    """A row and its results, by seed."""

    row: Row
    results: list[Result]

    @property
    def finals(self) -> list[float]:
        return [result.final for result in self.results]

    @property
    def mean(self) -> float:
        return statistics.mean(self.finals)

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds; 0 of a single one."""
        return statistics.stdev(self.finals) if len(self.finals) > 1 else 0.0


@dataclass(frozen=True)
class Claim:
    """An ordering that the paper reports: the row `better` is better than the row `worse`."""

    text: str
    better: Labels
    worse: Labels


@dataclass(frozen=True)
class Published:
    """A table of the paper."""

    source: str
    head: Sequence[str]
    cells: Sequence[Sequence[str]]


Plot: TypeAlias = Callable[[Path, Sequence[Outcome]], str]


@dataclass(frozen=True)
class Study:
    """Everything about a study but its results.

    Attributes
    ----------
    columns
        Names of the rows' labels.
    rows
        The rows at a scale.
    plots
        By file name, functions that draw a figure and return its caption.
    details
        Names and values of more columns, for a second table.
    shows_time
        Whether the table has a column of measured times.
    shows_change
        Whether the table has a column of the change of A at refreshes.
    claims
        Those whose rows a scale leaves out are skipped.
    """

    name: str
    title: str
    question: str
    columns: Sequence[str]
    rows: Callable[[Scale], list[Row]]
    published: Sequence[Published] = ()
    claims: Sequence[Claim] = ()
    plots: dict[str, Plot] = field(default_factory=dict)
    details: tuple[Sequence[str], Callable[[Outcome], Sequence[str]]] | None = None
    notes: str = ""
    shows_time: bool = False
    shows_change: bool = False
