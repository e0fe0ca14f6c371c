"""The formulas of unit1/01: each check in the notebook fails when its formula is broken."""

from functools import partial
from types import SimpleNamespace

import nbformat
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from run_notebooks import ROOT, source_with

NOTEBOOK = nbformat.read(ROOT / "unit1" / "01_introduction_to_diffusers.ipynb", as_version=4)
cell = partial(source_with, notebook=NOTEBOOK)


@pytest.fixture
def names():
    """What the cells under test expect to find, with small random pictures."""
    torch.manual_seed(0)
    space = {"torch": torch, "DDPMScheduler": DDPMScheduler, "UNet2DModel": UNet2DModel,
             "batch": torch.rand(8, 3, 8, 8) * 2 - 1}
    exec(cell("def add_noise"), space)
    return space


def run_broken(source, right, wrong, space):
    assert right in source
    exec(source, dict(space))                                # as it stands it passes
    exec(source.replace(right, wrong), space)


def test_variance_in_place_of_the_deviation_is_caught(names):
    source = cell("def add_noise") + "\n" + cell("add_noise equals")
    with pytest.raises(AssertionError):
        run_broken(source, "(1 - a).sqrt() * eps", "(1 - a) * eps", names)


@pytest.mark.parametrize("right, wrong", [
    ("beta.sqrt() * torch.randn", "beta * torch.randn"),     # "noise scaled by beta"
    ("(1 - beta).sqrt() * x", "(1 - beta) * x"),
    ("1 - alpha_bar[step]", "(1 - alpha_bar[step]).sqrt()"),
    ("alpha_bar[step].sqrt() * start_value", "alpha_bar[-1].sqrt() * start_value"),
])
def test_many_steps_equal_one_jump_only_with_the_right_formula(names, right, wrong):
    with pytest.raises(AssertionError):
        run_broken(cell("walks, start_value"), right, wrong, names)


@pytest.mark.parametrize("right, wrong", [
    ("a.sqrt() * eps - (1 - a).sqrt() * x0", "a.sqrt() * eps + (1 - a).sqrt() * x0"),
    ("a.sqrt() * eps - (1 - a).sqrt() * x0", "(1 - a).sqrt() * eps - a.sqrt() * x0"),
])
def test_wrong_v_is_caught(names, right, wrong):
    names |= {"x0": names["batch"], "eps": torch.randn(8, 3, 8, 8),
              "t_strip": torch.linspace(0, 999, 8).long()}
    with pytest.raises(AssertionError):
        run_broken(cell("def get_target"), right, wrong, names)


def test_image_size_that_cannot_be_halved(names):
    exec(cell("def build_unet").split("\n\n\n")[0], names)
    with pytest.raises(ValueError, match="image_size=30 cannot be halved 3 times: use a multiple"):
        names["build_unet"](30, (32, 32, 64, 128))


def test_save_folder_that_cannot_be_written(names, tmp_path, monkeypatch):
    from pathlib import Path

    from diffusers import DDPMPipeline

    monkeypatch.chdir(tmp_path)
    Path("output").write_text("a file is in the way")
    unet = UNet2DModel(sample_size=8, block_out_channels=(32,), down_block_types=["DownBlock2D"],
                       up_block_types=["UpBlock2D"])
    names |= {"Path": Path, "my_pipeline": DDPMPipeline(unet, DDPMScheduler())}
    with pytest.raises(OSError, match="Cannot save to output/my-butterflies .*choose a folder"):
        exec(cell("save_pretrained(my_folder)"), names)


def test_targets_split_again_into_picture_and_noise(names):
    """The solution of exercise 2 inverts get_target for every timestep."""
    space = dict(names)
    x0, eps = names["batch"], torch.randn(8, 3, 8, 8)
    t = torch.tensor([0, 1, 100, 300, 500, 700, 900, 999])
    a = names["alpha_bar"][t].view(-1, 1, 1, 1)
    space |= {"x0": x0, "eps": eps, "t_strip": t}
    exec(cell("def get_target"), space)
    v = space["get_target"](names["scheduler"], x0, eps, t)
    xt = names["add_noise"](x0, t, eps, names["alpha_bar"])
    torch.testing.assert_close(a.sqrt() * xt - (1 - a).sqrt() * v, x0)
    torch.testing.assert_close((1 - a).sqrt() * xt + a.sqrt() * v, eps)


@pytest.mark.parametrize("token, printed", [(None, "Skipped, no token"), ("x", "shared: me/my-")])
def test_sharing_needs_a_token_and_uploads_pipeline_and_card(monkeypatch, capsys, token, printed):
    import huggingface_hub

    pushed = []

    class Pipeline:
        def push_to_hub(self, repository):
            pushed.append(("pipeline", repository))

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub, "whoami", lambda: {"name": "me"})
    monkeypatch.setattr(huggingface_hub.ModelCard, "push_to_hub",
                        lambda self, repository: pushed.append((self.data.license, repository)))
    config = SimpleNamespace(image_size=32, source="butterflies", train_steps=5)
    exec(cell("push_to_hub(repository)"), {"my_pipeline": Pipeline(), "config": config, "n": 2,
                                           "fd_generated": 3.0, "fd_floor": 1.0})
    assert printed in capsys.readouterr().out
    repository = "me/my-butterflies"
    assert pushed == ([("pipeline", repository), ("apache-2.0", repository)] if token else [])
