"""Unit 1, notebook 2: an assertion fails when its formula is broken."""

import ast
import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parents[1] / "unit1" / "02_diffusion_models_from_scratch.ipynb"
TAGGED = [(cell["metadata"]["tags"][0], "".join(cell["source"]))
          for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
          if cell["cell_type"] == "code" and cell["metadata"].get("tags")]
CELLS = {tag: source for tag, source in TAGGED if tag not in ("exercise", "check")}
GUARDS = [tag for tag in CELLS if tag.startswith("guards:")]
GIVEN = "points", "starts", "T", "alpha_bar"     # data that the guards share


def kept(node):
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) or (
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in GIVEN)


def definitions(broken_cell="", formula="", broken=""):
    """What the page defines, with one formula replaced if asked for; nothing is trained."""
    namespace = {"__name__": "notebook", "gaps": {}}
    for tag, source in CELLS.items():
        if tag in ("launch", *GUARDS):
            continue
        if tag == broken_cell:
            assert source.count(formula) == 1, f"the notebook no longer holds {formula!r}"
            source = source.replace(formula, broken)
        tree = ast.parse(source)
        tree.body = [node for node in tree.body if kept(node)]
        exec(compile(tree, str(NOTEBOOK), "exec"), namespace)
    namespace["x"] = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    namespace["any_answer"] = lambda xt, level: torch.sin(3 * xt) + level
    return namespace


def run(guard, namespace):
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(CELLS[f"guards:{guard}"], str(NOTEBOOK), "exec"), namespace)


