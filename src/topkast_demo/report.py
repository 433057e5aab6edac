"""The report: a printed table, and plots and JSON in a folder."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

import topkast
from topkast._table import format_table
from topkast_demo.dynamics import Shares
from topkast_demo.measure import density
from topkast_demo.plots import plot_curves, plot_shares
from topkast_demo.settings import FRAMEWORKS, Settings
from topkast_demo.tasks import Task
from topkast_demo.train import Run


def format_report(task: Task, settings: Settings, runs: list[Run]) -> str:
    """Format the table of the runs, and notes on how to read it."""
    head = (
        "",
        task.metric,
        "forward\ndensity",
        "backward\ndensity",
        "gradient,\nbytes",
        "optimizer state,\nbytes",
        "in all,\nbytes",
        "time per step,\nmedian",
    )
    rows = [_cells(task, run) for run in runs]
    table = format_table(head, rows)
    return "\n".join((table, "", *_notes(task, settings, runs)))


def _cells(task: Task, run: Run) -> tuple[str, ...]:
    return (
        run.label,
        f"{run.metric_values[-1]:.2f} {task.short_unit}",
        f"{density(run.sizes, 'forward'):.1%}",
        f"{density(run.sizes, 'backward'):.1%}",
        f"{run.memory.gradient:,}",
        f"{run.memory.state:,}",
        f"{run.memory.total:,}",
        f"{1e3 * run.step_seconds:.2f} ms",
    )


def _notes(task: Task, settings: Settings, runs: list[Run]) -> list[str]:
    notes = [
        f"Dense in all runs: {', '.join(task.dense)} and tensors of one dimension. Densities leave "
        "them out, bytes count all tensors; bytes in all are those of weights, gradients and "
        "everything that the optimizer holds.",
        "Sparse layers multiply by A alone and compute the gradient on B alone. This pays off for "
        "layers larger than these; in exchange, a refresh takes longer."
        if settings.execution == "sparse"
        else "This demo runs masked dense kernels and computes the whole gradient, so it saves "
        "neither time per step nor bytes in all; see --execution sparse.",
    ]
    for run in runs:
        if run.refresh_seconds is not None and settings.refresh_every > 1:
            notes.append(
                f"Every {settings.refresh_every:,} steps {run.label} chooses new sets A and B, in "
                f"a step of {1e3 * run.refresh_seconds:.2f} ms."
            )
    return notes


def write_report(
    folder: Path,
    task: Task,
    settings: Settings,
    runs: list[Run],
    *,
    versions: dict[str, str],
    threads: int | None,
) -> list[Path]:
    """Write plots and data, and return their paths."""
    curves = folder / "learning_curves.png"
    title = (
        f"{task.title} with {FRAMEWORKS[settings.framework]} at forward sparsity {settings.fwd:g}, "
        f"backward sparsity {settings.bwd:g}"
    )
    plot_curves(curves, task, runs, title=title)
    written = [curves]
    for run in runs:
        if run.dynamics:
            change, awakened = folder / "mask_change.png", folder / "reservoir.png"
            plot_shares(
                change,
                run.dynamics.change,
                title="Mask change from refresh to refresh",
                label="share of a tensor's A that entered\n"
                f"at a refresh, each after {_format_updates(settings.refresh_every)} (%)",
                empty=f"no refresh in {_format_updates(settings.steps)}",
            )
            plot_shares(
                awakened,
                run.dynamics.awakened,
                title="Reservoir units that were ever active",
                label="units of the initial reservoir C\nthat were in A so far (%)",
                empty="no refresh, or no reservoir (bwd = 0)",
            )
            written += [change, awakened]
    data = folder / "report.json"
    environment = {
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            **versions,
            "topkast": topkast.__version__,
        },
        "threads": threads,
    }
    content = environment | _to_dict(task, settings, runs)
    text = json.dumps(content, indent=1, allow_nan=False)
    data.write_text(text + "\n", encoding="utf-8")
    return [*written, data]


def _format_updates(count: int) -> str:
    return "1 update" if count == 1 else f"{count:,} updates"


def _to_dict(task: Task, settings: Settings, runs: list[Run]) -> dict[str, Any]:
    return {
        "options": dataclasses.asdict(settings)
        | {"data": None if settings.data is None else settings.data.name},
        "task": {
            "description": task.description,
            "metric": task.metric,
            "unit": task.unit,
            "dense": list(task.dense),
        },
        "table": [
            {
                "method": run.method,
                "metric": run.metric_values[-1],
                "forward_density": density(run.sizes, "forward"),
                "backward_density": density(run.sizes, "backward"),
                "gradient_bytes": run.memory.gradient,
                "optimizer_state_bytes": run.memory.state,
                "total_bytes": run.memory.total,
                "step_seconds": run.step_seconds,
                "refresh_seconds": run.refresh_seconds,
            }
            for run in runs
        ],
        "runs": {run.method: _run_to_dict(run) for run in runs},
    }


def _run_to_dict(run: Run) -> dict[str, Any]:
    return {
        "tensors": {name: dataclasses.asdict(size) for name, size in run.sizes.items()},
        "loss": {"step": list(range(1, len(run.losses) + 1)), "nats": run.losses},
        "metric": {"step": run.metric_steps, "value": run.metric_values},
        "mask_change": _shares_to_dict(run.dynamics.change) if run.dynamics else None,
        "awakened": _shares_to_dict(run.dynamics.awakened) if run.dynamics else None,
    }


def _shares_to_dict(shares: Shares) -> dict[str, Any]:
    return {"step": shares.step, "mean": shares.mean, "min": shares.min, "max": shares.max}
