"""The whole comparison: three runs, a table, a folder of plots."""

from __future__ import annotations

import tempfile
from pathlib import Path

from topkast_demo import DemoError
from topkast_demo.methods import LABELS
from topkast_demo.report import format_report, write_report
from topkast_demo.settings import FRAMEWORKS, Settings
from topkast_demo.tasks import load_task
from topkast_demo.train import train
from topkast_demo.trainers import find_trainer


def compare(settings: Settings, folder: Path) -> None:
    """Train with all three methods, print the table and write the report to `folder`."""
    trainer = find_trainer(settings.framework)
    task = load_task(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DemoError(f"the report cannot be written to {folder}: {error.strerror}") from None
    print(f"{task.title} with {FRAMEWORKS[settings.framework]}: {task.description}.")
    print(
        f"{settings.steps:,} steps of {settings.optimizer} at lr={settings.lr:g}; Top-KAST with "
        f"fwd={settings.fwd:g}, bwd={settings.bwd:g}, refresh_every={settings.refresh_every}, "
        f"penalty={settings.penalty:g}.",
        flush=True,
    )
    with trainer.limit_threads(task.threads) as threads:
        runs = [train(task, method, settings) for method in LABELS]
    print(f"\n{format_report(task, settings, runs)}\n")
    written = write_report(
        folder, task, settings, runs, versions=trainer.versions(), threads=threads
    )
    print(f"Written to {folder}: {', '.join(path.name for path in written)}")
