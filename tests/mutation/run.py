"""Mutation testing of the code that chooses sets: does a test fail when this code is wrong?

For a sample of the mutants of each module, a fork of this process runs the module's tests on the
changed source, which takes the place of the module when it is imported. NumPy, PyTorch and JAX are
imported once, before the forks: that takes several times as long as most of the tests.

A mutant that no test notices survives. Those that cannot be noticed are listed, with the reason, in
survivors.md; any other survivor is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutation.mutants import Mutant, mutants

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = ROOT / "src" / "topkast"
# NumPy and PyTorch tell mistakes apart quickly.
LIBRARIES = "not (jax or numpy-readonly or array-api-strict)"
MEMORY = 8 << 30  # bytes that a mutant may ask for

SELECTION = ["test_selection.py", "test_ranking.py"]
RESERVOIRS = ["test_reservoirs.py"]
# The tests that concern a module, the quickest first.
TESTS: dict[str, list[str]] = {
    "_step.py": [
        "test_exploration.py",
        "test_power.py",
        "test_deep_rewiring.py",
        "test_trajectories.py",
    ],
    "selection/_compact.py": ["test_compact.py"],
    "selection/_distribution.py": ["test_distribution.py"],
    "selection/_groups.py": ["test_patterns.py", "test_pattern_options.py"],
    "selection/_incremental.py": ["test_reserve.py", *RESERVOIRS],
    "selection/_random.py": [*SELECTION, "test_deep_rewiring.py", "test_exploration.py"],
    "selection/_replace.py": ["test_methods.py", "test_rivals.py"],
    "selection/_ranking.py": ["test_reserve.py"],
    "selection/_reserve.py": ["test_reserve.py"],
    "selection/_select.py": [
        *SELECTION,
        "test_exploration.py",
        "test_methods.py",
        "test_patterns.py",
        "test_units.py",
    ],
    "selection/_support.py": [
        "test_support.py",
        "test_compact.py",
        "test_selection.py",
        "test_transform.py",
    ],
    "selection/_units.py": ["test_support.py", "test_units.py", "test_unit_options.py"],
    "reservoirs/_file.py": [*RESERVOIRS],
    "reservoirs/_initial.py": [*RESERVOIRS],
    "reservoirs/_outside.py": ["test_reserve.py", *RESERVOIRS],
    "reservoirs/_reservoir.py": [*RESERVOIRS],
}


class ChangedSource(importlib.machinery.SourceFileLoader):
    """Loads a module from a changed source, and no bytecode of the real one."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self._source = source.encode()

    def path_stats(self, path: Any) -> Any:
        raise OSError("no bytecode")

    def get_data(self, path: Any) -> bytes:
        return self._source


class Replacement(importlib.abc.MetaPathFinder):
    """Imports one module from a changed source."""

    def __init__(self, path: Path, source: str) -> None:
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        self._loader = ChangedSource(".".join(parts), path, source)

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._loader.name:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self._loader.path, loader=self._loader
        )


@dataclass
class Outcome:
    module: str
    mutant: Mutant
    status: str  # "killed", "timeout", "survived" or "explained"


class FailureReporter:
    """A plugin of pytest that writes the names of failed tests to a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self._descriptor, f"{report.nodeid}\n".encode())

    pytest_collectreport = pytest_runtest_logreport


def run_tests(path: Path, source: str, tests: list[str], failures: int) -> int:
    """Run tests on a changed source, in a process that ends; returns pytest's exit code.

    `failures` is the file descriptor to which names of failed tests are written.
    """
    import pytest

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sys.meta_path.insert(0, Replacement(path, source))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-k", LIBRARIES, f"--rootdir={ROOT}"]
    arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what was imported before
    files = [str(ROOT / "tests" / test) for test in tests]
    # What a module's docstrings show is a test of it as well.
    arguments += ["--doctest-modules", str(path), *files]
    return int(pytest.main(arguments, plugins=[FailureReporter(failures)]))


class Worker:
    """A fork that runs the tests on one mutant."""

    def __init__(self, path: Path, source: str, tests: list[str], limit: float) -> None:
        self.ends = time.monotonic() + limit
        self._failures, write_end = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            with contextlib.suppress(BaseException):
                code = run_tests(path, source, tests, write_end)
            os._exit(code)
        os.close(write_end)

    def result(self) -> tuple[str, str] | None:
        """The result and the first test that failed, or ""; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            if time.monotonic() < self.ends:
                return None
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._failures)
            return "timeout", ""
        with open(self._failures, errors="replace") as failures:
            test = failures.readline().strip()
        return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed", test


