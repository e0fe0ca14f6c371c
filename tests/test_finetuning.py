"""The functions of unit2/01: what they promise, and that the page's check sees broken ones."""

import ast
import copy
import itertools
from types import SimpleNamespace

import nbformat
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image, ImageDraw
from run_notebooks import ROOT, source_with
from torchvision.transforms import functional as TF

from course_utils.drawings import COLOURS

NOTEBOOK = nbformat.read(ROOT / "unit2" / "01_finetuning_and_guidance.ipynb", as_version=4)
FUNCTIONS = {}                                   # the page's own, by name, without the exercises
for _cell in NOTEBOOK.cells:
    if _cell.cell_type == "code" and "exercise" not in _cell.metadata.get("tags", []):
        for _node in ast.parse(_cell.source).body:
            if isinstance(_node, ast.FunctionDef):
                FUNCTIONS[_node.name] = ast.unparse(_node)


@pytest.fixture
def page():
    """The page's functions, with a tiny model."""
    torch.manual_seed(0)
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=8)
    unet.conv_out.weight.data *= 20             # so that the way through the model matters
    ddim = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                         timestep_spacing="trailing")
    ddim.set_timesteps(10)
    names = {
        "torch": torch, "F": F, "TF": TF, "copy": copy, "itertools": itertools, "Image": Image,
        "ImageDraw": ImageDraw, "Muon": None, "unet": unet.eval().requires_grad_(False),
        "ddim": ddim, "alpha_bar": ddim.alphas_cumprod, "kind": "v_prediction",
        "predict": lambda xt, t: unet(xt, t).sample,
        "eight": torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))}
    for source in FUNCTIONS.values():
        exec(source, names)
    return names


@pytest.mark.parametrize("name, right, wrong", [
    ("guess_from", "a.sqrt() * xt - (1 - a).sqrt()", "a.sqrt() * xt + (1 - a).sqrt()"),
    ("guess_from", "a.sqrt() * xt - (1 - a).sqrt()", "a * xt - (1 - a)"),
    ("guess_and_gradient", "alphas_cumprod[t]", "alphas_cumprod[t // 50]"),
    ("guess_and_gradient", "loss_of(x0_hat).sum(), xt", "loss_of(x0_hat).mean(), xt"),
    ("guess_and_gradient", "guess_from(predict(xt, t)", "guess_from(predict(xt, t).detach()"),
])
def test_the_check_on_the_page_sees_a_broken_formula(page, name, right, wrong):
    check = source_with("to_grey = ", NOTEBOOK)
    exec(check, dict(page))
    assert right in FUNCTIONS[name]
    exec(FUNCTIONS[name].replace(right, wrong), page)
    with pytest.raises(AssertionError):
        exec(check, page)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_an_answer_and_its_guess_belong_together(page, kind):
    """The way back leads to the same answer; DDIM reads the same picture out of it."""
    ddim = DDIMScheduler(prediction_type=kind, clip_sample=False)
    ddim.set_timesteps(10)
    a, t = ddim.alphas_cumprod[400], torch.tensor(400)
    xt, x0_hat = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8) * 2 - 1
    answer = page["answer_from"](x0_hat, xt, a, kind)
    torch.testing.assert_close(page["guess_from"](answer, xt, a, kind), x0_hat, rtol=0, atol=1e-5)
    found = ddim.step(answer, t, xt).pred_original_sample
    torch.testing.assert_close(found, x0_hat, rtol=0, atol=1e-5)


def squared(images):
    return (images - 0.3).square().mean((1, 2, 3))


def test_the_guess_moves_by_scale_and_deviation_of_the_noise(page):
    """A steered answer means x0_hat - scale * sqrt(1 - alpha_bar_t) * gradient, cut to [-1, 1]."""
    ddim, a, scale = page["ddim"], page["alpha_bar"], 5.0
    for t in (900, 500, 100):
        xt = 0.1 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(t))
        x0_hat, slope = page["guess_and_gradient"](page["predict"], xt, t, ddim, squared)
        expected = (x0_hat - scale * (1 - a[t]).sqrt() * slope).clamp(-1, 1)
        answer = page["steered"](page["predict"], ddim, squared, scale)(xt, t)
        found = page["guess_from"](answer, xt, a[t], "v_prediction")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_scale_0_is_ddim(page):
    noise, ddim = page["eight"][:2], page["ddim"]
    plain = page["sample"](page["predict"], noise, ddim, 5, use_clipped_model_output=True)
    still = page["sample"](page["steered"](page["predict"], ddim, squared, 0.0), noise, ddim, 5)
    torch.testing.assert_close(still, plain, rtol=0, atol=1e-4)


