"""Formulas as MathML, which browsers draw by themselves: no script, no font, no network."""

from __future__ import annotations

import re
from typing import Any
from xml.sax.saxutils import escape

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number

TYPEWRITER = re.compile(r"\\mathtt\{([^{}]*)\}")
CORRECTIONS = [
    # Browsers have dropped the attributes mathvariant and columnalign.
    (r"<mtext>typewriter:(.*?)</mtext>", r'<mtext style="font-family: monospace">\1</mtext>'),
    (r'columnalign="left"', 'style="text-align: left"'),
    # A named function and a bar are no operators between two operands: no space on both sides.
    (r"<mo>(max|min)</mo>", r"<mi>\1</mi>"),
    (r"<mo>([a-z]{2,})</mo>", r'<mi>\1</mi><mspace width="0.17em"/>'),
    (r"<mo>&#x0007C;</mo>", '<mo lspace="0" rspace="0" stretchy="false">|</mo>'),
    # Fonts without the set minus are common.
    (r"<mi>&#x029F5;</mi>", '<mo lspace="0.17em" rspace="0.17em">&#x0005C;</mo>'),
]


def to_mathml(latex: str, *, display: str) -> str:
    marked = TYPEWRITER.sub(lambda match: rf"\text{{typewriter:{match[1]}}}", latex)
    mathml = convert(marked.strip(), display=display)
    for pattern, replacement in CORRECTIONS:
        mathml = re.sub(pattern, replacement, mathml)
    note = f'<annotation encoding="application/x-tex">{escape(latex.strip())}</annotation>'
    start, body = re.fullmatch(r"(<math[^>]*>)(.*)</math>", mathml, re.DOTALL).groups()
    return f"{start}<semantics>{body}{note}</semantics></math>"


def visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(to_mathml(node.astext(), display="inline"))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    if node["number"]:
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})</span>')
    translator.body.append(to_mathml(node.astext(), display="block"))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
