"""Plotting, exercise checks, set-up and the Fréchet distance."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from course_utils import runtime
from course_utils.exercises import check
from course_utils.metrics import DigitJudge, frechet_distance
from course_utils.plotting import display_figure, film, plot_loss, show_images, tile


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_tile_places_pictures_row_by_row():
    images = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    canvas = tile(images, columns=2, gap=1)
    assert canvas.shape == (5, 5, 3)
    assert canvas[0, 0, 0] == 0 and canvas[0, 3, 0] == 128 and canvas[3, 0, 0] == 255


def test_tile_clips_what_is_out_of_range():
    assert set(np.unique(tile(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1), gap=0))) == {0, 255}


def test_show_images_draws_into_a_given_axes_and_labels_columns():
    _, ax = plt.subplots()
    drawn = show_images(torch.zeros(4, 3, 8, 8), labels=list("abcd"), title="four", ax=ax)
    assert drawn is ax and ax.get_title() == "four"
    assert [label.get_text() for label in ax.get_xticklabels()] == list("abcd")


def test_plot_loss_shows_the_expected_value():
    ax = plot_loss([1.0, 0.5, 0.25], expected=0.2)
    assert any("0.2" in text.get_text() for text in ax.get_legend().get_texts())


def test_film_is_an_animation_with_alternative_text():
    shown = film([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)], alt="two frames")
    assert Image.open(io.BytesIO(shown.data)).n_frames == 2
    assert shown.alt == "two frames"


def test_display_figure_closes_the_figure_and_keeps_the_text(monkeypatch):
    shown = []
    monkeypatch.setattr("course_utils.plotting.display", shown.append)
    display_figure(show_images(torch.zeros(1, 3, 8, 8)), alt="a grey square")
    assert shown[0].alt == "a grey square" and not plt.get_fignums()


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
    assert run.profile == "quick" and run.device.type == "cpu"
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


class Pixels(nn.Module):
    num_features = 3

    def forward(self, images):
        return images.flatten(1)


def test_frechet_distance_of_known_gaussians():
    """Means 1 apart in each of 3 features, deviations 1 and 2: 3 * (1 + (2 - 1)^2) = 6."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, 1, 1, generator=generator)
    b = 1 + 2 * torch.randn(20_000, 3, 1, 1, generator=generator)
    assert frechet_distance(a, b, Pixels()) == pytest.approx(6, abs=0.2)   # sampling error of n
    assert frechet_distance(a, a, Pixels()) == pytest.approx(0, abs=1e-3)


def test_frechet_distance_needs_two_pictures():
    with pytest.raises(ValueError, match="at least two of each"):
        frechet_distance(torch.zeros(1, 3, 1, 1), torch.zeros(5, 3, 1, 1), Pixels())


def test_digit_judge_learns_and_leaves_the_seed_in_charge():
    labels = torch.arange(2).repeat(32)
    images = labels.view(-1, 1, 1, 1) * 2.0 - torch.ones(64, 1, 8, 8)
    votes = []
    for _ in range(2):
        torch.manual_seed(0)
        judge = DigitJudge(classes=2).fit(images, labels, steps=30)
        votes.append(judge.probabilities(images))
    assert torch.equal(votes[0], votes[1])
    assert (votes[0].argmax(1) == labels).all()
    assert judge(images).shape == (64, judge.num_features)
