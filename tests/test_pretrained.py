"""The two embedded models: public formats, safe weights, measured quality."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline

import course_utils
from course_utils.data import load_images, to_tensor
from course_utils.drawings import COLOURS, KINDS
from course_utils.metrics import measure
from course_utils.training import draw_pictures

PRETRAINED = Path(course_utils.__file__).parent / "pretrained"
BUTTERFLIES, CLIP = PRETRAINED / "butterflies-32", PRETRAINED / "clip-butterflies"


@pytest.mark.parametrize("folder", [BUTTERFLIES, CLIP], ids=lambda p: p.name)
def test_small_safe_and_documented(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    card = (folder / "README.md").read_text()
    script = next(word for word in card.split() if word.endswith(".py"))
    assert (Path(__file__).parents[1] / script).is_file()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_clip_knows_the_colour_of_unseen_pictures(kind, noise):
    """At least 98 %, also of noisy pictures, because guidance shows it such."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    dataset = load_images(kind, "test", limit=500)
    x = to_tensor(dataset, 32)
    x = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    text = model.encode_text(tokenizer([f"a {c} {KINDS[kind][0]}" for c in COLOURS]))
    scores = F.normalize(model.eval().encode_image(x), dim=-1) @ F.normalize(text, dim=-1).T
    assert (scores.argmax(1) == torch.tensor(dataset["label"])).float().mean() >= 0.98


def test_pipeline_loads_and_draws_butterflies():
    """64 samples are not told apart from butterflies, flowers are (full measure: model card)."""
    pipeline = DDPMPipeline.from_pretrained(BUTTERFLIES)
    assert pipeline.unet.dtype == torch.float32
    real = to_tensor(load_images("butterflies", "test", 256), 32)
    ours = measure(draw_pictures(pipeline.unet, pipeline.scheduler, 64, steps=15), real)
    flowers = measure(to_tensor(load_images("flowers", "test", 64), 32), real)
    assert ours.distance < ours.floor + 3 * ours.floor_spread < flowers.distance
