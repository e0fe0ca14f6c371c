"""Unit 1, notebook 2: an assertion fails when its formula is broken; bad input gets a sentence."""

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
        "move_part_way", "move", "amount_left * T", "float(i)"),
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
        "samplers", "ode", "(xt_next, t_next)[1]) / 2", "(xt_next, t_next)[1])"),
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


PICTURES = torch.zeros(4, 1, 16, 16)
LABELS = torch.zeros(4, dtype=torch.int64)
BAD_PICTURES = {
    "three axes": (PICTURES[0], LABELS, "N×1×H×W"),
    "three channels": (PICTURES.expand(4, 3, 16, 16), LABELS, "N×1×H×W"),
    "bytes": (PICTURES.byte(), LABELS, "N×1×H×W"),
    "0 to 255": (PICTURES + 255, LABELS, r"scale to \[-1, 1\]"),
    "not a number": (PICTURES * float("nan"), LABELS, r"scale to \[-1, 1\]"),
    "too few labels": (PICTURES, LABELS[:3], "need 4 int64"),
    "labels with two axes": (PICTURES, LABELS[:, None], "need 4 int64"),
    "labels that are floats": (PICTURES, LABELS.float(), "need 4 int64"),
    "a label of 10": (PICTURES, LABELS + 10, "0 … 9"),
    "a label of -1": (PICTURES, LABELS - 1, "0 … 9"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_and_labels_get_one_sentence(defined, name):
    images, labels, sentence = BAD_PICTURES[name]
    with pytest.raises(ValueError, match=sentence) as error:
        defined["check_pictures"](images, labels, 10)
    assert "\n" not in str(error.value)


def test_good_pictures_pass(defined):
    defined["check_pictures"](PICTURES - 1, LABELS + 9, 10)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_samplers_refuse_impossible_step_counts(defined, steps):
    bars = defined["alpha_bars"](defined["cosine_betas"](1000))
    calls = {
        "sample_states": lambda: next(defined["sample_states"](None, PICTURES, bars, steps)),
        "edm_times": lambda: defined["edm_times"](bars, steps),
        "move_part_way": lambda: next(defined["move_part_way"](None, PICTURES, steps)),
        "flow_states": lambda: next(defined["flow_states"](None, PICTURES, steps)),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=f"Asked for {steps} steps: choose 1 … 1000"):
            call()


def test_samplers_accept_one_and_all_steps(defined):
    assert defined["even_times"](1000, 1) == [999, -1]
    assert defined["even_times"](1000, 1000) == list(range(999, -2, -1))
    bars = defined["alpha_bars"](defined["cosine_betas"](1000))
    assert len(defined["edm_times"](bars, 1)) == 2


def test_unknown_objective_names_the_known_ones(defined):
    bars = defined["alpha_bars"](defined["cosine_betas"](10))
    a = bars[5]
    calls = (lambda: defined["target_of"]("noise", PICTURES, PICTURES, a),
             lambda: defined["both_guesses"]("noise", PICTURES, PICTURES, a),
             lambda: defined["gaussian_batch"]("noise", bars),
             lambda: defined["make_predictor"](None, "noise", bars))
    for call in calls:
        with pytest.raises(ValueError, match="Unknown objective 'noise': choose .*'epsilon'"):
            call()


def test_noise_and_amounts_of_the_wrong_shape_or_range(defined):
    bars = defined["alpha_bars"](defined["cosine_betas"](1000))
    add_noise, corrupt = defined["add_noise"], defined["corrupt"]
    with pytest.raises(ValueError, match="pictures' shape"):
        add_noise(PICTURES, LABELS, PICTURES[:, :, :8], bars)
    with pytest.raises(ValueError, match="each picture one t"):
        add_noise(PICTURES, LABELS[:1], PICTURES, bars)
    for t in (LABELS - 1, LABELS + 1000):
        with pytest.raises(ValueError, match="from 0 to 999"):
            add_noise(PICTURES, t, PICTURES, bars)
    for amount in (torch.tensor(0.5), torch.full((4,), 1.5), torch.full((4,), -0.1)):
        with pytest.raises(ValueError, match="from 0 to 1 for each picture"):
            corrupt(PICTURES, amount, torch.Generator())
    with pytest.raises(ValueError, match="multiples of 4"):
        defined["MinimalUNet"]()(torch.zeros(1, 1, 18, 18))
