"""Badges, the repository's address, and the files that platforms build from."""

import re
import shutil

import nbformat
import pytest
import slug
import yaml
from packaging.requirements import Requirement
from run_notebooks import ROOT, has_tag, notebooks

SLUG = slug.current_slug()
PLATFORMS = {                                   # name: (badge, how its link begins)
    "Colab": ("https://colab.research.google.com/assets/colab-badge.svg",
              "https://colab.research.google.com/github/"),
    "Kaggle": ("https://kaggle.com/static/images/open-in-kaggle.svg",
               "https://kaggle.com/kernels/welcome?src=https://github.com/"),
    "Gradient": ("https://assets.paperspace.io/img/gradient-badge.svg",
                 "https://console.paperspace.com/github/"),
    "Studio Lab": ("https://studiolab.sagemaker.aws/studiolab.svg",
                   "https://studiolab.sagemaker.aws/import/github/"),
}
STARTS = "|".join(re.escape(start) for _, start in PLATFORMS.values())
LAUNCH_LINK = re.compile(rf'({STARTS})([^/\s]+/[^/\s]+)/blob/([^/\s]+)/([^\s)"\\]+)')
BADGE = re.compile(r"\[!\[([^\]]*)\]\(([^)\s]+)\)\]\(([^)\s]+)\)")
OWN_ADDRESS = re.compile(r'(?:repository = \\?"|git clone )https://github\.com/([\w.-]+/[\w.-]+)')


def wrong_links(text, root=ROOT):
    """Each launch link and repository address in `text` that leads elsewhere or nowhere."""
    for start, owner, branch, path in LAUNCH_LINK.findall(text):
        if owner != SLUG or branch != "main" or not (root / path).is_file():
            yield f"{start}{owner}/blob/{branch}/{path}"
    for owner in OWN_ADDRESS.findall(text):
        if owner.removesuffix(".git") != SLUG:
            yield owner


def platforms_of(text, path):
    """The platforms whose badge in `text`, with alt text, opens the notebook `path`."""
    found = [(picture, link) for alt, picture, link in BADGE.findall(text) if alt.strip()]
    return {name for name, (badge, start) in PLATFORMS.items()
            if (badge, f"{start}{SLUG}/blob/main/{path.relative_to(ROOT)}") in found}


@pytest.mark.parametrize("page", slug.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_address_names_this_repository_and_a_notebook_that_exists(page):
    assert list(wrong_links(page.read_text(encoding="utf-8"))) == []


def test_wrong_links_are_found():
    good = f"https://colab.research.google.com/github/{SLUG}/blob/main/" \
           "unit1/01_introduction_to_diffusers.ipynb"
    assert list(wrong_links(f"[a]({good}) git clone https://github.com/{SLUG}\n")) == []
    for bad in (good.replace(SLUG, "some/fork"), good.replace("01_", "09_"),
                good.replace("/main/", "/master/")):
        assert list(wrong_links(f"[a]({bad})")) == [bad]
    assert list(wrong_links('repository = \\"https://github.com/some/fork\\"')) == ["some/fork"]


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_notebooks_open_on_every_platform(path):
    first, *_ = cells = nbformat.read(path, as_version=4).cells
    assert platforms_of(first.source, path) == set(PLATFORMS)
    launch = next(cell.source for cell in cells if has_tag(cell, "launch"))
    assert f'address = "https://github.com/{SLUG}/archive/main.zip"' in launch


@pytest.mark.parametrize("page", sorted(ROOT.glob("unit*/README*.md")),
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_a_launch_table_holds_every_notebook_of_its_unit(page):
    text = page.read_text(encoding="utf-8")
    for path in page.parent.glob("*.ipynb"):
        assert platforms_of(text, path) == set(PLATFORMS), path.name


@pytest.fixture
def copied_pages(tmp_path):
    for page in slug.pages():
        target = tmp_path / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, target)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("new", ["someone/their-fork", "a/b", f"x/{SLUG.split('/')[1]}",
                                 f"{SLUG}-2"])
def test_rewriting_the_slug_reaches_every_address_and_leads_back(copied_pages, new):
    before = contents(copied_pages)
    changed = slug.rewrite(new, copied_pages)
    assert {path.name for path in changed} > {path.name for path in notebooks()}
    assert slug.current_slug(copied_pages) == new
    assert not any(slug.mentions(SLUG).search(path.read_text()) for path in changed)
    assert f"git clone https://github.com/{new}\ncd {new.split('/')[1]}\n" in (
        copied_pages / "README.md").read_text()
    slug.rewrite(SLUG, copied_pages)
    assert contents(copied_pages) == before


@pytest.mark.parametrize("bad", ["", "name", "a/b/c", "https://github.com/a/b", "a b/c", "a/",
                                 "../x"])
def test_a_bad_slug_gives_one_sentence_and_changes_nothing(copied_pages, capsys, monkeypatch, bad):
    monkeypatch.setattr("sys.argv", ["slug.py", bad])
    assert slug.main() == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="owner/name"):
        slug.rewrite(bad, copied_pages)


def test_a_slug_that_a_page_links_to_already_is_refused(copied_pages):
    with open(copied_pages / "README.md", "a") as page:
        page.write("See https://github.com/huggingface/diffusers.\n")
    before = contents(copied_pages)
    with pytest.raises(ValueError, match="links to huggingface/diffusers already"):
        slug.rewrite("huggingface/diffusers", copied_pages)
    assert contents(copied_pages) == before


def test_studio_lab_builds_the_course_environment():
    """environment.yml installs requirements.txt, on a Python that the course allows."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.txt"]}
    assert {"pip", "ipykernel"} <= set(conda)           # Studio Lab lists kernels by ipykernel
    python = next(line for line in conda if line.startswith("python=")).removeprefix("python=")
    project = slug.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"{python}.0" in Requirement(f"python{project['requires-python']}").specifier


def test_the_workflow_calls_targets_that_exist():
    """It runs weekly and on each change, on Python 3.10 to 3.13, targets of the Makefile."""
    text = (ROOT / ".github/workflows/course.yml").read_text()
    workflow = yaml.safe_load(text)
    triggers = workflow[True]                           # YAML 1.1 reads the key `on` so
    assert {"push", "pull_request", "schedule"} <= set(triggers)
    assert workflow["jobs"]["checks"]["strategy"]["matrix"]["python"] == [
        "3.10", "3.11", "3.12", "3.13"]
    rules = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = set(" ".join(rules).split())
    matrix = workflow["jobs"]["checks"]["strategy"]["matrix"]["target"]
    called = set(matrix) | set(re.findall(r"make ([a-z-]+)", text))
    assert {"test", "test-lowest", "test-latest", "test-launch", "course"} <= called <= targets
    uploads = [step for step in workflow["jobs"]["checks"]["steps"]
               if "upload-artifact" in step.get("uses", "")]
    assert uploads and uploads[0]["with"]["path"] == "build/*.html"
