"""The command line: ``python -m topkast demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import topkast
from topkast._adapters import find_missing_package
from topkast_demo import DemoError
from topkast_demo.settings import EXECUTIONS, FRAMEWORKS, OPTIMIZERS, STEPS, Settings, find_rates

_DESCRIPTION = """\
Train one network three ways, for the same steps on the same batches: dense; sparse on a fixed
random mask; and sparse with Top-KAST, which searches for a good mask while it trains. Prints a
table and writes plots and JSON to a folder. The last layer and embeddings stay dense.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # argparse would print the usage first


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status.

    Raises
    ------
    SystemExit
        With status 2 and one line on stderr, if an argument is wrong.
    """
    parser = _Parser(
        prog="topkast",
        description="Top-KAST: always sparse training.",
    )
    parser.add_argument("--version", action="version", version=f"topkast {topkast.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a network densely, on a random mask and with Top-KAST",
        description=_DESCRIPTION,
    )
    _add_options(demo)
    # For the help, and for the error that lists the commands: topkast.__main__ runs it.
    commands.add_parser("study", help="repeat the paper's studies on small data")
    arguments = parser.parse_args(argv)
    if arguments.command != "demo":
        parser.print_help()
        return 0
    try:
        _demo(arguments)
    except (DemoError, topkast.OptionError) as error:
        demo.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: nothing was reported", file=sys.stderr)
        return 130
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--framework",
        choices=FRAMEWORKS,
        default="torch",
        help="torch: PyTorch; jax: JAX with optax, which trains the same networks on the same "
        "batches and needs pip install 'topkast[demo,jax]' (default: torch)",
    )
    add(
        "--execution",
        choices=EXECUTIONS,
        default="masked",
        help="masked: the sparse runs multiply by dense tensors with zeros; sparse: they multiply "
        "by the nonzero weights only, which pays off for large layers and is faster with pip "
        "install 'topkast[cpu]' (default: masked)",
    )
    add(
        "--task",
        choices=STEPS,
        default="digits",
        help="digits: an MLP on scikit-learn's digits; text: a small transformer on the "
        "characters of Python's own documentation (default: digits)",
    )
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="train on this file instead: a text file, or a gzipped IDX file of images such as "
        "MNIST's, whose name contains 'images-idx3'; the labels are read from the file with "
        "'labels-idx1' in its place",
    )
    add(
        "--fwd",
        type=float,
        default=0.9,
        metavar="SPARSITY",
        help="forward sparsity: share of zeros among the weights of the forward pass, and of the "
        "random mask (default: 0.9)",
    )
    add(
        "--bwd",
        type=float,
        default=0.8,
        metavar="SPARSITY",
        help="backward sparsity: share of weights that get no gradient (default: 0.8)",
    )
    add(
        "--refresh-every",
        type=int,
        default=Settings.refresh_every,
        metavar="UPDATES",
        help="number of updates between two selections of A and B (default: %(default)s, the "
        "paper's main setting). More is faster, and often worse in a run as short as this",
    )
    add(
        "--penalty",
        type=float,
        default=1e-4,
        metavar="NUMBER",
        help="coefficient of the exploration penalty (default: 0.0001)",
    )
    add(
        "--steps",
        type=int,
        metavar="NUMBER",
        help=f"training steps (default: {STEPS['digits']} for digits, {STEPS['text']} for text)",
    )
    add(
        "--optimizer",
        default="adamw",
        metavar="NAME",
        help=f"one of {', '.join(OPTIMIZERS)} (default: adamw)",
    )
    add(
        "--lr",
        type=float,
        metavar="NUMBER",
        help="peak learning rate, between a warm-up and a decay to zero (default: depends on "
        "optimizer and task)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="NUMBER",
        help="seed of weights, batches and the random mask (default: 0)",
    )
    add(
        "--report",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="folder for plots and JSON (default: report)",
    )


def _demo(arguments: argparse.Namespace) -> None:
    lr = find_rates(arguments.optimizer)[arguments.task]
    settings = Settings(
        framework=arguments.framework,
        execution=arguments.execution,
        task=arguments.task,
        data=arguments.data,
        fwd=arguments.fwd,
        bwd=arguments.bwd,
        refresh_every=arguments.refresh_every,
        penalty=arguments.penalty,
        steps=STEPS[arguments.task] if arguments.steps is None else arguments.steps,
        optimizer=arguments.optimizer.lower(),
        lr=lr if arguments.lr is None else arguments.lr,
        seed=arguments.seed,
    )
    try:  # imported here, so that --help and argument errors are fast and need no framework
        from topkast_demo.compare import compare

        compare(settings, arguments.report)
    except ModuleNotFoundError as error:
        missing = find_missing_package(error)
        if missing is None or missing == "topkast":
            raise
        extras = "demo,jax" if settings.framework == "jax" else "demo"
        raise DemoError(
            f"the demo needs {missing}, which is not installed: pip install 'topkast[{extras}]'"
        ) from None