def run(jobs: Iterator[Any], count: int) -> Iterator[tuple[Any, str, str]]:
    """Run jobs (key, path, source, tests, limit), `count` at a time.

    Yields the key, the result and the first test that failed.
    """
    running: list[tuple[Any, Worker]] = []
    exhausted = False
    while running or not exhausted:
        while len(running) < count and not exhausted:
            job = next(jobs, None)
            if job is None:
                exhausted = True
            else:
                running.append((job[0], Worker(*job[1:])))
        time.sleep(0.05)
        for entry in list(running):
            result = entry[1].result()
            if result is not None:
                running.remove(entry)
                yield entry[0], *result


def sample(module: str, source: str, size: int, seed: int) -> list[Mutant]:
    """`size` mutants of a module, in the order of its text; all of them for 0."""
    every = mutants(source)
    if not 0 < size < len(every):
        return every
    chosen = random.Random(f"{seed} {module}").sample(range(len(every)), size)
    return [every[number] for number in sorted(chosen)]


def describe(module: str, mutant: Mutant) -> str:
    """The entry of a mutant in survivors.md, which holds no line number: those change."""
    return f"`{module}` `{mutant.function}`: `{mutant.before}` → `{mutant.after}`"


def measure(modules: Sequence[str]) -> dict[str, float]:
    """Seconds that the tests of each module take on the unchanged source, which must pass."""
    seconds = {}
    for module in modules:
        path, start = SOURCE / module, time.monotonic()
        jobs = iter([(module, path, path.read_text(), TESTS[module], 1800.0)])
        ((_, result, test),) = run(jobs, 1)
        if result != "survived":
            raise SystemExit(
                f"the tests of {module} fail on the unchanged source: mend {test or 'them'} first"
            )
        seconds[module] = time.monotonic() - start
        print(f"{module}: {seconds[module]:.1f} s", flush=True)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="as selection/_select.py; default: all")
    parser.add_argument("--sample", type=int, default=20, help="mutants of a module; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--match", default="", help="only mutants whose entry has this text")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    modules = options.modules or list(TESTS)
    # Before the first import of JAX and PyTorch; "CI" makes Hypothesis draw the same examples.
    os.environ.update({"CI": "1", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"})
    os.environ["TOPKAST_HYPOTHESIS_PROFILE"] = "unsimplified"
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "adapters"), str(ROOT / "tests")]
    for library in ("array_api_strict", "hypothesis", "jax", "numba", "optax", "pytest", "torch"):
        importlib.import_module(library)
    os.chdir(ROOT)

    seconds = measure(modules)
    known = (HERE / "survivors.md").read_text()

    def jobs() -> Iterator[Any]:
        for module in modules:
            source = (SOURCE / module).read_text()
            limit = 30 + 10 * seconds[module]
            for mutant in sample(module, source, options.sample, options.seed):
                if options.match in describe(module, mutant):
                    key = module, mutant
                    yield key, SOURCE / module, mutant.source, TESTS[module], limit

    outcomes = []
    for (module, mutant), result, test in run(jobs(), options.processes):
        entry = describe(module, mutant)
        every = f"`{module}` `{mutant.function}`: all"
        is_known = result == "survived" and (entry in known or every in known)
        status = "explained" if is_known else result
        outcomes.append(Outcome(module, mutant, status))
        by = f", by {test}" if test else ""
        print(f"{status:9} {entry} (line {mutant.line}{by})", flush=True)
    return report(outcomes)


def report(outcomes: list[Outcome]) -> int:
    """Print a table by module; returns 1 if a survivor is not explained."""
    columns = ("killed", "timeout", "explained", "survived")
    print(f"\n{'module':28}{'mutants':>10}" + "".join(f"{column:>10}" for column in columns))
    for module in [*dict.fromkeys(outcome.module for outcome in outcomes), "total"]:
        rows = [one for one in outcomes if module in (one.module, "total")]
        counts = [sum(one.status == column for one in rows) for column in columns]
        print(f"{module:28}{len(rows):10}" + "".join(f"{count:10}" for count in counts))
    survivors = [one for one in outcomes if one.status == "survived"]
    if survivors:
        print("\nTo be killed by a test, or explained in tests/mutation/survivors.md:")
        for outcome in survivors:
            print(f"- {describe(outcome.module, outcome.mutant)} (line {outcome.mutant.line})")
    return int(bool(survivors))


if __name__ == "__main__":
    raise SystemExit(main())
