"""The launch cell for real: an empty folder, only the notebook, an archive, whole platforms.

Slow and gigabytes large, so only `make test-launch` runs it. test_install.py tests the same logic
with toy packages.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from launching import environment, fetching_from, publish
from run_notebooks import SHORT_MODE, has_tag, insert_after, notebooks

pytestmark = [pytest.mark.launch, pytest.mark.slow]

# What Colab comes with, on Python 3.12: not the newest, much of it pinned by the rest. From the
# list that Google keeps, github.com/googlecolab/backend-info, pip-freeze.gpu.txt, of June 2026
# (commit 03a89033). Of what the course needs, open_clip and torchmetrics are missing.
# Kaggle builds on Colab's image (github.com/Kaggle/docker-python, Dockerfile.tmpl) and pins some
# packages lower, matplotlib below 3.8 among them: there the launch cell asks for one restart.
HOSTED_PYTHON = "3.12"
HOSTED = {
    "torch": "2.11.0", "torchvision": "0.26.0", "numpy": "2.0.2", "scipy": "1.16.3",
    "transformers": "5.9.0", "huggingface-hub": "1.17.0", "diffusers": "0.37.1",
    "datasets": "4.0.0", "accelerate": "1.13.0", "timm": "1.0.27", "mlxtend": "0.23.4",
    "gradio": "5.50.0", "tensorboard": "2.20.0", "pandas": "2.2.2", "pyarrow": "18.1.0",
    "scikit-learn": "1.6.1", "matplotlib": "3.10.0", "pillow": "11.3.0", "tqdm": "4.67.3",
    "fsspec": "2025.3.0", "ipython": "7.34.0", "ipywidgets": "7.7.1", "nbclient": "0.10.4",
    "nbconvert": "7.17.1", "ipykernel": "6.17.1", "jupyter-client": "7.4.9", "traitlets": "5.7.1",
    "setuptools": "75.2.0",
}
VERSIONS = """
import json, sys
from importlib.metadata import distributions
found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}
print(json.dumps(found))
"""
IMPORTED = """
import json, diffusers, numpy, torch, torchvision
print(json.dumps({m.__name__: m.__version__ for m in (diffusers, numpy, torch, torchvision)}))
"""


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("remote"))


@pytest.fixture
def make_platform(tmp_path):
    """Make a virtual environment with pip and some packages; uv makes it fast."""
    folder = tmp_path / "python"

    def make(*packages, python=sys.executable):
        begun = time.time()
        uv = [shutil.which("uv", path=os.path.dirname(sys.executable)) or "uv"]
        venv = [*uv, "venv", "-q", "--seed", folder, "--python"]
        if subprocess.run([*venv, python]).returncode:
            print(f"no Python {python} to be had, so this one")
            subprocess.run([*venv, sys.executable], check=True)
        subprocess.run([*uv, "pip", "install", "-q", "--python", folder / "bin/python", *packages],
                       check=True)
        print(f"platform made in {time.time() - begun:.0f} s")
        return folder

    yield make
    shutil.rmtree(folder)                               # gigabytes


def first_cells(path, remote):
    """The notebook up to its first cell after the settings; the launch cell runs twice."""
    notebook = nbformat.read(path, as_version=4)
    insert_after(notebook, "config", SHORT_MODE)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    config = next(i for i, cell in enumerate(code) if has_tag(cell, "config"))
    assert has_tag(code[0], "launch")
    code[0].source = fetching_from(remote, code[0].source)
    added = [nbformat.v4.new_code_cell(s) for s in (VERSIONS, code[0].source, VERSIONS, IMPORTED)]
    notebook.cells = [code[0], *added[:3], *code[1:config + 3], added[3]]
    return notebook


def run_in(platform, remote, path, folder):
    """Run the first cells of the notebook with the platform's own Jupyter; returns them by name."""
    folder.mkdir()
    nbformat.write(first_cells(path, remote), folder / path.name)
    command = [platform / "bin/jupyter", "nbconvert", "--to=notebook", "--execute", "--inplace",
               "--log-level=ERROR", path.name]
    subprocess.run(command, cwd=folder, check=True, env=environment(
        COURSE_PROFILE="quick", PATH=f"{platform / 'bin'}{os.pathsep}{os.environ['PATH']}"))
    launch, versions, again, versions_again, *middle, imported = nbformat.read(
        folder / path.name, as_version=4).cells

    def printed(cell):
        return "".join(o.text for o in cell.outputs if o.output_type == "stream")

    assert printed(again) == ""
    assert json.loads(printed(versions)) == json.loads(printed(versions_again))
    assert printed(middle[0]).startswith("Profile quick")
    return printed(launch), json.loads(printed(versions)), json.loads(printed(imported))


def run_every_notebook(platform, remote, tmp_path):
    """The first notebook installs, the others find all there; returns what the first did."""
    results = []
    for i, path in enumerate(notebooks()):
        begun = time.time()
        results.append(run_in(platform, remote, path, tmp_path / f"folder{i}"))
        print(f"{path.parent.name}/{path.name}: {time.time() - begun:.0f} s, "
              f"the launch cell printed: {results[-1][0].strip() or 'nothing'}")
    assert all(message == "" for message, *_ in results[1:])
    return results[0]


def test_nothing_but_jupyter(make_platform, remote, tmp_path):
    platform = make_platform("jupyter")
    message, versions, imported = run_every_notebook(platform, remote, tmp_path)
    assert message.startswith("Installing torch>=")
    assert imported["torch"].split("+")[0] == versions["torch"].split("+")[0]
    print("installed:", ", ".join(f"{name} {versions[name]}" for name in (
        "torch", "torchvision", "numpy", "diffusers", "datasets", "open-clip-torch")))


def test_a_hosted_platform_keeps_its_versions(make_platform, remote, tmp_path):
    platform = make_platform(*(f"{name}=={version}" for name, version in HOSTED.items()),
                             python=HOSTED_PYTHON)
    before = json.loads(subprocess.run([platform / "bin/python", "-c", VERSIONS], check=True,
                                       capture_output=True, text=True).stdout)
    assert HOSTED.items() <= before.items()
    message, after, imported = run_every_notebook(platform, remote, tmp_path)
    assert message.startswith("Installing open_clip_torch") and "torchmetrics" in message
    assert not any(f" {name}>" in message for name in ("torch", "diffusers", "datasets"))
    changed = {name for name, version in before.items() if after.get(name) != version}
    print("changed:", {name: (before[name], after.get(name)) for name in changed})
    print("added:", {name: after[name] for name in sorted(after.keys() - before.keys())})
    assert not changed
    for name in ("torch", "torchvision", "numpy", "diffusers"):
        assert imported[name].split("+")[0] == HOSTED[name]
