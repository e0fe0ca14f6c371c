"""The functions of the class-conditioned notebook: conditions, training and guidance."""

import ast
import json
from pathlib import Path

import pytest
import torch

from course_utils.data import load_images

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "unit2" / "02_class_conditioned_diffusion_model_example.ipynb"
CLASSES, SIZE, WIDTHS = 10, 16, (16, 32, 32)
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
    built = {way: nb[way](CLASSES, SIZE, WIDTHS) for way in WAYS}
    built["pair"] = nb["CrossAttentionUnet"](CLASSES, SIZE, WIDTHS, length=2)
    return {name: model.eval().requires_grad_(False) for name, model in built.items()}


@pytest.fixture(scope="module")
def scheduler(nb):
    return nb["DDPMScheduler"](num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2",
                               prediction_type="v_prediction", timestep_spacing="trailing")


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
    answers = [model(xt[:1], torch.tensor(500), torch.tensor([k])) for k in (0, 1, CLASSES)]
    assert answers[0].shape == xt[:1].shape
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (answers[i] - answers[j]).abs().max() > 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_each_picture_follows_its_own_label(models, xt, way):
    model, t = models[way], torch.tensor(500)
    both = model(xt, t, torch.tensor([4, 7]))
    torch.testing.assert_close(both[1:], model(xt[1:], t, torch.tensor([7])), atol=1e-5, rtol=1e-4)


def test_only_positions_tell_a_pair_from_its_swap(nb, models):
    pair, t = models["pair"], torch.tensor(500)
    wide = torch.randn(1, 1, 16, 32, generator=torch.Generator().manual_seed(1))
    swapped = [pair(wide, t, torch.tensor([order])) for order in ([2, 5], [5, 2])]
    assert swapped[0].shape == wide.shape and not torch.allclose(*swapped, atol=1e-4)
    blind = nb["copy"].deepcopy(pair)
    blind.positions.zero_()
    torch.testing.assert_close(*(blind(wide, t, torch.tensor([o])) for o in ([2, 5], [5, 2])))


