"""The demo: the notebook's guidance, every request answered, seen in a real browser."""

import ast
import io
import os
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid

import httpx
import nbformat
import numpy as np
import pytest
import torch
import yaml
from gradio_client import Client
from gradio_client.exceptions import AppError
from packaging.requirements import Requirement
from PIL import Image
from run_notebooks import ROOT, source_with

DEMO = ROOT / "unit2" / "demo"
GOOD = {"colour": "#3258d7", "colour_scale": 30, "prompt": "", "prompt_scale": 0, "steps": 5,
        "seed": 0}


def test_the_space_is_complete():
    """The front matter names the file, and a version of Gradio that the course allows."""
    _, front, text = (DEMO / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    front, course = yaml.safe_load(front), (ROOT / "requirements.txt").read_text().splitlines()
    assert front["sdk"] == "gradio" and (DEMO / front["app_file"]).exists()
    allowed = next(Requirement(line) for line in course if line.startswith("gradio"))
    assert allowed.specifier.contains(front["sdk_version"])
    wanted = (DEMO / "requirements.txt").read_text().splitlines()
    assert all(any(line.startswith(f"{name}>=") for line in course)
               for name in wanted if not name.startswith("#"))
    assert "upload_folder" in text


@pytest.fixture(scope="module")
def app():
    sys.path.insert(0, str(DEMO))
    import app
    yield app
    sys.path.remove(str(DEMO))


def test_it_imports_no_notebook_and_is_not_shared():
    source = (DEMO / "app.py").read_text(encoding="utf-8")
    assert "ipynb" not in source and "share=False" in source


def test_it_guides_as_the_notebook_does(app):
    """The same noise, colour and prompt, drawn by the page's functions, are the same pictures."""
    page = {**vars(app)}
    for name in ("sample", "make_noise", "guess_from", "answer_from", "guess_and_gradient",
                 "steered", "wing_mask", "colour_distance", "clip_input", "embed_images",
                 "prompt_loss", "predict_with"):
        cell = source_with(f"def {name}(", nbformat.read(
            ROOT / "unit2" / "01_finetuning_and_guidance.ipynb", as_version=4))
        function = next(node for node in ast.parse(cell).body
                        if isinstance(node, ast.FunctionDef) and node.name == name)
        exec("from torchvision.transforms import functional as TF\n" + ast.unparse(function), page)
    ddim = app.DDIMScheduler.from_config(app.pipeline.scheduler.config)
    blue, target = torch.tensor([50, 88, 215]) / 127.5 - 1, app.embed("a butterfly with spots")

    def loss_of(images):
        return (100 * page["colour_distance"](images, blue)
                + 50 * page["prompt_loss"](app.clip, target)(images))

    lead = page["steered"](page["predict_with"](app.unet), ddim, loss_of, 1.0)
    expected = page["sample"](lead, page["make_noise"](8, (3, 32, 32), 0), ddim, 5)
    *_, drawn = app.draw_eight("#3258d7", 100, "a butterfly with spots", 50, 5, 0)
    for picture, wanted in zip(drawn, expected, strict=True):
        found = np.asarray(picture.resize((32, 32), Image.Resampling.NEAREST)) / 127.5 - 1
        assert np.abs(found - wanted.permute(1, 2, 0).numpy()).max() < 0.02


def test_it_refuses_what_the_notebook_sends(app, monkeypatch, capsys):
    cell = source_with('public["draw_eight"]', nbformat.read(
        ROOT / "unit2" / "01_finetuning_and_guidance.ipynb", as_version=4))
    monkeypatch.setattr("runpy.run_path", lambda path: vars(app))
    exec(cell, {"runpy": runpy, "course": ROOT, "gr": app.gr})
    assert [line[:9] for line in capsys.readouterr().out.splitlines()] == 3 * ["refused: "]


def test_the_picture_is_seen_forming(app):
    """Each preview comes nearer to the last one, which is the picture."""
    *previews, last = ([np.asarray(picture, float) for picture in pictures]
                       for pictures in app.draw_eight("#3258d7", 30, "", 0, 12, 0))
    gaps = [np.abs(np.subtract(preview, last)).mean() for preview in previews]
    assert len(gaps) == 3 and gaps == sorted(gaps, reverse=True) and gaps[-1] > 1


@pytest.mark.parametrize("text, rgb", [
    ("#fff", (255, 255, 255)), ("#3258d7", (50, 88, 215)), ("3258D7", (50, 88, 215)),
    ("rgb(1, 2, 3)", (1, 2, 3)), ("rgba(12.5, 0, 255.0, 0.5)", (12.5, 0, 255)),
])
def test_colours(app, text, rgb):
    found = (app.parse_colour(text).flatten() + 1) * 127.5
    assert found.tolist() == pytest.approx(rgb, abs=1e-3)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The demo as a process of its own on a free port: (address, its folder)."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1",
                   "GRADIO_TEMP_DIR": str(folder / "t"), "GRADIO_ANALYTICS_ENABLED": "False"}
    environment.pop("DEMO_MODELS", None)
    address = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, DEMO / "app.py"], cwd=folder, env=environment,
                                   stdout=log, stderr=log)
    for _ in range(240):
        try:
            httpx.get(address, timeout=5)
            break
        except httpx.TransportError:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
    yield address, folder
    process.terminate()
    process.wait(20)


