"""The ruler sees damage as the eye does; the judge learns; intervals and neighbours are right."""

import math
from functools import lru_cache

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from course_utils import metrics
from course_utils.data import load_images, to_tensor

N = 256
KINDS = ("textures", "butterflies", "digits")


def draw_textures(count, size=32):
    """Smooth random colours whose spectrum falls as a photograph's does: (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.fft.fftfreq(2 * size)
    falloff = torch.hypot(frequency[:, None], frequency).clamp(min=0.5 / size) ** -1.5
    waves = torch.fft.fft2(torch.randn(count, 3, 2 * size, 2 * size, generator=generator)) * falloff
    light, warm, green = torch.fft.ifft2(waves).real[..., :size, :size].unbind(1)
    x = torch.stack([light + 0.5 * warm, light + 0.2 * green, light - 0.6 * warm], 1)
    contrast = 0.2 + 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    return (x / x.std((1, 2, 3), keepdim=True) * contrast).clamp(-1, 1)


@lru_cache
def load(kind):
    """256 pictures, and 512 others of the same kind to measure them with."""
    if kind == "textures":
        x = draw_textures(3 * N)
    elif kind == "digits":                       # mixed: neighbours in MNIST share a hand
        x = to_tensor(load_images("digits", "test"), 28, channels=1)
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:3 * N]]
    else:
        x = to_tensor(load_images(kind, "test", 3 * N), 32)
    return x[:N], x[N:]


def damage(x):
    """Pictures damaged in several ways, each way from weak to strong."""
    generator, middle = torch.Generator().manual_seed(0), x.shape[-1] // 2
    noise = torch.randn(x.shape, generator=generator)
    ways = {
        "noise": [(x + sigma * noise).clamp(-1, 1) for sigma in (0.1, 0.2, 0.4)],
        "blur": [gaussian_blur(x, 7, sigma) for sigma in (0.5, 1.0)],
        "repeated": [x[:kept].repeat(N // kept, 1, 1, 1) for kept in (64, 32, 16)],
        "half another": [torch.cat([x.roll(1, 0)[..., :middle], x[..., middle:]], -1)],
        "halves exchanged": [x.roll(middle, -1)],
        "grey": [x.mean((1, 2, 3), keepdim=True).expand_as(x)],
        "plain noise": [noise.clamp(-1, 1)],
        "garbage": [noise.sign()],
    }
    if x.shape[1] == 3:
        other = x[:, [1, 2, 0]]
        ways["colours mixed"] = [x.lerp(other, share) for share in (0.125, 0.25, 0.5)]
        ways["colours exchanged"] = [other]
    return ways


def spreads_apart(measured):
    """How many spreads, of the distance and of the floor together, lie between the two."""
    spread = math.hypot(measured.spread, measured.floor_spread)
    return (measured.distance - measured.floor) / spread


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [2, 0, 1])
def test_more_damage_is_farther(kind, seed, monkeypatch):
    """Every way ranks by its strength, garbage comes last, with these random weights or others."""
    draw = metrics.RandomFeatures
    monkeypatch.setattr(metrics, "RandomFeatures", lambda: draw(seed))
    made, real = load(kind)
    worst = {}
    for way, pictures in damage(made).items():
        found = [metrics.measure(x, real, resamples=4 if seed == 2 else 2) for x in pictures]
        assert found == sorted(found), way       # by distance, which comes first
        worst[way] = found[-1]
        assert spreads_apart(found[-1]) > (3 if seed == 2 else 1), way
    assert max(worst, key=worst.get) == "garbage"


@pytest.mark.parametrize("kind", KINDS)
def test_real_pictures_are_not_told_apart(kind):
    made, real = load(kind)
    measured = metrics.measure(made, real)
    assert abs(spreads_apart(measured)) < 3 and measured.n == N
    assert metrics.measure(made.expand(-1, 3, -1, -1), real) == measured, "grey is equal colours"
    assert f"({N} pictures)" in str(measured)


def test_the_floor_shares_no_picture(monkeypatch):
    pairs = []
    monkeypatch.setattr(metrics, "frechet_distance", lambda *pair: pairs.append(pair) or 0.0)
    metrics.measure(*load("textures"))
    assert len(pairs) == 3 * 8 and all(torch.cdist(*pair).min() > 1e-3 for pair in pairs)


@pytest.mark.parametrize("made, real", [(63, 128), (64, 127)])
def test_too_few_pictures(made, real):
    with pytest.raises(ValueError, match=f"Got {made} pictures and {real} real .* 64 and 128"):
        metrics.measure(torch.zeros(made, 1, 8, 8), torch.zeros(real, 1, 8, 8))


def test_the_smallest_pictures():
    x = torch.rand(128, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.tensor(metrics.measure(x[:64], x)).isfinite().all()
    with pytest.raises(ValueError, match=r"Got pictures of \(8, 9\) pixels: .* 9 x 9"):
        metrics.measure(x[:64, :, 1:], x[:, :, 1:])


def test_frechet_distance_of_known_gaussians():
    """Of x and 1 + 2 x with mean 0: one for each of 96 features, and the trace of (2 - 1)^2 cov."""
    x = torch.randn(500, 96, generator=torch.Generator().manual_seed(0))
    x -= x.mean(0)
    expected = 96 + x.var(0).sum().item()
    assert metrics.frechet_distance(x, 1 + 2 * x) == pytest.approx(expected, rel=1e-3)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("seen, asked, expected", [
    (torch.ones(64), torch.ones(64), (1, 0.9434, 1)),
    (["red"] * 10, ["blue"] * 10, (0, 0, 0.2775)),
    (["a", "b"], ["a", "c"], (0.5, 0.0945, 0.9055)),
])
def test_match_rate(seen, asked, expected):
    assert metrics.match_rate(seen, asked) == pytest.approx(expected, abs=1e-4)


def test_nearest_finds_who_was_copied():
    others = load("textures")[1][:20]
    distances, indices = metrics.nearest(others[[7, 3]] + 0.01, others)
    assert indices.tolist() == [7, 3]
    torch.testing.assert_close(distances, torch.full((2,), 0.01), rtol=1e-2, atol=0)


def test_judge_learns_digits():
    digits = load_images("digits", limit=1000)
    images, labels = to_tensor(digits, 16, channels=1), torch.tensor(digits["label"])
    judge = metrics.train_judge(images[:500], labels[:500], steps=100)
    seen = judge(images[500:])
    torch.testing.assert_close(seen.sum(1), torch.ones(500))
    assert metrics.match_rate(seen.argmax(1), labels[500:])[0] > 0.7
