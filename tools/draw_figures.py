"""Draw the film and the diagrams of the pages, with the course's own drawings and model.

`make figures` runs this. Words are few on purpose: one picture serves the pages of all languages.
"""

import colorsys
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from course_utils.drawings import draw  # noqa: E402
from course_utils.plotting import tile  # noqa: E402

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#444444"     # Okabe and Ito: safe for colour blindness


def load_model():
    """The shipped butterfly model and a sampler that begins at the last timestep."""
    pipeline = DDPMPipeline.from_pretrained(ROOT / "course_utils/pretrained/butterflies-32")
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return pipeline.unet.float().eval(), scheduler


def butterfly(index):
    """Drawing number `index` as a tensor (3, 32, 32) in [-1, 1]."""
    pixels = np.array(draw("butterflies", index, 32)["image"])
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def put(ax, picture, x, y, size=1.0):
    """Show a tensor (3, H, W) in [-1, 1] with its lower left corner at (x, y)."""
    pixels = (picture.clamp(-1, 1).permute(1, 2, 0).numpy() + 1) / 2
    ax.imshow(pixels, extent=(x, x + size, y, y + size), interpolation="nearest", zorder=2)


def arrow(ax, start, end, colour=GREY, **options):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=18, color=colour,
                                 shrinkA=0, shrinkB=0,
                                 linewidth=options.pop("linewidth", 2.5), **options))


def number(ax, n, x, y, colour=BLUE):
    ax.add_patch(Circle((x, y), 0.19, color=colour, zorder=5))
    ax.text(x, y, str(n), color="white", weight="bold", fontsize=11, ha="center",
            va="center_baseline", zorder=6)


def hourglass(ax, x, y, width, height):
    """A UNet: narrow in the middle, with a skip connection."""
    waist = 0.3 * height
    ax.add_patch(Polygon(
        [(x, y), (x + width / 2, y + (height - waist) / 2), (x + width, y),
         (x + width, y + height), (x + width / 2, y + (height + waist) / 2), (x, y + height)],
        facecolor="#DCE9F2", edgecolor=BLUE, linewidth=1.8))


def canvas(width, height):
    """An empty figure 8 inches wide whose axes measure `width` x `height` units."""
    figure, ax = plt.subplots(figsize=(8, 8 * height / width))
    figure.subplots_adjust(0, 0, 1, 1)
    ax.axis("off")

    def save(name):
        ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        figure.savefig(ROOT / name, dpi=120, facecolor="white")
        plt.close(figure)
        picture = Image.open(ROOT / name).convert("RGB")
        picture.quantize(256, dither=Image.Dither.NONE).save(ROOT / name, optimize=True)

    return ax, save


def states_of_ddim(unet, scheduler, count, seed):
    """The states (count, 3, 32, 32) of 50 steps of DDIM, from noise to butterflies."""
    scheduler.set_timesteps(50)
    states = [torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))]
    for t in scheduler.timesteps:
        state = states[-1]
        states.append(scheduler.step(unet(state, t).sample, t, state).prev_sample)
    return states


@torch.no_grad()
def denoising():
    """A film: twelve butterflies come out of noise by DDIM, and stay for a while."""
    states, frames = states_of_ddim(*load_model(), count=12, seed=5), []
    for state in [*states[:16:4], *states[16::2]]:                    # at first little happens
        # one palette a frame: noise, which cannot be compressed, gets few colours
        frame = Image.fromarray(tile(state, 6)).quantize(
            256 if state is states[-1] else 64, dither=Image.Dither.NONE).convert("RGB")
        frames.append(frame.resize((4 * frame.width, 4 * frame.height), Image.Resampling.NEAREST))
    durations = [500, *[110] * (len(frames) - 2), 3500]
    frames[0].save(ROOT / "unit1/denoising.webp", save_all=True, append_images=frames[1:],
                   duration=durations, loop=0, lossless=True, quality=75, method=4)