@pytest.fixture
def client(server):
    client = Client(server[0], verbose=False)
    yield client
    client.close()


def pictures(answer):
    return [Image.open(item["image"]).convert("RGB") for item in answer]


@pytest.mark.slow
def test_a_request_draws_eight_pictures_and_a_seed_repeats_them(client):
    first, second = (pictures(client.predict(**GOOD, api_name="/draw")) for _ in range(2))
    assert len(first) == 8 and first[0].size == (256, 256)
    assert first[0].tobytes() == second[0].tobytes() != first[1].tobytes()


@pytest.mark.slow
def test_guidance_changes_the_wings(client):
    """A red target makes the wings redder than a blue one does, from the same noise."""
    def redness(colour):
        answer = pictures(client.predict(**{**GOOD, "colour": colour, "colour_scale": 100,
                                            "steps": 10}, api_name="/draw"))
        r, _, b = answer[0].getpixel((77, 102))
        return r - b

    assert redness("#d02020") > redness("#2020d0") + 100


@pytest.mark.slow
@pytest.mark.parametrize("name, value, words", [
    ("colour", "green-ish", "is not a colour"), ("colour", "rgb(300, 0, 0)", "is not a colour"),
    ("colour", None, "is not a colour"), ("colour", {"path": "/etc/hostname"}, "is not a colour"),
    ("prompt", "blue " * 100, "at most 200"), ("colour_scale", 1e9, "from 0 to 500"),
    ("prompt_scale", -1, "from 0 to 500"),
    ("steps", 0, "from 5 to 50"), ("steps", "many", "from 5"), ("steps", None, "from 5"),
    ("seed", -5, "from 0 to"), ("seed", "x", "from 0"), ("seed", "inf", "from 0"),
])
def test_bad_input_ends_in_one_sentence_and_the_next_request_works(client, name, value, words):
    with pytest.raises(AppError) as error:
        client.predict(**{**GOOD, name: value}, api_name="/draw")
    sentence = str(error.value)
    assert words in sentence and 10 < len(sentence) < 300 and "Traceback" not in sentence
    assert len(client.predict(**GOOD, api_name="/draw")) == 8


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["", "   ", "파란 나비", "青い蝶 🦋", "/etc/hostname", "<b>"])
def test_any_short_prompt_draws(client, prompt):
    answer = client.predict(**{**GOOD, "prompt": prompt, "prompt_scale": 100}, api_name="/draw")
    assert len(pictures(answer)) == 8


def visit(address, until, **controls):
    """Ask as a browser does, and leave when the message `until` comes."""
    session = {"session_hash": uuid.uuid4().hex}
    request = {"data": [*{**GOOD, **controls}.values()], "fn_index": 0, **session}
    httpx.post(f"{address}/gradio_api/queue/join", json=request).raise_for_status()
    with httpx.stream("GET", f"{address}/gradio_api/queue/data", params=session, timeout=60) as sse:
        return next(line for line in sse.iter_lines() if f'"msg":"{until}"' in line)


