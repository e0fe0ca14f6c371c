"""The training script: a pipeline comes out, mistakes end in one sentence."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit1"))
import train_unconditional as script

TINY = ["--limit=16", "--batch_size=8", "--image_size=16", "--widths", "32", "32"]


def test_trains_saves_and_reloads(tmp_path):
    output = tmp_path / "model"
    script.main([*TINY, "--steps=3", "--sample_every=2", f"--output={output}"])
    pipeline = DDPMPipeline.from_pretrained(output)
    assert pipeline.unet.config.sample_size == 16
    assert pipeline(batch_size=1, num_inference_steps=2).images[0].size == (16, 16)
    assert Image.open(output / "samples" / "step-000002.png").size == (8 * 18 - 2, 4 * 18 - 2)
    card = (output / "README.md").read_text()
    assert "`butterflies` (16 pictures) for 3 steps" in card
    assert not list(output.rglob("*.bin"))


def test_grey_digits_deeper_with_adamw(tmp_path):
    script.main([*TINY, "--source=digits", "--channels=1", "--layers=2", "--optimizer=adamw",
                 "--no-flip", "--steps=1", "--half", "--sample_every=0", f"--output={tmp_path}"])
    unet = DDPMPipeline.from_pretrained(tmp_path).unet
    assert unet.config.in_channels == 1 and len(unet.down_blocks[0].resnets) == 2


def test_one_picture_is_learned(tmp_path):
    """The loss of a model that sees only grey pictures falls far below that of its first guess."""
    for i in range(16):
        Image.new("L", (16, 16), 128).save(tmp_path / f"{i}.png")
    script.main([*TINY, f"--source={tmp_path}", "--steps=40", "--sample_every=0",
                 "--batch_size=16", "--checkpoint_every=0", f"--output={tmp_path / 'model'}"])
    losses = np.loadtxt(tmp_path / "model/losses.csv", delimiter=",", skiprows=1)[:, 1]
    assert len(losses) == 40 and losses[-20:].mean() < 0.5 * losses[:3].mean()


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_only_the_truth_has_no_loss(kind):
    """A model that knows the one picture x0 answers without error; one that says zero does not."""
    scheduler = script.make_scheduler()
    scheduler.register_to_config(prediction_type=kind)
    x0 = torch.full((64, 1, 4, 4), 0.5)

    def knowing(xt, t):
        a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        eps = (xt - a.sqrt() * x0) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x0
        return SimpleNamespace(sample={"epsilon": eps, "sample": x0, "v_prediction": v}[kind])

    assert script.batch_loss(knowing, scheduler, x0) < 1e-6
    assert script.batch_loss(lambda xt, t: SimpleNamespace(sample=0 * xt), scheduler, x0) > 0.2


@pytest.mark.parametrize("arguments, sentence", [
    (["--image_size=30"], "cannot be halved 3 times: choose a multiple of 8"),
    (["--widths", "32", "48"], "each must be a positive multiple of 32"),
    (["--widths", "32"], "give at least two levels"),
    (["--evaluate=63"], "give 64 or more, or 0"),
    (["--steps=0"], "must be at least 1"),
    (["--channels=2"], "invalid choice"),
])
def test_bad_arguments(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