def test_timesteps_reach_the_last_one_and_prefer_the_noisy_half(nb):
    t = nb["draw_timesteps"](200_000, 1000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() == 999
    assert (t >= 500).float().mean() > 0.6 and (t < 500).any()


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


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_training_hides_labels_at_the_stated_rate_and_averages_the_weights(nb, scheduler, rate):
    class Recorder(torch.nn.Module):
        classes = CLASSES

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen = []

        def forward(self, xt, t, labels):
            self.seen += labels.tolist()
            return self.weight * xt

    images, labels = torch.zeros(4, 1, 4, 4), torch.tensor([0, 1, 2, 3])
    model = Recorder()
    loss_of = nb["conditioned_loss"](images, labels, scheduler, 200, rate)
    average, losses = nb["train"](model, loss_of, 5, 1e-3)
    assert len(losses) == 5 and len(model.seen) == 1000
    assert model.seen.count(CLASSES) / 1000 == pytest.approx(rate, abs=0.05 if rate else 0)
    assert set(model.seen) - {CLASSES} == {0, 1, 2, 3}
    assert 0 < average.weight.abs() < model.weight.abs()


def test_the_loss_of_a_perfect_model_is_zero(nb, scheduler):
    class Perfect(torch.nn.Linear):
        def forward(self, xt, t, x0):
            a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
            return (a.sqrt() * xt - x0) / (1 - a).sqrt()

    images = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss_of = nb["conditioned_loss"](images, images, scheduler, 16)
    assert loss_of(Perfect(1, 1), torch.Generator().manual_seed(1)) < 1e-8


@pytest.mark.parametrize("way", WAYS)
def test_guidance_counts_from_no_class(nb, models, xt, way):
    model, t, labels = models[way], torch.tensor(500), torch.tensor([1, 2])
    label, no_class = model(xt, t, labels), model(xt, t, torch.tensor([CLASSES, CLASSES]))
    for scale, expected in ((0, no_class), (1, label), (3, 3 * label - 2 * no_class)):
        torch.testing.assert_close(nb["guided"](model, xt, t, labels, CLASSES, scale), expected,
                                   atol=1e-5, rtol=1e-4)


def test_data_without_labels_are_refused(nb):
    bare = load_images("digits", limit=3).remove_columns("label")
    with pytest.raises(ValueError, match="no labels: choose a source with a label column"):
        nb["labelled_tensors"](bare, 16)


def test_labelled_tensors_keeps_pictures_and_labels_together(nb):
    digits = load_images("digits", limit=5)
    images, labels = nb["labelled_tensors"](digits, 16)
    assert images.shape == (5, 1, 16, 16) and labels.tolist() == digits["label"]


def test_the_sampler_reaches_the_picture_of_a_perfect_model(nb, scheduler):
    x0 = nb["labelled_tensors"](load_images("digits", limit=4), SIZE)[0]
    noise = nb["seeded_noise"](len(x0), x0.shape[1:], seed=0)
    assert torch.equal(noise, nb["seeded_noise"](len(x0), x0.shape[1:], seed=0))

    def perfect(xt, t):
        a = scheduler.alphas_cumprod[t]
        return (a.sqrt() * xt - x0) / (1 - a).sqrt()

    solver, heard = nb["DPMSolverMultistepScheduler"].from_config(scheduler.config), []
    made = nb["sample"](nb["listen"](perfect, heard), noise, solver, 20)
    torch.testing.assert_close(made, x0, atol=1e-3, rtol=0)
    assert len(heard) == 20 and heard[0][0] == 999 and torch.equal(heard[0][1], noise)
    assert torch.equal(made, nb["sample"](perfect, noise, solver, 20))


def test_asking_hands_the_condition_to_the_model(nb):
    predict = nb["ask_for"](lambda xt, t, condition: (xt, t, condition), torch.tensor([3, 7]))
    xt = torch.zeros(2, 1, 4, 4)
    assert predict(xt, 5)[:2] == (xt, 5) and predict(xt, 5)[2].tolist() == [3, 7]


def test_pairs_hold_the_pictures_of_their_labels(nb):
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(-1, 1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    pairs, labels = nb["side_by_side"](images, torch.arange(5), 50, generator)
    assert pairs.shape == (50, 1, 4, 8) and labels.shape == (50, 2)
    assert torch.equal(pairs[:, 0, 0, 0].long(), labels[:, 0])
    assert torch.equal(pairs[:, 0, 0, -1].long(), labels[:, 1])


def test_the_upscaler_depends_on_the_small_picture(nb):
    torch.manual_seed(0)
    model = nb["UpscalingUnet"](SIZE, WIDTHS).eval()
    xt = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        dark, light = (model(xt, torch.tensor(500), torch.full((1, 3, 4, 4), shade))
                       for shade in (-1.0, 1.0))
    assert dark.shape == xt.shape and not torch.allclose(dark, light, atol=1e-4)
    assert nb["enlarge"](torch.zeros(1, 3, 4, 4), (16, 16)).shape == (1, 3, 16, 16)


def test_the_judge_is_asked_about_all_pictures_in_parts(nb):
    sizes = []

    def judge(pictures):
        sizes.append(len(pictures))
        return torch.nn.functional.one_hot(pictures[:, 0, 0, 0].long(), 3).float()

    classes = torch.arange(2500) % 3
    assert torch.equal(nb["seen_by"](judge, classes.float().view(-1, 1, 1, 1)), classes)
    assert sizes == [1000, 1000, 500]


def test_variety_is_the_deviation_within_a_class(nb):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(1000)
    pictures = 0.3 * torch.randn(4000, 1, 2, 2, generator=generator) + labels.view(-1, 1, 1, 1)
    assert nb["variety"](pictures, labels).item() == pytest.approx(0.3, abs=0.01)
    assert nb["variety"](labels.float().view(-1, 1, 1, 1), labels).item() == 0
