"""Train an unconditional diffusion model on pictures and save it as a DDPMPipeline folder.

Example: accelerate launch unit1/train_unconditional.py --source my_pictures --output my_model
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo, get_token, upload_folder
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.optim import Muon
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from course_utils.data import load_images, to_tensor
from course_utils.metrics import FEWEST, measure
from course_utils.plotting import tile

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
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)   # what a full disk raises, by library


# ---- the command line: what both scripts share -----------------------------------------------

def training_parser(description, **defaults):
    """A parser with the options of every training run; `defaults` replaces some defaults."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--source", default="butterflies", help="built-in name, folder, dataset file or Hub id")
    add("--limit", type=int, help="use at most this many pictures; all of them if not given")
    add("--output", default="my-diffusion-model", help="folder to write the pipeline to")
    add("--steps", type=int, default=2000, help="optimizer steps")
    add("--epochs", type=int, help="passes over the pictures, instead of --steps")
    add("--batch_size", type=int, default=16, help="pictures in a forward pass on each device")
    add("--accumulation", type=int, default=1,
        help="forward passes in an optimizer step: their gradients are averaged")
    add("--optimizer", default="muon", choices=("muon", "adamw"), help="Muon: see unit 1")
    add("--learning_rate", type=float, default=5e-3,
        help="its peak; AdamW needs less than Muon: 2e-3 did well")
    add("--schedule", default="one_cycle", choices=("one_cycle", "cosine", "constant"),
        help="the learning rate over the run; the last two warm up over a tenth of the steps")
    add("--ema_decay", type=float, default=0.999, help="decay of the averaged weights, 0 to 1")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="mirror half of the pictures left to right")
    add("--mixed_precision", default="no", choices=("no", "fp16", "bf16"), help="see Accelerate")
    add("--compile", action="store_true", help="torch.compile the model: pays in long runs")
    add("--half", action="store_true", help="save the weights as float16")
    add("--sample_every", type=int, default=500, help="steps between sample grids, 0 for none")
    add("--checkpoint_every", type=int, default=500,
        help="steps between checkpoints (the newest is kept until the run is complete), 0 for none")
    add("--resume", action="store_true", help="go on exactly from the checkpoint in --output")
    add("--tracker", default="tensorboard",
        help="where Accelerate logs loss and learning rate: tensorboard, wandb, ... or none")
    add("--evaluate", type=int, default=0,
        help=f"samples for the Fréchet distance to the source's test split: {FEWEST} or more, "
             "and twice as many unseen pictures; 0 for none")
    add("--push_to_hub", metavar="OWNER/NAME", help="repository of the Hub to upload the result to")
    add("--seed", type=int, default=0, help="random seed")
    parser.set_defaults(**defaults)
    return parser


def check_training_arguments(parser, args):
    """End with one sentence if an option of `training_parser` makes no sense."""
    if min(args.steps, args.epochs or 1, args.batch_size, args.accumulation) < 1:
        parser.error("--steps, --epochs, --batch_size and --accumulation must be at least 1")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit} must be at least 1")
    if not (args.learning_rate > 0 and 0 <= args.ema_decay < 1):
        parser.error("--learning_rate must be above 0 and --ema_decay from 0 to below 1")
    if args.evaluate and args.evaluate < FEWEST:
        parser.error(f"--evaluate {args.evaluate}: fewer than {FEWEST} pictures cannot be told "
                     f"from noise: give {FEWEST} or more, or 0 for no measurement")
    if args.push_to_hub and not get_token():
        parser.error("--push_to_hub needs a token: run `hf auth login` first")


def parse_args(argv=None):
    parser = training_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--image_size", type=int, default=32, help="height and width in pixels")
    add("--channels", type=int, default=3, choices=(1, 3), help="1 for grey, 3 for RGB")
    add("--widths", type=int, nargs="+", default=[32, 32, 64, 128],
        help="channels of each UNet level, multiples of 32; each level halves the picture")
    add("--layers", type=int, default=1, help="residual blocks of each UNet level")
    args = parser.parse_args(argv)
    check_training_arguments(parser, args)
    if len(args.widths) < 2:
        parser.error(f"--widths {args.widths}: give at least two levels, both have attention")
    halvings = 2 ** (len(args.widths) - 1)
    if args.image_size < halvings or args.image_size % halvings:
        parser.error(f"--image_size {args.image_size} cannot be halved {len(args.widths) - 1} "
                     f"times: choose a multiple of {halvings} or give fewer --widths")
    if any(width % 32 or width <= 0 for width in args.widths):
        parser.error(f"--widths {args.widths}: each must be a positive multiple of 32")
    return args


