"""The right column of every notebook's table, with data from a Hub as the real one has it."""

import io
import json
import math
from concurrent.futures import ThreadPoolExecutor

import datasets
import nbformat
import open_clip
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub import Hub, environment, serving
from run_notebooks import SHORT_MODE, execute, has_tag, insert_after, notebooks, results_of
from safetensors.torch import save_file

from course_utils.data import load_images
from course_utils.drawings import draw

CLIP = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
# as in full on a GPU that computes in bfloat16, but small enough for a CPU; the names stay
SMALL = """
run.bf16 = True
config.batch_size = 4
config.image_size = 24 if getattr(config, "image_size", 0) == 64 else 16   # 1.1 halves it
if hasattr(config, "widths"):
    config.widths = (32,) * len(config.widths)
"""
TEXTS = ("image_url", "image_alt", "id", "name", "scientific_name", "gender", "taxonomy", "region",
         "locality", "date", "usnm_no", "guid", "edan_url", "source", "stage", "image_hash")
GARMENTS = ("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
            "Bag", "Ankle boot")


def photographs(kind, count, *texts):
    """JPEG pictures of mixed size, and text columns beside them."""
    def jpeg(i):
        drawn, file = draw(kind, i % 100, 80)["image"], io.BytesIO()
        drawn.crop((i % 13, i % 7, 80, 80 - i % 11)).save(file, "JPEG")
        return {"bytes": file.getvalue(), "path": f"{i}.jpg"}

    features = datasets.Features({**{text: datasets.Value("string") for text in texts},
                                  "image": datasets.Image()})
    return datasets.Dataset.from_dict({**{text: [f"{text} {i}" for i in range(count)]
                                          for text in texts},
                                       "image": [jpeg(i) for i in range(count)]}, features)


def put(folder, config="default", data="data", **splits):
    """Write Parquet files, and a card that lists them as the Hub's datasets do."""
    for split, dataset in splits.items():
        dataset.to_parquet(folder / data / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"{data}/{split}-*"} for split in splits]
    card = json.dumps({"configs": [{"config_name": config, "data_files": files}]})   # it is YAML
    (folder / "README.md").write_text(f"---\n{card}\n---\n# Pictures\n")


def put_pipeline(folder):
    """The architecture of the 128-pixel butterflies, with few channels and 32 pixels."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(8, 8, 16, 16, 16, 16), layers_per_block=1,
        norm_num_groups=8, attention_head_dim=8,
        down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)


def put_clip(folder):
    """ViT-B-32's form with few layers and channels; its tokenizer is the same."""
    config = {"embed_dim": 32, "vision_cfg": {"image_size": 224, "patch_size": 32, "layers": 1,
                                              "width": 32, "head_width": 32},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1,
                           "layers": 1}}
    folder.mkdir(parents=True)
    prepare = {"mean": [0.481, 0.458, 0.408], "std": [0.269, 0.261, 0.276]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": prepare}))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"))
    of, butterflies = hub.folder / "datasets", photographs("butterflies", 1000, *TEXTS)
    put(of / "huggan/smithsonian_butterflies_subset", train=butterflies)
    put(of / "huggan/flowers-102-categories", train=photographs("flowers", 400))
    digits = {split: load_images("digits", split) for split in ("train", "test")}
    put(of / "ylecun/mnist", "mnist", "mnist", **digits)
    put(of / "zalando-datasets/fashion_mnist", "fashion_mnist", "fashion_mnist",
        **{split: each.select(range(200)).cast_column("label", datasets.ClassLabel(names=GARMENTS))
           for split, each in digits.items()})
    put_pipeline(hub.folder / "models/anton-l/ddpm-butterflies-128")
    put_clip(hub.folder / "models" / CLIP)
    home = tmp_path_factory.mktemp("home")
    with serving(hub) as proxy, pytest.MonkeyPatch.context() as patch:
        for key, value in environment(proxy, home, token="hf_ada").items():
            patch.setenv(key, value)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield hub


def run(path, folder, extra="", last=""):
    """Run the right column of a notebook, up to the cell that contains `last`."""
    notebook = nbformat.read(path, as_version=4)
    insert_after(notebook, "config", SHORT_MODE + SMALL.format(clip=CLIP) + extra)
    if last:
        end = next(i for i, cell in enumerate(notebook.cells) if last in cell.source)
        notebook.cells = notebook.cells[:end + 1]
    (folder / "course").symlink_to(path.parents[1])       # the launch cell looks there
    return execute(notebook, folder, profile="full")


@pytest.fixture(scope="module")
def columns(hub, tmp_path_factory):
    """The runs of all notebooks by name, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {path.stem: pool.submit(run, path, tmp_path_factory.mktemp("work"))
               for path in notebooks()}


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_full_column_runs_every_cell_with_the_hub(path, columns):
    notebook = columns[path.stem].result()
    assert results_of(notebook) and all(map(math.isfinite, results_of(notebook).values()))
    start = next(cell for cell in notebook.cells if "run = start(" in cell.source)
    assert any("Profile full" in output.get("text", "") for output in start.outputs)


@pytest.mark.slow
def test_a_shared_model_is_fine_tuned_from_its_name(hub, columns, tmp_path):
    """1.1 has uploaded model and card with the learner's login; 2.1 starts from there."""
    columns["01_introduction_to_diffusers"].result()
    shared = hub.folder / "models/ada/my-butterflies"
    assert "pipeline_tag: unconditional-image-generation" in (shared / "README.md").read_text()
    path = next(path for path in notebooks() if path.stem == "01_finetuning_and_guidance")
    notebook = run(path, tmp_path, "config.base = 'ada/my-butterflies'", last="def keep_states(")
    assert "HEAD hub.test /ada/my-butterflies/resolve" in "\n".join(map(" ".join, hub.asked))
    assert not any(has_tag(cell, "results") for cell in notebook.cells)


@pytest.mark.slow
def test_nothing_but_the_hub_is_asked(hub, columns):
    for each in columns.values():
        each.result()
    hosts = {host for _, host, _ in hub.asked}   # the last two: nothing that is needed
    assert hosts <= {"hub.test", "store.test", "datasets-server.hub.test", "s3.amazonaws.com"}
