"""The studies at a scale of a few steps: ``topkast_study``."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the studies train with PyTorch")
pytest.importorskip("sklearn", reason="the studies take their digits from scikit-learn")
pytest.importorskip("matplotlib", reason="the studies draw with matplotlib")
pytest.importorskip("tqdm", reason="the studies show their progress with tqdm")

import topkast
from topkast.__main__ import main
from topkast_study.dynamics import LAG, SNAPSHOTS, Dynamics
from topkast_study.methods import METHODS
from topkast_study.report import _cells, _check
from topkast_study.runs import Result, Run
from topkast_study.scales import SCALES, find_scale
from topkast_study.studies import STUDIES
from topkast_study.study import Outcome, Row
from topkast_study.train import task_of, train

TINY = SCALES["tiny"]


def conduct(name: str, output: Path, *arguments: str, seeds: int = 1) -> dict[str, Any]:
    """Run a study at the smallest scale, and read its results."""
    options = ["--scale", "tiny", "--seeds", str(seeds), "--output", str(output), *arguments]
    assert main(["study", name, *options]) == 0
    return read(output)


def read(output: Path) -> dict[str, Any]:
    """The results without times."""
    results: dict[str, Any] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    for row in results["rows"]:
        for result in row["results"]:
            assert result.pop("seconds") > 0
    return results


def without_times(report: Path) -> str:
    return re.sub(r"\| [\d.]+ s \|", "| time |", report.read_text(encoding="utf-8"))


def fail(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command with a wrong argument; returns the one line on stderr."""
    capsys.readouterr()  # of earlier runs, the progress
    with pytest.raises(SystemExit) as caught:
        main(["study", *map(str, arguments)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("topkast study: error: ")
    return message


def result(*curve: float, seconds: float = 1.0, flops: float = 1.0) -> Result:
    return Result(
        curve_steps=list(range(1, len(curve) + 1)),
        curve=list(curve),
        loss=1.0,
        tensors={},
        flops=flops,
        mask_change=0.25,
        dynamics=None,
        seconds=seconds,
    )


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)


def test_unknown_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fail("tabel1", capsys=capsys)
    assert "'tabel1'" in message
    assert all(name in message for name in STUDIES)
    assert "name a study" in fail(capsys=capsys)
    assert "quick, full, paper, got 'fast'" in fail("table1", "--scale", "fast", capsys=capsys)
    paper = "--scale", "paper"
    assert "needs --data FOLDER" in fail("table1", *paper, capsys=capsys)
    assert "is not a folder" in fail("table1", *paper, "--data", tmp_path / "no", capsys=capsys)
    assert "age has no scale 'paper'" in fail("age", *paper, capsys=capsys)
    assert "needs --data" in fail("table1", "--scale", "full", capsys=capsys)
    assert "leave out --data" in fail("table1", "--data", tmp_path, capsys=capsys)
    assert "--seeds must be at least 1, got 0" in fail("age", "--seeds", "0", capsys=capsys)
    assert "--threads must be at least 1" in fail("age", "--threads", "-1", capsys=capsys)
    missing = tmp_path / "images-idx3.gz"
    arguments = ("age", "--scale", "full", "--data", missing)
    assert "cannot be read" in fail(*arguments, capsys=capsys)


def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    conduct("table6", ours)
    before = {path: path.read_bytes() for path in ours.rglob("*") if path.is_file()}
    message = fail("age", "--scale", "tiny", "--output", ours, capsys=capsys)
    assert "table6 at scale tiny" in message.partition(", not ")[0]
    assert "quick" in fail("table6", "--scale", "quick", "--output", ours, capsys=capsys)
    assert before == {path: path.read_bytes() for path in ours.rglob("*") if path.is_file()}
    theirs.mkdir()
    (theirs / "report.md").write_text("theirs")
    message = fail("age", "--scale", "tiny", "--output", theirs, capsys=capsys)
    assert "no study.json" in message
    assert [path.name for path in theirs.iterdir()] == ["report.md"]
    file = theirs / "report.md"
    assert "is a file" in fail("age", "--scale", "tiny", "--output", file, capsys=capsys)
    (ours / "study.json").write_text("{")
    message = fail("table6", "--scale", "tiny", "--output", ours, capsys=capsys)
    assert "damaged study.json" in message


def test_a_damaged_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conduct("table6", tmp_path)
    run = next((tmp_path / "runs").iterdir())
    run.write_text("{}")
    message = fail("table6", "--scale", "tiny", "--seeds", "1", "--output", tmp_path, capsys=capsys)
    assert str(run) in message
    assert "delete it" in message
    run.unlink()
    run.mkdir()
    message = fail("table6", "--scale", "tiny", "--seeds", "1", "--output", tmp_path, capsys=capsys)
    assert f"{run} cannot be read: Is a directory" in message


def test_a_killed_study_resumes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    conduct("table6", whole, seeds=2)
    arguments = ["study", "table6", "--scale", "tiny", "--seeds", "2", "--output", str(killed)]
    process = subprocess.Popen(
        [sys.executable, "-m", "topkast", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    runs, deadline = killed / "runs", time.monotonic() + 120
    while len(list(runs.glob("*.json"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert 3 <= len(finished) < 18
    assert not (killed / "report.md").exists()
    resumed = conduct("table6", killed, seeds=2)
    assert resumed == read(whole)
    assert without_times(killed / "report.md") == without_times(whole / "report.md")
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())
    names = sorted(path.name for path in runs.glob("*.json"))
    assert names == sorted(path.name for path in (whole / "runs").iterdir())


def test_more_seeds_train_only_these(tmp_path: Path) -> None:
    conduct("table6", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    results = conduct("table6", tmp_path, seeds=2)
    assert [len(row["results"]) for row in results["rows"]] == [2] * 9
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("table1", "figure3") else pytest.param(name, marks=pytest.mark.slow)
        for name in STUDIES
    ],
)
def test_every_study_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = conduct(name, tmp_path)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    study = STUDIES[name]
    assert report.startswith(f"# {study.title}\n")
    for row in results["rows"]:
        assert f"| {' | '.join(row['labels'].values())} |" in report
        assert all(math.isfinite(result["curve"][-1]) for result in row["results"])
    for plot in study.plots:
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
        assert f"]({plot})" in report
    for table in study.published:
        assert table.source in report
    assert str(tmp_path) not in report + json.dumps(results)
    assert "report.md" in capsys.readouterr().out
    if name in ("table1", "figure2"):
        labels = {row["labels"]["method"] for row in results["rows"]}
        assert labels == {entry.label for key, entry in METHODS.items() if key != "mixed"}
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_claims_name_rows(study: Any) -> None:
    """At full scale every ordering has its two rows, and labels are unique at every scale."""
    for scale in SCALES.values():
        labels = [row.labels for row in study.rows(scale)]
        assert len(set(labels)) == len(labels)
        assert all(width % 16 == 0 for width in scale.hidden)  # sides of blocks divide them
    for claim in study.claims:
        assert {claim.better, claim.worse} <= set(labels), claim


@pytest.mark.parametrize("method", METHODS)
def test_runs_are_reproducible_and_have_exact_counts(method: str) -> None:
    run = TINY.images(method, 0.0 if method == "dense" else 0.9)
    first, second = (train(run).to_dict() for _ in range(2))
    assert first.pop("seconds") > 0
    assert second.pop("seconds") > 0
    assert first == second
    other = train(run.with_seed(1))
    assert other.curve != first["curve"] or other.loss != first["loss"]
    expected = {
        "hidden0.weight": [64 * 16, 64 * 16 - math.floor(0.9 * 64 * 16)],
        "hidden1.weight": [16 * 16, 16 * 16 - math.floor(0.9 * 16 * 16)],
    }
    assert {name: counts[:2] for name, counts in first["tensors"].items()} == (
        {} if method == "dense" else expected
    )
    if method == "dense":
        assert first["flops"] == pytest.approx(1)


def test_the_id_depends_on_every_setting() -> None:
    run = TINY.images("topkast", 0.9)
    others: dict[str, Any] = {
        "method": "set",
        "task": "text",
        "data": "other",
        "widths": (16,),
        "block": (2, 2),
        "penalty_kind": "l1",
        "age": False,
        "dynamics": True,
        "penalty": 1.0,
        "ratio": 1.0,
        "explore_until": 1,
    }
    ids = {run.id}
    for field in dataclasses.fields(Run):
        value = others.get(field.name, getattr(run, field.name))
        value = value + 1 if value == getattr(run, field.name) else value
        ids.add(dataclasses.replace(run, **{field.name: value}).id)
    assert len(ids) == 1 + len(dataclasses.fields(Run))
    assert Run(**run.to_dict() | {"widths": run.widths}) == run


def test_data_of_a_file_count(tmp_path: Path) -> None:
    path = tmp_path / "images-idx3.gz"
    path.write_bytes(gzip.compress(b"first"))
    first = find_scale("full", path)
    assert first.images("set", 0.9).data.startswith("images-idx3.gz ")
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    other.write_bytes(gzip.compress(b"second"))
    assert find_scale("full", other).images("set", 0.9).id != first.images("set", 0.9).id


def test_the_added_penalty_is_that_of_the_library() -> None:
    """Weight 1 / D on B∖A, added to the gradient here, is what the option `penalty` does."""
    for kind in ("l2", "l1"):
        usual = TINY.images("topkast", 0.9, penalty=0.01, penalty_kind=kind)
        same, other = (dataclasses.replace(usual, ratio=ratio) for ratio in (10.0, 0.0))
        loss = train(usual).loss
        assert train(same).loss == pytest.approx(loss, rel=1e-4)
        assert train(other).loss != pytest.approx(loss, rel=1e-4)
        assert train(dataclasses.replace(usual, penalty=0.0)).loss != pytest.approx(loss, rel=1e-4)


def test_age_is_switched_off_for_one_run() -> None:
    run = TINY.images("random", 0.9, refresh_every=2)
    usual = train(run).loss
    assert train(dataclasses.replace(run, age=False)).loss != usual
    assert train(run).loss == usual


def test_dynamics() -> None:
    """Four units; the one in A moves from 0 to 1, and later to 3."""

    def masks(active: int, others: tuple[int, ...]) -> dict[str, topkast.Masks]:
        forward, backward = np.zeros((2, 4), dtype=bool)
        forward[active] = True
        backward[[active, *others]] = True
        return {"w": topkast.Masks(forward, backward)}

    dynamics = Dynamics(masks(0, (1,)), SNAPSHOTS)
    for step in range(1, SNAPSHOTS + 1):
        dynamics.record(step, masks(0 if step < 2 else 1 if step < 20 else 3, (2,)))
    record = dynamics.to_dict()
    assert record["awakened_steps"] == list(range(SNAPSHOTS + 1))
    assert record["awakened"] == [[0.0]] * 20 + [[0.5]] * (SNAPSHOTS - 19)  # C was {2, 3}
    pairs = zip(record["change_steps"], record["change"], strict=True)
    changed = {start for start, (change,) in pairs if change}
    assert changed == {0, 1, *range(20 - LAG, 20)}
    assert {change for (change,) in record["change"]} == {0.0, 0.5}  # two of four units


def test_orderings() -> None:
    task = task_of(TINY.images("dense"), None)
    rows = {"a": [(1.0,), (3.0,)], "b": [(0.5,), (2.5,)], "c": [(2.0,), (2.0,)]}
    outcomes = [
        Outcome(Row((name,), TINY.images("dense")), [result(*curve) for curve in curves])
        for name, curves in rows.items()
    ]
    assert _check(("a",), ("b",), outcomes, task) == ("+0.50 ± 0.00 %", "2 of 2", "holds")
    assert _check(("b",), ("a",), outcomes, task) == ("-0.50 ± 0.00 %", "0 of 2", "reversed")
    assert _check(("a",), ("c",), outcomes, task) == ("+0.00 ± 1.41 %", "1 of 2", "open")
    assert _check(("a",), ("d",), outcomes, task) == ("",)
    text = task_of(TINY.text("dense"), None)  # bits per character: less is better
    assert _check(("b",), ("a",), outcomes, text)[2] == "holds"


def test_cells() -> None:
    task = task_of(TINY.images("dense"), None)
    results = [result(9.0, 1.0, seconds=1.0), result(5.0, 2.0, seconds=2.0, flops=2.0)]
    outcome = Outcome(Row(("x",), TINY.images("dense")), results)
    usual = ("x", "1.50 ± 0.71", "7.00", "2", "1.500")
    for name, more in (("mixed", ()), ("table1", ("1.00 s",)), ("penalty", ("25.00 %",))):
        assert _cells(STUDIES[name], task, outcome) == usual + more


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("topkast_study.conduct.train", interrupt)
    assert main(["study", "age", "--scale", "tiny", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted")


@pytest.mark.parametrize("missing", ["torch", "sklearn"])
def test_missing_package(missing: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from topkast.__main__ import main\n"
        f"main(['study', 'age', '--scale', 'tiny', '--output', {str(tmp_path / 'x')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"need {missing}, which" in done.stderr.splitlines()[-1]
    assert "pip install 'topkast[demo]'" in done.stderr
