"""The command line: ``python -m topkast study``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from topkast._adapters import find_missing_package
from topkast_demo import DemoError
from topkast_study import StudyError

_DESCRIPTION = """\
Repeat a study of the Top-KAST paper on small data: train every method with several seeds, and
write one report with tables and figures beside the paper's own. A study that was stopped goes on
where it was, if it is started again with the same --output.
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
    parser = _make_parser()
    arguments = parser.parse_args(argv)
    try:
        from topkast_study.conduct import conduct
        from topkast_study.studies import STUDIES, find_study

        if arguments.list:
            for study in STUDIES.values():
                print(f"{study.name:12}{study.title}")
            return 0
        if arguments.name is None:
            raise StudyError(f"name a study: one of {', '.join(STUDIES)}")
        for option in ("seeds", "threads"):
            if getattr(arguments, option) < 1:
                raise StudyError(f"--{option} must be at least 1, got {getattr(arguments, option)}")
        output = arguments.output or Path(f"study-{arguments.name}")
        if arguments.scale == "paper":
            from topkast_study.paper_scale import conduct_at_paper_scale

            report = conduct_at_paper_scale(
                arguments.name, data=arguments.data, output=output, seeds=arguments.seeds
            )
            print(f"written to {report}")
            return 0
        conduct(
            find_study(arguments.name),
            scale_name=arguments.scale,
            data=arguments.data,
            output=output,
            seeds=arguments.seeds,
            threads=arguments.threads,
        )
    except ModuleNotFoundError as error:
        missing = find_missing_package(error)
        if missing is None or missing == "topkast":
            raise
        parser.error(
            f"the studies need {missing}, which is not installed: pip install 'topkast[demo]'"
        )
    except (StudyError, DemoError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _make_parser() -> _Parser:
    parser = _Parser(prog="topkast study", description=_DESCRIPTION)
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="the study; --list shows all")
    add("--list", action="store_true", help="list the studies and exit")
    add("--seeds", type=int, default=3, metavar="NUMBER", help="seeds per row (default: 3)")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for the report and the finished runs (default: study-NAME)",
    )
    add(
        "--scale",
        default="quick",
        metavar="SCALE",
        help="quick: scikit-learn's digits, some minutes a study on one core; full: the images of "
        "--data and wider networks, hours; paper: the models and data of table1, table2, table3 "
        "and table5, days on a GPU (default: quick)",
    )
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="for --scale paper: the folder of ImageNet, enwik8 or WikiText-103; for full: a "
        "gzipped IDX file of images such as MNIST's, whose name contains "
        "'images-idx3'; the labels are read from the file with 'labels-idx1' in its place",
    )
    add("--threads", type=int, default=1, metavar="NUMBER", help="threads (default: 1)")
    return parser