@torch.no_grad()
def paths_to_data():
    """Walks of points in the plane, from noise to a spiral, with the ideal denoiser."""
    angle = 3.5 * torch.pi * ((torch.arange(150) + 0.5) / 150).sqrt()
    data = angle[:, None] * torch.stack([angle.cos(), angle.sin()], 1) * 1.5 / angle.max()
    x = 3 * torch.randn(500, 2, generator=torch.Generator().manual_seed(2))
    levels = [*torch.logspace(np.log10(3), -2.3, 80).tolist(), 0.0]
    path = [x]
    for sigma, lower in zip(levels, levels[1:], strict=False):
        nearness = -torch.cdist(x, data) ** 2 / (2 * sigma**2)
        x = x + (lower / sigma - 1) * (x - nearness.softmax(1) @ data)
        path.append(x)
    path = torch.stack(path)                                           # (81, 500, 2)
    ax, save = canvas(10, 4.17)
    middle, scale = torch.tensor([5.0, 2.085]), 1.15
    colours = plt.get_cmap("viridis")(x.norm(dim=1) / 1.6)
    for line, colour in zip((middle + scale * path).unbind(1), colours, strict=True):
        ax.plot(*line.T, color=colour, linewidth=0.7, alpha=0.45)
        ax.scatter(*line[0], s=3, color=colour, alpha=0.6, linewidths=0)
    ax.scatter(*(middle + scale * x).T, s=16, c=colours, zorder=3)
    save("unit1/paths_to_data.png")


def steered_colours():
    """Ten colours asked for by guidance; each row starts from one noise."""
    unet, scheduler = load_model()
    unet.requires_grad_(False)
    line = torch.linspace(-1, 1, 32)
    y, x = torch.meshgrid(line, line, indexing="ij")
    wings = ((x.abs() - 0.4) ** 2 + (y + 0.2) ** 2 < 0.2**2).float()
    wanted = torch.tensor([colorsys.hsv_to_rgb(k / 10, 0.75, 0.85) for k in range(10)])
    wanted = (2 * wanted - 1).repeat(4, 1).view(40, 3, 1, 1)
    state = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    state = state.repeat_interleave(10, 0)
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod[t]
        state.requires_grad_()
        x0_hat = a.sqrt() * state - (1 - a).sqrt() * unet(state, t).sample
        loss = ((x0_hat - wanted).abs() * wings).sum() / (3 * wings.sum())
        (gradient,) = torch.autograd.grad(loss, state)
        x0_hat = (x0_hat - 100 * (1 - a).sqrt() * gradient).detach().clamp(-1, 1)
        state = state.detach()
        v = (a.sqrt() * state - x0_hat) / (1 - a).sqrt()
        state = scheduler.step(v, t, state).prev_sample
    ax, save = canvas(10.1, 4.1)
    for i, picture in enumerate(state):
        put(ax, picture, 0.1 + i % 10, 3.1 - i // 10, 0.9)
    save("unit2/steered_colours.png")


@torch.no_grad()
def noise_and_back():
    """One butterfly into noise at eight timesteps; another one out of noise by DDIM."""
    unet, scheduler = load_model()
    count, step = 8, 1.1
    levels = torch.linspace(0, scheduler.config.num_train_timesteps - 1, count).long()
    noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(2))
    noised = scheduler.add_noise(butterfly(3).expand(count, -1, -1, -1),
                                 noise.expand(count, -1, -1, -1), levels)
    states = states_of_ddim(unet, scheduler, count=1, seed=1)
    kept = torch.linspace(len(states) - 1, 0, count).long()      # clean on the left, as above
    right = 0.1 + count * step - 0.1
    ax, save = canvas(right + 0.1, 3.0)
    for i in range(count):
        put(ax, noised[i], 0.1 + i * step, 1.6)
        put(ax, states[kept[i]][0], 0.1 + i * step, 0.4)
    arrow(ax, (0.1, 2.8), (right, 2.8), GREY)
    arrow(ax, (right, 0.2), (0.1, 0.2), BLUE)
    save("unit1/noise_and_back.png")


