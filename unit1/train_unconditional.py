"""Train an unconditional diffusion model on pictures and save it as a DDPMPipeline folder.

Example: accelerate launch unit1/train_unconditional.py --source my_pictures --output my_model
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from course_utils.data import load_images, to_tensor  # noqa: E402
from course_utils.metrics import ClipFeatures, frechet_distance  # noqa: E402
from course_utils.plotting import tile  # noqa: E402

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: apache-2.0
---
# {name}

Unconditional diffusion model of {parameters:,} parameters for {size} x {size} pictures, trained on
`{source}` ({pictures:,} pictures) for {steps:,} steps ({minutes:.0f} minutes) with

    {command}

Load it with `DDPMPipeline.from_pretrained("PATH_TO_THIS_FOLDER")`.

{quality}
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--source", default="butterflies", help="built-in name, folder, dataset file or Hub id")
    add("--limit", type=int, help="use at most this many pictures")
    add("--output", default="my-diffusion-model", help="folder to write the pipeline to")
    add("--image_size", type=int, default=32, help="height and width in pixels")
    add("--channels", type=int, default=3, choices=(1, 3), help="1 for grey, 3 for RGB")
    add("--widths", type=int, nargs="+", default=[32, 32, 64, 128],
        help="channels of each UNet level, multiples of 32; each level halves the picture")
    add("--layers", type=int, default=1, help="residual blocks of each UNet level")
    add("--steps", type=int, default=2000, help="optimizer steps")
    add("--batch_size", type=int, default=16, help="pictures in a step on each device")
    add("--learning_rate", type=float, default=2e-3, help="peak of the one-cycle schedule")
    add("--ema_decay", type=float, default=0.999, help="decay of the averaged weights")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="mirror half of the pictures left to right")
    add("--mixed_precision", default="no", choices=("no", "fp16", "bf16"), help="see Accelerate")
    add("--compile", action="store_true", help="torch.compile the model: pays in long runs")
    add("--half", action="store_true", help="save the weights as float16")
    add("--sample_every", type=int, default=500, help="steps between sample grids, 0 for none")
    add("--evaluate", type=int, default=0,
        help="samples for the Fréchet distance to the source's test split, 0 for none")
    add("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args(argv)
    halvings = 2 ** (len(args.widths) - 1)
    if args.image_size < halvings or args.image_size % halvings:
        parser.error(f"--image_size {args.image_size} cannot be halved {len(args.widths) - 1} "
                     f"times: choose a multiple of {halvings} or give fewer --widths")
    if any(width % 32 or width <= 0 for width in args.widths):
        parser.error(f"--widths {args.widths}: each must be a positive multiple of 32")
    if min(args.steps, args.batch_size) < 1:
        parser.error("--steps and --batch_size must be at least 1")
    return args


def build_model(args):
    """A small UNet: attention only at the lowest resolution, where it is cheap."""
    plain = len(args.widths) - 1
    return UNet2DModel(
        sample_size=args.image_size, in_channels=args.channels, out_channels=args.channels,
        block_out_channels=args.widths, layers_per_block=args.layers, attention_head_dim=32,
        norm_num_groups=8,                       # one channel a group would erase its mean: colour
        down_block_types=["DownBlock2D"] * plain + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * plain)


def make_scheduler():
    """Cosine schedule, v-prediction, and samplers that start at the last timestep.

    Unit 1 explains the first two; for the third see Lin et al. 2023, "Common diffusion noise
    schedules and sample steps are flawed".
    """
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                         timestep_spacing="trailing")


def diffusion_loss(model, scheduler, x0):
    """Mean squared error of the predicted v at random timesteps (Salimans and Ho 2022)."""
    t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
    eps = torch.randn_like(x0)
    v = scheduler.get_velocity(x0, eps, t)
    v_hat = model(scheduler.add_noise(x0, eps, t), t).sample
    return F.mse_loss(v_hat.float(), v)


@torch.no_grad()
def sample(model, scheduler, count, seed=0, steps=25, batch_size=64):
    """Draw pictures (count, C, H, W) in [-1, 1] with DPM-Solver++."""
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
    generator = torch.Generator().manual_seed(seed)
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    batches = []
    for start in range(0, count, batch_size):
        x = torch.randn(min(batch_size, count - start), *shape, generator=generator)
        x = x.to(model.device)
        solver.set_timesteps(steps)
        for t in solver.timesteps:
            x = solver.step(model(x, t).sample, t, x).prev_sample
        batches.append(x.clamp(-1, 1))
    return torch.cat(batches)


def train(args, accelerator, model, scheduler, ema, x0_all):
    """Run the training loop; writes a sample grid every `sample_every` steps."""
    loader = DataLoader(TensorDataset(x0_all), min(args.batch_size, len(x0_all)), shuffle=True,
                        drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, args.steps, pct_start=0.1)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if args.compile:
        prepared = torch.compile(prepared)
    progress = tqdm(total=args.steps, desc="training", disable=not accelerator.is_main_process)
    step = 0
    while step < args.steps:
        for (x0,) in loader:
            if args.flip:
                mirrored = torch.rand(len(x0), device=x0.device) < 0.5
                x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
            with accelerator.autocast():
                loss = diffusion_loss(prepared, scheduler, x0)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            ema.step(model.parameters())
            step += 1
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.4f}")
            if args.sample_every and step % args.sample_every == 0:
                save_grid(args, accelerator, model, scheduler, ema, step)
            if step == args.steps:
                break
    progress.close()


def save_grid(args, accelerator, model, scheduler, ema, step):
    if accelerator.is_main_process:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        folder = Path(args.output) / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(tile(sample(model, scheduler, 32))).save(folder / f"step-{step:06d}.png")
        ema.restore(model.parameters())


def measure(args, model, scheduler):
    """Fréchet distance of samples to both halves of the unseen pictures, and between these."""
    n = args.evaluate
    real = to_tensor(load_images(args.source, "test", 2 * n), args.image_size, args.channels)
    extractor = ClipFeatures()
    generated = sample(model, scheduler, n).cpu()
    to_first, to_second = (frechet_distance(half, generated, extractor) for half in real.split(n))
    floor = frechet_distance(real[:n], real[n:], extractor)
    mean = (to_first + to_second) / 2
    return (f"Fréchet distance in the features of the course's small CLIP, {n:,} samples "
            f"(DPM-Solver++, 25 steps, seed 0) against two sets of {n:,} unseen pictures: "
            f"{to_first:.2f} and {to_second:.2f}, mean **{mean:.2f}**; the two sets against each "
            f"other (the floor): **{floor:.2f}**; ratio {mean / floor:.2f}.")


def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "README.md").touch()
        dataset = load_images(args.source, limit=args.limit)
    except OSError as error:
        sys.exit(f"Cannot write to {str(output)!r} ({error}): give --output a writable folder."
                 if not isinstance(error, ConnectionError) else str(error))
    except ValueError as error:
        sys.exit(str(error))
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed, device_specific=True)
    x0_all = to_tensor(dataset, args.image_size, args.channels)
    model = build_model(args).to(accelerator.device)
    scheduler = make_scheduler()
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    train(args, accelerator, model, scheduler, ema, x0_all)
    if not accelerator.is_main_process:
        return
    ema.copy_to(model.parameters())
    if args.half:
        model.half().float()                     # measure the weights that are saved
    quality = measure(args, model.eval(), scheduler) if args.evaluate else ""
    parameters = sum(p.numel() for p in model.parameters())
    DDPMPipeline(model.half() if args.half else model, scheduler).save_pretrained(output)
    (output / "README.md").write_text(CARD.format(
        name=output.name, parameters=parameters, size=args.image_size, source=args.source,
        pictures=len(x0_all), steps=args.steps, minutes=(time.time() - started) / 60,
        command="python " + " ".join(sys.argv), quality=quality))
    print(f"Saved {output} after {time.time() - started:.0f} s. {quality}")


if __name__ == "__main__":
    main()
