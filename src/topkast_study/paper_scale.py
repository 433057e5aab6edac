"""``--scale paper``: the paper's tables with its own models and data, by :mod:`topkast_paper`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from topkast.methods import SET, GradualPruning, Random, RigL, Static, TopKAST
from topkast_paper import PaperError, train_resnet50, train_transformer_xl
from topkast_paper.settings import Settings
from topkast_paper.train_resnet50 import ImageNetSettings
from topkast_paper.train_transformer_xl import ENWIK8, ENWIK8_SMALL, WIKITEXT103
from topkast_study import StudyError
from topkast_study.folder import claim, write_whole


@dataclass(frozen=True)
class Row:
    """One row of a table: its settings, and what the paper reports for it."""

    label: str
    settings: Settings
    paper: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of the paper: what it trains, its metric, and its rows."""

    title: str
    source: str
    metric: str
    train: Callable[..., dict[str, Any]]
    rows: tuple[Row, ...]


def _tables() -> dict[str, Table]:
    images, until = ImageNetSettings(), 24_000
    to = GradualPruning(start=10_000, end=25_000)
    pairs = [(0.8, 0.5, 75.03, None), (0.9, 0.8, 73.03, 74.76), (0.95, 0.9, 70.42, 68.48)]
    imagenet = [Row("dense", images)]
    for fwd, bwd, by_magnitude, at_random in pairs:
        row = f"{fwd}/{bwd}"
        equal: Any = {"fwd": fwd, "bwd": fwd, "refresh_every": 100, "penalty": 0.0}
        imagenet += [
            Row(f"Top-KAST {row}", _sparse(images, TopKAST(), fwd, bwd), by_magnitude),
            Row(f"Top-KAST, random {row}", _sparse(images, Random(), fwd, bwd), at_random),
            Row(f"static random {fwd}", replace(images, method=Static(), **equal)),
            Row(f"SET {fwd}", replace(images, method=SET(), **equal)),
            Row(f"RigL {fwd}", replace(images, method=RigL(until), **equal)),
        ]
        pruned = replace(images, method=to, fwd=fwd, bwd=0.0, refresh_every=1_000, penalty=0.0)
        imagenet.append(Row(f"gradual pruning {fwd}", pruned))
    without_reservoir = _sparse(images, TopKAST(), 0.9, 0.0)
    imagenet += [
        Row(f"Top-KAST 0.9/0.0, t = {t}", replace(without_reservoir, explore_until=t), accuracy)
        for t, accuracy in ((0, 68.26), (5_000, 72.05), (16_000, 74.14), (32_000, 74.65))
    ]
    enwik8 = [Row("dense", ENWIK8, 0.99)] + [
        Row(f"Top-KAST {fwd}/{bwd}", _sparse(ENWIK8, TopKAST(), fwd, bwd), bits)
        for fwd, bwd, bits in ((0.8, 0.0, 1.00), (0.8, 0.8, 1.02), (0.9, 0.6, 1.03))
    ]
    small = [Row("dense", ENWIK8_SMALL, 1.00)] + [
        Row(f"Top-KAST {fwd}/{bwd}", _sparse(ENWIK8_SMALL, TopKAST(), fwd, bwd), bits)
        for fwd, bwd, bits in (
            (0.8, 0.0, 1.03),
            (0.8, 0.6, 1.05),
            (0.9, 0.0, 1.08),
            (0.9, 0.8, 1.10),
            (0.95, 0.0, 1.14),
            (0.95, 0.9, 1.17),
        )
    ]
    # The paper has no schedule for its pruned language models: the shares of the steps are those of
    # ResNet-50.
    steps = ENWIK8_SMALL.steps
    later = GradualPruning(start=steps * 10 // 32, end=steps * 25 // 32)
    pruned_text = replace(ENWIK8_SMALL, method=later, bwd=0.0, refresh_every=1_000, penalty=0.0)
    small += [
        Row(f"gradual pruning {fwd}", replace(pruned_text, fwd=fwd), bits)
        for fwd, bits in ((0.8, 1.02), (0.9, 1.06), (0.95, 1.13))
    ]
    words = [Row("dense", WIKITEXT103, 18.3)] + [
        Row(f"Top-KAST {fwd}/{bwd}", _sparse(WIKITEXT103, TopKAST(), fwd, bwd), perplexity)
        for fwd, bwd, perplexity in (
            (0.8, 0.0, 19.8),
            (0.8, 0.6, 21.3),
            (0.9, 0.8, 25.1),
            (0.95, 0.9, 32.2),
        )
    ]
    images_of, text_of = train_resnet50.train, train_transformer_xl.train
    bits = "bits per character"
    return {
        "table1": Table(
            "ResNet-50 on ImageNet", "table 1", "top-1 accuracy (%)", images_of, tuple(imagenet)
        ),
        "table2": Table("Transformer-XL on enwik8", "table 2", bits, text_of, tuple(enwik8)),
        "table3": Table(
            "Transformer-XL on WikiText-103", "table 3", "perplexity", text_of, tuple(words)
        ),
        "table5": Table("A smaller model on enwik8", "table 5", bits, text_of, tuple(small)),
    }


def _sparse(settings: Any, method: Any, fwd: float, bwd: float) -> Any:
    return replace(settings, method=method, fwd=fwd, bwd=bwd, refresh_every=1)


TABLES = _tables()


def conduct_at_paper_scale(
    name: str, *, data: Path | None, output: Path, seeds: int, shrink: Any = None
) -> Path:
    """Train every row of a table with several seeds; return the path of the report.

    Finished runs are skipped, and a run that was stopped goes on from its checkpoint. `shrink` maps
    settings to smaller ones, for tests.

    Raises :class:`StudyError` for a table that has no such scale, without data, and for a folder
    with other contents.
    """
    if name not in TABLES:
        raise StudyError(
            f"{name} has no scale 'paper': it has {', '.join(TABLES)}. Choose --scale quick or full"
        )
    table = TABLES[name]
    if data is None:
        raise StudyError(
            f"--scale paper needs --data FOLDER, the folder of the data for {table.title}"
        )
    if not data.is_dir():
        raise StudyError(f"{data} is not a folder: expected that of the data for {table.title}")
    claim(output, study=name, scale="paper", data=str(data))
    results: dict[str, list[dict[str, Any]]] = {}
    for row in table.rows:
        settings = row.settings if shrink is None else shrink(row.settings)
        for seed in range(seeds):
            folder = output / "runs" / f"{row.label.replace('/', '-').replace(' ', '_')}-{seed}"
            done, made_with = folder / "result.json", settings.describe() | {"seed": repr(seed)}
            if not done.exists():
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    result = table.train(settings, data, folder, seed)
                except PaperError as error:
                    raise StudyError(str(error)) from None
                write_whole(done, json.dumps(result | {"settings": made_with}, indent=1) + "\n")
            results.setdefault(row.label, []).append(_load(done, made_with))
    write_whole(output / "results.json", json.dumps(results, indent=1) + "\n")
    report = output / "report.md"
    write_whole(report, _report(name, table, results))
    return report


def _load(path: Path, settings: dict[str, str]) -> dict[str, Any]:
    """The result of a finished run with these settings."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        result = None
    if not isinstance(result, dict) or not {"final", "training_fraction"} <= result.keys():
        raise StudyError(f"{path} is not the result of its run: delete it, and the run is repeated")
    if result.get("settings") != settings:
        raise StudyError(
            f"{path} was made with other settings: choose another folder with --output, or delete "
            "the folder of the run, and it is repeated"
        )
    return result


def _report(name: str, table: Table, results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        f"# {table.title}",
        "",
        f"The paper's {table.source}, by `python -m topkast study {name} --scale paper`.",
        "",
        f"| method | {table.metric} | n | training FLOPs | paper |",
        "|---|---|---|---|---|",
    ]
    for row in table.rows:
        runs = results[row.label]
        values = [float(run["final"]) for run in runs]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        paper = "" if row.paper is None else f"{row.paper}"
        fraction = runs[0]["training_fraction"]
        lines.append(
            f"| {row.label} | {statistics.mean(values):.2f}{spread} | {len(values)} | "
            f"{fraction:.3f} | {paper} |"
        )
    return "\n".join([*lines, ""])
