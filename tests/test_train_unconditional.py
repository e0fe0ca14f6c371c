"""The training script: a pipeline comes out, mistakes end in one sentence, nothing is lost."""

import contextlib
import csv
import io
import os
import random
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import DDPMPipeline
from filelock import FileLock
from forked import Runs
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit1"))
import train_unconditional as script

from course_utils import training
from course_utils.data import load_images, to_pixels

TINY = ["--limit=16", "--batch_size=8", "--image_size=16", "--widths", "32", "32",
        "--sample_every=0", "--tracker=none", "--log_every=2"]


def losses(output):
    with (Path(output) / "losses.csv").open() as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def weights(output):
    return DDPMPipeline.from_pretrained(output).unet.state_dict()


def same(first, second):
    """Whether two runs have written the same losses and weights, bit for bit."""
    return losses(first) == losses(second) and all(
        torch.equal(weights(first)[name], weight) for name, weight in weights(second).items())


def fails(*options):
    """The one sentence with which a run of TINY ends; its exit status is 1."""
    with pytest.raises(SystemExit) as stop:
        script.main([*TINY, *options])
    assert isinstance(stop.value.code, str), "a text means exit status 1"
    assert "\n" not in stop.value.code
    return stop.value.code


# ---- what comes out ----------------------------------------------------------------------------

def test_trains_saves_and_reloads(tmp_path):
    output = tmp_path / "model"
    script.main([*TINY, "--steps=3", "--sample_every=2", "--tracker=tensorboard", "--evaluate=64",
                 "--evaluate_every=2", f"--output={output}"])
    pipeline = DDPMPipeline.from_pretrained(output)
    assert pipeline.unet.config.sample_size == 16
    assert pipeline(batch_size=1, num_inference_steps=2).images[0].size == (16, 16)
    for grid in ("samples/step-000002.png", "samples.png"):
        assert Image.open(output / grid).size == (8 * 18 - 2, 4 * 18 - 2)
    card = (output / "README.md").read_text()
    assert "`butterflies` (16 pictures) for 3 steps of 8 pictures" in card
    assert "(64 pictures)." in card
    assert "](losses.png)" in card and (output / "losses.png").exists()
    assert list(output.glob("logs/**/events*"))
    assert {path.name for path in output.iterdir()} == training.OURS - {".lock", "checkpoints"}
    assert not list(output.rglob("*.bin"))


def test_grey_digits_deeper_with_adamw(tmp_path):
    script.main([*TINY, "--source=digits", "--channels=1", "--layers=2", "--optimizer=adamw",
                 "--no-flip", "--steps=1", "--half", "--schedule=constant",
                 f"--output={tmp_path / 'a'}"])
    unet = DDPMPipeline.from_pretrained(tmp_path / "a").unet
    assert unet.config.in_channels == 1 and len(unet.down_blocks[0].resnets) == 2


def test_one_picture_is_learned(tmp_path):
    """The loss of a model that sees only grey pictures falls far below that of its first guess."""
    for i in range(16):
        Image.new("L", (16, 16), 128).save(tmp_path / f"{i}.png")
    script.main([*TINY, f"--source={tmp_path}", "--steps=40", "--batch_size=16",
                 "--checkpoint_every=0", f"--output={tmp_path / 'model'}"])
    found = list(losses(tmp_path / "model").values())
    assert len(found) == 40 and np.mean(found[-20:]) < 0.5 * np.mean(found[:3])


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_only_the_truth_has_no_loss(kind):
    """A model that knows the one picture x0 answers without error; one that says zero does not."""
    scheduler = script.make_scheduler()
    scheduler.register_to_config(prediction_type=kind)
    x0 = torch.full((64, 1, 4, 4), 0.5)
    t, eps = torch.arange(64) * 15, torch.randn(x0.shape)

    def knowing(xt, t):
        a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        eps = (xt - a.sqrt() * x0) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x0
        return SimpleNamespace(sample={"epsilon": eps, "sample": x0, "v_prediction": v}[kind])

    def zero(xt, t):
        return SimpleNamespace(sample=0 * xt)

    assert script.batch_loss(knowing, scheduler, x0, t, eps) < 1e-6
    assert script.batch_loss(zero, scheduler, x0, t, eps) > 0.2


# ---- what a step sees --------------------------------------------------------------------------

