"""The right column of every notebook's table, with stand-ins for the data of the Hub."""

import datasets
import nbformat
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from run_notebooks import SHORT_MODE, execute, has_tag, insert_after, notebooks, results_of

from course_utils.data import load_images
from course_utils.drawings import draw

# as in full, but small enough for a CPU; every dataset and model of the Hub has its stand-in
SMALL = """
for _name, _value in vars(config).items():
    if isinstance(_value, str) and "/" in _value:
        setattr(config, _name, {stand_ins!r}[_value])
config.batch_size = 8
config.image_size = min(getattr(config, "image_size", 32), 32)
if hasattr(config, "widths"):
    config.widths = tuple(max(32, _width // 4) for _width in config.widths)   # whole heads
if hasattr(config, "clip_weights"):
    config.clip, config.clip_weights = f"local-dir:{{shipped / 'clip-butterflies'}}", None
"""


def write(folder, **splits):
    for name, dataset in splits.items():
        dataset.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return str(folder)


def pictures(kind):
    """Pictures that are not square, without labels, as in datasets with one split only."""
    shown = [draw(kind, i, 80)["image"].crop((0, 5, 80, 70)) for i in range(600)]
    features = datasets.Features({"image_alt": datasets.Value("string"),
                                  "image": datasets.Image()})
    return datasets.Dataset.from_dict({"image_alt": ["…"] * 600, "image": shown}, features)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """The Hub's names, and folders of the same form. The base model predicts noise."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    unet = UNet2DModel(
        32, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "model")
    digits = write(folder / "digits", train=load_images("digits"),
                   test=load_images("digits", "test"))
    return {"anton-l/ddpm-butterflies-128": str(folder / "model"),
            "huggan/smithsonian_butterflies_subset": write(folder / "butterflies",
                                                           train=pictures("butterflies")),
            "huggan/flowers-102-categories": write(folder / "flowers", train=pictures("flowers")),
            "ylecun/mnist": digits, "zalando-datasets/fashion_mnist": digits}


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_full_column_runs_with_data_of_the_same_form(path, stand_ins, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    config = next(cell for cell in notebook.cells if has_tag(cell, "config"))
    assert "run.profile," in config.source
    config.source = config.source.replace("run.profile,", "'full',")
    insert_after(notebook, "config", SHORT_MODE + SMALL.format(stand_ins=stand_ins))
    (tmp_path / "course").symlink_to(path.parents[1])     # the launch cell looks there
    assert results_of(execute(notebook, tmp_path))
