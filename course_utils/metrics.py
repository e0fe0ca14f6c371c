"""One ruler for drawings, digits and photographs, and a judge of classes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

FEWEST = 64                                     # pictures; below it the floor hides real damage


class RandomFeatures(nn.Module):
    """Features of a fixed, untrained network: (N, 1 or 3, H, W) in [-1, 1] -> (N, 96).

    Three convolutions with random weights; of each one's 16 channels, the mean and the deviation
    over all places. Naeem et al. 2020 (arXiv:2002.09797) recommend untrained networks for pictures
    unlike ImageNet's.
    """

    num_features = 96

    def __init__(self, seed: int = 2):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for i, inputs in enumerate((3, 16, 16)):
            weight = torch.randn(16, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
            self.register_buffer(f"weight{i}", weight)

    def forward(self, images):
        h, found = images.expand(-1, 3, -1, -1), []
        for weight in self.buffers():
            h = F.conv2d(F.pad(h, (1, 1, 1, 1), mode="reflect"), weight, stride=2)
            h = F.leaky_relu(h, 0.2)                                    # (N, 16, H / 2, W / 2)
            found += [h.mean((2, 3)), h.std((2, 3))]
        return torch.cat(found, dim=1)


class _Given(nn.Identity):
    """Hands features that are ready to torchmetrics."""

    num_features = RandomFeatures.num_features


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance between two sets of features (N, 96) (Heusel et al. 2017, eq. 6)."""
    metric = FrechetInceptionDistance(feature=_Given())
    metric.update(first, real=True)
    metric.update(second, real=False)
    return metric.compute().item()


class Measured(NamedTuple):
    """A distance and its floor, each with its spread (one standard deviation)."""

    distance: float
    spread: float
    floor: float
    floor_spread: float
    n: int

    def __str__(self):
        return (f"{self.distance:.2f} ± {self.spread:.2f}, {self.distance / self.floor:.1f} times "
                f"the floor of {self.floor:.2f} ± {self.floor_spread:.2f} ({self.n} pictures)")


@torch.no_grad()
def measure(pictures: torch.Tensor, real: torch.Tensor, resamples: int = 8) -> Measured:
    """Fréchet distance of pictures (N, C, H, W) in [-1, 1] to real ones, beside its floor.

    Both are taken at the same n, the smaller of N and half of the real pictures, because the
    distance of few pictures is too large: the floor, between two disjoint sets of n real pictures,
    shows by how much. Each of `resamples` draws takes new real sets; eight give a spread that is
    itself uncertain by a quarter. Half of the generated pictures is drawn anew for the spread,
    which makes it that of all of them (the jackknife of Shao and Wu 1989, half left out).
    Raises ValueError below 64 pictures, and below 9 x 9 pixels.
    """
    n = min(len(pictures), len(real) // 2)
    if n < FEWEST:
        raise ValueError(f"Got {len(pictures)} pictures and {len(real)} real ones: give at least "
                         f"{FEWEST} and {2 * FEWEST}, fewer cannot be told from noise.")
    if min(size := tuple(pictures.shape[-2:])) < 9:     # else a deviation of one place
        raise ValueError(f"Got pictures of {size} pixels: give at least 9 x 9.")
    network = RandomFeatures().to(pictures.device)
    made, true = (torch.cat([network(part) for part in images.to(pictures.device).split(256)]).cpu()
                  for images in (pictures, real))
    mean, deviation = true.mean(0), true.std(0) + 1e-6
    made, true = (made - mean) / deviation, (true - mean) / deviation
    generator, distances, halves, floors = torch.Generator().manual_seed(0), [], [], []
    for _ in range(resamples):
        reference, other = true[torch.randperm(len(true), generator=generator)][:2 * n].split(n)
        order = torch.randperm(len(made), generator=generator)[:n]
        distances.append(frechet_distance(reference, made[order]))
        halves.append(frechet_distance(reference, made[order[:n // 2]]))
        floors.append(frechet_distance(reference, other))
    distances, halves, floors = map(torch.tensor, (distances, halves, floors))
    return Measured(distances.mean().item(), halves.std().item(), floors.mean().item(),
                    floors.std().item(), n)


def nearest(pictures: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance (RMS per pixel) to, and index of, the nearest of `others`, each (N,)."""
    found = torch.cdist(pictures.flatten(1), others.flatten(1)).min(dim=1)
    return found.values / pictures[0].numel() ** 0.5, found.indices


def match_rate(seen, asked) -> tuple[float, float, float]:
    """Share of `seen` (N,) that equals `asked` (N,), and its 95 % interval (Wilson 1927)."""
    hits = sum(bool(one == other) for one, other in zip(seen, asked, strict=True))
    interval = binomtest(hits, len(asked)).proportion_ci(method="wilson")
    return hits / len(asked), interval.low, interval.high


def train_judge(images: torch.Tensor, labels: torch.Tensor, classes: int = 10, steps: int = 400,
                seed: int = 0) -> nn.Module:
    """A small classifier that judges samples: pictures (N, C, H, W) in [-1, 1] -> (N, classes).

    It returns probabilities. Train it on pictures that the judged model never sees; here they are
    shifted by up to one pixel.
    """
    torch.manual_seed(seed)
    judge, inputs = nn.Sequential(), images.shape[1]
    for outputs, stride in ((32, 1), (64, 2), (64, 2)):
        judge += nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1),
                               nn.BatchNorm2d(outputs), nn.ReLU())
        inputs = outputs
    judge += nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3),
                           nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, classes))
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        logits = judge(images[rows].roll(shift, (2, 3)))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.append(nn.Softmax(1)).eval().requires_grad_(False)
