"""Fréchet distance between sets of pictures, in the features of a small network."""

from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

PRETRAINED = Path(__file__).parent / "pretrained"


class ClipFeatures(nn.Module):
    """Image features of the course's small CLIP: (N, 1 or 3, H, W) in [-1, 1] -> (N, 128)."""

    num_features = 128

    def __init__(self):
        super().__init__()
        self.clip = open_clip.create_model(f"local-dir:{PRETRAINED / 'clip-butterflies'}")
        self.eval().requires_grad_(False)

    def forward(self, images):
        images = images.expand(-1, 3, -1, -1)
        if images.shape[-1] != 32:
            images = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
        return self.clip.encode_image(images)


def frechet_distance(real: torch.Tensor, generated: torch.Tensor, extractor: nn.Module) -> float:
    """Fréchet distance between two sets of pictures (Heusel et al. 2017, eq. 6).

    `extractor` maps pictures to features (N, num_features). Compare it only with distances at
    the same number of pictures: the fewer there are, the larger it is, even for two real sets.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"Got {len(real)} real and {len(generated)} generated pictures: "
                         "the Fréchet distance needs at least two of each.")
    metric = FrechetInceptionDistance(feature=extractor)
    for images, is_real in ((real, True), (generated, False)):
        for batch in images.split(256):
            metric.update(batch, real=is_real)
    return metric.compute().item()


class DigitJudge(nn.Module):
    """A small classifier whose features and opinions judge samples: (N, 1, H, W) -> (N, 64).

    Train it with `fit` on pictures that the judged model never sees.
    """

    num_features = 64

    def __init__(self, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, 64), nn.ReLU())
        self.classify = nn.Linear(64, classes)

    def fit(self, images: torch.Tensor, labels: torch.Tensor, steps: int = 400, seed: int = 0):
        """Train on pictures (N, 1, H, W) in [-1, 1], shifted by up to one pixel; returns self."""
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        self.train()
        for _ in range(steps):
            rows = torch.randint(len(images), (64,), generator=generator)
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            batch = images[rows].roll(shift, (2, 3))
            logits = self.classify(self.features(batch))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self.eval().requires_grad_(False)

    def forward(self, images):
        return self.features(images)

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Class probabilities (N, classes); the share of samples above 0.9 is "recognised"."""
        return self.classify(self.features(images)).softmax(1)
