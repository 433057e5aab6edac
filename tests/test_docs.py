"""Every example in the README and the docs runs, page by page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import memory
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()]).parse(page)
    for example in document.examples():
        example.evaluate()
        memory.release()


def test_files_that_the_pages_name_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"`(?:tests/)?((?:ecosystem/)?test_\w+\.py)", text):
            assert (ROOT / "tests" / path).is_file(), f"{page.name} names {path}"
        for path in re.findall(r"`((?:benchmarks|examples|tests)/[\w/]+\.\w+)", text):
            assert (ROOT / path).is_file(), f"{page.name} names {path}"


def test_diagrams_are_as_their_script_draws_them(tmp_path: Path) -> None:
    images = ROOT / "docs" / "images"
    command = [sys.executable, str(images / "diagrams.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 4
    for file in drawn:
        assert file.read_bytes() == (images / file.name).read_bytes(), file.name


def test_there_are_examples_to_run() -> None:
    assert sum(page.read_text().count("```python") for page in PAGES) >= 10
