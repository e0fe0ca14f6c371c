"""The rendered pages show everything without a network: no script, and formulas as MathML."""

import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from pages import page
from run_notebooks import notebooks


def problems(html):
    """What a reader without a network would miss, the badges' pictures apart, or see raw."""
    yield from re.findall(r"url\(\W*https?://[^)]*", html)
    soup = BeautifulSoup(html, "html.parser")
    yield from map(str, soup.select("script, link, iframe, .math-core-error"))
    for code in soup.select("style, pre, code"):
        code.decompose()
    yield from re.findall(r"\$.*|\\[A-Za-z([].*", soup.get_text())


def page_of(markdown):
    return page(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(markdown)]))


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_notebook_needs_no_network(path):
    html = page(nbformat.read(path, as_version=4))
    assert list(problems(html)) == []
    assert html.count("<math") > 10


def test_every_way_to_write_a_formula():
    html = page_of("# $a$\n\n| $b$ |\n|---|\n| $c$ |\n\n$$d\n= e$$\n\n\\begin{align}f\\end{align}")
    assert list(problems(html)) == []
    assert html.count("<math>") == 3 and html.count('<math display="block"') == 2


@pytest.mark.parametrize("broken", [
    "<p>$x_t$</p>", r"$\unknown$", '<script src="https://example.org/a.js"></script>',
    '<link rel="stylesheet" href="https://example.org/a.css">',
])
def test_what_would_be_missing_is_noticed(broken):
    assert list(problems(page_of(broken)))
