"""Unit 1, notebook 2: an assertion fails when its formula is broken."""

import ast
import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parents[1] / "unit1" / "02_diffusion_models_from_scratch.ipynb"


def cells_by_tag():
    """The source of each tagged code cell."""
    return {tag: "".join(cell["source"])
            for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
            for tag in cell["metadata"].get("tags", [])}


CELLS = cells_by_tag()
GUARDS = [tag for tag in CELLS if tag.startswith("guards:")]
DEFINITIONS = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef


def definitions(broken_cell="", formula="", broken=""):
    """What the tagged cells define, with one formula replaced if asked for; nothing is trained."""
    namespace = {"__name__": "notebook"}
    for tag, source in CELLS.items():
        if tag in ("launch", "exercise", "check", *GUARDS):
            continue
        if tag == broken_cell:
            assert formula in source, f"the notebook no longer holds {formula!r}"
            source = source.replace(formula, broken)
        tree = ast.parse(source)
        tree.body = [node for node in tree.body if isinstance(node, DEFINITIONS) or
                     isinstance(node, ast.Assign) and ast.unparse(node.targets) == "OBJECTIVES"]
        exec(compile(tree, str(NOTEBOOK), "exec"), namespace)
    return namespace


def run(source, namespace):
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, str(NOTEBOOK), "exec"), namespace)


# guard, cell that holds the formula, the formula, how it is broken
MUTATIONS = {
    "likelihood with the deviation for the variance": (
        "ideal_denoiser", "ideal", "/ (2 * sigma**2)", "/ (2 * sigma)"),
    "likelihood without the factor 2": ("ideal_denoiser", "ideal", "(2 * sigma**2)", "sigma**2"),
    "an activation on the UNet's output": (
        "MinimalUNet", "minimal_unet", "return self.out(h)", "return F.silu(self.out(h))"),
    "a UNet without its second skip": (
        "MinimalUNet", "minimal_unet", "two_convolutions(c + b, b)", "two_convolutions(c, b)"),
    "a share of the way that never grows": (
        "move_part_way", "move", "/ (steps - i)", "/ steps"),
    "loop counter told for the noise level": (
        "move_part_way", "move", "torch.tensor(amount_left * T)", "torch.tensor(i)"),
    "corruption that adds instead of mixing": (
        "move_part_way", "corrupt", "(1 - amount) * x0", "x0"),
    "variance in the place of the deviation": (
        "forward", "forward", "(1 - a).sqrt() * eps", "(1 - a) * eps"),
    "variance in the place of the deviation (moments)": (
        "moments", "forward", "(1 - a).sqrt() * eps", "(1 - a) * eps"),
    "missing root over the signal": ("forward", "forward", "a.sqrt() * x0", "a * x0"),
    "product to T": (
        "forward", "forward", "torch.cumprod(1 - beta, 0)", "(1 - beta).prod().expand_as(beta)"),
    "product to T (moments)": (
        "moments", "forward", "torch.cumprod(1 - beta, 0)", "(1 - beta).prod().expand_as(beta)"),
    "sum in the place of the product": (
        "moments", "forward", "torch.cumprod(1 - beta, 0)", "1 - torch.cumsum(beta, 0)"),
    "cosine schedule without its square": ("forward", "forward", "angle.cos() ** 2", "angle.cos()"),
    "sign of v": (
        "objectives", "objectives", "a.sqrt() * eps - (1", "a.sqrt() * eps + (1"),
    "x0 from v with the roots exchanged": (
        "objectives", "objectives", "a.sqrt() * xt - (1 - a).sqrt() * output",
        "(1 - a).sqrt() * xt - a.sqrt() * output"),
    "x0 from epsilon without the last root": (
        "objectives", "objectives", "output) / a.sqrt()", "output) / a"),
    "sign of the DDIM direction": (
        "samplers", "sampler", "x0_hat + kept.sqrt() * eps_hat", "x0_hat - kept.sqrt() * eps_hat"),
    "missing root in the DDIM direction": (
        "samplers", "sampler", "kept.sqrt() * eps_hat", "kept * eps_hat"),
    "fresh noise that is not taken from the rest": (
        "samplers", "sampler", "(1 - a_next - sigma**2)", "(1 - a_next)"),
    "missing root in the ancestral noise": (
        "samplers", "sampler", "((1 - a_next) / (1 - a)).sqrt()", "((1 - a_next) / (1 - a))"),
    "loop index for the timestep": (
        "samplers", "sampler", "predict(xt, t)", "predict(xt, times.index(t))"),
    "loop index for the schedule": (
        "samplers", "sampler", "bars[t], bars[t_next]", "bars[times.index(t)], bars[t_next]"),
    "timesteps that stop short of T - 1": (
        "samplers", "sampler", "torch.linspace(T, 0", "torch.linspace(T - 1, 0"),
    "variance in the place of sigma": (
        "samplers", "ode", "sigmas = ((1 - bars) / bars).sqrt()", "sigmas = (1 - bars) / bars"),
    "Heun with the sum of both slopes": (
        "samplers", "ode", "(xt, t_next)[1]) / 2", "(xt, t_next)[1])"),
    "eps_hat without the root": (
        "samplers", "samplers", "(xt - a.sqrt() * x0_hat) / (1 - a).sqrt()",
        "(xt - a.sqrt() * x0_hat) / (1 - a)"),
    "sign of the velocity": ("flow", "flow", "eps - x0", "x0 - eps"),
    "flow that walks the wrong way": ("flow", "flow", "x - velocity(", "x + velocity("),
    "flow told the loop index": ("flow", "flow", "s = 1 - i / steps", "s = i"),
}