@torch.no_grad()
def training_steps():
    """The five parts of a training step, with what the shipped model really predicts at 4."""
    unet, scheduler = load_model()
    levels = torch.tensor([100, 350, 600, 850])
    clean = torch.stack([butterfly(i) for i in (0, 3, 9, 12)])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = scheduler.add_noise(clean, noise, levels)
    v = unet(noisy, levels).sample
    a = scheduler.alphas_cumprod[levels].view(-1, 1, 1, 1)
    predictions = a.sqrt() * noisy - (1 - a).sqrt() * v
    ax, save = canvas(10.1, 5.75)
    rows = [4.05 - 1.08 * i for i in range(4)]
    middle = rows[-1] + (rows[0] + 1 - rows[-1]) / 2
    for i, y in enumerate(rows):
        for x, picture in zip((0.1, 2.1, 7.0, 9.0), (clean[i], noisy[i], predictions[i], clean[i]),
                              strict=True):
            put(ax, picture, x, y)
        arrow(ax, (1.2, y + 0.5), (2.05, y + 0.5))
        ax.annotate("", (8.05, y + 0.5), (8.95, y + 0.5), arrowprops={
            "arrowstyle": "<|-|>", "color": ORANGE, "linewidth": 2.2, "mutation_scale": 14})
    hourglass(ax, 4.25, middle - 1.3, 1.6, 2.6)
    arrow(ax, (3.2, middle), (4.15, middle))
    arrow(ax, (5.95, middle), (6.9, middle))
    ax.text(5.05, middle + 1.95, "$t$", fontsize=15, ha="center", va="center")
    arrow(ax, (5.05, middle + 1.7), (5.05, middle + 0.5))
    ax.plot((8.5, 8.5, 5.05), (0.65, 0.3, 0.3), color=ORANGE, linewidth=2.5,
            solid_joinstyle="round")
    arrow(ax, (5.05, 0.3), (5.05, middle - 0.5), ORANGE)
    top = rows[0] + 1.4
    for n, (x, y) in enumerate([(0.6, top), (2.6, top), (3.65, middle + 0.4), (8.5, top),
                                (6.8, 0.3)], start=1):
        number(ax, n, x, y, BLUE if n < 4 else ORANGE)
    save("unit1/training_steps.png")


def three_ways():
    """The three doors by which a condition enters a UNet; what carries it is orange."""
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noisy = scheduler.add_noise(butterfly(3)[None], noise, torch.tensor([300]))[0]
    light = torch.tensor([229, 129, 60]).view(3, 1, 1) / 127.5 - 1
    mask = torch.where((butterfly(3) < -0.2).any(0), light, torch.full((3, 1, 1), 1.0))
    ax, save = canvas(10.2, 3.3)
    for way in range(3):
        x = 0.1 + 3.5 * way
        number(ax, way + 1, x + 0.5, 3.08)
        put(ax, noisy, x, 1.8 if way == 0 else 1.25)
        if way == 0:
            put(ax, mask, x, 0.7)
            ax.add_patch(Rectangle((x, 0.7), 1, 1, fill=False, edgecolor=ORANGE,
                                   linewidth=2.5, zorder=3))
        arrow(ax, (x + 1.1, 1.75), (x + 1.65, 1.75), linewidth=2.2)
        hourglass(ax, x + 1.7, 0.85, 1.35, 1.8)
        inner = [x + 1.7 + 1.35 * part for part in (0.25, 0.5, 0.75)]
        heights = [1.75 - 0.6, 1.75 - 0.3, 1.75 - 0.6]
        if way == 1:
            ax.add_patch(Rectangle((x + 1.95, 0.1), 0.85, 0.22, color=ORANGE))
            for place, y in zip(inner, heights, strict=True):
                arrow(ax, (place, 0.36), (place, y + 0.12), ORANGE, linewidth=2)
        if way == 2:
            tokens = [x + 1.7 + 0.3 * i for i in range(5)]
            for token in tokens:
                ax.add_patch(Rectangle((token, 0.1), 0.16, 0.5, color=ORANGE))
            for place, y in zip(inner, heights, strict=True):
                for token in tokens:
                    ax.plot((token + 0.08, place), (0.64, y + 0.15), color=ORANGE, linewidth=1)
                ax.add_patch(Circle((place, y + 0.15), 0.06, color=ORANGE, zorder=5))
    save("unit2/three_ways.png")


if __name__ == "__main__":
    denoising()
    paths_to_data()
    steered_colours()
    noise_and_back()
    training_steps()
    three_ways()
