"""The launch cell and what it installs, without a download: toy packages of the real names."""

import json
import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import packaging
import pytest
from launching import environment, launch_cell, publish
from run_notebooks import ROOT

from course_utils.install import installed_versions, unmet

REPORT = """
import json as _json
from course_utils.install import installed_versions
print(_json.dumps(installed_versions()))
"""


def wheel(folder, name, version, *requires):
    """Write an installable package that holds nothing but its version."""
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        archive.writestr(f"{info}/METADATA",
                         f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        archive.writestr(f"{info}/WHEEL",
                         "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n"
                                           f"{info}/RECORD,,\n")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Toy packages whose newest versions would drag the platform's along."""
    folder = tmp_path_factory.mktemp("index")
    for version in ("2.5.0", "2.9.0", "2.15.0"):
        wheel(folder, "torch", version)
    for version in ("0.24.0", "0.29.0"):
        torch = "2.9.0" if version == "0.24.0" else "2.15.0"
        wheel(folder, "torchvision", version, f"torch=={torch}")
    for version in ("1.26.0", "2.4.0"):
        wheel(folder, "numpy", version)
    for version in ("0.36.0", "2.4.0"):
        wheel(folder, "huggingface_hub", version)
    wheel(folder, "transformers", "4.57.0", "huggingface_hub<1.0")
    wheel(folder, "diffusers", "0.30.0", "huggingface_hub<1.0")
    wheel(folder, "diffusers", "0.35.0", "huggingface_hub>=0.30", "torch>=2.6")
    wheel(folder, "diffusers", "0.42.0", "huggingface_hub>=1.0", "torch>=2.10", "numpy>=2.3")
    wheel(folder, "accelerate", "2.0.0", "huggingface_hub>=1.0")
    return folder


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A course that needs little."""
    folder = tmp_path_factory.mktemp("remote")
    (folder / "source").mkdir()
    shutil.copytree(ROOT / "course_utils", folder / "source" / "course_utils",
                    ignore=shutil.ignore_patterns("pretrained", "__pycache__"))
    (folder / "source" / "requirements.txt").write_text(
        "# ranges\ntorch>=2.6\ntorchvision>=0.21\nnumpy>=1.26\ndiffusers>=0.34  # pictures\n"
        "jupyter>=1.1\nantique>=1 ; python_version < '3'\n")
    return publish(folder / "work", folder / "course.git", folder / "source")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A virtual environment that holds pip and packaging."""
    folder = tmp_path_factory.mktemp("bare") / "python"
    venv.create(folder, with_pip=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    shutil.copytree(Path(packaging.__file__).parent, site / "packaging")
    return folder


@pytest.fixture
def platform(tmp_path, index, bare_python):
    """A function that installs some toy packages in a bare Python and runs the cell in it."""
    shutil.copytree(bare_python, tmp_path / "python", symlinks=True)
    python = tmp_path / "python/bin/python"
    folder = tmp_path / "empty"
    folder.mkdir()
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}

    def run(remote, *packages, before="", after=REPORT, **extra):
        env = environment(remote, **(pip | extra))
        if packages:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], env=env, check=True)
        done = subprocess.run([python, "-c", before + launch_cell() + after], cwd=folder, env=env,
                              capture_output=True, text=True)
        return done

    run.folder = folder
    return run


def test_unmet_lines():
    lines = ["# a comment", "", "torch>=2.6", "open_clip_torch>=3.0", "Pillow>=10.4  # pictures",
             "jupyter>=1.1", "tqdm>=4 ; python_version < '3'"]
    have = {"torch": "2.7.0a0+nv25.1", "open-clip-torch": "2.32.0", "pillow": "10.4.0"}
    assert [r.name for r in unmet(lines, have)] == ["open_clip_torch"]
    assert [r.name for r in unmet(lines, {})] == ["torch", "open_clip_torch", "Pillow"]
    assert [r.name for r in unmet(lines, have | {"torch": "2.5.1+cu121"})] == [
        "torch", "open_clip_torch"]


def test_this_python_has_all_that_the_course_needs():
    assert unmet((ROOT / "requirements.txt").read_text().splitlines(), installed_versions()) == []


def test_an_empty_python_gets_everything(platform, remote):
    done = platform(remote)
    assert done.returncode == 0, done.stderr
    message, report = done.stdout.splitlines()
    assert message.startswith("Installing torch>=2.6, torchvision>=0.21, numpy>=1.26, diffusers")
    assert {"torch": "2.15.0", "torchvision": "0.29.0", "numpy": "2.4.0", "diffusers": "0.42.0",
            "huggingface-hub": "2.4.0"}.items() <= json.loads(report).items()
    assert sorted(path.name for path in platform.folder.iterdir()) == ["course"]


