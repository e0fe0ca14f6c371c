"""The training script: a pipeline comes out, mistakes end in one sentence."""

import sys
from pathlib import Path

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


def test_loss_is_learned_on_one_picture(tmp_path):
    """The loss of a model that sees one grey picture falls far below that of saying zero."""
    Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    args = script.parse_args([*TINY, f"--source={tmp_path}"])
    torch.manual_seed(0)
    model, scheduler = script.build_model(args), script.make_scheduler()
    optimizer = script.Muon(model.named_parameters(), 5e-3)
    x0, losses = torch.zeros(8, 3, 16, 16), []
    for _ in range(40):
        losses.append(script.batch_loss(model, scheduler, x0))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


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