def draws(pictures, batch_size, process=0, processes=1):
    args = SimpleNamespace(source="p", batch_size=batch_size, seed=0, flip=True, buffer=5,
                           workers=2)
    return training.Draws(args, pictures, (1, 4, 4), lambda g: torch.rand(1, generator=g),
                          process, processes)


def take(found, count):
    return [batch for _, batch in zip(range(count), found, strict=False)]


def test_processes_and_passes_share_the_draws_of_one():
    """Two processes with half the batch, or two passes, see the pictures and noise of one."""
    pictures = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 4, 4)
    whole = take(draws(pictures, 4), 6)
    halves = [take(draws(pictures, 2, process, 2), 6) for process in (0, 1)]
    passes = take(draws(pictures, 2), 12)
    for name in ("x0", "t", "eps"):
        for step, batch in enumerate(whole):
            shared = torch.cat([half[step][name] for half in halves])
            passed = torch.cat([part[name] for part in passes[2 * step:2 * step + 2]])
            assert torch.equal(batch[name], shared) and torch.equal(batch[name], passed)
    seen = torch.cat([batch["x0"][:, 0, 0, 0] for batch in take(draws(pictures, 4), 5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)), "each once an epoch"
    assert not torch.equal(seen[:10], seen[10:])
    eps = torch.cat([batch["eps"] for batch in whole])
    assert len(eps.unique(dim=0)) == len(eps), "no two draws share their noise"


def shards(folder, count=3, rows=8):
    """Grey pictures with the values 0, 1, 2, … in Parquet files."""
    folder.mkdir()
    for i in range(count):
        images = [Image.new("L", (4, 4), i * rows + j) for j in range(rows)]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": images}, features).to_parquet(folder / f"{i}.parquet")
    return str(folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_shows_each_picture_once_an_epoch_and_goes_on_exactly(tmp_path, processes):
    args = SimpleNamespace(source=shards(tmp_path / "p"), evaluate=0, streaming=True, limit=None)
    stream, _ = training.read_pictures(args, 4, 1)
    assert stream.num_shards == 3
    found = [take(draws(stream, 4, process, processes), 12) for process in range(processes)]
    seen = [[int(x) for batch in part for x in batch["x0"][:, 0, 0, 0]] for part in found]
    share = [8 * len(range(3)[process::processes]) for process in range(processes)]
    first = [part[:n] for part, n in zip(seen, share, strict=True)]
    assert sorted(sum(first, [])) == list(range(24)), "shared out, nothing twice in an epoch"
    assert first[0] != seen[0][share[0]:2 * share[0]], "the next epoch is mixed anew"
    for stop in range(1, 11):
        rest = draws(stream, 4, 0, processes)
        rest.first, rest.state = stop, found[0][stop - 1]["state"]
        for batch, expected in zip(take(rest, 2), found[0][stop:], strict=False):
            assert all(torch.equal(batch[name], expected[name]) for name in ("x0", "t", "eps"))


def test_a_stream_leaves_out_what_it_cannot_read_and_ends_if_that_is_all(tmp_path):
    for i in range(4):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    args = SimpleNamespace(source=str(tmp_path), evaluate=0, streaming=True, limit=None)
    for broken in range(4):
        stream, _ = training.read_pictures(args, 4, 1)
        with warnings.catch_warnings(record=True) as warned:
            seen = {int(x) for batch in take(draws(stream, 4), 3) for x in batch["x0"][:, 0, 0, 0]}
        assert seen == set(range(broken, 4)) and bool(warned) == bool(broken)
        (tmp_path / f"{broken}.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(OSError, match="no readable picture"), pytest.warns(UserWarning):
        take(draws(training.read_pictures(args, 4, 1)[0], 4), 1)


@pytest.mark.parametrize("kind", ["pictures", "Parquet"])
def test_pictures_in_memory_are_those_of_the_notebooks_and_what_is_left_out_is_named(
        tmp_path, kind):
    if kind == "Parquet":
        folder = shards(tmp_path / "p")
        rows = [{"image": {"bytes": b"broken", "path": "b.png"}}, {"image": None}]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "p/3.parquet")
    else:
        folder = str(tmp_path)
        for i in range(24):
            Image.new("L", (4, 4), i).save(tmp_path / f"{i:02}.png")
        for name in ("b.png", "c.png"):
            (tmp_path / name).write_bytes(b"\x89PNG broken")
    with pytest.warns(UserWarning, match=r"Skipped 2 unreadable picture.s. in .*b\.png"):
        pictures = training.read_whole(folder, 8, 3)
    with pytest.warns(UserWarning):
        assert torch.equal(pictures, to_pixels(load_images(folder), 8, 3))


def png(value):
    stream = io.BytesIO()
    Image.new("L", (4, 4), value).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("columns, values", [
    ({"image": [{"bytes": png(1), "path": "a.png"}, {"bytes": png(2), "path": None}]}, [1, 2]),
    ({"image": [{"bytes": png(1), "path": None}, {"bytes": None, "path": None}]}, [1]),
    ({"img": [{"bytes": b"broken", "path": "b.png"}, {"bytes": png(2), "path": "c.png"}]}, [2]),
], ids=["a name that is another file's", "nothing", "another column, damaged"])
@pytest.mark.filterwarnings("ignore:Skipped")
def test_parquet_from_elsewhere_is_read_as_it_is(tmp_path, monkeypatch, columns, values):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (4, 4), 200).save("a.png")
    os.mkdir("set")
    name = next(iter(columns))
    features = datasets.Features({name: datasets.Image()})
    table = pyarrow.table(columns, features.arrow_schema)
    pyarrow.parquet.write_table(table, "set/0.parquet")
    whole = training.read_whole("set", 4, 1)
    assert whole[:, 0, 0, 0].tolist() == values
    more = datasets.Features({name: datasets.Image(), "text": datasets.Value("string")})
    other = pyarrow.table({name: [{"bytes": png(9), "path": None}], "text": ["nine"]},
                          more.arrow_schema)
    pyarrow.parquet.write_table(other, "set/1.parquet")
    assert training.read_whole("set", 4, 1)[:, 0, 0, 0].tolist() == [*values, 9]


def test_a_source_that_cannot_be_read_says_why_once(tmp_path):
    with pytest.raises(ValueError, match="^No pictures found in"):
        training.read_whole(str(tmp_path), 4, 1)
    shards(tmp_path / "p", count=1)
    (tmp_path / "p/0.parquet").rename(tmp_path / "p/test-0.parquet")
    with pytest.raises(ValueError, match="has no split 'train': choose test"):
        training.read_whole(str(tmp_path / "p"), 4, 1)
    with pytest.raises(ValueError):
        training.read_pictures(SimpleNamespace(source="~nobody/x", evaluate=0, streaming=False,
                                               limit=None), 4, 1)


def test_epochs_count_pictures(tmp_path, capsys):
    """Five pictures ten times are fifty draws: four steps of sixteen."""
    for i in range(5):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    script.main([*TINY, f"--source={tmp_path}", "--epochs=10", "--batch_size=16",
                 f"--output={tmp_path / 'model'}"])
    assert len(losses(tmp_path / "model")) == 4
    assert "10 epochs of 5 pictures: 4 steps of 16." in capsys.readouterr().out


# ---- mistakes ----------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, sentence", [
    (["--image_size=30"], "cannot be halved 3 times: choose a multiple of 8"),
    (["--widths", "32", "48"], "each must be a positive multiple of 32"),
    (["--widths", "32"], "give at least two levels"),
    (["--layers=-1"], "--layers -1 must be at least 1"),
    (["--evaluate=1"], "give 64 or more, or 0"),
    (["--evaluate_every=5"], "needs --evaluate"),
    (["--steps=0"], "--steps 0 must be at least 1"),
    (["--epochs=0"], "--epochs 0 must be at least 1"),
    (["--seed=-1"], "--seed -1 must be at least 0"),
    (["--learning_rate=nan"], "--learning_rate must be above 0"),
    (["--channels=2"], "invalid choice"),
    (["--streaming", "--source=p", "--epochs=2"], "give --steps instead"),
    (["--streaming"], "butterflies fit into memory"),
    (["--output="], "name the folder"),
    (["--tracker=wandb"], "is not installed: run pip install wandb"),
    (["--tracker=wandbb"], "invalid choice"),
    (["--push_to_hub=no/such/name"], "not of the form OWNER/NAME"),
])
def test_bad_arguments(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_finished_work_and_other_things_are_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    script.main([*TINY, "--steps=1", "--output=~/model"])
    before = (tmp_path / "model" / "losses.csv").read_text()
    assert "holds a finished model" in fails("--output=~/model")
    assert "is complete: there is nothing to resume" in fails("--output=~/model", "--resume")
    assert (tmp_path / "model" / "losses.csv").read_text() == before
    script.main([*TINY, "--steps=2", "--output=~/model", "--overwrite"])
    assert len(losses(tmp_path / "model")) == 2
    (tmp_path / "model" / ".DS_Store").touch()
    assert "holds a finished model" in fails("--output=~/model"), "a viewer's file is no obstacle"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my diary")
    for more in ([], ["--overwrite"]):
        assert "holds other things (README.md)" in fails(f"--output={tmp_path / 'mine'}", *more)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    (tmp_path / "file").touch()
    assert "writable folder" in fails(f"--output={tmp_path / 'file' / 'model'}")


def test_one_run_at_a_time_writes_to_a_folder(tmp_path):
    with FileLock(tmp_path / ".lock"):
        assert "Another run is writing" in fails(f"--output={tmp_path}")
    script.main([*TINY, "--steps=1", f"--output={tmp_path}"])


def test_sources_that_do_not_do(tmp_path):
    output = f"--output={tmp_path / 'o'}"
    assert "Unknown source" in fails("--source=no", output)
    for part in ("train", "test"):
        (tmp_path / "few" / part).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "few" / part / "1.png")
    sentence = fails(f"--source={tmp_path / 'few'}", output, "--evaluate=64")
    assert "has 1 unseen pictures: --evaluate needs 128" in sentence


