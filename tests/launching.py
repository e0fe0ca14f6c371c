"""Run the notebooks' launch cell somewhere else: an archive on this machine, an empty folder."""

import os
import shutil

import nbformat
from run_notebooks import ROOT, has_tag, notebooks
from slug import current_slug

ADDRESS = f"https://github.com/{current_slug()}"
NOT_PUBLISHED = shutil.ignore_patterns(".git", ".venv", "build", "output", "__pycache__",
                                       ".*_cache", ".ipynb_checkpoints")


def launch_cell(path=None):
    """The launch cell of the notebook `path`, of the first one unless given."""
    cells = nbformat.read(path or notebooks()[0], as_version=4).cells
    return next(cell for cell in cells if has_tag(cell, "launch"))


def fetching_from(remote, source):
    """The code `source` with `remote` in place of the course's address on GitHub."""
    assert source.count(ADDRESS) == 1
    return source.replace(ADDRESS, remote)


def publish(folder, source=ROOT):
    """Pack the files of `source` as GitHub does; returns the address that stands for GitHub's."""
    shutil.copytree(source, folder / "files/course-main", ignore=NOT_PUBLISHED)
    shutil.make_archive(folder / "archive/main", "zip", folder / "files", "course-main")
    return folder.as_uri()


def environment(**extra):
    """Variables for a process that knows nothing of this Python, its packages and its platform."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "JUPYTER", "VIRTUAL_ENV", "PAPERSPACE"))}
    return {**kept, "PYTHONNOUSERSITE": "1", "JUPYTER_PREFER_ENV_PATH": "1", **extra}
