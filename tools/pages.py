"""A notebook as a page that needs no network: no script, formulas as MathML, their font inside."""

import base64
import io
from importlib.util import find_spec
from pathlib import Path

from fontTools.subset import Subsetter
from fontTools.ttLib import TTFont
from math_core import LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

# Jupyter's page without the scripts that it would load from the network.
TEMPLATE = """{% extends "lab/index.html.j2" %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}"""
# That page has too little contrast, and links that only their colour tells apart.
STYLE = """
.jp-RenderedHTMLCommon :is(p, li, td) a { text-decoration: underline !important; }
.jp-Cell .jp-InputPrompt, .jp-Cell .jp-OutputPrompt { color: #545454 !important;
    opacity: 1 !important; }
body { --jp-mirror-editor-comment-color: #2f6f6f; --jp-mirror-editor-keyword-color: #006800;
       --jp-mirror-editor-operator-color: #7a1fa2; --jp-mirror-editor-number-color: #006800; }
"""
# <mi>x</mi> is drawn with the character of the italic x, and a root with the radical sign.
DRAWN = {*range(0x1D434, 0x1D468), *range(0x1D6E2, 0x1D71C), ord("ℎ"), ord("√")}
to_mathml = LatexToMathML(continue_on_error=True).convert_with_local_state


class FormulaRenderer(IPythonRenderer):
    """nbconvert's Markdown, with formulas that a browser shows without a script."""

    def inline_math(self, body):
        return to_mathml(body, displaystyle=False)

    def block_math(self, body):
        return to_mathml(body, displaystyle=True)

    def latex_environment(self, name, body):
        return to_mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", displaystyle=True)


def markdown_to_html(source):
    return MarkdownWithMath(renderer=FormulaRenderer(escape=False)).render(source)


def math_font(text):
    """CSS with what `text` needs of a font for formulas; without one, x_t looks like a product."""
    fonts = Path(find_spec("ziamath").origin).with_name("fonts")
    font = TTFont(fonts / "STIXTwoMath-Regular.ttf")
    subsetter = Subsetter()
    subsetter.populate(unicodes=DRAWN.union(map(ord, text)))
    subsetter.subset(font)
    widths = font["hmtx"].metrics
    narrow, _ = widths["uni221A"]                # Chromium leaves a gap as if each root were large
    for name in [name for name in widths if name.startswith("uni221A.")]:
        width, bearing = widths[name]
        font["glyf"][name].coordinates.scale((narrow / width, 1))
        widths[name] = (narrow, round(bearing * narrow / width))
    font.flavor = "woff"
    font.save(file := io.BytesIO())
    data = base64.b64encode(file.getvalue()).decode()
    return (f"@font-face {{ font-family: formulas; src: url(data:font/woff;base64,{data}); }}\n"
            "math { font-family: formulas, math; font-size: 1.1em; }\n")


def page(notebook):
    """The notebook as HTML."""
    exporter = HTMLExporter(raw_template=TEMPLATE, filters={"markdown2html": markdown_to_html})
    html, _ = exporter.from_notebook_node(notebook)
    style = f"<style>{STYLE}{math_font(html)}</style></head>"
    return html.replace("</head>", style, 1).replace("<html>", '<html lang="en">', 1)
