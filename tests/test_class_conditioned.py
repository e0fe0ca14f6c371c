"""The functions of the class-conditioned notebook: conditions, training and guidance."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from course_utils.data import load_images

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "unit2" / "02_class_conditioned_diffusion_model_example.ipynb"
CLASSES, SIZE, WIDTHS = 10, 12, (32, 32, 32)
WAYS = ("ChannelsUnet", "EmbeddingUnet", "AttentionUnet")


def plain_dict(node):
    value = getattr(node, "value", None)
    return isinstance(value, ast.Dict) and all(isinstance(v, ast.Constant) for v in value.values)


@pytest.fixture(scope="module")
def nb():
    """Imports, functions, classes and plain dicts of the notebook's cells, not the rest."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    space = {"device": torch.device("cpu"), "run": SimpleNamespace(bf16=False)}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and "exercise" not in cell["metadata"].get("tags", []):
            tree = ast.parse("".join(cell["source"]))
            tree.body = [node for node in tree.body if isinstance(node, kept) or plain_dict(node)]
            exec(compile(tree, str(NOTEBOOK), "exec"), space)
    return space


def fixed(model):
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models(nb):
    torch.manual_seed(0)
    return {way: fixed(nb[way](CLASSES + 1, SIZE, WIDTHS)) for way in WAYS}


@pytest.fixture(scope="module")
def scheduler(nb):
    return nb["DDPMScheduler"](beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                               timestep_spacing="trailing")


@pytest.fixture
def xt():
    return torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("way", WAYS)
def test_the_label_has_no_way_in_but_its_vector(nb, models, xt, way):
    model = nb["copy"].deepcopy(models[way])
    model.table.weight[1] = model.table.weight[0]
    answers = [model(xt, torch.tensor(500), torch.tensor([k, k])) for k in (0, 1)]
    assert torch.equal(*answers)


def test_what_the_ways_are_told(models):
    two, pair = torch.tensor([1, 2]), torch.tensor([[1, 2]])
    assert models["ChannelsUnet"].told(two).shape == (2, 8, 1, 1)
    assert models["EmbeddingUnet"].told(two).shape == (2, 128)
    assert models["AttentionUnet"].told(two).shape == (2, 1, 64)
    assert models["AttentionUnet"].told(pair).shape == (1, 2, 64)
    table = models["EmbeddingUnet"].table.weight
    torch.testing.assert_close(models["EmbeddingUnet"].told(pair)[0], table[1] + table[2])


def test_a_label_fills_its_channels(nb):
    vector = torch.randn(1, 8, 1, 1)
    maps = nb["enlarge"](vector, (12, 10))
    assert maps.shape == (1, 8, 12, 10)
    torch.testing.assert_close(maps, vector.expand_as(maps))


def test_a_whole_network_hears_the_extra_channels_about_as_loudly_with_32_groups(nb, xt):
    """What is lost in one layer finds ways around it: RMS from one label to the next."""
    heard = {}
    for groups in (32, 8):
        total = 0.0
        for seed in range(3):
            torch.manual_seed(seed)
            model = nb["ChannelsUnet"](CLASSES + 1, SIZE, (32, 64, 64))
            torch.manual_seed(seed)
            model.unet = nb["UNet2DModel"].from_config(model.unet.config, norm_num_groups=groups)
            answers = torch.stack([fixed(model)(xt, torch.tensor(500), torch.tensor([k, k]))
                                   for k in range(CLASSES)])
            total += answers.diff(dim=0).square().mean().sqrt().item() / 3
        heard[groups] = total
    assert heard[32] == pytest.approx(0.4, abs=0.06)
    assert heard[8] == pytest.approx(0.35, abs=0.06)


def test_only_positions_tell_a_pair_from_its_swap(nb, models):
    t, orders = torch.tensor(500), [torch.tensor([pair]) for pair in ([2, 5], [5, 2])]
    wide = torch.randn(1, 1, SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(1))
    for way in ("EmbeddingUnet", "AttentionUnet"):
        torch.testing.assert_close(*(models[way](wide, t, order) for order in orders))
    placed = nb["copy"].deepcopy(models["AttentionUnet"])
    placed.positions = torch.nn.Parameter(torch.randn(2, 64), requires_grad=False)
    swapped = [placed(wide, t, order) for order in orders]
    assert swapped[0].shape == wide.shape and not torch.allclose(*swapped, atol=1e-4)


