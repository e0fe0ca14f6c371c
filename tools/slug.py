"""Rewrite the repository's address everywhere: make slug REPO=owner/name.

The slug stands in pyproject.toml, [project.urls]; every badge, launch cell and `git clone` line
repeats it, and tests/test_links.py finds any that differ.
"""

import re
import sys

from run_notebooks import ROOT, tomllib

PYPROJECT = "pyproject.toml"
PAGES = ("README*.md", "CONTRIBUTING*.md", "GLOSSARY.md", ".github/**/*.md", "unit*/*.ipynb",
         "unit*/README*.md", "unit*/*.py", "unit2/demo/README*.md", "unit2/demo/*.py", PYPROJECT)
PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"
BEFORE = r"(?:github\.com|paperspace\.com/github|google\.com/github|import/github)/"


def pages(root=ROOT):
    """Every file that may name the repository."""
    return sorted({path for pattern in PAGES for path in root.glob(pattern)})


def current_slug(root=ROOT):
    """The slug in pyproject.toml."""
    urls = tomllib.loads((root / PYPROJECT).read_text(encoding="utf-8"))["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/")


def mentions(slug):
    """A pattern that finds the slug in an address, and only there."""
    return re.compile(rf"({BEFORE}){re.escape(slug)}(?![\w-]|\.\w)")


def rewrite(new, root=ROOT):
    """Put the slug `new` in place of the old one; returns the files that changed."""
    if not re.fullmatch(f"{PART}/{PART}", new):
        raise ValueError(f"REPO={new!r} is not of the form owner/name, as in "
                         "make slug REPO=huggingface/diffusion-models-class")
    old = current_slug(root)
    if new == old:
        return []
    texts = {path: path.read_bytes().decode("utf-8") for path in pages(root)}
    for path, text in texts.items():
        if mentions(new).search(text):           # the way back could not tell the two apart
            raise ValueError(f"{path.relative_to(root)} links to {new} already, as another "
                             "project: choose another name.")
    changed = []
    for path, text in texts.items():
        text_now = mentions(old).sub(lambda found: found.group(1) + new, text)
        if path.suffix == ".md" and text_now != text:
            name = re.escape(old.split("/")[1])
            text_now = re.sub(rf"(?m)^cd {name}$", f"cd {new.split('/')[1]}", text_now)
        if text_now != text:
            path.write_bytes(text_now.encode("utf-8"))
            changed.append(path)
    return changed


def main():
    try:
        changed = rewrite(sys.argv[1] if len(sys.argv) == 2 else "")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(str(path.relative_to(ROOT)) for path in changed) or "nothing to change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