# ---- model, loss, sampling -------------------------------------------------------------------

def build_unet(image_size, widths, in_channels=3, out_channels=3, **options):
    """A small UNet with attention at its two lowest resolutions."""
    plain = len(widths) - 2
    return UNet2DModel(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=8,
        down_block_types=["DownBlock2D"] * plain + ["AttnDownBlock2D"] * 2,
        up_block_types=["AttnUpBlock2D"] * 2 + ["UpBlock2D"] * plain,
        **options,
    )


def build_model(args):
    """The UNet that the options ask for."""
    small = build_unet(args.image_size, args.widths, args.channels, args.channels)
    return UNet2DModel.from_config(small.config, layers_per_block=args.layers)


def make_scheduler():
    """Cosine schedule, v-prediction, and samplers that start at the last timestep.

    Unit 1 explains the first two; for the third see Lin et al. 2023, "Common diffusion noise
    schedules and sample steps are flawed".
    """
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                         timestep_spacing="trailing")


def draw_timesteps(count, T, generator):
    """Timesteps (count,) from 0 to T - 1, the noisy ones more often."""
    return (torch.rand(count, generator=generator).sqrt() * T).long().clamp(max=T - 1)


def batch_loss(model, scheduler, x0):
    """Mean squared error of what the scheduler's model predicts, at random timesteps."""
    t = draw_timesteps(len(x0), scheduler.config.num_train_timesteps, None).to(x0.device)
    eps = torch.randn_like(x0)
    target = {"epsilon": lambda: eps, "sample": lambda: x0,
              "v_prediction": lambda: scheduler.get_velocity(x0, eps, t)}
    prediction = model(scheduler.add_noise(x0, eps, t), t).sample
    return F.mse_loss(prediction.float(), target[scheduler.config.prediction_type]())


@torch.no_grad()
def sample(predict, noise, scheduler, steps, **options):
    """From noise (B, C, H, W) to pictures in [-1, 1]; predict(xt, t) is the model."""
    scheduler.set_timesteps(steps)
    xt = noise
    for t in scheduler.timesteps:
        xt = scheduler.step(predict(xt, t), t, xt, **options).prev_sample
    return xt.clamp(-1, 1)


def draw_pictures(model, scheduler, count, seed=0, steps=25):
    """Pictures (count, C, H, W) in [-1, 1], drawn with DPM-Solver++, 64 at a time."""
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config,
                                                     timestep_spacing="trailing")
    generator = torch.Generator().manual_seed(seed)
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    noise = torch.randn(count, *shape, generator=generator).to(model.device)
    return torch.cat([sample(lambda xt, t: model(xt, t).sample, part, solver, steps)
                      for part in noise.split(64)])


# ---- checkpoints -----------------------------------------------------------------------------

def run_settings(args):
    """The options that a resumed run must share with the one before."""
    free = ("output", "resume", "compile", "half", "sample_every", "checkpoint_every", "tracker",
            "evaluate", "push_to_hub")
    return {name: value for name, value in vars(args).items() if name not in free}


def newest_checkpoint(output):
    """The folder of the last complete checkpoint in `output`, or None."""
    return max((Path(output) / "checkpoints").glob("step-*"), default=None)