# ---- interrupted runs --------------------------------------------------------------------------

def interrupted(output, monkeypatch, at=4, *options):
    """A run of 6 steps that stops after the checkpoint of step `at`."""
    real = training.write_checkpoint

    def stop(output, tensors, position):
        real(output, tensors, position)
        if position["step"] == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_checkpoint", stop)
    with pytest.raises(SystemExit) as end:
        script.main([*TINY, f"--output={output}", "--steps=6", "--checkpoint_every=2", *options])
    assert end.value.code == 130
    monkeypatch.setattr(training, "write_checkpoint", real)


def test_a_checkpoint_of_other_settings_or_pictures(tmp_path, monkeypatch):
    for i in range(6):
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "p" / f"{i}.png")
    options = [f"--source={tmp_path / 'p'}", f"--output={tmp_path / 'o'}", "--steps=6",
               "--checkpoint_every=2"]
    interrupted(tmp_path / "o", monkeypatch, 4, options[0])
    assert "add --resume to go on" in fails(*options)
    sentence = fails(*options, "--resume", "--learning_rate=0.5")
    assert "made with learning_rate 0.005, not 0.5" in sentence
    (tmp_path / "p" / "0.png").unlink()
    assert "made with pictures 6, digest" in fails(*options, "--resume")
    Image.new("RGB", (16, 16)).save(tmp_path / "p" / "0.png")
    script.main([*TINY, *options, "--resume"])
    assert len(losses(tmp_path / "o")) == 6


