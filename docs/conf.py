"""Sphinx configuration: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

import topkast

project = "topkast"
author = "The topkast authors"
copyright = author  # noqa: A001 - Sphinx's name
release = topkast.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
nb_execution_mode = "off"  # notebooks are stored with their outputs: docs/notebooks/execute.py

html_theme = "furo"
html_title = f"topkast {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what each parameter is
napoleon_attr_annotations = False
napoleon_google_docstring = False
napoleon_use_ivar = True  # attributes as a list, beside which no member is documented twice
