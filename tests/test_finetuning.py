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

from course_utils.drawings import COLOURS

NOTEBOOK = nbformat.read(ROOT / "unit2" / "01_finetuning_and_guidance.ipynb", as_version=4)
cell = partial(source_with, notebook=NOTEBOOK)


@pytest.fixture
def space():
    """What the cells under test expect to find, with a tiny model."""
    torch.manual_seed(0)
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=8)
    unet.conv_out.weight.data *= 20             # so that the way through the model matters
    ddim = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                         timestep_spacing="trailing")
    names = {
        "torch": torch, "F": F, "copy": copy, "shape": (3, 8, 8), "T": 1000,
        "device": torch.device("cpu"), "unet": unet.eval().requires_grad_(False),
        "ddim": ddim, "alpha_bar": ddim.alphas_cumprod, "kind": "v_prediction",
        "new_images": torch.randn(16, 3, 8, 8).clamp(-1, 1),
        "blue": torch.tensor([-0.6, -0.3, 0.7])}
    for text in ("def sample(", "def accumulate_gradients", "def guess_from", "def steered",
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
    ("loss.backward()", "loss.backward() if total == 0 else None"),    # the first part only
])
def test_wrong_accumulation_is_caught(space, right, wrong):
    with pytest.raises(AssertionError):
        run_broken(space, "def accumulate_gradients", right, wrong, "def gradient_of")


@pytest.mark.parametrize("place, right, wrong", [
    ("def guess_from", "a.sqrt() * xt - (1 - a).sqrt()", "a.sqrt() * xt + (1 - a).sqrt()"),
    ("def guess_from", "a.sqrt() * xt - (1 - a).sqrt()", "a * xt - (1 - a)"),
    ("def guess_from", "(a.sqrt() * xt - x0_hat)", "(a.sqrt() * xt + x0_hat)"),
    ("def steered", "alphas_cumprod[t]  # at", "alphas_cumprod[t // 50]  # at"),
    ("def steered", "loss_of(x0_hat).sum(), xt", "loss_of(x0_hat).mean(), xt"),
    ("def steered", "torch.set_grad_enabled(through_model)", "torch.no_grad()"),
    ("def steered", "x0_hat - scale *", "x0_hat - (scale + 1) *"),
    ("def steered", ".clamp(-1, 1)", ""),
])
def test_wrong_guidance_is_caught(space, place, right, wrong):
    with pytest.raises(AssertionError):
        run_broken(space, place, right, wrong, "def squared_distance")


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_an_answer_and_its_guess_belong_together(space, kind):
    """The way back leads to the same answer; DDIM reads the same picture out of it."""
    ddim = DDIMScheduler(prediction_type=kind, clip_sample=False)
    ddim.set_timesteps(10)
    a, t = ddim.alphas_cumprod[400], torch.tensor(400)
    xt, x0_hat = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8) * 2 - 1
    answer = space["answer_from"](x0_hat, xt, a, kind)
    torch.testing.assert_close(space["guess_from"](answer, xt, a, kind), x0_hat, rtol=0, atol=1e-5)
    found = ddim.step(answer, t, xt).pred_original_sample
    torch.testing.assert_close(found, x0_hat, rtol=0, atol=1e-5)


def test_the_guess_moves_by_scale_and_deviation_of_the_noise(space):
    """A steered answer means x0_hat - scale * sqrt(1 - alpha_bar_t) * gradient."""
    unet, ddim, a = space["unet"], space["ddim"], space["alpha_bar"]
    predict, loss, scale = lambda xt, t: unet(xt, t).sample, space["squared_distance"], 5.0
    for t in (900, 500, 100):
        xt = 0.1 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(t))
        x0_hat, slope = space["guess_and_gradient"](predict, xt, t, ddim, loss, True)
        expected = (x0_hat - scale * (1 - a[t]).sqrt() * slope).clamp(-1, 1)
        answer = space["steered"](predict, ddim, loss, scale)(xt, t)
        found = space["guess_from"](answer, xt, a[t], "v_prediction")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_pictures_of_a_batch_do_not_disturb_each_other(space):
    """A picture is guided in the same way alone and in a batch."""
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    predict = space["steered"](lambda xt, t: space["unet"](xt, t).sample, space["ddim"],
                               space["squared_distance"], 5.0)
    together, alone = (space["sample"](predict, x, space["ddim"], 4) for x in (noise, noise[1:2]))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_model_that_says_zero_has_the_mean_square_of_its_target_as_error(space, kind):
    scheduler = DDIMScheduler(prediction_type=kind)
    x0, eps, t = *torch.randn(2, 4, 3, 8, 8), torch.tensor([0, 300, 600, 999])
    target = eps if kind == "epsilon" else scheduler.get_velocity(x0, eps, t)
    zero = lambda xt, t: SimpleNamespace(sample=torch.zeros_like(xt))  # noqa: E731
    found = space["error_of"](zero, scheduler, x0, eps, t)
    torch.testing.assert_close(found, target.square().mean())


def test_an_average_moves_by_the_decay(space):
    source = cell("def update_average")
    exec(source[source.index("@torch.no_grad()\ndef update_average"):], space)
    ones, zeros = (torch.nn.Linear(2, 2) for _ in range(2))
    for model, value in ((ones, 1.0), (zeros, 0.0)):
        for weight in model.parameters():
            torch.nn.init.constant_(weight, value)
    space["update_average"](ones.requires_grad_(False), zeros, 0.9)
    assert torch.allclose(ones.weight, torch.tensor(0.9))


def test_the_judge_sees_what_was_drawn(space):
    """Every colour in a plain picture, and the wings' majority in a mixed one."""
    space["COLOURS"] = COLOURS
    exec(cell("def colour_distance").split("\n\n\nblue =")[0], space)
    exec(cell("def wing_colour").split("\n\n\nseen =")[0], space)
    plain = torch.tensor(list(COLOURS.values())).view(8, 3, 1, 1) / 127.5 - 1
    pictures = plain.expand(8, 3, 32, 32).clone()
    assert space["wing_colour"](pictures) == list(COLOURS)
    pictures[0, :, :, :13] = plain[4]           # most of the left wing is blue, the right is red
    assert space["wing_colour"](pictures)[0] == "red"
    pictures[0, :, :, :20] = plain[4]
    assert space["wing_colour"](pictures)[0] == "blue"


def test_clip_input_of_another_size_and_range(space):
    """Pictures are resized and normalised as the CLIP model wants them."""
    exec(cell("def clip_input").split("def clip_input")[1].join(["def clip_input", ""])
         .split("def embed_images")[0], space)
    clip = SimpleNamespace(visual=SimpleNamespace(
        image_size=(4, 4), image_mean=(0.0, 0.5, 0.25), image_std=(1.0, 0.5, 0.25)))
    found = space["clip_input"](clip, torch.ones(2, 3, 8, 8))
    assert found.shape == (2, 3, 4, 4)
    assert found[0, :, 0, 0].tolist() == pytest.approx([1.0, 1.0, 3.0])
