"""The fine-tuning script: it starts from a trained model, resumes exactly, and loses nothing."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit2"))
import finetune_model as script
import train_unconditional as training

FEW = ["--limit=16", "--batch_size=4", "--sample_every=0", "--tracker=none"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny pipeline of random weights for 16 x 16 pictures."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    args = training.parse_args(["--image_size=16", "--widths", "32", "32"])
    DDPMPipeline(training.build_model(args), training.make_scheduler()).save_pretrained(folder)
    return folder


def losses(output):
    with (Path(output) / "losses.csv").open() as file:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(file)}


def weights(output):
    return DDPMPipeline.from_pretrained(output).unet.state_dict()


def test_fine_tunes_at_the_given_size(base, tmp_path):
    """Sample grid, pipeline, card and TensorBoard log; the given size, not the base's."""
    output = tmp_path / "model"
    script.main([f"--base={base}", f"--output={output}", "--limit=8", "--batch_size=4",
                 "--image_size=24", "--steps=2", "--sample_every=2", "--evaluate=64"])
    assert Image.open(output / "samples" / "step-000002.png").size == (8 * 26 - 2, 4 * 26 - 2)
    assert DDPMPipeline.from_pretrained(output).unet.config.sample_size == 24
    card = (output / "README.md").read_text()
    assert f"from `{base}` on\n`flowers` (8 pictures) for 2 steps" in card
    assert "64 samples (DPM-Solver++, 25 steps, seed 0): " in card and "(64 pictures)." in card
    assert list(output.glob("logs/**/events*"))
    assert not list(output.rglob("*.bin")) and not (output / "checkpoints").exists()


def test_it_starts_from_the_base(base, tmp_path):
    """With a learning rate of almost nothing the base comes out again."""
    script.main([*FEW, f"--base={base}", f"--output={tmp_path}", "--steps=1",
                 "--learning_rate=1e-12"])
    for name, weight in weights(base).items():
        torch.testing.assert_close(weights(tmp_path)[name], weight)


def test_a_step_sees_all_its_passes(base, tmp_path, monkeypatch):
    """Two passes of 4 pictures move the weights as one of 8 does, where no noise differs."""
    monkeypatch.setattr(training, "batch_loss",
                        lambda model, _, x0: (model(x0, 9).sample - 1).square().mean())
    for size in (8, 4):
        script.main([f"--base={base}", f"--output={tmp_path / str(size)}", "--limit=8", "--no-flip",
                     "--epochs=2", f"--batch_size={size}", f"--accumulation={8 // size}",
                     "--sample_every=0", "--tracker=none", "--optimizer=adamw"])
        assert len(losses(tmp_path / str(size))) == 2
    whole, parts = weights(tmp_path / "8"), weights(tmp_path / "4")
    torch.testing.assert_close(whole, parts, atol=2e-5, rtol=0)   # of steps of about 2e-3


def test_killed_and_resumed_is_the_same_run(base, tmp_path):
    """kill -9 in the middle, then --resume: every later loss and the weights are the same."""
    options = [*FEW, f"--base={base}", "--steps=12", "--accumulation=3", "--checkpoint_every=5"]
    script.main([*options, f"--output={tmp_path / 'whole'}"])
    output = tmp_path / "killed"
    command = [sys.executable, script.__file__, *options, f"--output={output}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not training.newest_checkpoint(output):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    script.main([*options, f"--output={output}", "--resume"])
    assert losses(output) == losses(tmp_path / "whole") and len(losses(output)) == 12
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weights(output)[name], weight), name


TWO_RUNS = """
import sys
sys.path.insert(0, sys.argv[1])
import finetune_model as script, train_unconditional as training
training.Accelerator.end_training = lambda self: None    # it would end the process group
*options, folder = sys.argv[2:]
script.main([*options, f"--output={folder}/whole"])
save = training.save_checkpoint
def stop(*arguments):
    save(*arguments)
    raise KeyboardInterrupt
training.save_checkpoint = stop
try:
    script.main([*options, f"--output={folder}/stopped"])
except KeyboardInterrupt:
    training.save_checkpoint = save
script.main([*options, f"--output={folder}/stopped", "--resume"])
"""


@pytest.mark.slow
def test_two_processes_resume_exactly(base, tmp_path):
    """Two processes write each loss once, and go on from a checkpoint as if never stopped."""
    (tmp_path / "runs.py").write_text(TWO_RUNS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, tmp_path / "runs.py", Path(script.__file__).parent, *FEW, f"--base={base}",
         "--steps=6", "--checkpoint_every=4", tmp_path],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"}, capture_output=True, check=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    lines = (tmp_path / "stopped/losses.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", *"123456"]
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "stopped")[name], weight), name


