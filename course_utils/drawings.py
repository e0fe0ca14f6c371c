"""Embedded pictures: butterflies and flowers, drawn from a seed at any size.

Every picture comes with the attributes that it was drawn from, so that a question such as
"did guidance make the wings blue?" has a true answer.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

COLOURS = {
    "red": (205, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 220, 60),
    "green": (55, 160, 70),
    "blue": (50, 90, 215),
    "purple": (135, 60, 175),
    "white": (246, 246, 246),
    "black": (42, 42, 48),
}
BACKGROUNDS = {
    "cream": (240, 234, 214),
    "rose": (243, 214, 218),
    "mint": (212, 238, 218),
    "sky": (208, 228, 244),
}
INK = (35, 30, 30)


@lru_cache(maxsize=4)
def _axes(size):
    """Pixel centres in [-1, 1], x to the right and y downwards, each (size, size)."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    return np.meshgrid(centres, centres)


def _ellipse(x, y, centre, radii, angle=0.0):
    """Distance to an ellipse's edge, negative inside (exact on the edge of a circle)."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dx, dy = x - centre[0], y - centre[1]
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    return (np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2) - 1) * min(radii)


def _segment(x, y, start, end, width):
    """Distance to a thick line from `start` to `end`, negative inside."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy)
    along = np.clip(along, 0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy) - width


def _paint(canvas, distance, colour):
    """Fill where `distance` is negative; the edge is one pixel soft."""
    pixel = 2 / canvas.shape[0]
    cover = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
    canvas += cover * (np.asarray(colour, np.float32) - canvas)


def _start_picture(rng, size):
    """Draw what both kinds share: attributes, background and a slightly turned frame."""
    colour = rng.choice(list(COLOURS))
    background = rng.choice(list(BACKGROUNDS))
    spots = bool(rng.random() < 0.5)
    x, y = _axes(size)
    shade = 1 + rng.uniform(-0.05, 0.05) * y[..., None]
    canvas = (np.array(BACKGROUNDS[background]) + rng.normal(0, 3, 3)) * shade
    angle = rng.uniform(-0.2, 0.2)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    main = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 7, 3), 0, 255)
    attributes = {"colour": str(colour), "spots": spots, "background": str(background)}
    turned = x * cos - y * sin, x * sin + y * cos
    return canvas.astype(np.float32), turned, main, attributes


def _butterfly(rng, size):
    canvas, (x, y), main, attributes = _start_picture(rng, size)
    side = np.abs(x)                                  # both wings at once
    scale = rng.uniform(0.9, 1.15)
    long, wide, low = rng.uniform(0.88, 1.12, 3)
    fore = _ellipse(side, y, (0.41 * scale, -0.25 * scale),
                    (0.46 * scale * long, 0.28 * scale * wide), rng.uniform(-0.85, -0.6))
    hind = _ellipse(side, y, (0.31 * scale, 0.31 * scale),
                    (0.34 * scale * low, 0.25 * scale * wide), rng.uniform(0.65, 0.95))
    rim = 0.075 * scale
    light = np.clip(1.12 - 0.25 * side, 0.8, 1.12)[..., None]   # paler near the body
    for wing, shade in ((hind, 0.68), (fore, 1.0)):
        _paint(canvas, wing, main * 0.25)
        _paint(canvas, wing + rim, np.clip(main * shade * light, 0, 255))
    if attributes["spots"]:
        dot = (60, 60, 66) if attributes["colour"] == "white" else (250, 246, 236)
        for centre, radius in (((0.56, -0.40), 0.085), ((0.36, 0.40), 0.06)):
            place = (centre[0] * scale, centre[1] * scale)
            _paint(canvas, _ellipse(side, y, place, (radius * scale,) * 2), dot)
    _paint(canvas, _segment(side, y, (0.01, -0.3), (0.17, -0.68 * scale), 0.018), INK)
    _paint(canvas, _ellipse(side, y, (0.17, -0.68 * scale), (0.035, 0.035)), INK)
    _paint(canvas, _ellipse(x, y, (0, 0.04), (0.065, 0.42 * scale)), INK)
    return canvas, attributes


def _flower(rng, size):
    canvas, (x, y), main, attributes = _start_picture(rng, size)
    y = y + 0.22                                      # the head sits above the middle
    petals = int(rng.integers(5, 9))
    scale = rng.uniform(0.9, 1.1)
    stem = np.array((70, 135, 65)) + rng.normal(0, 8, 3)
    bend = rng.uniform(-0.15, 0.15)
    _paint(canvas, _segment(x, y, (0, 0), (bend, 1.3), 0.045), stem)
    for sign in (-1, 1):
        leaf = (bend * 0.6 + sign * 0.2, rng.uniform(0.72, 0.9))
        _paint(canvas, _ellipse(x, y, leaf, (0.22, 0.085), -0.5 * sign), stem * 0.85)
    turn = rng.uniform(0, 2 * np.pi)
    sector = 2 * np.pi / petals
    angle = (np.arctan2(y, x) - turn + sector / 2) % sector - sector / 2
    radius = np.hypot(x, y)
    u, v = radius * np.cos(angle), radius * np.sin(angle)   # every petal at once
    width = 0.95 * 0.36 * scale * np.sin(sector / 2) / np.sin(np.pi / 5)
    petal = _ellipse(u, v, (0.36 * scale, 0), (0.28 * scale, min(width, 0.3)))
    light = np.clip(0.75 + 0.5 * radius, 0.75, 1.1)[..., None]
    _paint(canvas, petal, main * 0.35)
    _paint(canvas, petal + 0.045, np.clip(main * light, 0, 255))
    if attributes["spots"]:
        dot = (60, 60, 66) if attributes["colour"] == "white" else (250, 246, 236)
        _paint(canvas, _ellipse(u, v, (0.44 * scale, 0), (0.065, 0.065)), dot)
    heart = (250, 205, 70) if attributes["colour"] != "yellow" else (150, 90, 40)
    _paint(canvas, np.hypot(x, y) - 0.2 * scale, np.array(heart) * 0.5)
    _paint(canvas, np.hypot(x, y) - 0.16 * scale, heart)
    return canvas, attributes


KINDS = {"butterflies": ("butterfly", _butterfly), "flowers": ("flower", _flower)}


def draw(kind: str, index: int, size: int = 64, seed: int = 0) -> dict:
    """Draw picture number `index` of an endless series.

    The series depends on `seed` only: the same index shows the same motif at every size.
    Returns `image` (RGB, size x size), `caption`, and the attributes `colour` (a name in
    COLOURS), `spots` (bool) and `background` (a name in BACKGROUNDS).
    """
    word, painter = KINDS[kind]
    rng = np.random.default_rng([seed, index, list(KINDS).index(kind)])
    canvas, attributes = painter(rng, size)
    caption = f"a {attributes['colour']} {word}".replace("a orange", "an orange")
    if attributes["spots"] and rng.random() < 0.5:
        caption += " with spots"
    if rng.random() < 0.3:
        caption += f" on a {attributes['background']} background"
    image = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    return {"image": image, "caption": caption, **attributes}
