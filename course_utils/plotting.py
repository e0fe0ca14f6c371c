"""Grids, curves and films in one style. Each function returns what it drew; none shows it."""

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image as DisplayImage
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid


def tile(images: torch.Tensor, columns: int = 8) -> np.ndarray:
    """Lay pictures (N, 1 or 3, H, W) in [-1, 1] out as one uint8 array, two white pixels apart."""
    pixels = (images.detach().float().cpu().clamp(-1, 1) + 1) / 2
    grid = make_grid(pixels, min(columns, len(pixels)), padding=2, pad_value=1)   # (3, …, …)
    grid = grid[:, 2:-2, 2:-2] if len(pixels) > 1 else grid
    return (grid * 255).round().byte().permute(1, 2, 0).numpy()


def show_images(images: torch.Tensor | Mapping[str, torch.Tensor], columns: int = 8,
                title: str = "", labels: Sequence[str] = (), rows: Sequence[str] = (),
                ax: Axes | None = None) -> Axes:
    """Draw pictures (N, 1 or 3, H, W) in [-1, 1] as a grid.

    `labels` name its columns, `rows` its rows. A dict of names and pictures is drawn as one row
    each, of as many pictures as the shortest has.
    """
    if isinstance(images, Mapping):
        columns, rows = min(map(len, images.values())), list(images)
        images = torch.cat([row[:columns].detach().cpu() for row in images.values()])
    canvas = tile(images, columns)
    columns = min(columns, len(images))
    if ax is None:
        width = min(8, 0.9 * columns)
        extra = 0.3 * bool(title) + 0.25 * bool(len(labels))
        size = (max(width, 3), width * canvas.shape[0] / canvas.shape[1] + extra)
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    ax.imshow(canvas, interpolation="nearest")
    ax.set_title(title, fontsize=10)
    height, width = (side + 2 for side in images.shape[-2:])
    ax.set_xticks([width * (i + 0.5) - 1 for i in range(len(labels))], labels, fontsize=8)
    ax.set_yticks([height * (i + 0.5) - 1 for i in range(len(rows))], rows, fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def plot_loss(losses: Sequence[float], label: str = "", levels: Mapping[str, float] | None = None,
              ax: Axes | None = None) -> Axes:
    """Draw a loss curve: each step faintly, a running mean boldly, `levels` as dashed lines."""
    if ax is None:
        ax = plt.subplots(figsize=(7, 3), layout="constrained")[1]
    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    line, = ax.plot(np.arange(window - 1, len(losses)), mean, label=label or "running mean")
    ax.plot(losses, color=line.get_color(), alpha=0.25, linewidth=0.8)
    for (name, value), style in zip((levels or {}).items(), ("--", ":", "-."), strict=False):
        ax.axhline(value, color="black", linestyle=style, linewidth=1, label=f"{name}: {value:.3g}")
    ax.set(xlabel="step", ylabel="loss", yscale="log")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    return ax


def plot_curves(curves: Mapping[str, Sequence[tuple]], xlabel: str, ylabel: str,
                floor: tuple[float, float] | None = None, log: str = "", title: str = "",
                ax: Axes | None = None) -> Axes:
    """Draw points (x, y) or (x, y, spread) of each name, joined; `floor` (mean, spread) as a band.

    `log` names the logarithmic axes: "", "x", "y" or "xy".
    """
    if ax is None:
        ax = plt.subplots(figsize=(7, 3.2), layout="constrained")[1]
    for (name, points), marker in zip(curves.items(), "osD^vPX*" * 9, strict=False):
        x, y, *spread = zip(*points, strict=True)
        ax.errorbar(x, y, *spread, marker=marker, markersize=4, capsize=3, label=name)
    if floor is not None:
        ax.axhspan(floor[0] - floor[1], floor[0] + floor[1], color="grey", alpha=0.35,
                   label="floor: real against real")
    for axis in (ax.xaxis, ax.yaxis):
        if axis.axis_name in log:
            getattr(ax, f"set_{axis.axis_name}scale")("log")
            low, high = axis.get_data_interval()
            axis.set_major_locator(plt.LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax


def plot_bars(measured: Mapping[str, tuple], xlabel: str, title: str = "",
              ax: Axes | None = None) -> Axes:
    """Draw what `metrics.measure` returned for each name: bars of distances, floors in grey."""
    if ax is None:
        ax = plt.subplots(figsize=(7, 0.6 + 0.35 * len(measured)), layout="constrained")[1]
    distances, spreads, floors, *_ = zip(*measured.values(), strict=True)
    ax.barh(list(measured), distances, xerr=spreads, capsize=3, color="C0")
    ax.barh(list(measured), floors, color="lightgrey", height=0.5, label="floor")
    for place, distance in enumerate(distances):
        ax.annotate(f"  {distance:.3g}", (distance + spreads[place], place), va="center")
    ax.set(xscale="log", xlabel=xlabel)
    ax.set_title(title, fontsize=10)
    ax.margins(x=0.15)
    ax.invert_yaxis()
    ax.legend(fontsize=8)
    return ax


def draw_unet(unet: torch.nn.Module, picture: torch.Tensor) -> Figure:
    """Draw the blocks of a diffusers UNet2DModel as `picture` (1, C, H, W) passes through them.

    A box is as high as the picture that leaves its block and as wide as its channels; green blocks
    have attention. Each arc is a skip connection, from the block that keeps to the one that takes.
    """
    blocks = {"in": unet.conv_in} | {f"down {i}": b for i, b in enumerate(unet.down_blocks)}
    blocks |= {"mid": unet.mid_block} | {f"up {i}": b for i, b in enumerate(unet.up_blocks)}
    shapes, kept = {}, [0]                       # kept: the places of all outputs not taken yet

    def note(block, _, out):
        shapes[block] = (out[0] if isinstance(out, tuple) else out).shape[1:]

    hooks = [block.register_forward_hook(note) for block in blocks.values()]
    with torch.no_grad():
        unet(picture, 0)
    figure, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for place, (name, block) in enumerate(blocks.items()):
        hooks[place].remove()
        channels, size, _ = shapes[block]
        height = size / picture.shape[-1]
        width = 0.15 + 0.6 * channels / max(unet.config.block_out_channels)
        colour = "C2" if getattr(block, "attentions", None) else "C0"
        ax.bar(place, height, width, bottom=-height / 2, color=colour)
        ax.text(place, -0.82, f"{name}\n{channels}×{size}×{size}", ha="center", fontsize=8)
        if name.startswith("down"):
            kept += [place] * (len(block.resnets) + len(block.downsamplers or ()))
        for _ in block.resnets if name.startswith("up") else ():
            ax.annotate("", (place, 0.52), (kept.pop(), 0.52), arrowprops={
                "arrowstyle": "->", "color": "C3", "connectionstyle": "arc3,rad=-0.3"})
    ax.set(xlim=(-0.6, len(blocks) - 0.4), ylim=(-0.85, 1.5))
    ax.axis("off")
    return figure


def film(frames: Sequence[torch.Tensor], alt: str, columns: int = 8, zoom: int = 2,
         milliseconds: int = 120) -> DisplayImage:
    """Animate batches of pictures (N, 1 or 3, H, W) in [-1, 1], one batch a frame.

    The result is an animated PNG, which every notebook viewer shows; the last frame stays longer.
    All frames share 128 colours, which halves the size of noise.
    """
    pages = [tile(frame, columns) for frame in frames]
    palette = Image.fromarray(np.concatenate(pages)).quantize(128, dither=Image.Dither.NONE)
    pages = [Image.fromarray(page).quantize(palette=palette, dither=Image.Dither.NONE)
             for page in pages]
    pages = [p.resize((p.width * zoom, p.height * zoom), Image.Resampling.NEAREST) for p in pages]
    durations = [milliseconds] * (len(pages) - 1) + [2000]
    buffer = io.BytesIO()
    pages[0].save(buffer, "PNG", save_all=True, append_images=pages[1:], duration=durations, loop=0)
    return DisplayImage(buffer.getvalue(), format="png", metadata={"alt": alt})


def display_figure(drawn: Axes | Figure, alt: str) -> None:
    """Put a figure into the page with alternative text for readers who cannot see it."""
    figure = drawn if isinstance(drawn, Figure) else drawn.figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)   # half the size, same look
    display(DisplayImage(buffer.getvalue(), format="png", metadata={"alt": alt}))
