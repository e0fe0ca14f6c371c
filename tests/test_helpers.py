"""Plotting, exercise checks and set-up."""

import ast
import io
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from matplotlib.colors import same_color
from matplotlib.text import Annotation
from PIL import Image

import course_utils
from course_utils import runtime
from course_utils.exercises import check
from course_utils.metrics import Measured
from course_utils.plotting import (
    display_figure,
    draw_unet,
    film,
    plot_bars,
    plot_curves,
    plot_loss,
    show_images,
    tile,
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def grey(*levels):
    """One picture of 6 x 6 pixels for each grey level."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 6, 6)


def test_tile_places_pictures_row_by_row_and_clips():
    canvas = tile(grey(-9.0, 0.0, 9.0), columns=2)
    assert canvas.shape == (14, 14, 3)
    assert [canvas[0, 0, 0], canvas[0, 8, 0], canvas[8, 0, 0]] == [0, 128, 255]
    assert canvas[0, 6, 0] == canvas[6, 0, 0] == 255, "white lines between"


def names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize("images, options", [
    (grey(-1.0, 0.0, 0.5, 0.6), {"columns": 2, "rows": ["a", "b"]}),
    ({"a": grey(-1.0, 0.0, 0.3), "b": grey(0.5, 0.6)}, {}),
])
def test_names_stand_beside_their_pictures(images, options):
    _, ax = plt.subplots()
    assert show_images(images, title="four", labels="cd", ax=ax, **options) is ax
    assert (ax.get_title(), names(ax.xaxis), names(ax.yaxis)) == ("four", [*"cd"], [*"ab"])
    canvas = ax.images[0].get_array()
    shown = [[canvas[round(y), round(x), 0] for x in ax.get_xticks()] for y in ax.get_yticks()]
    assert shown == [[0, 128], [191, 204]]


def test_plot_loss_shows_levels():
    ax = plot_loss([1.0, 0.5, 0.25], levels={"zeros": 1.0, "identity": 0.2})
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["running mean", "zeros: 1", "identity: 0.2"]
    assert [line.get_ydata()[0] for line in ax.lines[2:]] == [1.0, 0.2]


def test_plot_curves_draws_spreads_and_the_floor():
    ax = plot_curves({"a": [(1, 9, 2), (2, 8, 1)], "b": [(1, 7), (2, 6)]}, "steps", "distance",
                     floor=(3, 1), log="x")
    assert [tuple(curve.lines[0].get_ydata()) for curve in ax.containers] == [(9, 8), (7, 6)]
    assert [curve.has_yerr for curve in ax.containers] == [True, False]
    band, = ax.patches
    heights = band.get_path().transformed(band.get_patch_transform()).vertices[:, 1]
    assert (heights.min(), heights.max()) == (2, 4)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")


def test_plot_bars_names_distances_and_floors():
    ax = plot_bars({"ours": Measured(20, 2, 4, 1, 64), "theirs": Measured(50, 3, 4, 1, 64)}, "mm")
    assert names(ax.yaxis) == ["ours", "theirs"]
    assert [bar.get_width() for bar in ax.patches] == [20, 50, 4, 4]
    assert [text.get_text().strip() for text in ax.texts] == ["20", "50"]


@pytest.mark.parametrize("layers", [1, 2])
def test_draw_unet_draws_the_true_skips(layers):
    """An arc for each tensor that an up block takes, from the block that made it."""
    unet = UNet2DModel(
        16, layers_per_block=layers, block_out_channels=(8, 8, 16), norm_num_groups=4,
        down_block_types=["DownBlock2D"] * 2 + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * 2)
    made, taken = [], []                         # (tensor, place of its block)

    def note(place, block, given, out):
        if block in unet.up_blocks:
            taken.extend((tensor, place) for tensor in given[1])
        elif block is not unet.mid_block:
            made.extend((t, place) for t in ([out] if block is unet.conv_in else out[1]))

    blocks = [unet.conv_in, *unet.down_blocks, unet.mid_block, *unet.up_blocks]
    for place, block in enumerate(blocks):
        block.register_forward_hook(partial(note, place))
    ax = draw_unet(unet, torch.zeros(1, 3, 16, 16)).axes[0]
    arcs = [(arc.xyann[0], arc.xy[0]) for arc in ax.texts if isinstance(arc, Annotation)]
    true = [(start, end) for tensor, end in taken for one, start in made if one is tensor]
    assert sorted(arcs) == sorted(true) and len(arcs) == len(made) == 3 * (layers + 1)
    green = [place for place, bar in enumerate(ax.patches) if same_color(bar.get_facecolor(), "C2")]
    assert green == [3, 4, 5], "the blocks with attention"


def test_film_is_an_animation_with_alternative_text():
    shown = film([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)], alt="two frames")
    assert Image.open(io.BytesIO(shown.data)).n_frames == 2
    assert shown.metadata == {"alt": "two frames"}


def test_display_figure_closes_the_figure_and_keeps_the_text(monkeypatch):
    shown = []
    monkeypatch.setattr("course_utils.plotting.display", shown.append)
    display_figure(show_images(torch.zeros(1, 3, 8, 8)), alt="a grey square")
    assert shown[0].metadata == {"alt": "a grey square"} and not plt.get_fignums()


@pytest.mark.parametrize("answer, expected, verdict", [
    (None, 1, "not attempted yet"),
    (..., 1, "not attempted yet"),
    (2.0, 2.0, "passed"),
    (3, (1, 4), "passed"),
    (5, (1, 4), "expected between 1 and 4, got 5"),
    (2.1, 2.0, "expected 2.0, got 2.1"),
    (torch.ones(3), torch.ones(3), "passed"),
    (torch.ones(2), torch.ones(3), "expected tensor"),
    (torch.tensor(float("nan")), torch.tensor(0.0), "expected"),
    ("text", 1.0, "got text"),
    ("text", (0, 1), "got text"),
])
def test_check_says_what_came(capsys, answer, expected, verdict):
    check("answer", answer, expected)
    assert verdict in capsys.readouterr().out


def test_check_reports_an_error_of_the_learner_without_raising(capsys):
    check("answer", lambda: 1 / 0, 1)
    assert "stopped with ZeroDivisionError" in capsys.readouterr().out


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_start_picks_quick_without_a_gpu_and_says_so_in_one_line(no_gpu, capsys):
    run = runtime.start(seed=3)
    out = capsys.readouterr().out
    assert run.profile == "quick" and run.device.type == "cpu" and not run.bf16
    assert out.count("\n") == 1 and "no GPU found" in out and "COURSE_PROFILE" in out


def test_start_seeds_everything(no_gpu):
    draws = []
    for _ in range(2):
        runtime.start(seed=3)
        draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1]


def test_start_keeps_all_bits_of_float32(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    runtime.start()
    assert not torch.backends.cudnn.allow_tf32


def test_misspelt_profile(no_gpu, monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "quik")
    with pytest.raises(ValueError, match="'quik'.*'quick' or 'full'"):
        runtime.start()


def test_full_without_network_names_the_way_out(no_gpu, monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "full")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")          # nobody listens there
    with pytest.raises(ConnectionError, match="COURSE_PROFILE=quick"):
        runtime.start()


@pytest.mark.parametrize("answers, profile", [(True, "full"), (False, "quick")])
def test_gpu_means_full_when_the_hub_answers(no_gpu, monkeypatch, answers, profile):
    monkeypatch.setattr(runtime, "hub_answers", lambda: answers)
    assert runtime._pick_profile("cuda")[0] == profile


def test_choose_picks_a_column():
    assert runtime.choose("quick", steps=(1, 2)).steps == 1
    assert runtime.choose("full", steps=(1, 2)).steps == 2


def test_timed_waits_for_the_device(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append("wait"))

    def work(a, b):
        calls.append("work")
        return a + b

    result, seconds = runtime.timed(work, 1, b=2)
    assert result == 3 and 0 <= seconds < 60 and calls == ["wait", "work", "wait"]


def test_course_utils_stays_thin():
    """Under 960 lines that hold something, and half of the functions at most ten lines long.

    A fifth of them says in one sentence what is wrong with a folder or with the Hub. What only the
    training scripts use does not count, and neither does what the first cell executes.
    """
    sources = [path.read_text() for path in Path(course_utils.__file__).parent.glob("*.py")
               if path.stem not in ("training", "launch")]
    assert sum(bool(line.strip()) for text in sources for line in text.splitlines()) < 960
    lengths = [node.end_lineno - node.lineno + 1 for text in sources
               for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert median(lengths) <= 10
