"""Sphinx configuration: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import topkast

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "topkast"
author = "The topkast authors"
copyright = author  # noqa: A001 - Sphinx's name
release = topkast.__version__

extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nb_execution_mode = "off"  # notebooks are stored with their outputs: docs/notebooks/execute.py

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"topkast {release}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
copybutton_exclude = ".linenos, .gp, .go"  # prompts and output of doctests are not copied

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Array": "Array"}
python_display_short_literal_types = True
napoleon_attr_annotations = False
napoleon_google_docstring = False
napoleon_use_ivar = True  # attributes as a list, beside which no member is documented twice

# One signature for each function: the overloads are for type checkers.
for name in ("topkast._wrap",):
    analyzer = ModuleAnalyzer.for_module(name)
    analyzer.analyze()
    analyzer.overloads = {}


def shorten_types(app: Sphinx, *_: Any) -> None:
    """Write no type where it is Any, and the names of aliases inside other types."""
    for types in app.env.current_document.autodoc_annotations.values():
        for name, annotation in list(types.items()):
            if annotation.endswith("typing.Any"):
                del types[name]  # the text says what the parameter is
            else:
                types[name] = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", annotation)


def allow_breaks(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Let names break after a dot, a slash and an underscore, so that tables fit the page."""

    def in_name(match: re.Match[str]) -> str:
        return re.sub(r"(?<=\w)([._/])(?=\w)(?!py\b)", r"\1<wbr>", match[0])

    def in_cell(match: re.Match[str]) -> str:
        return re.sub(r'(?<=<span class="pre">)[^<]+', in_name, match[0])

    if "body" in context:
        context["body"] = re.sub(r"<td>.*?</td>", in_cell, context["body"], flags=re.DOTALL)


def skip_fields(app: Sphinx, what: str, name: str, member: Any, *_: Any) -> bool | None:
    """Leave out the fields of named tuples: their attributes are listed in the docstring."""
    is_field = (getattr(member, "__doc__", None) or "").startswith("Alias for field number")
    return True if is_field else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("object-description-transform", shorten_types, priority=400)  # before autodoc
    app.connect("html-page-context", allow_breaks)