def test_a_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch, capsys):
    """A changed bit or a cut end: the run goes on from the one before, with the same result."""
    script.main([*TINY, "--steps=6", f"--output={tmp_path / 'whole'}"])
    interrupted(tmp_path / "o", monkeypatch)
    newest, older = training.checkpoints(tmp_path / "o")
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    script.main([*TINY, f"--output={tmp_path / 'o'}", "--steps=6", "--checkpoint_every=2",
                 "--resume"])
    assert f"{newest.name} is damaged: going back" in capsys.readouterr().out
    assert same(tmp_path / "o", tmp_path / "whole")

    interrupted(tmp_path / "cut", monkeypatch)
    for path in training.checkpoints(tmp_path / "cut"):
        path.write_bytes(path.read_bytes()[:1000])
    sentence = fails(f"--output={tmp_path / 'cut'}", "--steps=6", "--resume")
    assert "No whole checkpoint" in sentence and "--overwrite" in sentence


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch, 2)
    kept = [(path.name, path.read_bytes()) for path in training.checkpoints(tmp_path)]
    monkeypatch.setattr(training, "save_file", full)
    sentence = fails(f"--output={tmp_path}", "--steps=6", "--checkpoint_every=2", "--resume")
    assert "No space left" in sentence and "step-00000002 is whole" in sentence
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "checkpoints").iterdir()] == kept


def test_a_resume_that_dies_at_once_loses_no_line(tmp_path, monkeypatch):
    """The record is cut back to the checkpoint's step and never lies there empty."""
    script.main([*TINY, "--steps=6", f"--output={tmp_path / 'whole'}"])
    interrupted(tmp_path / "o", monkeypatch)
    resume = [*TINY, "--steps=6", "--checkpoint_every=2", f"--output={tmp_path / 'o'}", "--resume"]

    def stop(path, *_):
        path.open("w").close()
        full()

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(Path, "write_text", stop)
        patch.setattr(training.Run, "steps", full)
        script.main(resume)
    script.main(resume)
    assert same(tmp_path / "o", tmp_path / "whole")


