"""What does a newcomer wait for, and what fails? A fresh clone, the README and every page, timed.

The repository is cloned into an empty folder, a new environment is made, and in it the README's
installation, all its examples, and the first example of each page of the docs run one after the
other, each in a process of its own in another empty folder, exactly as they are printed. Kernels
are compiled when they are first needed, as for a newcomer. The benchmark asserts nothing: an
example that fails is shown with the last line of its error.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _harness import describe_environment, make_parser, markdown_table, write_json

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900  # seconds for a command
# What the examples of all pages need together; installation as docs/install.md has it.
EXTRAS = "analysis,cpu,demo,jax,safetensors,testing,torch"
PACKAGES = "array-api-strict", "equinox", "flax", "nox"


class Newcomer:
    """Runs commands and examples, and notes how long each takes and how it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clone = folder, folder / "topkast"
        self.python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
        self.records: list[dict[str, object]] = []
        keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._env = {**keep, "PATH": f"{self.python.parent}{os.pathsep}{keep['PATH']}"}

    def run(self, name: str, command: list[str], cwd: Path) -> None:
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=cwd, env=self._env, timeout=LIMIT, capture_output=True, text=True
            )
            code, error = str(done.returncode), done.stderr
        except subprocess.TimeoutExpired:
            code, error = "timeout", ""
        seconds = time.perf_counter() - start
        lines = error.strip().splitlines()
        last = lines[-1] if lines and code != "0" else ""
        self.records.append({"what": name, "seconds": seconds, "exit": code, "error": last})
        print(f"{seconds:6.1f} s  exit {code}  {name}  {last}", flush=True)

    def run_example(self, name: str, code: str) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as empty:
            self.run(name, [str(self.python), "-c", code], Path(empty))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language, in the order of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The commands of a block of shell code, without comments."""
    return [shlex.join(shlex.split(line, comments=True)) for line in block.splitlines() if line]


def main() -> None:
    parser = make_parser(__doc__, "stranger")
    parser.add_argument("--pages", nargs="*", help="names of pages, such as jax; default: all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stranger-") as name:
        newcomer = Newcomer(Path(name))
        clone, folder = newcomer.clone, newcomer.folder
        newcomer.run("git clone", ["git", "clone", "-q", str(ROOT), str(clone)], folder)
        newcomer.run("python -m venv", [sys.executable, "-m", "venv", "env"], folder)
        pip = [str(newcomer.python), "-m", "pip", "install", "-q", "-c", "constraints.txt"]
        newcomer.run("pip install torch", [*pip, "torch"], clone)
        for block in blocks(clone / "README.md", "bash"):
            for command in commands(block):
                newcomer.run(command, ["bash", "-c", command], clone)
        newcomer.run(f"all extras: {EXTRAS}", [*pip, f".[{EXTRAS}]", *PACKAGES], clone)
        for number, code in enumerate(blocks(clone / "README.md", "python"), start=1):
            newcomer.run_example(f"README, example {number}", code)
        newcomer.run("python3 -m nox -s demo", ["python3", "-m", "nox", "-s", "demo"], clone)
        for page in sorted((clone / "docs").glob("*.md")):
            examples = blocks(page, "python")
            if examples and (options.pages is None or page.stem in options.pages):
                newcomer.run_example(f"docs/{page.name}", examples[0])
    rows = [
        [str(record["what"]), f"{record['seconds']:.1f}", str(record["exit"]), str(record["error"])]
        for record in newcomer.records
    ]
    print("\n" + markdown_table(["command or example", "seconds", "exit", "error"], rows))
    result = {"environment": describe_environment(options.threads), "records": newcomer.records}
    write_json(options.output, result)


if __name__ == "__main__":
    main()