def test_pictures_of_a_batch_do_not_disturb_each_other(page):
    """A picture is guided in the same way alone and in a batch."""
    noise, ddim = page["eight"][:3], page["ddim"]
    lead = page["steered"](page["predict"], ddim, squared, 5.0)
    together, alone = (page["sample"](lead, x, ddim, 4) for x in (noise, noise[1:2]))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_what_is_known_stays_and_the_rest_is_the_models(page):
    """Known pixels come out unchanged; with an empty mask the sampler is the plain one."""
    ddim, noise, sample = page["ddim"], page["eight"][:2], page["sample"]
    known, mask = torch.rand(2, 3, 8, 8) * 2 - 1, torch.zeros(8)
    plain = sample(page["predict"], noise, ddim, 5)
    free = sample(page["inpainted"](page["predict"], ddim, known, mask), noise, ddim, 5)
    torch.testing.assert_close(free, plain, rtol=0, atol=1e-3)
    mask[:4] = 1
    half = sample(page["inpainted"](page["predict"], ddim, known, mask), noise, ddim, 5)
    torch.testing.assert_close(half[..., :4], known[..., :4], rtol=0, atol=1e-5)
    assert (half[..., 4:] - known[..., 4:]).abs().mean() > 0.05


@pytest.mark.parametrize("t", [1, 400, 1000])
def test_a_scheduler_that_ends_earlier_is_the_same_up_to_there(page, t):
    part = page["ending_at"](page["ddim"], t)
    torch.testing.assert_close(part.alphas_cumprod, page["alpha_bar"][:t])
    part.set_timesteps(1)
    assert part.timesteps.tolist() == [t - 1]


def test_finishing_from_little_noise_keeps_the_picture(page):
    """A model that sees through the noise gives the picture back, from any timestep."""
    pictures, noise, a = torch.rand(2, 3, 8, 8) * 2 - 1, page["eight"][:2], page["alpha_bar"]

    def all_knowing(xt, t):
        return (a[t].sqrt() * xt - pictures) / (1 - a[t]).sqrt()

    for t in (300, 1000):
        found = page["finish"](all_knowing, pictures, noise, page["ddim"], t, 10)
        torch.testing.assert_close(found, pictures, rtol=0, atol=1e-3)


def test_states_are_kept_as_they_were_before_the_steps(page):
    model, kept = torch.nn.Linear(1, 1), []

    def loss_of(model, generator):
        with torch.no_grad():
            model.weight += 1
        return 0

    listening = page["keep_states"](loss_of, [0, 2], kept)
    torch.nn.init.zeros_(model.weight)
    for _ in range(4):
        assert listening(model, None) == 0
    assert [state.weight.item() for state in kept] == [0, 2]
    assert not any(state.weight.requires_grad for state in kept)


def test_an_average_moves_by_the_decay(page):
    ones, zeros = (torch.nn.Linear(2, 2) for _ in range(2))
    for model, value in ((ones, 1.0), (zeros, 0.0)):
        for weight in model.parameters():
            torch.nn.init.constant_(weight, value)
    page["update_average"](ones.requires_grad_(False), zeros, 0.9)
    assert torch.allclose(ones.weight, torch.tensor(0.9))


def test_the_judge_sees_what_was_drawn_and_names_no_colour_for_noise(page):
    """Every colour in a plain picture, the wings' majority in a mixed one, "none" for noise."""
    vote, mask = page["vote"], page["wing_mask"](32)
    plain = torch.tensor(list(COLOURS.values())).view(8, 3, 1, 1) / 127.5 - 1
    pictures = plain.expand(8, 3, 32, 32).clone()
    assert vote(pictures, mask, COLOURS) == list(COLOURS)
    pictures[0, :, :, :9] = plain[4]            # part of the left wing is blue, the rest red
    assert vote(pictures, mask, COLOURS)[0] == "red"
    pictures[0, :, :, :20] = plain[4]
    assert vote(pictures, mask, COLOURS)[0] == "blue"
    noise = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert vote(noise, mask, COLOURS).count("none") >= 12


def test_form_sees_no_colour_and_no_brightness(page):
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    shifted = 0.7 * picture + torch.tensor([0.3, -0.1, 0.2]).view(3, 1, 1)
    torch.testing.assert_close(page["form"](shifted), page["form"](picture), rtol=0, atol=1e-5)
    assert (page["form"](picture) - page["form"](picture.flip(-1))).abs().mean() > 0.1


def test_clip_input_of_another_size_and_range(page):
    """Pictures are resized and normalised as the CLIP model wants them."""
    clip = SimpleNamespace(visual=SimpleNamespace(
        image_size=(4, 4), image_mean=(0.0, 0.5, 0.25), image_std=(1.0, 0.5, 0.25)))
    found = page["clip_input"](clip, torch.ones(2, 3, 8, 8))
    assert found.shape == (2, 3, 4, 4)
    assert found[0, :, 0, 0].tolist() == pytest.approx([1.0, 1.0, 3.0])
