"""Traffic with the Hub as a learner's notebook has it: what works, and every way to fail."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import nbformat
import pytest
from hub import EXPIRED, Hub, cut, damaged, environment, hang, serving, status
from nbclient import NotebookClient
from run_notebooks import ROOT, text_of

from course_utils.data import load_images
from course_utils.hub import explained, hub_answers

SHIPPED = ROOT / "course_utils" / "pretrained"
SET_UP = """
import os, socket, sys, time
sys.path.insert(0, {root!r})
import open_clip
from diffusers import DDPMPipeline
from huggingface_hub import ModelCard
from course_utils.data import load_images
from course_utils.hub import explained
time.sleep = lambda seconds: None                # clients wait between their tries
real_lookup = socket.getaddrinfo


def no_lookup(*args, **options):
    raise socket.gaierror(-3, "Temporary failure in name resolution")
"""
LOAD = {                                         # each says OK when it has what it wanted
    "dataset": "print('OK', len(load_images({name!r})))",
    "model": "with explained({name!r}):\n"
             "    DDPMPipeline.from_pretrained({name!r}, use_safetensors=True)\nprint('OK')",
    "clip": "with explained('hf-hub:' + {name!r}):\n"
            "    open_clip.create_model('hf-hub:' + {name!r}, require_pretrained=True)\n"
            "print('OK')",
    "card": "with explained({name!r}):\n"
            "    ModelCard('---\\nlicense: mit\\n---').push_to_hub({name!r})\nprint('OK')",
}
NO_DNS = "socket.getaddrinfo = no_lookup\n"


def always(app):
    return lambda hub: app


def nobody(hub):
    return None


def fails(what, *words, on="/", answer=nobody, token="hf_ada", before="", private=False,
          gated=False, missing=False):
    """A fault: what is loaded, words of the sentence, and what answers for which part of paths."""
    return SimpleNamespace(**locals())


FAULTS = {
    "no DNS": fails("dataset", "does not answer", "network", before=NO_DNS),
    "no DNS, model": fails("model", "does not answer", "network", before=NO_DNS),
    "missing": fails("dataset", "404", "check the name", missing=True),
    "missing, no login": fails("dataset", "401", "check the name", missing=True, token=""),
    "missing model": fails("model", "404", "check the name", missing=True),
    "missing CLIP": fails("clip", "404", "check the name", missing=True),
    "private": fails("dataset", "404", "token may read it", token="hf_bob", private=True),
    "private, no login": fails("model", "401", "hf auth login", token="", private=True),
    "gated": fails("dataset", "403", "ask for access at", token="hf_bob", gated=True),
    "gated, no login": fails("dataset", "401", "hf auth login", token="", gated=True),
    "gated model": fails("model", "403", "ask for access at", token="hf_bob", gated=True),
    "expired token": fails("dataset", "expired", "hf auth login", token=EXPIRED),
    "expired token, model": fails("model", "expired", "hf auth login", token=EXPIRED),
    "wrong token": fails("dataset", "refuses your token", "hf auth login", token="hf_typo"),
    "too many requests": fails("dataset", "429", "wait five", answer=always(status(429))),
    "too many files": fails("model", "429", "wait five", on="/store", answer=always(status(429))),
    "down": fails("dataset", "does not answer", answer=always(status(500))),
    "API down": fails("model", "500", "wait some minutes", on="/api", answer=always(status(500))),
    "store down": fails("model", "500", "wait some", on="/store", answer=always(status(500))),
    "store forbids": fails("dataset", "403", on="/store", answer=always(status(403))),
    "hangs": fails("dataset", "incomplete", "run this again", on="/store", answer=always(hang)),
    "hangs, model": fails("model", "incomplete", "again", on="/store", answer=always(hang)),
    "cut": fails("dataset", "incomplete", "run this again", on="/store", answer=cut),
    "cut model": fails("model", "incomplete", "run this again", on="/store", answer=cut),
    "cut CLIP": fails("clip", "incomplete", "run this again", on="/store", answer=cut),
    "damaged": fails("dataset", "damaged", "run this again", on="/store", answer=damaged),
    "damaged model": fails("model", "damaged", "run this again", on="/store", answer=damaged),
    "damaged CLIP": fails("clip", "damaged", "run this again", on="/store", answer=damaged),
    "share, expired": fails("card", "expired", "hf auth login", token=EXPIRED),
    "share, no right": fails("card", "403", "right to write", token="hf_bob"),
    "share, down": fails("card", "500", "wait some", on="/commit", answer=always(status(500))),
}


def make(hub, name, what):
    """A repository of the kind that is to be loaded; nothing if it is there."""
    folder = hub.folder / ("datasets" if what == "dataset" else "models") / name
    if what == "dataset":
        shutil.copytree(hub.folder / "pictures", folder, dirs_exist_ok=True)
    else:
        shipped = "clip-butterflies" if what == "clip" else "butterflies-32"
        shutil.copytree(SHIPPED / shipped, folder, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"))
    load_images("butterflies", limit=12).to_parquet(
        hub.folder / "pictures" / "data" / "train-00000-of-00001.parquet")
    with serving(hub) as hub.proxy:
        yield hub


@pytest.fixture(scope="module")
def met(hub, tmp_path_factory):
    """One notebook meets every fault, and tries again when all is well: the two cells of each."""
    notebook, steps = nbformat.v4.new_notebook(), {0: lambda: None}
    notebook.cells = [nbformat.v4.new_code_cell(SET_UP.format(root=str(ROOT)))]

    def add(prepare, token, code):
        steps[len(notebook.cells)] = prepare
        notebook.cells.append(nbformat.v4.new_code_cell(
            f"os.environ['HF_TOKEN'] = {token!r}\n{code}"))

    for number, fault in enumerate(FAULTS.values()):
        name = f"ada/fault-{number}"
        code = LOAD[fault.what].format(name=name)

        def break_it(name=name, fault=fault):
            if not fault.missing:
                make(hub, name, fault.what)
            hub.private, hub.gated = set([name] * fault.private), set([name] * fault.gated)
            app = fault.answer(hub)
            hub.fault = lambda scope: app if fault.on in scope["path"] else None

        def mend(name=name, fault=fault):
            make(hub, name, fault.what)
            hub.private, hub.gated, hub.fault = set(), set(), lambda scope: None

        add(break_it, fault.token, fault.before + code)
        add(mend, "hf_ada", "socket.getaddrinfo = real_lookup\n" + code)

    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment(hub.proxy, folder).items():
            patch.setenv(key, value)
        patch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        NotebookClient(notebook, allow_errors=True, timeout=120,
                       on_cell_start=lambda cell, cell_index: steps[cell_index]()).execute()
    set_up, *cells = notebook.cells
    assert not any(output.output_type == "error" for output in set_up.outputs), set_up.outputs
    return dict(zip(FAULTS, zip(cells[::2], cells[1::2], strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_says_in_one_sentence_what_to_do(name, met):
    broken, _ = met[name]
    error = next(output for output in broken.outputs if output.output_type == "error")
    assert error.ename == "ConnectionError" and all(word in error.evalue for word in
                                                    FAULTS[name].words), error.evalue
    assert "\n" not in error.evalue and error.evalue.endswith(".")
    assert "During handling" not in "".join(error.traceback)
    for token in ("hf_ada", "hf_bob", "hf_typo", EXPIRED):
        assert token not in json.dumps(broken.outputs).replace(repr(token), "")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_after_a_fault_the_next_run_succeeds(name, met):
    assert text_of(met[name][1]).startswith("OK"), met[name][1].outputs


def run(code, hub, home, **variables):
    """What a program prints that has the Hub and ada's login."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, **environment(hub.proxy, home, "hf_ada"), **variables})
    assert done.returncode == 0, done.stderr
    assert "hf_ada" not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_offline_what_is_in_the_cache_loads_and_the_rest_names_the_variable(hub, tmp_path):
    """The full profile starts, too: who sets HF_HUB_OFFLINE knows what lies in the cache."""
    make(hub, "ada/cached", "dataset")
    code = """if True:
        from course_utils.data import load_images
        from course_utils.runtime import start
        start()
        print(len(load_images("ada/cached")))
        try:
            load_images("ada/not-cached")
        except ConnectionError as error:
            print(error)
    """
    assert "12\n" in run(code, hub, tmp_path, COURSE_PROFILE="full")
    seen = len(hub.asked)
    printed = run(code, hub, tmp_path, COURSE_PROFILE="full", HF_HUB_OFFLINE="1").splitlines()
    assert printed[1] == "12" and "unset that variable" in printed[2] and len(printed) == 3
    assert len(hub.asked) == seen


