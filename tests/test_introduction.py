"""The formulas of unit1/01: each check in the notebook fails when its formula is broken."""

from functools import partial
from types import SimpleNamespace

import nbformat
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from run_notebooks import ROOT, source_with

from course_utils.hub import explained

NOTEBOOK = nbformat.read(ROOT / "unit1" / "01_introduction_to_diffusers.ipynb", as_version=4)
cell = partial(source_with, notebook=NOTEBOOK)


@pytest.fixture
def names():
    """What the cells under test expect to find, with small random pictures."""
    torch.manual_seed(0)
    space = {"torch": torch, "DDPMScheduler": DDPMScheduler, "F": torch.nn.functional,
             "train_images": torch.rand(8, 3, 8, 8) * 2 - 1}
    exec(cell("def add_noise"), space)
    space["t_strip"] = torch.linspace(0, 999, 8).long()
    ddim = DDIMScheduler.from_config(space["scheduler"].config)
    exec(cell("def sample"), space)
    space["heard"] = []

    def predict(xt, t):
        answer = torch.tanh(xt.roll(1, 3)) + t / 1000
        space["heard"].append((int(t), xt, answer))
        return answer

    space["sample"](predict, torch.randn(2, 3, 8, 8), ddim, 10)
    return space


@pytest.mark.parametrize("where, right, wrong", [
    ("def add_noise", "(1 - a).sqrt() * eps", "(1 - a) * eps"),      # variance for deviation
    ("def add_noise", "a.sqrt() * x0", "a * x0"),
    ("factor, variance =", "(1 - beta).sqrt() * factor", "(1 - beta) * factor"),
    ("factor, variance =", "(1 - beta) * variance + beta", "variance + beta"),
    ("def get_target", "eps - (1 - a).sqrt() * x0", "eps + (1 - a).sqrt() * x0"),
    ("def get_target", "a.sqrt() * eps - (1 - a).sqrt()", "(1 - a).sqrt() * eps - a.sqrt()"),
    ("def ddim_step", "(1 - a_next).sqrt() * eps_hat", "(1 - a).sqrt() * eps_hat"),
    ("def ddim_step", "+ a.sqrt() * v_hat", "- a.sqrt() * v_hat"),
    ("def ddim_step", ".clamp(-1, 1)", ""),
])
def test_a_broken_formula_is_caught_by_its_cell(names, where, right, wrong):
    source = cell(where)
    assert right in source
    exec(source, dict(names))                                # as it stands it passes
    with pytest.raises(AssertionError):
        exec(source.replace(right, wrong), names)


def test_every_timestep_is_drawn_and_the_last_one_too(names):
    exec(cell("def draw_timesteps"), names)
    t = names["draw_timesteps"](200_000, 1000, torch.Generator().manual_seed(0))
    assert t.min() <= 20 and t.max() == 999 and (t >= 500).float().mean() > 0.5


def test_slerp_keeps_the_variance():
    """On the whole way from one noise to another the variance stays 1, up to its error."""
    space = {"torch": torch, "film": lambda *_, **__: None, "sample": lambda *a: a[1],
             "predict_with": lambda unet: None, "device": "cpu",
             "pipeline": SimpleNamespace(unet=None, scheduler=None),
             "make_noise": lambda n, shape, seed: torch.randn(
                 n, *shape, generator=torch.Generator().manual_seed(seed))}
    exec(cell("def slerp"), space)
    a, b = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    for share in (0, 0.3, 0.5, 1):
        assert abs(space["slerp"](a, b, share).var() - 1) < 5 * (2 / 100_000) ** 0.5


@pytest.mark.parametrize("token, printed", [(None, "Skipped, no token"), ("x", "shared: me/my-")])
def test_sharing_needs_a_token_and_uploads_pipeline_and_card(monkeypatch, capsys, token, printed):
    import huggingface_hub

    pushed = []

    class Pipeline:
        def push_to_hub(self, repository):
            pushed.append(("pipeline", repository))

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub, "whoami", lambda: {"name": "me"})
    monkeypatch.setattr(
        huggingface_hub.ModelCard, "push_to_hub",
        lambda self, repository: pushed.append((self.data.library_name, repository)))
    config = SimpleNamespace(image_size=32, source="butterflies", train_steps=5, solver_steps=20)
    exec(cell("push_to_hub(repository)"), {"my_pipeline": Pipeline(), "config": config,
                                           "quality": {"your model": "3.0"},
                                           "explained": explained})
    assert printed in capsys.readouterr().out
    repository = "me/my-butterflies"
    assert pushed == ([("pipeline", repository), ("diffusers", repository)] if token else [])
