"""The functions of the class-conditioned notebook: conditions, guidance and bad input."""

import ast
import json
from pathlib import Path

import pytest
import torch

from course_utils.data import load_images

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "unit2" / "02_class_conditioned_diffusion_model_example.ipynb"
CLASSES, WIDTHS = 10, (16, 32, 32)
WAYS = ("ClassConditionedUnet", "TimeEmbeddingUnet", "CrossAttentionUnet")


@pytest.fixture(scope="module")
def nb():
    """Imports, functions and classes of the notebook's cells, without running the rest."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    space = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and "exercise" not in cell["metadata"].get("tags", []):
            tree = ast.parse("".join(cell["source"]))
            tree.body = [node for node in tree.body if isinstance(node, kept)]
            exec(compile(tree, str(NOTEBOOK), "exec"), space)
    return space


@pytest.fixture(scope="module")
def models(nb):
    torch.manual_seed(0)
    built = {way: nb[way](CLASSES, WIDTHS) for way in WAYS}
    built["pair"] = nb["CrossAttentionUnet"](CLASSES, WIDTHS, length=2)
    return {name: model.eval().requires_grad_(False) for name, model in built.items()}


@pytest.fixture(scope="module")
def scheduler(nb):
    return nb["DDPMScheduler"](num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2",
                               prediction_type="v_prediction")


@pytest.fixture
def xt():
    return torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_label_channels_repeat_the_embedding_at_every_pixel(models):
    model = models["ClassConditionedUnet"]
    maps = model.label_channels(torch.tensor([3, CLASSES]), (16, 12))
    assert maps.shape == (2, 8, 16, 12)
    assert torch.equal(maps[0, :, 5, 7], model.label_embedding.weight[3])
    assert torch.equal(maps, maps[:, :, :1, :1].expand_as(maps))


def test_tokens_are_a_sequence_with_one_vector_per_label(models):
    assert models["CrossAttentionUnet"].tokens(torch.tensor([1, 2])).shape == (2, 1, 64)
    assert models["pair"].tokens(torch.tensor([[1, 2]])).shape == (1, 2, 64)


@pytest.mark.parametrize("way", WAYS)
def test_the_answer_has_the_shape_of_the_picture_and_depends_on_the_label(models, xt, way):
    model = models[way]
    answers = [model(xt[:1], torch.tensor(500), [label]) for label in (0, 1, CLASSES)]
    assert answers[0].shape == xt[:1].shape
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (answers[i] - answers[j]).abs().max() > 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_each_picture_follows_its_own_label(models, xt, way):
    model, t = models[way], torch.tensor(500)
    both = model(xt, t, [4, 7])
    torch.testing.assert_close(both[1:], model(xt[1:], t, [7]), atol=1e-5, rtol=1e-4)


def test_only_positions_tell_a_pair_from_its_swap(nb, models):
    pair, t = models["pair"], torch.tensor(500)
    wide = torch.randn(1, 1, 16, 32, generator=torch.Generator().manual_seed(1))
    swapped = [pair(wide, t, torch.tensor([order])) for order in ([2, 5], [5, 2])]
    assert swapped[0].shape == wide.shape and not torch.allclose(*swapped, atol=1e-4)
    blind = nb["copy"].deepcopy(pair)
    blind.positions.zero_()
    torch.testing.assert_close(*(blind(wide, t, torch.tensor([o])) for o in ([2, 5], [5, 2])))


def test_timesteps_cover_the_whole_range_evenly(nb, scheduler):
    t = nb["draw_timesteps"](200_000, scheduler, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and (t.min(), t.max()) == (0, 999)
    counts = t.bincount(minlength=1000)
    assert len(counts) == 1000 and counts.min() > 120 and counts.max() < 290


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_at_the_stated_rate(nb, rate):
    labels = torch.arange(CLASSES).repeat(10_000)
    dropped = nb["drop_labels"](labels, rate, CLASSES, torch.Generator().manual_seed(0))
    hidden = dropped == CLASSES
    assert hidden.float().mean().item() == pytest.approx(rate, abs=0.006)
    assert torch.equal(dropped[~hidden], labels[~hidden])


def test_a_pair_is_dropped_as_a_whole(nb):
    pairs = torch.zeros(10_000, 2, dtype=torch.long)
    dropped = nb["drop_labels"](pairs, 0.3, CLASSES, torch.Generator().manual_seed(0))
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert (dropped == CLASSES).float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_training_shows_the_model_dropped_labels_and_remembers_it(nb, scheduler):
    class Recorder(torch.nn.Module):
        classes, drop_rate = CLASSES, 0.0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen = []

        def forward(self, xt, t, labels):
            self.seen += labels.tolist()
            return self.weight * xt

    images, labels = torch.zeros(4, 1, 4, 4), torch.tensor([0, 1, 2, 3])
    model = Recorder()
    average, losses, _ = nb["train"](model, images, labels, scheduler, 5, 200, 1e-3, drop_rate=0.2)
    share = model.seen.count(CLASSES) / len(model.seen)
    assert len(losses) == 5 and share == pytest.approx(0.2, abs=0.05)
    assert average.drop_rate == 0.2 and set(model.seen) == {0, 1, 2, 3, CLASSES}
    model = Recorder()
    average, *_ = nb["train"](model, images, labels, scheduler, 5, 20, 1e-3)
    assert average.drop_rate == 0 and CLASSES not in model.seen


@pytest.mark.parametrize("way", WAYS)
def test_guidance_counts_from_no_class(nb, models, xt, way):
    model, t = models[way], torch.tensor(500)
    model.drop_rate = 0.1
    label, no_class = model(xt, t, [1, 2]), model(xt, t, [CLASSES, CLASSES])
    for scale, expected in ((0, no_class), (1, label), (3, 3 * label - 2 * no_class)):
        torch.testing.assert_close(nb["guided"](model, xt, t, [1, 2], scale), expected,
                                   atol=1e-5, rtol=1e-4)


def test_guidance_needs_dropped_labels(nb, models, xt):
    model = nb["copy"].copy(models["TimeEmbeddingUnet"])
    model.drop_rate = 0.0
    with pytest.raises(ValueError, match="trained without dropped labels"):
        nb["guided"](model, xt, torch.tensor(500), [1, 2], 2)


@pytest.mark.parametrize("labels, sentence", [
    ([0, CLASSES + 1], "Label 11 is outside the classes 0 to 9"),
    ([-1, 0], "Label -1 is outside the classes 0 to 9"),
    ([0], r"shape \(1,\), but 2 pictures need \(2,\)"),
    ([0, 1, 2], r"shape \(3,\), but 2 pictures need \(2,\)"),
    ([[0, 1]], r"shape \(1, 2\), but 2 pictures need \(2,\)"),
    (torch.zeros(2, 1, dtype=torch.long), "one label for each"),
    (3, r"shape \(\), but 2 pictures"),
    ([0.0, 1.0], "whole numbers"),
    (torch.tensor([True, False]), "whole numbers"),
    (["3", "7"], "whole numbers"),
    ([[1], [2, 3]], "whole numbers"),
    (None, "whole numbers"),
])
@pytest.mark.parametrize("way", WAYS)
def test_wrong_labels_give_one_sentence(models, xt, way, labels, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        models[way](xt, torch.tensor(500), labels)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


def test_a_pair_model_wants_two_labels_for_each_picture(models, xt):
    with pytest.raises(ValueError, match=r"shape \(2,\), but 2 pictures need \(2, 2\)"):
        models["pair"](xt, torch.tensor(500), [1, 2])


def test_data_without_labels_are_refused(nb):
    bare = load_images("digits", limit=3).remove_columns("label")
    with pytest.raises(ValueError, match="no labels: choose a source with a label column"):
        nb["labelled_tensors"](bare, 16)


def test_labelled_tensors_keeps_pictures_and_labels_together(nb):
    digits = load_images("digits", limit=5)
    images, labels = nb["labelled_tensors"](digits, 16)
    assert images.shape == (5, 1, 16, 16) and labels.tolist() == digits["label"]


def test_the_sampler_reaches_the_picture_of_a_perfect_model(nb, scheduler):
    x0 = load_images_as_tensor(nb)
    noise = nb["make_noise"](len(x0), x0.shape[1:], seed=0)
    assert torch.equal(noise, nb["make_noise"](len(x0), x0.shape[1:], seed=0))

    def perfect(xt, t):
        a = scheduler.alphas_cumprod[t]
        return (a.sqrt() * xt - x0) / (1 - a).sqrt()

    states = nb["sample"](perfect, noise, scheduler, 20)
    assert len(states) == 21 and torch.equal(states[0], noise)
    torch.testing.assert_close(states[-1], x0, atol=1e-3, rtol=0)


def load_images_as_tensor(nb):
    return nb["labelled_tensors"](load_images("digits", limit=4), 16)[0]


def test_pairs_hold_the_pictures_of_their_labels(nb):
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(-1, 1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    pairs, labels = nb["side_by_side"](images, torch.arange(5), 50, generator)
    assert pairs.shape == (50, 1, 4, 8) and labels.shape == (50, 2)
    assert torch.equal(pairs[:, 0, 0, 0].long(), labels[:, 0])
    assert torch.equal(pairs[:, 0, 0, -1].long(), labels[:, 1])


def test_the_upscaler_depends_on_the_small_picture(nb):
    torch.manual_seed(0)
    model = nb["UpscalingUnet"](WIDTHS).eval()
    xt = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        dark, light = (model(xt, torch.tensor(500), torch.full((1, 3, 4, 4), shade))
                       for shade in (-1.0, 1.0))
    assert dark.shape == xt.shape and not torch.allclose(dark, light, atol=1e-4)
    assert nb["enlarge"](torch.zeros(1, 3, 4, 4), (16, 16)).shape == (1, 3, 16, 16)


def test_match_rate_and_variety_measure_what_they_say(nb):
    class Judge:
        def probabilities(self, pictures):
            return torch.nn.functional.one_hot(pictures[:, 0, 0, 0].long(), 3).float()

    pictures = torch.tensor([0.0, 1, 2, 0]).view(4, 1, 1, 1)
    assert nb["match_rate"](Judge(), pictures, torch.tensor([0, 1, 1, 2])) == 0.5
    labels = torch.tensor([0, 0, 1, 1])
    spread = torch.tensor([-1.0, 1, -1, 1]).view(4, 1, 1, 1)
    assert nb["variety"](spread, labels).item() == pytest.approx(1)
    assert nb["variety"](spread.abs(), labels).item() == 0
