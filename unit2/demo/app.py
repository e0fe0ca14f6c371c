"""Butterflies guided by a colour and a sentence: a Gradio demo for the public.

The guidance is that of the notebook; what is added holds out against requests that no control of
the page sends: numbers out of range, text where a number or colour is expected, endless prompts,
crowds (a queue of 20), visitors who leave (their drawing stops), uploads, missing values, errors
that tell too much (one sentence, no traceback) and paths.
"""

import os
import re
from pathlib import Path

import gradio as gr
import open_clip
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline
from PIL import Image

HERE = Path(__file__).resolve().parent
BESIDE = HERE / "models"                        # in a Space the models lie beside this file
MODELS = Path(os.environ.get("DEMO_MODELS") or (
    BESIDE if BESIDE.exists() else HERE.parents[1] / "course_utils/pretrained"))
CLIP = f"local-dir:{MODELS / 'clip-butterflies'}"
PICTURES = 8
LONGEST = 200                                   # characters of a prompt
MOST = 500                                      # the largest scale of guidance
HOUR = 3600                                     # seconds that a picture's file is kept
PREVIEW = 4                                     # steps from one preview to the next

pipeline = DDPMPipeline.from_pretrained(MODELS / "butterflies-32", use_safetensors=True)
unet = pipeline.unet.eval().requires_grad_(False)
clip = open_clip.create_model(CLIP).eval().requires_grad_(False)
tokenizer = open_clip.get_tokenizer(CLIP)


def parse_colour(text):
    """#rgb, #rrggbb, rgb(…) or rgba(…) as a tensor (3, 1, 1) in [-1, 1]."""
    text = str(text or "").strip().lower()
    short = re.fullmatch(r"#?([0-9a-f]{3}|[0-9a-f]{6})", text)
    called = re.fullmatch(r"rgba?\(([^()]*)\)", text)
    try:
        if short:
            digits = short[1] if len(short[1]) == 6 else "".join(2 * d for d in short[1])
            values = [int(digits[i:i + 2], 16) for i in (0, 2, 4)]
        else:
            values = [float(part) for part in called[1].split(",")][:3]
        if len(values) == 3 and all(0 <= value <= 255 for value in values):
            return torch.tensor(values).view(3, 1, 1) / 127.5 - 1
    except (TypeError, ValueError):
        pass
    raise gr.Error(f"{text[:40]!r} is not a colour: write #rrggbb or rgb(0, 128, 255).")


def number(name, value, low, high):
    """`value` as a float from low to high, or one sentence."""
    try:
        if low <= float(value) <= high:
            return float(value)
    except (TypeError, ValueError):
        pass
    shown = str(value)[:20]
    raise gr.Error(f"{name} is {shown!r}: give a number from {low} to {high}.")


def embed(text):
    """Unit vector (1, D) of a sentence."""
    text = str(text or "").strip()
    if len(text) > LONGEST:
        raise gr.Error(f"The prompt has {len(text)} characters: use at most {LONGEST}.")
    with torch.no_grad():
        return F.normalize(clip.encode_text(tokenizer([text])), dim=-1) if text else None


def wing_mask(size):
    """1 in two discs left and right of the middle, 0 elsewhere: (size, size)."""
    line = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return ((x.abs() - 0.4) ** 2 + (y + 0.2) ** 2 < 0.2**2).float()


def guidance_loss(x0_hat, colour, colour_scale, target, prompt_scale):
    """Both losses, each times its scale, summed over the pictures."""
    mask = wing_mask(x0_hat.shape[-1])
    loss = colour_scale * ((x0_hat - colour).abs().mean(1) * mask).sum() / mask.sum()
    if target is not None and prompt_scale:
        vectors = F.normalize(clip.encode_image(x0_hat), dim=-1)
        loss = loss + prompt_scale * (1 - (vectors * target).sum(1)).sum()
    return loss


def to_pictures(x):
    """(N, 3, H, W) in [-1, 1] as pictures of a size that a visitor sees."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each).resize((256, 256), Image.Resampling.NEAREST) for each in pixels]


def draw_eight(colour, colour_scale, prompt, prompt_scale, steps, seed):
    """Yield eight guided pictures as they form, from the same noise for the same seed.

    Gradio asks for the next preview only while the visitor is there: who leaves ends the drawing.
    """
    colour, target = parse_colour(colour), embed(prompt)
    colour_scale = number("The colour scale", colour_scale, 0, MOST)
    prompt_scale = number("The prompt scale", prompt_scale, 0, MOST)
    steps = int(number("The number of steps", steps, 5, 50))
    seed = int(number("The seed", seed, 0, 2**31 - 1))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    size = unet.config.sample_size
    x = torch.randn(PICTURES, 3, size, size, generator=torch.Generator().manual_seed(seed))
    for i, t in enumerate(scheduler.timesteps):
        a, x = scheduler.alphas_cumprod[t], x.detach().requires_grad_()
        x0_hat = a.sqrt() * x - (1 - a).sqrt() * unet(x, t).sample
        loss = guidance_loss(x0_hat, colour, colour_scale, target, prompt_scale)
        gradient, = torch.autograd.grad(loss, x)
        x, x0_hat = x.detach(), (x0_hat - (1 - a).sqrt() * gradient).detach().clamp(-1, 1)
        x = scheduler.step((a.sqrt() * x - x0_hat) / (1 - a).sqrt(), t, x).prev_sample
        if i % PREVIEW == 0:
            yield to_pictures(x0_hat)
    yield to_pictures(x)


class Page(gr.Blocks):
    """Blocks that answer a request with too few values in a sentence."""

    def validate_inputs(self, block_fn, inputs):
        if len(inputs) < len(block_fn.inputs):
            names = ", ".join(block.label for block in block_fn.inputs)
            raise gr.Error(f"The request has {len(inputs)} values: give {names}.")


def build_demo():
    """The page: controls on the left, pictures on the right."""
    with Page(title="Guided butterflies", analytics_enabled=False,
              delete_cache=(HOUR, HOUR)) as demo:
        gr.Markdown("# Guided butterflies\nA small diffusion model draws; a colour and a sentence "
                    "steer it. A scale of 0 switches its guidance off.")
        with gr.Row():
            with gr.Column(scale=1):
                colour = gr.ColorPicker(value="#3258d7", label="Colour of the wings")
                colour_scale = gr.Slider(0, MOST, 100, step=1, label="Colour scale")
                prompt = gr.Textbox("", label="Prompt", placeholder="a red butterfly with spots")
                prompt_scale = gr.Slider(0, MOST, 0, step=1, label="Prompt scale")
                steps = gr.Slider(5, 50, 20, step=1, label="Steps")
                seed = gr.Number(0, label="Seed", precision=0)
                button = gr.Button("Draw", variant="primary")
            with gr.Column(scale=2):
                gallery = gr.Gallery(label="Pictures", columns=4, format="png")
        controls = [colour, colour_scale, prompt, prompt_scale, steps, seed]
        button.click(draw_eight, controls, gallery, api_name="draw", preprocess=False)  # own checks
        gr.Examples([["#3258d7", 100, "", 0, 20, 0],
                     ["#f5dc3c", 0, "a yellow butterfly with spots", 300, 20, 1],
                     ["#8a3fb0", 100, "a purple butterfly on a mint background", 200, 20, 2]],
                    controls)
    return demo


if __name__ == "__main__":
    build_demo().queue(max_size=20).launch(share=False, max_file_size="1kb")
