"""The launch cell and what it installs, without a download: toy packages of the real names."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import venv
import zipfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import packaging
import pytest
from launching import environment, fetching_from, launch_cell, publish
from run_notebooks import ROOT, notebooks

from course_utils import install
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
def source(tmp_path_factory):
    """A course that needs little."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "course_utils", folder / "course_utils",
                    ignore=shutil.ignore_patterns("pretrained", "__pycache__"))
    (folder / "requirements.txt").write_text(
        "# ranges\ntorch>=2.6\ntorchvision>=0.21\nnumpy>=1.26\ndiffusers>=0.34  # pictures\n"
        "jupyter>=1.1\nantique>=1 ; python_version < '3'\n")
    return folder


@pytest.fixture(scope="module")
def remote(tmp_path_factory, source):
    return publish(tmp_path_factory.mktemp("remote"), source)


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
        env = environment(**(pip | extra))
        if packages:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], env=env, check=True)
        code = before + fetching_from(remote, launch_cell().source) + "\n" + after
        return subprocess.run([python, "-c", code], cwd=folder, env=env, capture_output=True,
                              text=True)

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
        platform, source):
    course = shutil.copytree(source, platform.folder / "course")
    (course / "requirements.txt").write_text("accelerate>=1.7\n")      # needs another hub
    done = platform("file:///nowhere", "torch==2.9.0", "numpy==1.26.0", "huggingface_hub==0.36.0")
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


@pytest.fixture
def run_cell(tmp_path):
    """A function that runs the cell in an empty folder, with this Python, which lacks nothing."""
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(remote, before="", **extra):
        cell = fetching_from(remote, launch_cell().source)
        assert "timeout=60" in cell
        code = before + cell.replace("timeout=60", "timeout=1")
        return subprocess.run([sys.executable, "-c", code], cwd=folder, text=True,
                              env=environment(NO_PROXY="*", **extra), capture_output=True)

    run.folder = folder
    return run


def one_sentence(done):
    """The sentence that ends a failed cell; a reader sees it below the traceback."""
    assert done.returncode == 1
    name, sentence = done.stderr.splitlines()[-1].split(": ", 1)
    assert name == "RuntimeError" and "During handling" not in done.stderr
    return sentence


def fetched(run_cell, remote):
    """Whether the cell, run again, brings the course without a word."""
    done = run_cell(remote)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return (run_cell.folder / "course/requirements.txt").exists()


INTERNET = "Could not fetch "


def test_no_network_says_what_to_do(run_cell, remote):
    assert one_sentence(run_cell("file:///nowhere")).startswith(INTERNET)
    assert list(run_cell.folder.iterdir()) == []
    assert fetched(run_cell, remote)


@pytest.fixture
def host():
    """A function that makes an address at which this machine answers once with some bytes."""
    with ExitStack() as stack:
        def answer(reply, then_close=True):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve():
                connection = stack.enter_context(listener.accept()[0])
                connection.recv(65536)
                connection.sendall(reply)
                if then_close:
                    connection.close()

            threading.Thread(target=serve, daemon=True).start()
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield answer


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + 50_000 * b"x"
LOGIN = b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\nPlease log in"


@pytest.mark.parametrize("reply, then_close, words", [
    (b"", False, "timed out"), (HALF, False, "timed out"), (HALF, True, "50000 bytes read"),
    (b"HTTP/1.1 404 Not Found\r\n\r\n", True, "404"), (LOGIN, True, "not a zip file")],
    ids=["silent", "hangs in the middle", "breaks off", "not there", "another page"])
def test_a_download_that_fails_says_so_and_leaves_nothing(run_cell, host, reply, then_close, words):
    sentence = one_sentence(run_cell(host(reply, then_close)))
    assert sentence.startswith(INTERNET) and words in sentence.split("is the internet on? ")[1]
    assert list(run_cell.folder.iterdir()) == []


FULL = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"


@pytest.mark.parametrize("before, words", [
    (FULL, "File too large"), ("import os\nos.chdir('/proc')\n", "/proc/")],
    ids=["a full disk", "a folder where nobody writes"])