def save_checkpoint(args, accelerator, ema, position):
    """Write a whole new checkpoint beside the old one, and only then remove the old one."""
    folder = Path(args.output) / "checkpoints"
    partial = folder / "partial"
    old = list(folder.glob("step-*"))
    try:
        accelerator.save_state(partial)          # model, optimizer, schedule, random states
        if accelerator.is_main_process:
            averaged = {str(i): weight for i, weight in enumerate(ema.shadow_params)}
            save_file(averaged, partial / "ema.safetensors")
            record = {"settings": run_settings(args), **position,
                      "ema_steps": ema.optimization_step}
            (partial / "position.json").write_text(json.dumps(record, indent=1))
            os.replace(partial, folder / f"step-{position['step']:08d}")
    except WRITE_ERRORS as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = f"the one of {old[-1].name} is whole" if old else "there is none before it"
        sys.exit(f"Could not write the checkpoint of step {position['step']} to {str(folder)!r} "
                 f"({error}); {kept}: free some space, then run again with --resume.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(args, accelerator, ema):
    """Restore everything from the newest checkpoint; returns its position in the run."""
    folder = newest_checkpoint(args.output)
    record = json.loads((folder / "position.json").read_text())
    accelerator.load_state(folder)
    averaged = load_file(folder / "ema.safetensors")
    for i, weight in enumerate(ema.shadow_params):
        weight.copy_(averaged[str(i)])
    ema.optimization_step = record["ema_steps"]
    return {name: record[name] for name in ("step", "epoch", "batch")}


def check_resume(args):
    """End with one sentence if there is nothing to resume, or something else was being trained."""
    folder = newest_checkpoint(args.output)
    if not args.resume:
        if folder:
            sys.exit(f"{str(args.output)!r} holds a checkpoint: add --resume to go on from it, or "
                     "give another --output.")
        return
    if folder is None:
        sys.exit(f"No checkpoint in {str(args.output)!r}: leave --resume out to start afresh.")
    before = json.loads((folder / "position.json").read_text())["settings"]
    now = json.loads(json.dumps(run_settings(args)))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            sys.exit(f"The checkpoint in {str(args.output)!r} was made with --{name} "
                     f"{before.get(name)}, not {now.get(name)}: resume with the same value, "
                     "or give another --output.")


# ---- training --------------------------------------------------------------------------------

def make_schedule(args, optimizer, processes):
    """The learning rate over the run; Accelerate advances it once for every process."""
    total = args.steps * processes
    if args.schedule == "one_cycle":
        return OneCycleLR(optimizer, args.learning_rate, total, pct_start=0.1,
                          cycle_momentum=False)
    name = {"cosine": "cosine", "constant": "constant_with_warmup"}[args.schedule]
    return get_scheduler(name, optimizer, num_warmup_steps=total // 10,
                         num_training_steps=total)


def mirror_some(x0):
    mirrored = torch.rand(len(x0), device=x0.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)


def run_training(args, accelerator, model, scheduler, ema, x0_all):
    """Run the training loop. Writes losses.csv, and sample grids and checkpoints at intervals."""
    loader = DataLoader(TensorDataset(x0_all), min(args.batch_size, len(x0_all)), shuffle=True,
                        drop_last=True, generator=torch.Generator().manual_seed(args.seed))
    if args.optimizer == "muon":
        optimizer = Muon(model.named_parameters(), args.learning_rate)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, betas=(0.9, 0.99))
    schedule = make_schedule(args, optimizer, accelerator.num_processes)
    prepared, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    at = {"step": 0, "epoch": 0, "batch": 0}
    if args.resume:
        at = load_checkpoint(args, accelerator, ema)
    log = open_log(args.output if accelerator.is_main_process else None, at["step"])
    if args.compile:
        prepared = torch.compile(prepared)
    progress = tqdm(total=args.steps, initial=at["step"], desc="training",
                    disable=not accelerator.is_main_process)
    losses = []
    while at["step"] < args.steps:
        if at["batch"] == len(loader):
            at["epoch"], at["batch"] = at["epoch"] + 1, 0
        batches = accelerator.skip_first_batches(loader, at["batch"])
        batches.set_epoch(at["epoch"])           # the order of the pictures depends on it
        for (x0,) in batches:
            at["batch"] += 1
            with accelerator.accumulate(prepared):
                with accelerator.autocast():
                    loss = batch_loss(prepared, scheduler, mirror_some(x0) if args.flip else x0)
                accelerator.backward(loss)       # divides by the number of accumulated passes
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            mean = accelerator.gather(torch.stack(losses)).mean().item()
            losses = []
            at["step"] += 1
            if not math.isfinite(mean):
                sys.exit(f"The loss became {mean} at step {at['step']}: lower --learning_rate, or "
                         "try --mixed_precision no; then run again with --resume if there is a "
                         "checkpoint.")
            ema.step(model.parameters())
            log.write(f"{at['step']},{mean!r}\n")
            log.flush()
            accelerator.log({"loss": mean, "learning_rate": schedule.get_last_lr()[0]}, at["step"])
            progress.update()
            progress.set_postfix(loss=f"{mean:.4f}")
            last = at["step"] == args.steps
            if args.sample_every and at["step"] % args.sample_every == 0:
                save_grid(args, accelerator, model, scheduler, ema, at["step"])
            if args.checkpoint_every and (last or at["step"] % args.checkpoint_every == 0):
                save_checkpoint(args, accelerator, ema, at)
            if last:
                break
    progress.close()
    log.close()


def open_log(output, step):
    """losses.csv in `output`, cut back to `step`, to be continued; nowhere without `output`."""
    if output is None:                           # not the main process
        return open(os.devnull, "w")
    path = Path(output) / "losses.csv"
    lines = path.read_text().splitlines(keepends=True)[:step + 1] if step else ["step,loss\n"]
    path.write_text("".join(lines))
    return path.open("a")


