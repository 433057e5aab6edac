"""Sphinx configuration: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

import sys
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

import topkast

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "topkast"
author = "The topkast authors"
copyright = author  # noqa: A001 - Sphinx's name
release = topkast.__version__

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

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
python_display_short_literal_types = True
napoleon_attr_annotations = False
napoleon_google_docstring = False
napoleon_use_ivar = True  # attributes as a list, beside which no member is documented twice

# One signature for each function: the overloads are for type checkers.
for name in ("topkast._wrap",):
    analyzer = ModuleAnalyzer.for_module(name)
    analyzer.analyze()
    analyzer.overloads = {}
