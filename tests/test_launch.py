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
# Kaggle builds on Colab's image (github.com/Kaggle/docker-python, Dockerfile.tmpl) and pins some
# packages lower: from its kaggle_requirements.txt, commit 01d659bb, and what these need in turn
# (matplotlib below 3.8 is built for numpy 1). It also pins scikit-learn 1.2.2, which has no wheel
# for Python 3.12: that one stays Colab's here. Its kernel imports matplotlib as it starts.
KAGGLE = HOSTED | {
    "matplotlib": "3.7.5", "numpy": "1.26.4", "seaborn": "0.12.2", "ipywidgets": "8.1.5",
    "torchmetrics": "1.8.2",
}
KAGGLE_KERNEL = "c = get_config(); c.IPKernelApp.matplotlib = 'inline'\n"
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


def execute(platform, notebook, folder, **extra):
    """Run `notebook` in the new `folder` with the platform's own Jupyter; returns its cells."""
    folder.mkdir()
    nbformat.write(notebook, folder / "notebook.ipynb")
    command = [platform / "bin/jupyter", "nbconvert", "--to=notebook", "--execute", "--inplace",
               "--log-level=ERROR", "notebook.ipynb"]
    subprocess.run(command, cwd=folder, check=True, env=environment(
        COURSE_PROFILE="quick", PATH=f"{platform / 'bin'}{os.pathsep}{os.environ['PATH']}",
        **extra))
    return nbformat.read(folder / "notebook.ipynb", as_version=4).cells


def printed(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def run_in(platform, remote, path, folder, **extra):
    """Run the first cells of the notebook `path`; returns what they printed."""
    cells = execute(platform, first_cells(path, remote), folder, **extra)
    launch, versions, again, versions_again, *middle, imported = cells
    assert printed(again) == ""
    assert json.loads(printed(versions)) == json.loads(printed(versions_again))
    assert printed(middle[0]).startswith("Profile quick")
    return printed(launch), json.loads(printed(versions)), json.loads(printed(imported))


def run_every_notebook(platform, remote, tmp_path, **extra):
    """The first notebook installs, the others find all there; returns what the first did."""
    results = []
    for i, path in enumerate(notebooks()):
        begun = time.time()
        results.append(run_in(platform, remote, path, tmp_path / f"folder{i}", **extra))
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


def make_hosted(make_platform, packages):
    """A platform with exactly these versions among others; returns it and all its versions."""
    wanted = [f"{name}=={version}" for name, version in packages.items()]
    platform = make_platform(*wanted, python=HOSTED_PYTHON)
    before = json.loads(subprocess.run([platform / "bin/python", "-c", VERSIONS], check=True,
                                       capture_output=True, text=True).stdout)
    assert packages.items() <= before.items()
    return platform, before


def changes(before, after):
    """The packages of `before` that have another version in `after`, with both."""
    changed = {name: (version, after.get(name)) for name, version in before.items()
               if after.get(name) != version}
    print("changed:", changed)
    print("added:", {name: after[name] for name in sorted(after.keys() - before.keys())})
    return changed


def test_a_hosted_platform_keeps_its_versions(make_platform, remote, tmp_path):
    platform, before = make_hosted(make_platform, HOSTED)
    message, after, imported = run_every_notebook(platform, remote, tmp_path)
    assert message.startswith("Installing open_clip_torch") and "torchmetrics" in message
    assert not any(f" {name}>" in message for name in ("torch", "diffusers", "datasets"))
    assert not changes(before, after)
    for name in ("torch", "torchvision", "numpy", "diffusers"):
        assert imported[name].split("+")[0] == HOSTED[name]


def test_kaggle_is_asked_for_one_restart(make_platform, remote, tmp_path):
    platform, before = make_hosted(make_platform, KAGGLE)
    settings = tmp_path / "ipython/profile_default"
    settings.mkdir(parents=True)
    (settings / "ipython_config.py").write_text(KAGGLE_KERNEL)
    extra = {"IPYTHONDIR": str(settings.parent)}
    notebook = first_cells(notebooks()[0], remote)
    notebook.cells = notebook.cells[:2]                 # the launch cell, then the versions
    launch, versions = execute(platform, notebook, tmp_path / "before_the_restart", **extra)
    print(printed(launch))
    assert printed(launch).startswith("Installing open_clip_torch")
    assert "Replaced while in use: matplotlib. Restart the kernel once" in printed(launch)
    assert changes(before, json.loads(printed(versions))).keys() == {"matplotlib"}
    message, _, imported = run_every_notebook(platform, remote, tmp_path, **extra)
    assert message == ""
    assert imported["numpy"] == KAGGLE["numpy"]
