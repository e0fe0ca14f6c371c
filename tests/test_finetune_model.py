"""The fine-tuning script: it starts from a trained model; the run around it is the other's."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit2"))
import finetune_model as script
import train_unconditional

FEW = ["--limit=16", "--batch_size=4", "--sample_every=0", "--tracker=none"]


def tiny(folder, scheduler, *options):
    """A pipeline of random weights for 16 x 16 pictures, saved in `folder`."""
    torch.manual_seed(0)
    args = train_unconditional.parse_args(["--image_size=16", "--widths", "32", "32", *options])
    DDPMPipeline(train_unconditional.build_model(args), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"), train_unconditional.make_scheduler())


def weights(output):
    return DDPMPipeline.from_pretrained(output).unet.state_dict()


def test_fine_tunes_at_the_given_size(base, tmp_path):
    """Grid, pipeline and card; the given size, not the base's."""
    output = tmp_path / "model"
    script.main([*FEW, f"--base={base}", f"--output={output}", "--image_size=24", "--steps=2",
                 "--sample_every=9"])
    assert Image.open(output / "samples.png").size == (8 * 26 - 2, 4 * 26 - 2)
    assert DDPMPipeline.from_pretrained(output).unet.config.sample_size == 24
    card = (output / "README.md").read_text()
    assert f"fine-tuned\nfrom `{base}` on\n`flowers` (16 pictures) for 2 steps of 4 " in card


def test_it_starts_from_the_base(base, tmp_path):
    """With a learning rate of almost nothing the base comes out again."""
    script.main([*FEW, f"--base={base}", f"--output={tmp_path}", "--steps=1",
                 "--learning_rate=1e-12"])
    for name, weight in weights(base).items():
        torch.testing.assert_close(weights(tmp_path)[name], weight)


def test_grey_pictures_and_a_model_that_predicts_noise(tmp_path):
    """Channels and kind of prediction are the base model's."""
    grey = tiny(tmp_path / "grey", DDPMScheduler(), "--channels=1")
    script.main([*FEW, f"--base={grey}", "--source=digits", "--steps=1",
                 f"--output={tmp_path / 'out'}"])
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.unet.config.in_channels == 1
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def fails(*options):
    """The one sentence with which the script ends; its exit status is 1."""
    with pytest.raises(SystemExit) as stop:
        script.main([*FEW, *options])
    assert isinstance(stop.value.code, str), "a text means exit status 1"
    assert "\n" not in stop.value.code
    return stop.value.code


def test_bases_that_do_not_fit(base, tmp_path):
    out = f"--output={tmp_path / 'out'}"
    assert "does not exist" in fails("--base=/nowhere/model", out)
    (tmp_path / "empty").mkdir()
    assert "Could not load" in fails(f"--base={tmp_path / 'empty'}", out)
    assert "multiple of 2" in fails(f"--base={base}", out, "--image_size=17")
    four = UNet2DModel(16, 4, 4, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",))
    DDPMPipeline(four, DDPMScheduler()).save_pretrained(tmp_path / "four")
    assert "4 channels in" in fails(f"--base={tmp_path / 'four'}", out)
    shutil.copytree(base, tmp_path / "pickled")
    found = tmp_path / "pickled/unet/diffusion_pytorch_model.safetensors"
    found.rename(found.with_suffix(".bin"))
    assert "safetensors" in fails(f"--base={tmp_path / 'pickled'}", out)
    assert not (tmp_path / "out").exists()


def test_the_base_is_never_the_output(base, capsys):
    before = weights(base)
    with pytest.raises(SystemExit):
        script.main([*FEW, f"--base={base}", f"--output={base}/../{base.name}", "--overwrite"])
    assert "is the base model itself" in capsys.readouterr().err
    assert all(torch.equal(weights(base)[name], weight) for name, weight in before.items())


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    shown = capsys.readouterr().out
    for name in ("base", "source", "accumulation", "schedule", "optimizer", "resume", "tracker",
                 "streaming", "overwrite"):
        assert f"--{name}" in shown
