"""The embedded drawings: repeatable, true to their attributes, the same motif at every size."""

import numpy as np
import pytest

from course_utils.drawings import BACKGROUNDS, COLOURS, KINDS, draw


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_picture(kind):
    first, second = draw(kind, 3, seed=5), draw(kind, 3, seed=5)
    assert np.array_equal(first["image"], second["image"])
    assert first["caption"] == second["caption"]
    assert not np.array_equal(first["image"], draw(kind, 3, seed=6)["image"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 17, 32, 256])
def test_any_size(kind, size):
    assert draw(kind, 0, size)["image"].size == (size, size)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_show_the_same_motif(kind):
    large, small = draw(kind, 1, 128)["image"], draw(kind, 1, 32)["image"]
    difference = np.abs(np.asarray(large.reduce(4), float) - np.asarray(small, float))
    assert difference.mean() < 6                 # of 255: only edges are sampled differently


@pytest.mark.parametrize("kind, spot", [("butterflies", (0.42, -0.3)), ("flowers", (0.36, 0))])
def test_attributes_are_true(kind, spot):
    """The named colour is the nearest of all where the motif is, the background at the corner."""
    for index in range(40):
        row = draw(kind, index, 64)
        pixels = np.asarray(row["image"], float).reshape(-1, 3)
        near = {name: (np.abs(pixels - rgb).sum(1) < 90).sum() for name, rgb in COLOURS.items()
                if name not in ("black", "white")}
        if row["colour"] in near:
            if kind == "flowers":                # stems are green, hearts yellow
                near = {k: v for k, v in near.items() if k in (row["colour"], "red", "blue")}
            assert max(near, key=near.get) == row["colour"], (index, near)
        corner = np.asarray(row["image"], float)[0, 0]
        nearest = min(BACKGROUNDS, key=lambda name: np.abs(corner - BACKGROUNDS[name]).sum())
        assert nearest == row["background"], index


def test_captions_tell_the_truth():
    for index in range(200):
        row = draw("butterflies", index, 8)
        words = row["caption"].split()
        assert row["colour"] in words and "butterfly" in words
        assert row["spots"] or "spots" not in words
        assert row["background"] in words or "background" not in words


def test_all_colours_appear():
    assert {draw("flowers", i, 4)["colour"] for i in range(100)} == set(COLOURS)
