"""The formulas of unit2/01: each check in the notebook fails when its formula is broken."""

import copy
from functools import partial
from types import SimpleNamespace

import nbformat
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from run_notebooks import ROOT, source_with
from tqdm.auto import tqdm

NOTEBOOK = nbformat.read(ROOT / "unit2" / "01_finetuning_and_guidance.ipynb", as_version=4)
cell = partial(source_with, notebook=NOTEBOOK)


@pytest.fixture
def space():
    """What the cells under test expect to find, with a tiny model."""
    torch.manual_seed(0)
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=8)
    unet.conv_out.weight.data *= 20             # so that the way through the model matters
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                              timestep_spacing="trailing")
    names = {
        "torch": torch, "F": F, "copy": copy, "tqdm": tqdm, "image_size": 8, "T": 1000,
        "device": torch.device("cpu"), "unet": unet.eval().requires_grad_(False),
        "scheduler": scheduler, "alpha_bar": scheduler.alphas_cumprod,
        "new_images": torch.randn(16, 3, 8, 8).clamp(-1, 1),
        "blue": torch.tensor([-0.6, -0.3, 0.7])}
    for text in ("def sample(", "def diffusion_loss", "def predict_x0", "def guided_sample",
                 "def squared_distance"):
        exec(cell(text), names)
    return names


def run_broken(space, place, right, wrong, check):
    """Run the check with the formula as it stands, then with the broken one."""
    source = cell(place)
    assert right in source, right
    exec(cell(check), dict(space))
    exec(source.replace(right, wrong), space)
    exec(cell(check), space)


@pytest.mark.parametrize("right, wrong", [
    ("loss * len(part) / len(x0)", "loss"),                            # never divided
    ("loss * len(part) / len(x0)", "loss * micro_batch / len(x0)"),    # small last part too heavy
    ("eps[part], t[part]", "eps[:len(part)], t[:len(part)]"),
])
def test_wrong_accumulation_is_caught(space, right, wrong):
    exec(cell("def gradient_of"), space)
    with pytest.raises(AssertionError):
        run_broken(space, "def accumulate_gradients", right, wrong, "def gradient_of")


CHECK = "the clean picture, both gradients and the sampler have passed"


@pytest.mark.parametrize("place, right, wrong", [
    ("def predict_x0", "a.sqrt() * xt - (1 - a).sqrt()", "a.sqrt() * xt + (1 - a).sqrt()"),
    ("def predict_x0", "a.sqrt() * xt - (1 - a).sqrt()", "a * xt - (1 - a)"),
    ("def predict_x0", "alphas_cumprod.to(xt.device)[t]", "alphas_cumprod.to(xt.device)[t // 50]"),
    ("def predict_x0", "torch.autograd.grad(loss_of(x0_hat).sum(), xt)",
     "torch.autograd.grad(loss_of(x0_hat).mean(), xt)"),
    ("def predict_x0", "torch.set_grad_enabled(through_model)", "torch.no_grad()"),
    ("def guided_sample", "x - scale *", "x - (scale + 1) *"),
])
def test_wrong_guidance_is_caught(space, place, right, wrong):
    with pytest.raises(AssertionError):
        run_broken(space, place, right, wrong, CHECK)


def test_strength_of_guidance_belongs_to_the_timestep(space):
    """One guided step differs from a plain one by scale * sqrt(1 - alpha_bar_t) * gradient."""
    guided, gradient = space["guided_sample"], space["loss_gradient"]
    unet, scheduler, a = space["unet"], space["scheduler"], space["alpha_bar"]
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    steps, scale = 5, 0.01
    loss = space["squared_distance"]
    scheduler.set_timesteps(steps)
    x, last = noise, scheduler.timesteps[-1]
    for t in scheduler.timesteps:
        v, slope = gradient(unet, scheduler, x, t, loss, True)
        x = scheduler.step(v, t, x).prev_sample - scale * (1 - a[t]).sqrt() * slope
    assert (1 - a[last]).sqrt() > 5 * (1 - a[len(scheduler.timesteps) - 1]).sqrt()
    torch.testing.assert_close(guided(unet, scheduler, noise, steps, loss, scale), x.clamp(-1, 1))


def test_pictures_of_a_batch_do_not_disturb_each_other(space):
    """A picture is guided in the same way alone and in a batch."""
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = lambda x: space["guided_sample"](  # noqa: E731
        space["unet"], space["scheduler"], x, 4, space["squared_distance"], 5.0)
    torch.testing.assert_close(draw(noise)[1:2], draw(noise[1:2]), rtol=1e-4, atol=1e-4)


def test_every_picture_is_trained_on_once_in_an_epoch(space):
    """The last, smaller batch of an epoch comes too."""
    exec(cell("def batches"), space)
    stream = space["batches"](10, 4, torch.Generator().manual_seed(0))
    epoch = [next(stream) for _ in range(3)]
    assert [len(rows) for rows in epoch] == [4, 4, 2]
    assert sorted(torch.cat(epoch).tolist()) == list(range(10))


def test_an_average_moves_by_the_decay(space):
    exec(cell("def average_weights"), space)
    ones, zeros = (torch.nn.Linear(2, 2) for _ in range(2))
    for model, value in ((ones, 1.0), (zeros, 0.0)):
        for weight in model.parameters():
            torch.nn.init.constant_(weight, value)
    space["average_weights"](ones.requires_grad_(False), zeros, 0.9)
    assert torch.allclose(ones.weight, torch.tensor(0.9))


def test_clip_input_of_another_size_and_range(space):
    """Pictures are resized and normalised as the CLIP model wants them."""
    exec(cell("def clip_input").split("def clip_input")[1].join(["def clip_input", ""])
         .split("def embed_images")[0], space)
    clip = SimpleNamespace(visual=SimpleNamespace(
        image_size=(4, 4), image_mean=(0.0, 0.5, 0.25), image_std=(1.0, 0.5, 0.25)))
    found = space["clip_input"](clip, torch.ones(2, 3, 8, 8))
    assert found.shape == (2, 3, 4, 4)
    assert found[0, :, 0, 0].tolist() == pytest.approx([1.0, 1.0, 3.0])
