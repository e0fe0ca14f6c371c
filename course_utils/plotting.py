"""Grids, curves and films in one style. Each function returns what it drew; none shows it."""

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image as DisplayImage
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image


def tile(images: torch.Tensor, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Lay pictures (N, 1 or 3, H, W) in [-1, 1] out as one uint8 array (rows, columns, 3)."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()   # (N, H, W, 3)
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top:top + height, left:left + width] = picture
    return canvas


def show_images(images: torch.Tensor, columns: int = 8, title: str = "",
                labels: Sequence[str] = (), ax: Axes | None = None) -> Axes:
    """Draw pictures (N, 1 or 3, H, W) in [-1, 1] as a grid; `labels` name its columns."""
    canvas = tile(images, columns)
    columns = min(columns, len(images))
    if ax is None:
        width = min(8, 0.9 * columns)
        extra = 0.3 * bool(title) + 0.25 * bool(len(labels))
        size = (max(width, 3), width * canvas.shape[0] / canvas.shape[1] + extra)
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    ax.imshow(canvas, interpolation="nearest")
    ax.set_title(title, fontsize=10)
    step = images.shape[-1] + 2
    ax.set_xticks([step * (i + 0.5) - 1 for i in range(len(labels))], labels, fontsize=8)
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def plot_loss(losses: Sequence[float], expected: float | None = None, label: str = "",
              ax: Axes | None = None) -> Axes:
    """Draw a loss curve: each step faintly, a running mean boldly, `expected` as a dashed line."""
    if ax is None:
        ax = plt.subplots(figsize=(7, 3), layout="constrained")[1]
    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    line, = ax.plot(np.arange(window - 1, len(losses)), mean, label=label or "running mean")
    ax.plot(losses, color=line.get_color(), alpha=0.25, linewidth=0.8)
    if expected is not None:
        ax.axhline(expected, color="black", linestyle="--", linewidth=1,
                   label=f"expected at the end: {expected:g}")
    ax.set(xlabel="step", ylabel="loss", yscale="log")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    return ax


def film(frames: Sequence[torch.Tensor], alt: str, columns: int = 8, zoom: int = 2,
         milliseconds: int = 120) -> DisplayImage:
    """Animate batches of pictures (N, 1 or 3, H, W) in [-1, 1], one batch a frame.

    The result is an animated PNG, which every notebook viewer shows; the last frame stays longer.
    Colours have 32 levels, which halves the size of noise.
    """
    pages = [Image.fromarray(tile(frame, columns) & 0xF8) for frame in frames]
    pages = [p.resize((p.width * zoom, p.height * zoom), Image.Resampling.NEAREST) for p in pages]
    durations = [milliseconds] * (len(pages) - 1) + [2000]
    buffer = io.BytesIO()
    pages[0].save(buffer, "PNG", save_all=True, append_images=pages[1:], duration=durations, loop=0)
    return DisplayImage(buffer.getvalue(), format="png", alt=alt)


def display_figure(drawn: Axes | Figure, alt: str) -> None:
    """Put a figure into the page with alternative text for readers who cannot see it."""
    figure = drawn if isinstance(drawn, Figure) else drawn.figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)   # half the size, same look
    display(DisplayImage(buffer.getvalue(), format="png", alt=alt))