def test_a_full_disk_spoils_a_grid_and_not_the_run(tmp_path, monkeypatch):
    real, calls = training.Run.write_losses, []

    def sometimes(run):
        calls.append(1)
        (full if len(calls) == 1 else real)(run)

    monkeypatch.setattr(training.Run, "write_losses", sometimes)
    grid = SimpleNamespace(save=full)
    monkeypatch.setattr(training, "Image", SimpleNamespace(fromarray=lambda _: grid))
    with pytest.warns(UserWarning) as warned:
        script.main([*TINY, "--steps=4", "--sample_every=2", f"--output={tmp_path}"])
    said = " ".join(str(warning.message) for warning in warned)
    assert "Could not write losses.csv" in said and "Could not write step-000002.png" in said
    assert list(losses(tmp_path)) == [1, 2, 3, 4] and (tmp_path / "model_index.json").exists()


def test_a_loss_that_is_not_a_number(tmp_path, monkeypatch, capsys):
    real, calls = script.batch_loss, []

    def broken(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(script, "batch_loss", broken)
    with pytest.raises(SystemExit) as stop:
        script.main([*TINY, f"--output={tmp_path}", "--steps=6", "--checkpoint_every=4"])
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "became nan at step 5: start again with" in said


@pytest.mark.parametrize("name, processes", [
    ("one_gpu", 1), ("several_gpus", 8), ("several_nodes", 16),
])
def test_the_launch_files_are_accelerates(name, processes):
    path = Path(script.__file__).parent / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.mixed_precision) == (processes, "bf16")


# ---- the Hub -----------------------------------------------------------------------------------