def test_a_disk_that_takes_no_file_is_not_blamed_on_the_internet(run_cell, remote, before, words):
    sentence = one_sentence(run_cell(remote, before))
    assert sentence.startswith("Could not unpack the course: make room for 20 MB, or work in a ")
    assert words in sentence
    assert list(run_cell.folder.iterdir()) == []
    assert fetched(run_cell, remote)


def test_a_folder_of_that_name_is_left_alone(run_cell, remote):
    mine = run_cell.folder / "course/notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert (f"give your own {mine.parent} another name and run this cell again"
            in one_sentence(run_cell(remote)))
    assert mine.read_text() == "mine" and list(run_cell.folder.iterdir()) == [mine.parent]
    mine.parent.rename(run_cell.folder / "mine")
    assert fetched(run_cell, remote)


@pytest.mark.parametrize("moment", ["event == 'open' and 'requirements' in str(args[0])",
                                    "event == 'os.rename'"])
def test_what_was_killed_in_the_middle_is_fetched_again(run_cell, remote, moment):
    killed = run_cell(remote, "import os, sys\nsys.addaudithook(lambda event, args: "
                              f"os.kill(os.getpid(), 9) if {moment} else None)\n")
    assert killed.returncode == -9 and not (run_cell.folder / "course").exists()
    assert fetched(run_cell, remote)


def test_no_git_is_needed(run_cell, remote):
    assert run_cell(remote, PATH="/nowhere").returncode == 0


def test_the_cell_is_folded_away_under_a_title():
    for path in notebooks():
        cell = launch_cell(path)
        assert cell.source.startswith("#@title ")
        assert cell.metadata.cellView == "form" and cell.metadata.jupyter.source_hidden is True


def test_a_failing_pip_says_what_to_do_and_a_second_run_mends_it(platform, remote):
    sentence = one_sentence(platform(remote, PIP_FIND_LINKS="/nowhere"))
    assert sentence.startswith("Could not install torch>=2.6, torchvision>=0.21, numpy>=1.26, "
                               "diffusers>=0.34: switch the notebook's internet on (on Kaggle: ")
    assert "(pip said: ERROR: No matching distribution found for torch>=2.6)" in sentence
    assert platform(remote).returncode == 0


def test_a_pip_that_may_not_install_is_not_blamed_on_the_internet(monkeypatch, tmp_path):
    refused = SimpleNamespace(returncode=1, stderr="error: externally-managed-environment\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(install, "installed_versions", dict)
    monkeypatch.setattr(install, "pip_install", lambda wanted, pinned: refused)
    with pytest.raises(RuntimeError, match="run %pip install -r .*externally-managed") as caught:
        install.install_missing()
    assert "internet" not in str(caught.value)


def test_in_a_clone_nothing_happens(tmp_path):
    """No file, no process, no output, no second."""
    guard = ("import sys, time; _begun = time.time()\n"
             "def _watch(event, args):\n"
             "    if event in ('subprocess.Popen', 'socket.connect', 'os.system'):\n"
             "        raise AssertionError(event)\n"
             "sys.addaudithook(_watch)\n")
    after = "\nassert time.time() - _begun < 1\n"
    cell = launch_cell().source
    before = set(ROOT.iterdir()) | set((ROOT / "unit1").iterdir())
    begun = time.time()
    done = subprocess.run([sys.executable, "-c", guard + cell + "\n" + cell + after],
                          cwd=ROOT / "unit1", env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), time.time() - begun
    assert set(ROOT.iterdir()) | set((ROOT / "unit1").iterdir()) == before


def test_a_clone_with_packages_missing_is_told_and_left_alone(platform, source):
    shutil.copytree(source, platform.folder / "clone")
    done = platform("file:///nowhere", before="import os\nos.chdir('clone')\n")
    message, report = done.stdout.splitlines()
    assert message.startswith("This Python lacks torch>=2.6, ")
    assert message.endswith(f'run %pip install -r "{platform.folder}/clone/requirements.txt" '
                            "in a cell.")
    assert "torch" not in json.loads(report)


def test_gradient_opens_a_clone_and_gets_its_packages_installed(platform, source):
    shutil.copytree(source, platform.folder / "clone")
    done = platform("file:///nowhere", before="import os\nos.chdir('clone')\n",
                    PAPERSPACE_FQDN="n.clg.paperspacegradient.com")
    assert done.returncode == 0, done.stderr
    assert "torch" in json.loads(done.stdout.splitlines()[-1])