@pytest.fixture(scope="module")
def defined():
    return definitions()


@pytest.mark.parametrize("guard", GUARDS)
def test_every_assertion_passes_as_written(guard):
    run(CELLS[guard], definitions())


@pytest.mark.parametrize("name", MUTATIONS)
def test_assertion_fails_when_its_formula_is_broken(name):
    guard, *mutation = MUTATIONS[name]
    namespace = definitions(*mutation)
    with pytest.raises((AssertionError, RuntimeError)):
        run(CELLS[f"guards:{guard}"], namespace)


def test_every_guard_is_mutated():
    assert {f"guards:{guard}" for guard, *_ in MUTATIONS.values()} == set(GUARDS)


def test_times_run_from_the_last_timestep_to_clean(defined):
    bars = defined["alpha_bars"](defined["cosine_betas"](1000))
    assert defined["even_times"](1000, 1) == [999, -1]
    assert defined["even_times"](1000, 1000) == list(range(999, -2, -1))
    for steps in (1, 3, 50):
        times = defined["edm_times"](bars, steps)
        assert times == sorted(times, reverse=True) and times[-1] == -1
        assert len(times) == steps + 1


@pytest.mark.parametrize("draw", ["even_timesteps", "draw_timesteps"])
def test_training_meets_every_timestep_that_sampling_starts_from(defined, draw):
    t = defined[draw](100_000, 1000, torch.Generator().manual_seed(0))
    assert t.shape == (100_000,) and t.dtype == torch.int64
    assert t.min() >= 0 and t.max() == 999


def test_flow_matching_trains_up_to_pure_noise(defined):
    x0 = torch.zeros(10_000, 1, 1, 1)
    xs, t, velocity = defined["flow_batch"](x0, torch.Generator().manual_seed(0))
    assert t.max() == 1000 and t.min() > 0
    torch.testing.assert_close(xs, velocity * t.view(-1, 1, 1, 1) / 1000)


def test_listening_changes_nothing(defined):
    heard = []
    answer = defined["listen"](lambda xt, t: xt + t, heard)(torch.ones(2), 3)
    assert answer.tolist() == [4, 4]
    assert [(t, xt.tolist(), out.tolist()) for t, xt, out in heard] == [(3, [1, 1], [4, 4])]