def test_only_what_is_too_old_is_replaced_and_a_second_run_changes_nothing(platform, remote):
    """The newest diffusers would need another torch, numpy and hub: an older one is taken."""
    hosted = ["torch==2.9.0", "numpy==1.26.0", "huggingface_hub==0.36.0", "transformers==4.57.0",
              "diffusers==0.30.0"]
    after = REPORT + "import diffusers\nprint(diffusers.__version__)"
    done = platform(remote, *hosted, after=after)
    assert done.returncode == 0, done.stderr
    message, report, imported = done.stdout.splitlines()
    assert message.startswith("Installing torchvision>=0.21, diffusers>=0.34;")
    have = json.loads(report)
    assert {"torch": "2.9.0", "torchvision": "0.24.0", "numpy": "1.26.0", "diffusers": "0.35.0",
            "huggingface-hub": "0.36.0", "transformers": "4.57.0"}.items() <= have.items()
    assert imported == "0.35.0"

    again = platform("file:///nowhere", PIP_FIND_LINKS="/nowhere")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == have


def test_other_packages_give_way_where_they_must_but_never_torch_or_numpy(
        platform, remote, tmp_path):
    course = platform.folder / "course"
    subprocess.run(["git", "clone", "-q", remote, str(course)], check=True)
    (course / "requirements.txt").write_text("accelerate>=1.7\n")      # needs another hub
    done = platform(remote, "torch==2.9.0", "numpy==1.26.0", "huggingface_hub==0.36.0")
    assert done.returncode == 0, done.stderr
    have = json.loads(done.stdout.splitlines()[-1])
    assert have["huggingface-hub"] == "2.4.0" and have["accelerate"] == "2.0.0"
    assert have["torch"] == "2.9.0" and have["numpy"] == "1.26.0"


def test_a_torch_that_is_too_old_is_replaced_with_its_torchvision(platform, remote):
    done = platform(remote, "torch==2.5.0", "numpy==2.4.0")
    assert done.returncode == 0, done.stderr
    have = json.loads(done.stdout.splitlines()[-1])
    assert have["torch"] == "2.15.0" and have["torchvision"] == "0.29.0"


def test_a_package_replaced_while_in_use_asks_for_a_restart(platform, remote):
    done = platform(remote, "diffusers==0.30.0", before="import diffusers\n")
    assert "Replaced while in use: diffusers. Restart the kernel once" in done.stdout
    assert "Restart" not in platform(remote, before="import diffusers\n").stdout


def one_sentence(done):
    """The sentence that ends a failed cell; a reader sees it below the traceback."""
    assert done.returncode == 1
    name, sentence = done.stderr.splitlines()[-1].split(": ", 1)
    assert name == "RuntimeError" and "During handling" not in done.stderr
    return sentence


def test_no_network_says_what_to_do(platform, remote):
    sentence = one_sentence(platform("file:///nowhere/course.git"))
    assert sentence.startswith("Could not fetch the course: switch the notebook's internet on "
                               "(on Kaggle: Settings, Internet) and run this cell again (git said:")
    assert list(platform.folder.iterdir()) == []
    assert platform(remote).returncode == 0                 # run again, with the network


def test_no_git_says_so(platform, remote):
    assert "'git'" in one_sentence(platform(remote, PATH="/nowhere"))


def test_a_failing_pip_says_what_to_do_and_a_second_run_mends_it(platform, remote):
    sentence = one_sentence(platform(remote, PIP_FIND_LINKS="/nowhere"))
    assert sentence.startswith("Could not install torch>=2.6, torchvision>=0.21, numpy>=1.26, "
                               "diffusers>=0.34: switch the notebook's internet on (on Kaggle: ")
    assert "(pip said: ERROR: No matching distribution found for torch>=2.6)" in sentence
    assert platform(remote).returncode == 0


def test_in_a_clone_nothing_happens(tmp_path):
    """No file, no process, no output, no second."""
    guard = ("import sys, time; _begun = time.time()\n"
             "def _watch(event, args):\n"
             "    if event in ('subprocess.Popen', 'socket.connect', 'os.system'):\n"
             "        raise AssertionError(event)\n"
             "sys.addaudithook(_watch)\n")
    after = "\nassert time.time() - _begun < 1\nassert sys.path.count(str(course)) == 1\n"
    cell = launch_cell()
    before = set(ROOT.iterdir()) | set((ROOT / "unit1").iterdir())
    begun = time.time()
    done = subprocess.run([sys.executable, "-c", guard + cell + "\n" + cell + after],
                          cwd=ROOT / "unit1", env=environment("file:///nowhere"),
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), time.time() - begun
    assert set(ROOT.iterdir()) | set((ROOT / "unit1").iterdir()) == before


def test_a_clone_with_packages_missing_is_told_and_left_alone(platform, remote):
    subprocess.run(["git", "clone", "-q", remote, str(platform.folder / "clone")], check=True)
    done = platform("file:///nowhere", before="import os\nos.chdir('clone')\n")
    message, report = done.stdout.splitlines()
    assert message.startswith("This Python lacks torch>=2.6, ")
    assert message.endswith(f'run %pip install -r "{platform.folder}/clone/requirements.txt" '
                            "in a cell.")
    assert "torch" not in json.loads(report)


def test_gradient_opens_a_clone_and_gets_its_packages_installed(platform, remote):
    subprocess.run(["git", "clone", "-q", remote, str(platform.folder / "clone")], check=True)
    done = platform("file:///nowhere", before="import os\nos.chdir('clone')\n",
                    PAPERSPACE_FQDN="n.clg.paperspacegradient.com")
    assert done.returncode == 0, done.stderr
    assert "torch" in json.loads(done.stdout.splitlines()[-1])
