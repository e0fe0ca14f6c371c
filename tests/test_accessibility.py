"""The rendered pages pass axe-core, a checker of accessibility, in headless Chromium."""

import shutil

import nbformat
import pytest
import run_notebooks
from run_notebooks import notebooks

axe = pytest.importorskip("axe_playwright_python.sync_playwright")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")]


@pytest.fixture(scope="module")
def findings():
    """A function from a page to its serious and critical findings."""
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def look(path):
            page = browser.new_page()
            page.route("http*://**", lambda route: route.abort())      # the page alone, offline
            page.goto(path.as_uri())
            found = axe.Axe().run(page).response["violations"]
            page.close()
            return [f"{rule['id']}: {node['html'][:200]}" for rule in found
                    if rule["impact"] in ("serious", "critical") for node in rule["nodes"]]

        yield look
        browser.close()


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_notebook_page(path, findings, tmp_path, monkeypatch):
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path)
    run_notebooks.render(nbformat.read(path, as_version=4), "page.html")
    assert findings(tmp_path / "page.html") == []


def test_index_page(findings, tmp_path, monkeypatch):
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path)
    run_notebooks.write_index([(path, 1.0) for path in notebooks()])
    assert findings(tmp_path / "index.html") == []


def test_the_checker_finds_a_picture_without_text(findings, tmp_path):
    (tmp_path / "bad.html").write_text(
        '<html lang="en"><title>t</title><main><h1>h</h1><img src="x.png"></main></html>')
    assert any("image-alt" in finding for finding in findings(tmp_path / "bad.html"))
