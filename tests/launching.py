"""Run the notebooks' launch cell somewhere else: a remote on this machine, an empty folder."""

import os
import shutil
import subprocess

import nbformat
from run_notebooks import ROOT, has_tag, notebooks
from slug import current_slug

NOT_PUBLISHED = shutil.ignore_patterns(".git", ".venv", "build", "output", "__pycache__",
                                       ".*_cache", ".ipynb_checkpoints")


def launch_cell():
    cells = nbformat.read(notebooks()[0], as_version=4).cells
    return next(cell.source for cell in cells if has_tag(cell, "launch"))


def publish(folder, bare, source=ROOT):
    """Make a bare repository `bare` with one commit that holds the files of `source`."""
    shutil.copytree(source, folder, ignore=NOT_PUBLISHED)
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org",
           "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "The course"]):
        subprocess.run([*git, *command], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(folder), str(bare)], check=True)
    return bare.as_uri()


def environment(remote, **extra):
    """Variables for a process to which `remote` is the course's address on GitHub."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "JUPYTER", "VIRTUAL_ENV", "GIT_", "PAPERSPACE"))}
    return {**kept, "PYTHONNOUSERSITE": "1", "JUPYTER_PREFER_ENV_PATH": "1",
            "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{remote}.insteadOf",
            "GIT_CONFIG_VALUE_0": f"https://github.com/{current_slug()}", **extra}