@pytest.mark.slow
def test_two_users_at_once_and_one_who_leaves(server, client):
    visit(server[0], "process_generating", steps=50)         # leaves in the middle
    answers = {}

    def ask(seed):
        mine = Client(server[0], verbose=False)
        answers[seed] = mine.predict(**{**GOOD, "seed": seed}, api_name="/draw")
        mine.close()

    users = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2)]
    for user in users:
        user.start()
    for user in users:
        user.join(120)
    assert sorted(answers) == [1, 2] and all(len(answer) == 8 for answer in answers.values())
    assert pictures(answers[1])[0].tobytes() != pictures(answers[2])[0].tobytes()
    assert pictures(client.predict(**{**GOOD, "seed": 1}, api_name="/draw"))[0].tobytes() == \
        pictures(answers[1])[0].tobytes()


@pytest.mark.slow
def test_who_leaves_holds_nobody_up(server):
    """Five drawings of 50 steps whose visitors leave, and the next, take less than one of them."""
    begun = time.monotonic()
    visit(server[0], "process_completed")
    five_steps = time.monotonic() - begun
    for _ in range(5):
        visit(server[0], "process_starts", steps=50)
    left = time.monotonic()
    visit(server[0], "process_completed")
    print(f"5 steps alone {five_steps:.1f} s, after 5 who left {time.monotonic() - left:.1f} s")
    assert time.monotonic() - begun < 10 * five_steps


@pytest.mark.slow
def test_a_request_without_values_gets_a_sentence_or_the_usual_ones(server, client):
    post = f"{server[0]}/gradio_api/call/draw"
    event = httpx.post(post, json={"data": []}).json()["event_id"]
    assert "0 values: give Colour of the wings, " in httpx.get(f"{post}/{event}", timeout=60).text
    assert len(client.predict(api_name="/draw")) == 8


@pytest.mark.slow
def test_nobody_fills_the_disk(server, app, monkeypatch, tmp_path):
    """Uploads are refused, and pictures deleted after a while."""
    big = httpx.post(f"{server[0]}/gradio_api/upload", files={"files": 2000 * b"x"})
    assert big.status_code == 413
    monkeypatch.setattr(app, "HOUR", 1)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    demo = app.build_demo()
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True)
    visit(address.rstrip("/"), "process_completed")
    assert list(tmp_path.rglob("*.png"))
    for _ in range(100):
        if not list(tmp_path.rglob("*.png")):
            break
        time.sleep(0.1)
    assert not list(tmp_path.rglob("*.png"))
    demo.close()


@pytest.mark.slow
def test_it_serves_no_file_and_writes_only_into_its_temporary_folder(server, client):
    address, folder = server
    client.predict(**GOOD, api_name="/draw")
    for path in ("/etc/hostname", str(DEMO / "app.py"), str(folder / "log"), "../../etc/hostname"):
        assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)
    assert sorted(path.name for path in folder.iterdir()) in (["log", "t"], [".gradio", "log", "t"])
    assert {path.name for path in DEMO.iterdir()} - {"__pycache__"} == \
        {"README.md", "app.py", "requirements.txt"}


@pytest.mark.slow
def test_in_a_browser(server):
    """A visitor sets a colour, presses the button and sees pictures, first forming, then done."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(server[0])
        page.locator(".block", has_text="Colour of the wings").locator("button").first.click()
        page.locator("input[type=text]").first.fill("#2846d0")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Guided butterflies").click()   # closes the picker
        page.get_by_label("number input for Steps").fill("8")
        page.get_by_label("number input for Colour scale").fill("100")
        page.get_by_role("button", name="Draw").click()
        picture = page.locator(".thumbnail-item img").nth(5)
        picture.wait_for(timeout=120_000)
        forming = picture.get_attribute("src")
        page.wait_for_function("!document.querySelector('.generating')")
        assert picture.get_attribute("src") != forming
        page.wait_for_function("image => image.complete && image.naturalWidth > 0",
                               arg=picture.element_handle())
        shot = Image.open(io.BytesIO(picture.screenshot())).convert("RGB")
        if "SCREENSHOT" in os.environ:
            page.screenshot(path=os.environ["SCREENSHOT"])
        browser.close()
    colours = shot.getcolors(shot.width * shot.height)
    assert len(colours) > 20, "a drawn picture, not an empty frame"
    red, green, blue = shot.getpixel((int(shot.width * 0.3), int(shot.height * 0.4)))
    assert blue > max(red, green) + 30, "the wing has the colour that was set"