@pytest.mark.slow
def test_the_space_is_uploaded_as_its_page_says_and_runs_from_a_download(hub, tmp_path):
    text = (ROOT / "unit2" / "demo" / "README.md").read_text(encoding="utf-8")
    upload = text[text.index("    from huggingface_hub import create_repo"):].split("\n\nTo ")[0]
    run(textwrap.dedent(upload).replace("YOUR_NAME", "ada"), hub, tmp_path)
    print_pictures = """if True:
        import runpy, huggingface_hub
        space = {"repo_id": "ada/guided-butterflies", "repo_type": "space"}
        huggingface_hub.snapshot_download(**space, local_dir="SPACE")
        app = runpy.run_path("SPACE/app.py")
        *_, pictures = app["draw_eight"]("#3258d7", 30, "", 0, 5, 0)
        print(app["MODELS"], len(pictures))
    """
    space = str(tmp_path / "space")              # files, as a Space has them; no cache's links
    models, count = run(print_pictures.replace("SPACE", space), hub, tmp_path).split()[-2:]
    assert models == f"{space}/models" and count == "8"


@pytest.mark.parametrize("name", ["{}", "local-dir:{}"])
def test_what_fails_with_a_folder_is_not_blamed_on_the_hub(name, tmp_path):
    with pytest.raises(KeyError), explained(name.format(tmp_path)):
        raise KeyError


@pytest.mark.parametrize("code, answers", [(200, True), (401, True), (429, True), (503, False)])
def test_a_hub_in_trouble_is_no_answer(code, answers, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.proxy)
    monkeypatch.setattr(hub, "fault", lambda scope: status(code))
    assert hub_answers() is answers


@pytest.mark.slow
def test_a_connection_cut_once_is_taken_up_again(hub, tmp_path):
    """The client asks for the rest of the file; nothing is said, nothing is lost."""
    make(hub, "ada/cut-once", "dataset")
    cuts = iter([cut(hub)])
    hub.fault = lambda scope: next(cuts, None) if scope["path"].startswith("/store") else None
    code = "from course_utils.data import load_images; print(len(load_images('ada/cut-once')))"
    assert run(code, hub, tmp_path).split()[-1] == "12"
    hub.fault = lambda scope: None
