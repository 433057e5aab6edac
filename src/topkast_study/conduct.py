"""The course of a study: train what is missing, then report."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from topkast_demo.torch_trainer import TorchTrainer
from topkast_study.folder import Folder
from topkast_study.report import write_report
from topkast_study.runs import Result
from topkast_study.scales import find_scale
from topkast_study.study import Outcome, Study
from topkast_study.train import task_of, train


def conduct(
    study: Study, *, scale_name: str, data: Path | None, output: Path, seeds: int, threads: int
) -> None:
    """Train the rows of a study with seeds from 0, except finished runs, and write the report."""
    scale = find_scale(scale_name, data)
    rows = study.rows(scale)
    folder = Folder(output, study.name, scale)
    plan = [row.run.with_seed(seed) for row in rows for seed in range(seeds)]
    results: dict[str, Result] = {}
    for run in plan:
        finished = folder.load(run)
        if finished is not None:
            results[run.id] = finished
    names = {row.run: " ".join(row.labels) for row in rows}
    missing = [run for run in plan if run.id not in results]
    with (
        TorchTrainer.limit_threads(threads),
        tqdm(total=len(plan), initial=len(plan) - len(missing), unit="run") as bar,
    ):
        for run in missing:
            if run.id not in results:  # two rows may be the same run
                bar.set_description_str(
                    f"{names[run.with_seed(0)]}, seed {run.seed}"[:40].ljust(40)
                )
                results[run.id] = train(run, scale.data_path)
                folder.save(run, results[run.id])
            bar.update()
    outcomes = [
        Outcome(row, [results[row.run.with_seed(seed).id] for seed in range(seeds)]) for row in rows
    ]
    command = (
        f"python -m topkast study {study.name} --scale {scale.name} --seeds {seeds} "
        f"--threads {threads}{f' --data {data.name}' if data else ''} --output FOLDER"
    )
    task = task_of(rows[0].run, scale.data_path)
    write_report(folder, study, scale, task, outcomes, threads=threads, command=command)
    print(f"Written to {output}: {', '.join(['report.md', *study.plots, 'results.json'])}")