# guard, cell that holds the formula, the formula, how it is broken
MUTATIONS = {
    "likelihood with the deviation for the variance": (
        "ideal_denoiser", "ideal", "/ (2 * sigma**2)", "/ (2 * sigma)"),
    "likelihood without the factor 2": ("ideal_denoiser", "ideal", "(2 * sigma**2)", "sigma**2"),
    "a walk uphill": (
        "walk", "walk", "x = x + (aim - sigma) * eps_hat\n        if fresh",
        "x = x - (aim - sigma) * eps_hat\n        if fresh"),
    "a guess of the noise that is not divided by its level": (
        "walk", "walk", "(x - denoise(x, sigma)) / sigma", "(x - denoise(x, sigma))"),
    "Heun with the sum of both guesses": ("walk", "walk", "/ aim) / 2", "/ aim)"),
    "Heun that looks back": (
        "walk", "walk", "ahead = x + (aim - sigma)", "ahead = x - (aim - sigma)"),
    "Heun that tells the old level": (
        "order", "walk", "denoise(ahead, aim)", "denoise(ahead, sigma)"),
    "Euler where Heun is asked for": ("order", "walk", "if heun and aim > 0", "if False"),
    "fresh noise that is not taken from the rest": (
        "ddim_ddpm", "walk", "(sigma_next**2 - fresh**2)", "(sigma_next**2)"),
    "missing square in the ancestral noise": (
        "ddim_ddpm", "walk", "(sigma_next / sigma) ** 2", "(sigma_next / sigma)"),
    "no fresh noise": ("ddim_ddpm", "walk", "fresh = eta *", "fresh = 0 *"),
    "a schedule's level without the root": (
        "forward", "forward", "((1 - alpha_bar) / alpha_bar).sqrt()",
        "((1 - alpha_bar) / alpha_bar)"),
    "variance in the place of the deviation": (
        "forward", "forward", "(1 - a).sqrt() * eps", "(1 - a) * eps"),
    "missing root over the signal": ("forward", "forward", "a.sqrt() * x0", "a * x0"),
    "product to T": (
        "forward", "forward", "torch.cumprod(1 - beta, 0)", "(1 - beta).prod().expand_as(beta)"),
    "sum in the place of the product": (
        "forward", "forward", "torch.cumprod(1 - beta, 0)", "1 - torch.cumsum(beta, 0)"),
    "cosine schedule without its square": ("forward", "forward", "angle.cos() ** 2", "angle.cos()"),
    "a mix that adds": ("forward", "mix", "(1 - s) * x0", "x0"),
    "sign of v": ("targets", "targets", "a.sqrt() * eps - (1", "a.sqrt() * eps + (1"),
    "sign of the velocity": ("targets", "targets", '"velocity": eps - x0', '"velocity": x0 - eps'),
    "x0 from v with the roots exchanged": (
        "targets", "targets", "signal * xt - noise * answer", "noise * xt - signal * answer"),
    "x0 from epsilon without the root": (
        "targets", "targets", "noise * answer) / signal,", "noise * answer) / signal**2,"),
    "x0 from the velocity without the noise's share": (
        "targets", "targets", "/ (signal + noise)", "/ signal"),
    "a denoiser on the wrong scale": ("ddim_ddpm", "targets", "xt = a.sqrt() * x", "xt = x"),
    "a denoiser with the deviation for the variance": (
        "ddim_ddpm", "targets", "torch.tensor(sigma, dtype=x.dtype) ** 2",
        "torch.tensor(sigma, dtype=x.dtype)"),
    "a denoiser that tells no level": (
        "ddim_ddpm", "targets", "network(xt, (t + 1) / len(sigmas))", "network(xt, 0)"),
    "Heun with the sum, against the library": ("heun_flow", "walk", "/ aim) / 2", "/ aim)"),
    "a walk uphill, against flow matching": (
        "heun_flow", "walk", "x = x + (aim - sigma) * eps_hat\n        if fresh",
        "x = x - (aim - sigma) * eps_hat\n        if fresh"),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_every_assertion_passes_as_written(guard):
    run(guard.removeprefix("guards:"), definitions())


@pytest.mark.parametrize("name", MUTATIONS)
def test_assertion_fails_when_its_formula_is_broken(name):
    guard, *mutation = MUTATIONS[name]
    namespace = definitions(*mutation)
    with pytest.raises((AssertionError, RuntimeError)):
        run(guard, namespace)


def test_every_guard_is_mutated():
    assert {f"guards:{guard}" for guard, *_ in MUTATIONS.values()} == set(GUARDS)


def test_walk_is_the_only_sampling_loop():
    """Beside `walk`, only the proofs against the library step a scheduler."""
    stepping = [tag for tag, source in TAGGED if "library.step" in source]
    assert stepping == ["guards:ddim_ddpm", "guards:heun_flow"]
    assert sum("def walk(" in source for _, source in TAGGED) == 1


@pytest.fixture(scope="module")
def defined():
    return definitions()


def test_unet_has_its_shapes_is_told_the_level_and_bounds_nothing(defined):
    torch.manual_seed(0)
    unet, shapes = defined["MinimalUNet"](3), {}
    for name, part in unet.named_children():
        part.register_forward_hook(lambda *io, name=name: shapes.update({name: io[2].shape[1:]}))
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert unet(x, torch.rand(5)).shape == x.shape
        assert shapes["down1"] == shapes["up1"] == (32, 16, 16)
        assert shapes["down2"] == shapes["up2"] == (64, 8, 8) and shapes["middle"] == (64, 4, 4)
        assert unet.up2[0].in_channels == 64 + 64 and unet.up1[0].in_channels == 64 + 32
        assert not torch.allclose(unet(x, 0.0), unet(x, 1.0))
        unet.out.bias.fill_(-5.0)
        assert unet(torch.zeros(1, 3, 16, 16), 0).max() < -1


@pytest.mark.parametrize("steps", [1, 2, 9, 50])
def test_karras_levels_fall_from_80_to_0(defined, steps):
    sigmas = torch.tensor(defined["karras_sigmas"](steps))
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0
    assert sigmas[0] == pytest.approx(80, rel=1e-4) and (sigmas.diff() < 0).all()


def test_training_meets_every_timestep_unless_told_otherwise(defined):
    t = defined["draw_timesteps"](100_000, 1000, torch.Generator().manual_seed(0))
    assert t.shape == (100_000,) and t.dtype == torch.int64
    assert t.min() >= 0 and t.max() == 999
    x0 = torch.zeros(5_000, 1, 1, 1)
    for below, told in ((900, 1.0), (None, 0.0)):
        make_batch = defined["batch_for"]("v", defined["alpha_bar"], told, below)
        _, level, _ = make_batch(x0, torch.Generator().manual_seed(0))
        assert level.max() == pytest.approx(told * (below or 1000) / 1000)
