"""The report of a study: Markdown, figures, and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from topkast_demo.tasks import Task
from topkast_study.folder import Folder
from topkast_study.methods import METHODS, REFRESHES, UNTIL
from topkast_study.scales import Scale
from topkast_study.study import Outcome, Study
from topkast_study.train import versions


def write_report(
    folder: Folder,
    study: Study,
    scale: Scale,
    task: Task,
    outcomes: list[Outcome],
    *,
    threads: int,
    command: str,
) -> None:
    """Write report.md, its figures and results.json."""
    figures = {name: plot(folder.path / name, outcomes) for name, plot in study.plots.items()}
    parts = [
        f"# {study.title}",
        study.question,
        f"```text\n{command}\n```",
        _setup(task, outcomes),
        "## Results",
        _results(study, task, outcomes),
        _legend(study, task),
        *_details(study, outcomes),
        *(f"![{caption}]({name})\n\n*{caption}*" for name, caption in figures.items()),
    ]
    checked = [
        (claim.text, *_check(claim.better, claim.worse, outcomes, task)) for claim in study.claims
    ]
    claims = [row for row in checked if row[1]]
    if claims:
        head = ("ordering", "difference here", "seeds that agree", "verdict")
        parts += ["## Orderings", markdown_table(head, claims), _VERDICTS]
    for table in study.published:
        parts += ["## The paper's figures", markdown_table(table.head, table.cells), table.source]
    if study.notes:
        parts += ["## Notes", study.notes]
    parts += ["## Settings of the methods", _methods(outcomes)]
    folder.write_text("report.md", "\n\n".join(parts) + "\n")
    content = {
        "study": study.name,
        "scale": scale.name,
        "task": task.description,
        "metric": f"{task.metric} ({task.unit})",
        "versions": versions(),
        "threads": threads,
        "rows": [
            {
                "labels": dict(zip(study.columns, outcome.row.labels, strict=True)),
                "settings": outcome.row.run.to_dict(),
                "mean": outcome.mean,
                "deviation": outcome.deviation,
                "results": [result.to_dict() for result in outcome.results],
            }
            for outcome in outcomes
        ],
    }
    folder.write_json("results.json", content)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _setup(task: Task, outcomes: list[Outcome]) -> str:
    run, seeds = outcomes[0].row.run, len(outcomes[0].results)
    # A study that goes on later may find other versions.
    environments = dict.fromkeys(
        result.environment for outcome in outcomes for result in outcome.results
    )
    return (
        f"{task.description}. {run.steps // run.multiple:,} steps of {run.batch}, Adam with a peak "
        f"learning rate of {run.lr:g}, a warm-up over 5 % of the steps and a linear decay to zero: "
        "the same for all methods, and nothing is tuned for any of them. All sparse layers have "
        f"the same density; biases and {', '.join(task.dense)} are dense. {seeds} "
        f"seed{'s' * (seeds != 1)} of weights, batches and draws. PyTorch with masked dense "
        f"products on {'; or on '.join(environments)}."
    )


def _results(study: Study, task: Task, outcomes: list[Outcome]) -> str:
    head = (
        *study.columns,
        f"{task.metric} ({task.unit})",
        "best",
        "n",
        "operations",
        *(("time",) if study.shows_time else ()),
        *(("mask change",) if study.shows_change else ()),
    )
    return markdown_table(head, [_cells(study, task, outcome) for outcome in outcomes])


def _cells(study: Study, task: Task, outcome: Outcome) -> tuple[str, ...]:
    results = outcome.results
    best = [result.best(higher_is_better=task.higher_is_better) for result in results]
    seconds = min(result.seconds for result in results)  # others were disturbed
    change = statistics.mean(result.mask_change for result in results)
    digits = 2 if task.higher_is_better else 3
    return (
        *outcome.row.labels,
        f"{outcome.mean:.{digits}f} ± {outcome.deviation:.{digits}f}",
        f"{statistics.mean(best):.{digits}f}",
        str(len(results)),
        f"{statistics.mean(result.flops for result in results):.3f}",
        *((f"{seconds:.2f} s",) if study.shows_time else ()),
        *((f"{100 * change:.2f} %",) if study.shows_change else ()),
    )


def _details(study: Study, outcomes: list[Outcome]) -> list[str]:
    if study.details is None:
        return []
    names, values = study.details
    rows = [(*outcome.row.labels, *values(outcome)) for outcome in outcomes]
    return [markdown_table((*study.columns, *names), rows)]


def _legend(study: Study, task: Task) -> str:
    time = (
        " *time*: processor time of the training steps, the least of the seeds; masked products "
        "take as long as dense ones, and layers this small spend most time elsewhere, so that it "
        "shows what a method adds and not what sparsity saves."
    )
    change = " *mask change*: share of A that enters at a refresh, mean over ten refreshes."
    return (
        f"The {task.metric} is that after the last step: mean ± standard deviation over n seeds. "
        "*best*: mean of the best of ten evaluations; a method that begins denser may reach it "
        "before it is sparse. *operations*: floating-point operations of "
        "training, as a multiple of those of dense training for the usual number of steps, counted "
        f"from the sizes of the sets at each step.{time * study.shows_time}"
        f"{change * study.shows_change}"
    )


_VERDICTS = (
    "The orderings are the paper's, unless the notes say otherwise. Runs with the same seed share "
    "initial weights and batches, so differences are taken seed by seed: mean ± standard "
    "deviation, positive if the ordering holds. *holds*: in all seeds. *reversed*: its opposite "
    "holds in all seeds. *open*: neither. With three seeds, two equal settings agree in all of "
    "them one time in four."
)


def _check(
    better: tuple[str, ...], worse: tuple[str, ...], outcomes: list[Outcome], task: Task
) -> tuple[str, ...]:
    """Difference, number of seeds that agree, and verdict of an ordering."""
    by_labels = {outcome.row.labels: outcome for outcome in outcomes}
    if better not in by_labels or worse not in by_labels:
        return ("",)
    sign = 1 if task.higher_is_better else -1
    pairs = zip(by_labels[better].finals, by_labels[worse].finals, strict=True)
    differences = [sign * (first - second) for first, second in pairs]
    agree, seeds = sum(difference > 0 for difference in differences), len(differences)
    against = sum(difference < 0 for difference in differences)
    spread = statistics.stdev(differences) if seeds > 1 else 0.0
    verdict = "holds" if agree == seeds else "reversed" if against == seeds else "open"
    digits = 2 if task.higher_is_better else 3
    return (
        f"{statistics.mean(differences):+.{digits}f} ± {spread:.{digits}f} {task.short_unit}",
        f"{agree} of {seeds}",
        verdict,
    )


def _methods(outcomes: list[Outcome]) -> str:
    used = {outcome.row.run.method for outcome in outcomes}
    rows = [(entry.label, entry.settings) for name, entry in METHODS.items() if name in used]
    table = markdown_table(("method", "sets are chosen"), rows)
    return (
        f"{table}\n\nShares are of the steps of the run, whatever its length: {REFRESHES} "
        f"refreshes, unless the method chooses after each step, and no replacement after "
        f"{100 * UNTIL:g} %. The "
        "tables above name what differs."
    )