def test_the_map_is_what_the_layer_does(nb, models):
    """Weights sum to 1 over the tokens; weighing the values with them gives the layer's answer."""
    model, labels = models["AttentionUnet"], torch.tensor([[2, 5], [7, 1]])
    wide = torch.randn(2, 1, SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(1))
    layer = model.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2
    given = {}
    hook = layer.register_forward_hook(lambda _, places, told, answer: given.update(
        places=places[0], tokens=told["encoder_hidden_states"], answer=answer), with_kwargs=True)
    maps = nb["attention_map"](model, wide, torch.tensor(500), labels)
    hook.remove()
    assert maps.shape == (2, 2, SIZE // 2, SIZE)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, SIZE // 2, SIZE))
    heads = [layer.head_to_batch_dim(z) for z in (layer.to_q(given["places"]),
                                                  layer.to_k(given["tokens"]),
                                                  layer.to_v(given["tokens"]))]
    weights = layer.get_attention_scores(*heads[:2])
    answer = layer.to_out[0](layer.batch_to_head_dim(weights @ heads[2]))
    torch.testing.assert_close(answer, given["answer"], atol=1e-5, rtol=1e-4)
    mean = weights.view(2, -1, *weights.shape[1:]).mean(1)           # (B, places, L)
    torch.testing.assert_close(maps.flatten(2), mean.mT)


def test_timesteps_are_densest_where_the_label_decides(nb):
    """The fourth smallest of six random numbers has the distribution Beta(4, 3)."""
    t = nb["draw_middle_timesteps"](200_000, 1000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and 0 <= t.min() < 60 and 980 < t.max() <= 999
    assert abs(t.float().mean() - 570.9) < 2     # mean 4/7; five standard errors
    assert abs(t.float().std() - 175) < 2        # variance 4 * 3 / (7**2 * 8)


class Recorder(torch.nn.Module):
    """Notes the labels that it is told."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, xt, t, labels):
        self.seen += labels.tolist()
        return self.weight * xt


@pytest.mark.parametrize("bf16", [False, True])
def test_training_takes_bfloat16_where_the_run_says_so_and_keeps_float32_weights(
        nb, monkeypatch, bf16):
    monkeypatch.setattr(nb["run"], "bf16", bf16)
    model, seen = torch.nn.Linear(4, 4), []

    def loss_of(model, generator):
        seen.append(model(torch.ones(1, 4)).dtype)
        return model(torch.ones(1, 4)).square().mean()

    average, _ = nb["train"](model, loss_of, 2, 1e-3)
    assert seen == 2 * [torch.bfloat16 if bf16 else torch.float32]
    assert model.weight.dtype == average.weight.dtype == torch.float32


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("method", ["muon", "adamw"])
def test_training_hides_labels_at_the_stated_rate_and_averages_the_weights(
        nb, scheduler, rate, method):
    images, labels, model = torch.zeros(4, 1, 4, 4), torch.tensor([0, 1, 2, 3]), Recorder()
    loss_of = nb["labelled_loss"](images, labels, scheduler, 200, rate, CLASSES)
    optimiser = {"muon": nb["Muon"], "adamw": torch.optim.AdamW}[method]
    average, losses = nb["train"](model, loss_of, 5, 1e-3, method=optimiser)
    assert len(losses) == 5 and len(model.seen) == 1000
    assert model.seen.count(CLASSES) / 1000 == pytest.approx(rate, abs=0.05 if 0 < rate < 1 else 0)
    assert set(model.seen) - {CLASSES} == (set() if rate == 1 else {0, 1, 2, 3})
    assert labels.tolist() == [0, 1, 2, 3]                            # the data stay as they are
    assert 0 < average.weight.abs() < model.weight.abs()


def test_no_class_is_taught_without_changing_a_digit(nb, models, scheduler, xt):
    """Every label hidden, all but the table frozen: one row moves, what labels get stays."""
    writer = models["EmbeddingUnet"]
    pupil = nb["copy"].deepcopy(writer)
    pupil.table.requires_grad_(True)
    lesson = nb["labelled_loss"](xt, torch.tensor([3, 7]), scheduler, 4, 1.0, CLASSES)
    free_writer, _ = nb["train"](pupil, lesson, 4, 5e-2)
    moved = (free_writer.table.weight - writer.table.weight).abs().amax(1)
    assert moved[CLASSES] > 1e-3 and not moved[:CLASSES].any()
    told = [m(xt, torch.tensor(500), torch.tensor([3, 7])) for m in (writer, free_writer)]
    assert torch.equal(*told)


def test_a_pair_is_hidden_as_a_whole_and_pictures_keep_their_labels(nb, scheduler):
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(-1, 1, 4, 4) / 4
    pairs, model = torch.arange(4).view(4, 1).repeat(1, 2), Recorder()
    loss_of = nb["labelled_loss"](images, pairs, scheduler, 2000, 0.3, CLASSES)
    loss_of(model, torch.Generator().manual_seed(0))
    seen = torch.tensor(model.seen)
    assert torch.equal(seen[:, 0], seen[:, 1])
    assert (seen == CLASSES).float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_the_loss_of_a_perfect_model_is_zero(nb, scheduler):
    """Told the picture itself as its condition, it knows v: pictures and conditions match."""
    class Perfect(torch.nn.Linear):
        def forward(self, xt, t, x0):
            a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
            return (a.sqrt() * xt - x0) / (1 - a).sqrt()

    images = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss_of = nb["labelled_loss"](images, images, scheduler, 16)
    assert loss_of(Perfect(1, 1), torch.Generator().manual_seed(1)) < 1e-8


def test_regression_compares_with_the_picture_of_the_small_one_without_noise(nb):
    class Known(torch.nn.Module):
        def forward(self, xt, t, small):
            assert not xt.any() and t == 0
            return small.expand_as(xt)

    images = torch.arange(8.0).view(8, 1, 1, 1).expand(-1, 3, 8, 8)
    loss_of = nb["regression_loss"](images, images[:, :, :2, :2].mean((2, 3), True), 16)
    assert loss_of(Known(), torch.Generator().manual_seed(0)) == 0


def test_the_sampler_reaches_the_picture_of_a_perfect_model(nb, scheduler):
    x0, labels = nb["labelled"](load_images("digits", limit=4), SIZE, 1)
    assert x0.shape == (4, 1, SIZE, SIZE) and labels.tolist() == [0, 1, 2, 3]
    noise = nb["make_noise"](len(x0), x0.shape[1:], seed=0)

    def perfect(xt, t):
        a = scheduler.alphas_cumprod[t]
        return (a.sqrt() * xt - x0) / (1 - a).sqrt()

    solver = nb["DPMSolverMultistepScheduler"].from_config(scheduler.config)
    torch.testing.assert_close(nb["sample"](perfect, noise, solver, 20), x0, atol=1e-3, rtol=0)


def test_the_margin_is_cut_off_evenly(nb):
    dataset = load_images("digits", limit=6)
    whole, cut = nb["labelled"](dataset, 14)[0], nb["labelled"](dataset, 12, 1)[0]
    assert torch.equal(cut, whole[:, :, 1:-1, 1:-1])


def test_asking_hands_the_labels_to_the_model(nb):
    predict = nb["ask"](lambda xt, t, labels: (xt, t, labels), torch.tensor([3, 7]))
    xt = torch.zeros(2, 1, 4, 4)
    assert predict(xt, 5)[:2] == (xt, 5) and predict(xt, 5)[2].tolist() == [3, 7]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_in_v_is_guidance_in_the_noise(nb, scheduler, models, xt, scale):
    """The second route: at a given xt the noise is a straight-line function of v."""
    model, t = models["EmbeddingUnet"], torch.tensor(600)
    labels, start = torch.tensor([3, 4]), torch.tensor([CLASSES, CLASSES])
    a = scheduler.alphas_cumprod[t]

    def eps(v):
        return a.sqrt() * v + (1 - a).sqrt() * xt

    told, untold = eps(model(xt, t, labels)), eps(model(xt, t, start))
    answer = nb["guided"](model, labels, start, scale)(xt, t)
    torch.testing.assert_close(eps(answer), untold + scale * (told - untold), atol=1e-5, rtol=1e-4)


def test_the_score_in_the_plane_is_the_gradient_of_log_p(nb):
    """And the difference of two scores is the gradient of log p(y | x): Bayes."""
    centres, sigma = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.5]]), 0.8
    nb |= {"centres": centres, "sigma": sigma}
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = -torch.cdist(x, centres).square() / (2 * sigma**2)
    share = logits.softmax(1)
    plain, told = (nb["score"](x, s).detach() for s in (share, torch.tensor([[0.0, 1.0, 0.0]])))
    density, = torch.autograd.grad(logits.logsumexp(1).sum(), x, retain_graph=True)
    posterior, = torch.autograd.grad(share[:, 1].log().sum(), x)
    torch.testing.assert_close(plain, density, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(told - plain, posterior, atol=1e-4, rtol=1e-3)


def test_pairs_hold_the_pictures_of_their_labels(nb):
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(-1, 1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    pairs, labels = nb["side_by_side"](images, torch.arange(5), 50, generator)
    assert pairs.shape == (50, 1, 4, 8) and labels.shape == (50, 2)
    assert torch.equal(pairs[:, 0, 0, 0].long(), labels[:, 0])
    assert torch.equal(pairs[:, 0, 0, -1].long(), labels[:, 1])


def test_the_upscaler_depends_on_the_small_picture(nb):
    torch.manual_seed(0)
    model = fixed(nb["UpscalingUnet"](1, 16, WIDTHS, 3, 3))
    xt = torch.randn(1, 3, 16, 16)
    dark, light = (model(xt, torch.tensor(500), torch.full((1, 3, 4, 4), shade))
                   for shade in (-1.0, 1.0))
    assert dark.shape == xt.shape and not torch.allclose(dark, light, atol=1e-4)


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
    assert nb["variety"](pictures, labels) == pytest.approx(0.3, abs=0.01)
    assert nb["variety"](labels.float().view(-1, 1, 1, 1), labels) == 0