def interrupted(base, output, monkeypatch, at=4):
    """A run of 6 steps that stops after the checkpoint of step `at`."""
    real = training.save_checkpoint

    def stop(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        script.main([*FEW, f"--base={base}", f"--output={output}", "--steps=6",
                     f"--checkpoint_every={at}"])
    monkeypatch.setattr(training, "save_checkpoint", real)


def fails(capsys, *options):
    """The one sentence with which the script ends; its exit status is 1."""
    with pytest.raises(SystemExit) as stop:
        script.main([*FEW, *options])
    assert isinstance(stop.value.code, str), "a text means exit status 1"
    assert "\n" not in stop.value.code
    return stop.value.code


def test_a_checkpoint_of_other_settings(base, tmp_path, monkeypatch, capsys):
    interrupted(base, tmp_path, monkeypatch)
    same = [f"--base={base}", f"--output={tmp_path}", "--checkpoint_every=4"]
    assert "add --resume" in fails(capsys, *same, "--steps=6")
    sentence = fails(capsys, *same, "--steps=6", "--resume", "--learning_rate=0.5")
    assert "made with --learning_rate 0.002, not 0.5" in sentence
    assert training.newest_checkpoint(tmp_path).name == "step-00000004"
    script.main([*FEW, *same, "--steps=6", "--resume"])
    assert len(losses(tmp_path)) == 6


def test_a_full_disk_keeps_the_checkpoint_before(base, tmp_path, monkeypatch, capsys):
    interrupted(base, tmp_path, monkeypatch, at=2)
    kept = {p.name: p.read_bytes() for p in training.newest_checkpoint(tmp_path).iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_file", full)
    sentence = fails(capsys, f"--base={base}", f"--output={tmp_path}", "--steps=6",
                     "--checkpoint_every=2", "--resume")
    assert "No space left" in sentence and "step-00000002 is whole" in sentence
    checkpoint = training.newest_checkpoint(tmp_path)
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == kept
    assert [p.name for p in checkpoint.parent.iterdir()] == ["step-00000002"]


def test_a_loss_that_is_not_a_number(base, tmp_path, monkeypatch, capsys):
    real, calls = training.batch_loss, []

    def broken(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(training, "batch_loss", broken)
    sentence = fails(capsys, f"--base={base}", f"--output={tmp_path}", "--steps=6",
                     "--checkpoint_every=4")
    assert "became nan at step 5" in sentence and "lower --learning_rate" in sentence
    assert training.newest_checkpoint(tmp_path).name == "step-00000004"


def test_bases_that_do_not_fit(base, tmp_path, capsys):
    out = f"--output={tmp_path / 'out'}"
    assert "does not exist" in fails(capsys, "--base=/nowhere/model", out)
    (tmp_path / "empty").mkdir()
    assert "Could not load" in fails(capsys, f"--base={tmp_path / 'empty'}", out)
    assert "multiple of 2" in fails(capsys, f"--base={base}", out, "--image_size=17")
    four = UNet2DModel(16, 4, 4, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",))
    DDPMPipeline(four, DDPMScheduler()).save_pretrained(tmp_path / "four")
    assert "4 channels in" in fails(capsys, f"--base={tmp_path / 'four'}", out)
    shutil.copytree(base, tmp_path / "pickled")
    weights = tmp_path / "pickled/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "safetensors" in fails(capsys, f"--base={tmp_path / 'pickled'}", out)


def test_no_pictures_and_no_place(base, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    same = f"--base={base}"
    sentence = fails(capsys, same, f"--source={tmp_path / 'empty'}", f"--output={tmp_path / 'o'}")
    assert "No pictures found" in sentence
    assert "Unknown source" in fails(capsys, same, "--source=no", f"--output={tmp_path / 'o'}")
    for part in ("train", "test"):
        (tmp_path / "few" / part).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "few" / part / "1.png")
    sentence = fails(capsys, same, f"--source={tmp_path / 'few'}", f"--output={tmp_path / 'o'}",
                     "--evaluate=64")
    assert "has 1 unseen pictures: --evaluate needs 128" in sentence
    assert "writable folder" in fails(capsys, same, f"--output={tmp_path / 'file' / 'model'}")
    sentence = fails(capsys, same, f"--output={tmp_path / 'o'}", "--tracker=nothing")
    assert "--tracker nothing" in sentence


def test_grey_pictures(tmp_path):
    """The channels are the base model's."""
    args = training.parse_args(["--image_size=16", "--widths", "32", "32", "--channels=1"])
    DDPMPipeline(training.build_model(args), DDPMScheduler()).save_pretrained(tmp_path / "grey")
    script.main([*FEW, f"--base={tmp_path / 'grey'}", "--source=digits", "--steps=1",
                 "--schedule=constant", f"--output={tmp_path / 'out'}"])
    assert DDPMPipeline.from_pretrained(tmp_path / "out").unet.config.in_channels == 1


def test_push_to_hub(base, tmp_path, monkeypatch, capsys):
    """The whole folder is uploaded, subfolders kept; without a token nothing starts."""
    calls = {}
    monkeypatch.setattr(training, "get_token", lambda: None)
    with pytest.raises(SystemExit):
        script.main([*FEW, "--push_to_hub=me/flowers"])
    assert "hf auth login" in capsys.readouterr().err
    monkeypatch.setattr(training, "get_token", lambda: "secret")
    monkeypatch.setattr(training, "create_repo", lambda name, exist_ok: calls.update(repo=name))
    monkeypatch.setattr(training, "upload_folder", lambda **options: calls.update(options))
    script.main([*FEW, f"--base={base}", "--steps=1", f"--output={tmp_path}",
                 "--push_to_hub=me/flowers"])
    assert calls["repo"] == calls["repo_id"] == "me/flowers"
    assert (Path(calls["folder_path"]) / "unet" / "config.json").exists()
    assert "secret" not in capsys.readouterr().out


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if line.startswith("  --")]) >= 23
    for name in ("base", "source", "accumulation", "schedule", "optimizer", "resume", "tracker"):
        assert f"--{name}" in shown