def test_the_hub_is_asked_before_the_first_step(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(training, "get_token", lambda: None)
        with pytest.raises(SystemExit):
            script.main([*TINY, "--push_to_hub=me/model"])
        assert "hf auth login" in capsys.readouterr().err
    monkeypatch.setattr(training, "get_token", lambda: "secret")
    monkeypatch.setattr(training, "create_repo", full)
    sentence = fails("--push_to_hub=me/model", f"--output={tmp_path / 'o'}")
    assert "Cannot write to me/model on the Hub" in sentence and "secret" not in sentence
    assert not (tmp_path / "o" / "losses.csv").exists()


def test_an_upload_that_fails_says_how_to_repeat_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(training, "get_token", lambda: "secret")
    monkeypatch.setattr(training, "create_repo", lambda name, exist_ok: calls.append(name))
    monkeypatch.setattr(training, "upload_folder", full)
    sentence = fails("--push_to_hub=me/model", "--steps=1", f"--output={tmp_path / 'o'}")
    assert f"hf upload me/model {tmp_path / 'o'} . --exclude" in sentence
    assert DDPMPipeline.from_pretrained(tmp_path / "o") and calls == ["me/model"]


# ---- several processes, signals, kill -9 -------------------------------------------------------

@pytest.fixture(scope="module")
def run():
    with Runs() as runs:
        yield runs


NAME = "train_unconditional"
FEW = [*TINY, "--log_every=5", "--checkpoint_every=3"]


@pytest.mark.slow
def test_two_processes_and_four_passes_are_one_batch(run, tmp_path):
    """Sums in another order move a loss by 1e-7; 50 AdamW steps of 1e-3 move weights by 5e-2."""
    options = [*TINY, "--optimizer=adamw", "--learning_rate=1e-3", "--steps=50", "--output"]
    for name, processes, more in (("one", 1, []), ("two", 2, ["--batch_size=4"]),
                                  ("passes", 1, ["--batch_size=2", "--accumulation=4"])):
        done = run(NAME, *options, tmp_path / name, *more, processes=processes)
        assert done["codes"] == [0] * processes, done["printed"]
    for name in ("two", "passes"):
        assert (tmp_path / name / "losses.csv").read_text().count("\n") == 51, "no line twice"
        np.testing.assert_allclose(list(losses(tmp_path / name).values()),
                                   list(losses(tmp_path / "one").values()), atol=1e-5)
        for key, weight in weights(tmp_path / "one").items():
            torch.testing.assert_close(weights(tmp_path / name)[key], weight, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Sixteen drawings in two Parquet files."""
    folder = tmp_path_factory.mktemp("parquet")
    for i in range(2):
        load_images("butterflies", limit=16).shard(2, i).select_columns("image").to_parquet(
            folder / f"{i}.parquet")
    return [f"--source={folder}", "--streaming", "--buffer=5"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("streamed", [False, True])
def test_killed_at_random_moments_is_the_same_run(run, parquet, tmp_path, processes, streamed):
    """kill -9 at five moments, and --resume each time: losses and weights are the same."""
    options = [*FEW, "--steps=40", *(parquet if streamed else []), "--output"]
    if streamed:
        options.remove("--limit=16")
    assert run(NAME, *options, tmp_path / "whole", processes=processes)["codes"] == [0] * processes
    moments, more, codes = random.Random(processes), [], []
    for _ in range(5):
        kill = (signal.SIGKILL, list(range(processes)), moments.uniform(0.2, 2))
        codes += run(NAME, *options, tmp_path / "killed", *more, processes=processes,
                     kill=kill)["codes"]
        if training.checkpoints(tmp_path / "killed"):
            more = ["--resume"]
    if not (tmp_path / "killed/model_index.json").exists():
        done = run(NAME, *options, tmp_path / "killed", *more, processes=processes)
        assert done["codes"] == [0] * processes, done["printed"]
    assert -signal.SIGKILL in codes and same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number, processes, code", [(signal.SIGINT, 1, 130),
                                                     (signal.SIGTERM, 2, 143)])
def test_a_signal_saves_and_says_how_to_go_on(run, tmp_path, number, processes, code):
    """It reaches the last process only; all end together."""
    options = [*TINY, "--steps=400", "--output", tmp_path]
    done = run(NAME, *options, processes=processes, kill=(number, [processes - 1], 1))
    assert done["codes"] == [code] * processes, done["printed"]
    assert "the same command with --resume goes on from there." in done["printed"][0]
    newest, = training.checkpoints(tmp_path)
    assert len(losses(tmp_path)) == int(newest.name[5:13]) < 400
    other = run(NAME, *options, "--resume", processes=3 - processes)
    assert other["codes"] == [1] * (3 - processes)
    assert f"was made with processes {processes}, not" in other["printed"][0]


@pytest.mark.slow
def test_a_lost_process_ends_the_others_in_one_sentence(run, tmp_path):
    done = run(NAME, *FEW, "--steps=400", "--output", tmp_path, processes=2,
               kill=(signal.SIGKILL, [1], 2))
    assert done["codes"] == [1, -signal.SIGKILL]
    assert "(another process of this run was lost). step-" in done["printed"][0]
    assert "Traceback" not in done["printed"][0] and training.checkpoints(tmp_path)


@pytest.mark.slow
def test_processes_need_not_have_a_whole_batch_but_a_shard(run, parquet, tmp_path):
    """24 pictures for two processes with batches of 16 once looped for ever."""
    done = run(NAME, *TINY, "--limit=24", "--batch_size=16", "--steps=2", "--output",
               tmp_path / "a", processes=2)
    assert done["codes"] == [0, 0], done["printed"]
    options = [option for option in TINY if not option.startswith("--limit")]
    done = run(NAME, *options, *parquet, "--steps=2", "--output", tmp_path / "b", processes=3)
    assert done["codes"] == [1, 1, 1] and "has 2 shards for 3 processes" in done["printed"][0]


@pytest.mark.slow
def test_what_the_launcher_says_holds(run, tmp_path):
    """Precision comes from it unless the script is told otherwise."""
    for name, options, expected in (("a", [], "bf16"), ("b", ["--mixed_precision=no"], "no")):
        run(NAME, *TINY, "--tracker=tensorboard", "--steps=1", *options, "--output",
            tmp_path / name, ACCELERATE_MIXED_PRECISION="bf16")
        settings, = (tmp_path / name).rglob("hparams.yml")
        assert f"mixed_precision: {expected}" in settings.read_text().replace("'", "")
    low, full_precision = (losses(tmp_path / name)[1] for name in "ab")
    assert 0 < abs(low - full_precision) < 0.02, "bfloat16 keeps 8 bits"
    done = run(NAME, *TINY, "--mixed_precision=fp16", "--output", tmp_path / "c")
    assert done["codes"] == [1] and "fp16 needs a GPU" in done["printed"][0]