def save_grid(args, accelerator, model, scheduler, ema, step):
    """32 samples of the averaged weights, at the model's picture size."""
    if accelerator.is_main_process:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        folder = Path(args.output) / "samples"
        folder.mkdir(exist_ok=True)
        pictures = tile(draw_pictures(model, scheduler, 32))
        Image.fromarray(pictures).save(folder / f"step-{step:06d}.png")
        ema.restore(model.parameters())


def quality_sentence(model, scheduler, unseen):
    """What the ruler says about half as many samples as there are unseen pictures."""
    n = len(unseen) // 2
    measured = measure(draw_pictures(model, scheduler, n), unseen)
    return (f"Fréchet distance in the course's fixed random features, {n:,} samples "
            f"(DPM-Solver++, 25 steps, seed 0): {measured}.")


# ---- the whole run ---------------------------------------------------------------------------

def prepare(args, image_size, channels):
    """Check what can fail before the training; returns Accelerator, pictures and unseen ones."""
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "README.md").touch()
    except OSError as error:
        sys.exit(f"Cannot write to {str(output)!r} ({error}): give --output a writable folder.")
    try:
        dataset = load_images(args.source, limit=args.limit)
        unseen = load_images(args.source, "test", 2 * args.evaluate) if args.evaluate else None
    except (ValueError, ConnectionError) as error:
        sys.exit(str(error))
    if unseen and len(unseen) < 2 * FEWEST:
        sys.exit(f"{args.source!r} has {len(unseen)} unseen pictures: --evaluate needs "
                 f"{2 * FEWEST}; leave it out.")
    accumulation = GradientAccumulationPlugin(num_steps=args.accumulation,
                                              sync_with_dataloader=False)
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed)
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, gradient_accumulation_plugin=accumulation,
            dataloader_config=order,
            log_with=None if args.tracker == "none" else args.tracker, project_dir=output)
    except ValueError as error:
        sys.exit(f"--tracker {args.tracker}, --mixed_precision {args.mixed_precision}: {error}")
    if args.epochs:
        per_step = args.batch_size * accelerator.num_processes * args.accumulation
        args.steps = max(1, args.epochs * len(dataset) // per_step)
    check_resume(args)
    set_seed(args.seed, device_specific=True)
    x0_all = to_tensor(dataset, image_size, channels)
    return accelerator, x0_all, to_tensor(unseen, image_size, channels) if unseen else None


def run(args, accelerator, model, scheduler, x0_all, unseen, card=CARD):
    """Train `model` and save the averaged weights as a pipeline with its card in `args.output`."""
    started, output = time.time(), Path(args.output)
    settings = {name: value if isinstance(value, (int, float, str)) else str(value)
                for name, value in run_settings(args).items()}
    accelerator.init_trackers("logs", config=settings)
    model.to(accelerator.device)
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    run_training(args, accelerator, model, scheduler, ema, x0_all)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    ema.copy_to(model.parameters())
    if args.half:
        model.half().float()                     # measure the weights that are saved
    quality = quality_sentence(model.eval(), scheduler, unseen) if args.evaluate else ""
    text = card.format(
        name=output.name, parameters=sum(p.numel() for p in model.parameters()), quality=quality,
        size=model.config.sample_size, source=args.source, base=getattr(args, "base", ""),
        pictures=len(x0_all), steps=args.steps, minutes=(time.time() - started) / 60,
        command="python " + " ".join(sys.argv))
    try:
        DDPMPipeline(model.half() if args.half else model, scheduler).save_pretrained(output)
        (output / "README.md").write_text(text)
    except WRITE_ERRORS as error:
        sys.exit(f"Could not save the pipeline to {str(output)!r} ({error}): free some space, then "
                 "run again with --resume.")
    shutil.rmtree(output / "checkpoints", ignore_errors=True)   # the run is complete
    print(f"Saved {output} after {time.time() - started:.0f} s. {quality}")
    if args.push_to_hub:
        create_repo(args.push_to_hub, exist_ok=True)
        upload_folder(repo_id=args.push_to_hub, folder_path=output, ignore_patterns=["logs/*"])
        print("Shared:", args.push_to_hub)


def main(argv=None):
    args = parse_args(argv)
    accelerator, x0_all, unseen = prepare(args, args.image_size, args.channels)
    run(args, accelerator, build_model(args), make_scheduler(), x0_all, unseen)


if __name__ == "__main__":
    main()
