"""What a training script needs around its loop: options, pictures, checkpoints, records, the end.

It lies here because both scripts use it; no notebook does. The model, the loss and the loop stand
in `unit1/train_unconditional.py`.

A run is a list of draws 0, 1, 2, …: draw n is a picture, its noise, its timestep, and whether it is
mirrored, all of which follow from n and the seed. A step takes the next draws, however many
processes and accumulated passes share them. So a run on two processes is the run on one, and a
checkpoint needs no random state to go on exactly.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    broadcast_object_list,
    gather_object,
)
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
from diffusers.optimization import get_scheduler
from filelock import FileLock, Timeout
from huggingface_hub import create_repo, get_token, upload_folder
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from matplotlib import pyplot as plt
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.optim import Muon
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from course_utils.data import BUILT_IN, load_images, open_picture, open_source, to_pixels, to_square
from course_utils.metrics import FEWEST, measure
from course_utils.plotting import plot_loss, tile

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---
# {name}

Unconditional diffusion model of {parameters:,} parameters for {size} x {size} pictures, {origin}
`{source}` ({pictures}) for {steps:,} steps of {batch} pictures ({minutes:.0f} minutes) with

    {command}

Load it with `DDPMPipeline.from_pretrained("PATH_TO_THIS_FOLDER")`. Who shares it adds the licence,
which depends on that of the pictures.

{grid}![Loss over the steps](losses.png)

{quality}
"""
OURS = {".lock", "README.md", "checkpoints", "logs", "losses.csv", "losses.png", "model_index.json",
        "samples", "samples.png", "scheduler", "unet"}    # what a run writes into its folder
HOURS = timedelta(hours=6)                      # that processes wait while one draws and measures
FREE = {"checkpoint_every", "compile", "evaluate", "evaluate_every", "half", "log_every", "output",
        "overwrite", "push_to_hub", "resume", "sample_every", "tf32", "tracker", "workers"}
START = {"epoch": 0, "shard": 0, "row": 0, "taken": 0}    # of a stream
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)   # what a full disk raises, by library


# ---- the command line ------------------------------------------------------------------------

def training_parser(description, **defaults):
    """A parser with the options of every training run; `defaults` replaces some defaults."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--source", default="butterflies", help="built-in name, folder, dataset file or Hub id")
    add("--limit", type=int, help="use at most this many pictures; all of them if not given")
    add("--streaming", action="store_true", help="read the pictures while training: for more than "
        "memory holds; mixes --buffer of them at a time")
    add("--buffer", type=int, default=4096, help="streamed pictures that are mixed at a time")
    add("--workers", type=int, default=4, help="threads that decode streamed pictures")
    add("--output", default="my-diffusion-model", help="folder to write the pipeline to")
    add("--overwrite", action="store_true", help="replace what an earlier run left in --output")
    add("--steps", type=int, default=2000, help="optimizer steps")
    add("--epochs", type=int, help="passes over the pictures, instead of --steps")
    add("--batch_size", type=int, default=16, help="pictures in a forward pass on each device")
    add("--accumulation", type=int, default=1,
        help="forward passes in an optimizer step: their gradients are averaged")
    add("--optimizer", default="muon", choices=("muon", "adamw"), help="Muon: see unit 1")
    add("--learning_rate", type=float, default=5e-3,
        help="its peak; AdamW needs less than Muon: 2e-3 did well")
    add("--schedule", default="one_cycle", choices=("one_cycle", "cosine", "constant"),
        help="the learning rate over the run, each with a rise over the first --warmup of it")
    add("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises")
    add("--ema_decay", type=float, default=0.999, help="decay of the averaged weights, 0 to 1")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="mirror half of the pictures left to right")
    add("--mixed_precision", choices=("no", "fp16", "bf16"),
        help="if not given, what the launcher says, or no")
    add("--compile", action="store_true", help="torch.compile the model: pays in long runs")
    add("--tf32", action="store_true", help="float32 products and convolutions with 10 bits on "
        "NVIDIA GPUs: faster")
    add("--half", action="store_true", help="save the weights as float16")
    add("--log_every", type=int, default=10, help="steps between looks at the loss")
    add("--sample_every", type=int, default=500, help="steps between sample grids, 0 for none")
    add("--checkpoint_every", type=int, default=500, help="steps between checkpoints (the last two "
        "are kept until the run is complete), 0 for none")
    add("--resume", action="store_true", help="go on exactly from the last whole checkpoint")
    add("--tracker", default="tensorboard", choices=["none", *LoggerType.list()],
        help="where Accelerate logs loss and learning rate")
    add("--evaluate", type=int, default=0,
        help=f"samples for the Fréchet distance to the source's test split: {FEWEST} or more, "
             "and twice as many unseen pictures; 0 for none")
    add("--evaluate_every", type=int, default=0, help="steps between such measurements; 0: the end")
    add("--push_to_hub", metavar="OWNER/NAME", help="repository of the Hub to upload the result to")
    add("--seed", type=int, default=0, help="random seed")
    parser.set_defaults(**defaults)
    return parser


def check_training_arguments(parser, args):
    """End with one sentence if an option of `training_parser` makes no sense."""
    least = {"steps": 1, "epochs": 1, "batch_size": 1, "accumulation": 1, "limit": 1, "buffer": 1,
             "workers": 1, "log_every": 1, "sample_every": 0, "checkpoint_every": 0,
             "evaluate": 0, "evaluate_every": 0, "seed": 0}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name} {value} must be at least {low}")
    if not (0 < args.learning_rate < math.inf and 0 <= args.ema_decay < 1 and 0 < args.warmup < 1):
        parser.error("--learning_rate must be above 0, --ema_decay from 0 to below 1, "
                     "--warmup between 0 and 1")
    if 0 < args.evaluate < FEWEST:
        parser.error(f"--evaluate {args.evaluate}: fewer than {FEWEST} pictures cannot be told "
                     f"from noise: give {FEWEST} or more, or 0 for no measurement")
    if args.evaluate_every and not args.evaluate:
        parser.error("--evaluate_every needs --evaluate, the number of samples")
    if args.streaming and args.source in BUILT_IN:
        parser.error(f"--streaming: {args.source} fit into memory: leave it out")
    if args.streaming and (args.epochs or args.limit):
        parser.error("--streaming does not know how many pictures there are: give --steps instead "
                     "of --epochs and --limit")
    if not args.output.strip():
        parser.error("--output is empty: name the folder to write to")
    if args.tracker not in ("none", "tensorboard") and not importlib.util.find_spec(args.tracker):
        parser.error(f"--tracker {args.tracker} is not installed: run pip install {args.tracker}, "
                     "or use tensorboard or none")
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError:
            parser.error(f"--push_to_hub {args.push_to_hub!r} is not of the form OWNER/NAME")
        if not get_token():
            parser.error("--push_to_hub needs a token: run `hf auth login` first")


# ---- pictures --------------------------------------------------------------------------------

class Draws(IterableDataset):
    """The batches of one process, without end: dictionaries of x0 (uint8), t, eps and state.

    `pictures` is uint8 (N, C, H, W) or a streamed dataset, of which this process reads its share.
    """

    def __init__(self, args, pictures, shape, draw_t, process=0, processes=1):
        self.args, self.pictures, self.shape, self.draw_t = args, pictures, shape, draw_t
        self.process, self.processes = process, processes
        self.first, self.state = 0, None         # the batch to begin with, the stream's position

    def __iter__(self):
        size = self.args.batch_size
        stream = None if torch.is_tensor(self.pictures) else self.stream()
        for batch in count(self.first):
            begin = (batch * self.processes + self.process) * size
            draws = range(begin, begin + size)
            if stream is None:
                x0 = torch.stack([self.pictures[self.place(draw)] for draw in draws])
                state = None
            else:
                x0, state = next(stream)
            yield self.complete(x0, draws) | {"state": state}

    def place(self, draw):
        """Where the picture of this draw stands: each epoch has its own order."""
        epoch, place = divmod(draw, len(self.pictures))
        return shuffled(len(self.pictures), self.args.seed, epoch)[place]

    def complete(self, x0, draws):
        """Mirror some of x0 and add timesteps and noise, each from the seed of its draw."""
        t, eps = [], []
        for i, draw in enumerate(draws):
            seed = np.random.SeedSequence([self.args.seed, draw]).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(seed))
            if torch.rand(1, generator=generator) < 0.5 and self.args.flip:
                x0[i] = x0[i].flip(-1)
            t.append(self.draw_t(generator))
            eps.append(torch.randn(self.shape, generator=generator))
        return {"x0": x0, "t": torch.cat(t), "eps": torch.stack(eps)}

    def stream(self):
        """Batches of streamed pictures that can be read, and the position behind each."""
        at, size = self.state or START, self.args.batch_size
        rows, ready, good = self.mixed_rows(**at), [], at["epoch"]
        with ThreadPoolExecutor(self.args.workers) as pool:
            while True:
                chunk, places = zip(*islice(rows, size), strict=True)
                found = zip(pool.map(self.decode, chunk), places, strict=True)
                ready += [(x0, at) for x0, at in found if x0 is not None]
                if len(ready) >= size:
                    pictures, places = zip(*ready[:size], strict=True)
                    yield torch.from_numpy(np.stack(pictures)), places[-1]
                    ready, good = ready[size:], places[-1]["epoch"]
                elif places[-1]["epoch"] > good + size:
                    raise OSError(f"no readable picture in {self.args.source!r}")

    def mixed_rows(self, epoch, shard, row, taken):
        """Rows of this process without end, mixed block by block; the position behind each."""
        while True:
            rows, block = self.rows_from(epoch, shard, row), None
            while ready := list(islice(rows, self.args.buffer)):
                shard, row, _ = block = ready[0]
                order = np.random.default_rng([self.args.seed, epoch, shard, row])
                order = order.permutation(len(ready))
                for i in range(taken, len(ready)):
                    yield ready[order[i]][2], {"epoch": epoch, "shard": shard, "row": row,
                                               "taken": i + 1}
                taken = 0
            if block is None:
                raise OSError(f"no picture in {self.args.source!r}")
            epoch, shard, row = epoch + 1, 0, 0

    def rows_from(self, epoch, shard, row):
        """(shard, row, example) of this process in the order of the epoch, from a place on."""
        order = shuffled(shards_of(self.pictures), self.args.seed, epoch)
        order = order[self.process::self.processes]
        for place in range(shard, len(order)):
            part = self.pictures.shard(shards_of(self.pictures), int(order[place]))
            for place_in, example in enumerate(part.skip(row), row):
                yield place, place_in, example
            row = 0

    def decode(self, row):
        image = open_picture(row["image"])
        if image is None:
            name = (row["image"] or {}).get("path") or "unnamed"
            warnings.warn(f"Left out an unreadable picture: {name}", stacklevel=2)
            return None
        return to_square(image, self.shape[1], self.shape[0])


def shards_of(stream):
    """In how many parts a stream is read; a folder has a shard for each file."""
    return min(stream.num_shards, 1024)


def leave_signals(_):
    """Give a loading process, which inherits the run's handlers, the usual ones."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # Ctrl-C is the run's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@lru_cache(maxsize=2)                            # a batch may lie in two epochs
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def read_pictures(args, image_size, channels):
    """The pictures to train on (a tensor or a stream), and unseen ones or None."""
    unseen = None
    if args.evaluate:
        unseen = load_images(args.source, "test", 2 * args.evaluate)
        if len(unseen) < 2 * FEWEST:
            raise ValueError(f"{args.source!r} has {len(unseen)} unseen pictures: --evaluate needs "
                             f"{2 * FEWEST}; leave it out.")
        unseen = to_pixels(unseen, image_size, channels).float() / 127.5 - 1
    if args.streaming:
        return open_source(args.source, streaming=True).select_columns("image"), unseen
    if args.limit or args.source in BUILT_IN or not os.path.exists(os.path.expanduser(args.source)):
        return to_pixels(load_images(args.source, limit=args.limit), image_size, channels), unseen
    return read_whole(args.source, image_size, channels), unseen


def read_whole(source, image_size, channels):
    """The readable pictures of a folder or file, uint8 (N, C, H, W), without a cache on the disk.

    At the peak they take one byte a value: a bytearray grows where it lies.
    """
    pixels, count, left_out = bytearray(), 0, []
    rows = open_source(source, streaming=True).select_columns("image")
    try:
        for row in rows:
            if image := open_picture(row["image"]):
                pixels += to_square(image, image_size, channels).tobytes()
            else:
                left_out.append((row["image"] or {}).get("path") or f"row {count}")
            count += 1
    except Exception as error:                   # readers of damaged files raise anything
        raise ValueError(f"Could not read {source!r} behind {count} pictures: {reason(error)}"
                         ) from None
    if not pixels:
        raise ValueError(f"No readable picture in {source!r}: give at least one intact picture.")
    if left_out:
        names = ", ".join(left_out[:5]) + (" …" if len(left_out) > 5 else "")
        warnings.warn(f"Skipped {len(left_out)} unreadable picture(s) in {source!r}: {names}",
                      stacklevel=2)
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, channels, image_size, image_size)


# ---- checkpoints: one file each, which carries its digest in its name --------------------------

def digest(path):
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**24):
            found.update(part)
    return found.hexdigest()[:16]


def checkpoints(output):
    """The checkpoints in `output`, the newest first."""
    return sorted((Path(output) / "checkpoints").glob("step-*.safetensors"), reverse=True)


def whole_checkpoint(output):
    """The newest checkpoint whose digest is right, or None; says which ones are damaged."""
    for path in checkpoints(output):
        if path.stem.rsplit("-", 1)[1] == digest(path):
            return path
        print(f"{path.name} is damaged: going back to the one before.")
    return None


def write_checkpoint(output, tensors, position):
    """Write a whole new checkpoint, then remove all but the last two."""
    folder = Path(output) / "checkpoints"
    folder.mkdir(exist_ok=True)
    partial = folder / "partial"
    try:
        save_file(tensors, partial, metadata={"position": json.dumps(position)})
        partial.replace(folder / f"step-{position['step']:08d}-{digest(partial)}.safetensors")
    finally:
        partial.unlink(missing_ok=True)
    for path in checkpoints(output)[2:]:
        path.unlink()


def all_tensors(model, average, optimizer):
    """Everything that training changes, as one flat dictionary."""
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    found |= {f"average.{i}": value for i, value in enumerate(average.shadow_params)}
    found |= {f"optimizer.{i}.{name}": torch.as_tensor(value)
              for i, values in optimizer.state_dict()["state"].items()
              for name, value in values.items()}
    return {name: value.detach().cpu().contiguous() for name, value in found.items()}


def restore_tensors(tensors, model, average, optimizer):
    """Put back what `all_tensors` found."""
    state = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "average":
            average.shadow_params[int(rest)].copy_(value)
        elif kind == "optimizer":
            i, name = rest.split(".")
            state.setdefault(int(i), {})[name] = (
                value.item() if value.dtype == torch.bool else value)
    model.load_state_dict({name[6:]: value for name, value in tensors.items()
                           if name.startswith("model.")})
    optimizer.load_state_dict({"state": state,
                               "param_groups": optimizer.state_dict()["param_groups"]})
    for weight, values in optimizer.state.items():       # in the memory format of the weight
        values |= {name: torch.empty_like(weight).copy_(value) for name, value in values.items()
                   if torch.is_tensor(value) and value.shape == weight.shape}


# ---- the run ---------------------------------------------------------------------------------

def build_optimizer(args, model):
    """The optimizer that the options ask for, and its learning rate over the run."""
    if args.optimizer == "muon":
        optimizer = Muon(model.named_parameters(), args.learning_rate, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, betas=(0.9, 0.99),
                                      fused=True)
    if args.schedule == "one_cycle":
        return optimizer, OneCycleLR(optimizer, args.learning_rate, args.steps,
                                     pct_start=args.warmup, cycle_momentum=False)
    name = {"cosine": "cosine", "constant": "constant_with_warmup"}[args.schedule]
    return optimizer, get_scheduler(name, optimizer, num_training_steps=args.steps,
                                    num_warmup_steps=round(args.warmup * args.steps))


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


def reason(error):
    """The last line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class Run:
    """One training run: what happens before, between and after its steps.

    The script's loop is `for step in run.steps(): for x0, t, eps in run.batches(): …`. As a context
    it holds the folder's lock, and turns signals and lost connections into a whole checkpoint and
    one sentence.
    """

    def __init__(self, args, image_size, channels, scheduler, draw_timesteps):
        """Check all that could fail later and read the pictures; ends in one sentence if it must.

        `draw_timesteps(count, T, generator)` is the script's; T is the scheduler's.
        """
        self.args, self.output, self.scheduler = args, Path(args.output).expanduser(), scheduler
        self.step, self.asked_to_stop, self.started = 0, 0, time.time()
        self.losses, self.rates, self.unwritten, self.state = [], [], "", None
        self.lock = None
        self.accelerator = self.start_accelerator()
        self.layout = (torch.channels_last if self.accelerator.device.type == "cuda"
                       else torch.contiguous_format)
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.passes = self.accelerator.gradient_accumulation_steps
        self.processes = self.accelerator.num_processes
        self.votes = dist.new_group(backend="gloo", timeout=HOURS) if self.processes > 1 else None
        self.agree(self.claim_output)
        pictures, self.unseen = self.agree(
            lambda: read_pictures(args, image_size, channels), everywhere=True)
        self.count_pictures(pictures)
        self.position = self.agree(self.find_position)
        if args.push_to_hub:
            self.agree(self.create_repository)
        draw_t = partial(draw_timesteps, 1, scheduler.config.num_train_timesteps)
        self.draws = Draws(args, pictures, (channels, image_size, image_size), draw_t,
                           self.accelerator.process_index, self.processes)
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = args.tf32
        # on a CPU in bf16 fused attention is slow on the way back, plain products are not
        bf16_on_cpu = self.device.type == "cpu" and self.accelerator.mixed_precision == "bf16"
        torch.backends.cuda.enable_flash_sdp(not bf16_on_cpu)
        torch.manual_seed(args.seed)             # a fresh model's weights

    def start_accelerator(self):
        """What is not given here is taken from the launcher or its configuration file."""
        args = self.args
        try:
            accelerator = Accelerator(
                mixed_precision=args.mixed_precision, project_dir=self.output,
                log_with=None if args.tracker == "none" else args.tracker,
                dynamo_backend="inductor" if args.compile else None,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=HOURS)],
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=args.accumulation, sync_with_dataloader=False))
        except ValueError as error:
            sys.exit(f"--tracker {args.tracker}, --mixed_precision {args.mixed_precision}: "
                     f"{reason(error)}")
        if accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            sys.exit(f"These scripts keep the whole model on each device: "
                     f"{accelerator.distributed_type} is not for them, use MULTI_GPU.")
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            sys.exit("Mixed precision fp16 needs a GPU: use bf16 or no.")
        return accelerator

    def say(self, sentence):
        if self.main:
            tqdm.write(sentence)

    def agree(self, check, everywhere=False):
        """What check() returns, on the main process or everywhere; if it fails, all end."""
        result = sentence = None
        if self.main or everywhere:
            try:
                result = check()
            except (ValueError, OSError) as error:
                sentence = str(error)
            except SystemExit as error:
                sentence = error.code
        failed = [found for found in gather_object([sentence]) if found]
        if failed:
            self.release()
            sys.exit(failed[0] if self.main else 1)
        return result if everywhere else broadcast_object_list([result])[0]

    def release(self):
        """Let another run write to the folder."""
        if self.lock:
            (self.output / ".lock").unlink(missing_ok=True)
            self.lock.release()

    # -- before the first step

    def claim_output(self):
        """Make the folder ours: nothing else in it, no other run, no finished model lost."""
        shown, names = repr(str(self.output)), set()
        if self.output.is_dir():
            names = {path.name for path in self.output.iterdir()
                     if not path.name.startswith((".", "desktop.ini"))}   # of viewers
        ours = OURS if names & {"losses.csv", "model_index.json"} else set()
        if names - ours:
            sys.exit(f"{shown} holds other things ({', '.join(sorted(names - ours)[:3])}): give "
                     "--output a new or empty folder.")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.output / ".lock")
            lock.acquire(blocking=False)
            self.lock = lock
        except Timeout:
            sys.exit(f"Another run is writing to {shown}: wait for it, or give another --output.")
        except OSError as error:
            sys.exit(f"Cannot write to {shown} ({error}): give --output a writable folder.")
        finished = "model_index.json" in names and not checkpoints(self.output)
        if self.args.resume and finished:
            sys.exit(f"The run in {shown} is complete: there is nothing to resume.")
        if not (self.args.resume or self.args.overwrite):
            if finished:
                sys.exit(f"{shown} holds a finished model: give another --output, or --overwrite "
                         "to replace it.")
            if checkpoints(self.output):
                sys.exit(f"{shown} holds a checkpoint: add --resume to go on from it, --overwrite "
                         "to start again, or give another --output.")

    def count_pictures(self, pictures):
        """Turn epochs into steps, and note what a resumed run must share with this one."""
        args, self.per_step = self.args, self.args.batch_size * self.processes * self.passes
        if args.streaming:
            self.shown, found = "streamed", pictures.num_shards
            if found < self.processes:
                self.agree(lambda: sys.exit(
                    f"{args.source!r} has {found} shards for {self.processes} processes: start at "
                    "most as many processes, or store it in more files."))
        else:
            self.shown = f"{len(pictures):,} pictures"
            found = f"{len(pictures)}, digest {hashlib.sha256(pictures.numpy()).hexdigest()[:8]}"
        if args.epochs:
            args.steps = math.ceil(args.epochs * len(pictures) / self.per_step)
            self.say(f"{args.epochs} epochs of {self.shown}: {args.steps:,} steps of "
                     f"{self.per_step}.")
        self.settings = {name: value for name, value in vars(args).items() if name not in FREE}
        self.settings |= {"accumulation": self.passes, "processes": self.processes,
                          "mixed_precision": self.accelerator.mixed_precision, "pictures": found}

    def find_position(self):
        """The position in the newest whole checkpoint and its file; None without --resume."""
        if not self.args.resume:
            return None
        path, shown = whole_checkpoint(self.output), repr(str(self.output))
        if path is None:
            sys.exit(f"No whole checkpoint in {shown}: start again without --resume and with "
                     "--overwrite.")
        with safe_open(path, "pt") as file:
            position = json.loads(file.metadata()["position"])
        before, now = position["settings"], json.loads(json.dumps(self.settings))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                sys.exit(f"The checkpoint in {shown} was made with {name} {before.get(name)}, not "
                         f"{now.get(name)}: resume with the same, or give another --output.")
        return position | {"path": str(path)}

    def create_repository(self):
        try:
            create_repo(self.args.push_to_hub, exist_ok=True)
        except Exception as error:               # whatever a network can raise
            sys.exit(f"Cannot write to {self.args.push_to_hub} on the Hub ({reason(error)}): check "
                     "name, token and network, or leave --push_to_hub out.")

    def begin(self, model, optimizer, schedule, average):
        """Take what is trained; go back to the checkpoint, or open an empty record."""
        self.model, self.average = model, average
        self.optimizer, self.schedule = optimizer, schedule
        if self.position:
            tensors = self.agree(lambda: load_file(self.position["path"]), everywhere=True)
            restore_tensors(tensors, model, average, optimizer)
            average.optimization_step = self.step = self.position["step"]
            self.started -= self.position["seconds"]
            schedule.load_state_dict(self.position["schedule"])
            for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate
            if self.accelerator.scaler and self.position["scaler"]:
                self.accelerator.scaler.load_state_dict(self.position["scaler"])
            self.state = self.position["states"][self.accelerator.process_index]
        self.agree(self.open_record)
        self.draws.first, self.draws.state = self.step * self.passes, self.state
        background = self.device.type != "cpu"   # there the CPU is free to prepare batches
        ahead = {"num_workers": 1, "prefetch_factor": 8} if background else {}
        self.loader = iter(DataLoader(self.draws, None, worker_init_fn=leave_signals,
                                      pin_memory=self.device.type == "cuda", **ahead))

    def open_record(self):
        """Remove what an earlier run left; cut losses.csv back to the checkpoint's step."""
        path = self.output / "losses.csv"
        if self.position:                        # cut at one go: a kill here loses no line
            lines = path.read_bytes().splitlines(keepends=True)[:self.step + 1]
            os.truncate(path, len(b"".join(lines)))
        else:                                    # losses.csv stays: it says whose folder it is
            for old in sorted(self.output / name for name in OURS - {".lock", "losses.csv"}):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            path.write_text("step,loss\n")
        self.record_size = path.stat().st_size
        (self.output / "samples").mkdir(exist_ok=True)
        (self.output / "checkpoints").mkdir(exist_ok=True)

    # -- the loop's two iterators

    def __enter__(self):
        self.progress = tqdm(desc="training", disable=not self.main)
        self.handlers = {number: signal.signal(number, self.ask_to_stop)
                         for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask_to_stop(self, number, frame):
        self.asked_to_stop = number
        signal.signal(number, self.handlers[number])   # a second one ends at once

    def stop_asked(self):
        """The signal that any process has received, or 0; agreed without waiting for a GPU."""
        if self.votes is None:
            return self.asked_to_stop
        vote = torch.tensor(self.asked_to_stop)
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.votes)
        return int(vote)

    def steps(self):
        """The steps that are left; between two of them losses, samples and checkpoints."""
        args = self.args
        self.start_trackers()
        self.progress.reset(args.steps)
        self.progress.update(self.step)
        while self.step < args.steps:
            seed = (args.seed + self.step) * self.processes + self.accelerator.process_index
            torch.manual_seed(seed)              # for models with dropout
            yield self.step
            self.step, self.state = self.step + 1, self.next_state
            stop = self.stop_asked()
            self.rates.append(self.schedule.get_last_lr()[0])
            last = self.step == args.steps

            def due(every, step=self.step):
                return every and step % every == 0

            save = due(args.checkpoint_every) or stop or last and args.checkpoint_every
            if due(args.log_every) or save or last:
                self.look_at_losses()
            if due(args.sample_every) and self.main:
                path = self.output / f"samples/step-{self.step:06d}.png"
                self.averaged(lambda path=path: self.save_grid(path))
            if due(args.evaluate_every) and not last and self.main:
                self.track({"distance": self.averaged(self.measured).distance})
            if save:
                self.save_checkpoint()
            if stop and not last:
                self.say(f"Stopped after step {self.step} of {args.steps}, which is saved: the "
                         "same command with --resume goes on from there.")
                sys.exit(128 + stop)

    def batches(self):
        """The next step's passes: x0 in [-1, 1], timesteps and noise, on the device."""
        for _ in range(self.passes):
            try:
                batch = next(self.loader)
            except OSError:                      # a stream broke off: the last step is whole
                if self.processes == 1:
                    del self.losses[self.passes * len(self.rates):]
                    self.look_at_losses()
                    self.save_checkpoint()
                raise
            x0, t, eps = (batch[name].to(self.device, non_blocking=True)
                          for name in ("x0", "t", "eps"))
            yield ((x0.float() / 127.5 - 1).contiguous(memory_format=self.layout), t,
                   eps.contiguous(memory_format=self.layout))
        self.next_state = batch["state"]         # counts when the step is complete

    # -- between two steps

    def look_at_losses(self):
        """Fetch the losses since the last look, all at once; end if one is not a number."""
        if not self.losses:
            return
        losses = torch.stack(self.losses).view(1, -1, self.passes)
        losses = self.accelerator.gather(losses).mean((0, 2)).tolist()
        first = self.step - len(losses) + 1
        for step, loss, rate in zip(range(first, self.step + 1), losses, self.rates, strict=True):
            if not math.isfinite(loss):
                self.say(f"The loss became {loss} at step {step}: start again with --overwrite and "
                         "a lower --learning_rate, or with --mixed_precision no.")
                sys.exit(1)
            self.unwritten += f"{step},{loss!r}\n"
            self.track({"loss": loss, "learning_rate": rate}, step)
        self.losses, self.rates = [], []
        self.progress.update(self.step - self.progress.n)
        self.progress.set_postfix(loss=f"{losses[-1]:.4f}")
        if self.main:
            self.try_to_write("losses.csv", self.write_losses)

    def way_back(self):
        kept = checkpoints(self.output)
        return (f"{kept[0].stem[:13]} is whole: the same command with --resume goes on from there."
                if kept else "There is no checkpoint yet.")

    def write_losses(self):
        with (self.output / "losses.csv").open("r+") as file:
            file.truncate(self.record_size)      # what an attempt on a full disk left
            file.seek(self.record_size)
            file.write(self.unwritten)
        self.record_size, self.unwritten = self.record_size + len(self.unwritten), ""

    def try_to_write(self, name, write):
        """Call write(); if it fails, say so once and train on: this file can be done without."""
        try:
            write()
        except Exception as error:               # a disk, a tracker's network
            warnings.warn(f"Could not write {name} ({reason(error)}); the training goes on.",
                          stacklevel=2)

    def start_trackers(self):
        if self.args.tracker != "none":
            settings = {name: value if isinstance(value, (int, float, str)) else str(value)
                        for name, value in self.settings.items()}
            name = "logs" if self.args.tracker == "tensorboard" else self.output.name
            self.try_to_write(self.args.tracker,
                              lambda: self.accelerator.init_trackers(name, settings))

    def track(self, values, step=None):
        self.try_to_write(self.args.tracker,
                          lambda: self.accelerator.log(values, step or self.step))

    def averaged(self, function):
        """What function() returns while the model holds the averaged weights."""
        self.average.store(self.model.parameters())
        self.average.copy_to(self.model.parameters())
        self.model.eval()
        try:
            return function()
        finally:
            self.model.train()
            self.average.restore(self.model.parameters())

    def save_grid(self, path):
        """32 samples, always from the same noise."""
        images = draw_pictures(self.model, self.scheduler, 32)
        self.try_to_write(path.name, lambda: Image.fromarray(tile(images)).save(path))

    def measured(self):
        """What the ruler says of the model."""
        n = len(self.unseen) // 2
        found = measure(draw_pictures(self.model, self.scheduler, n), self.unseen)
        self.say(f"Step {self.step}, {n:,} samples: {found}")
        return found

    def save_checkpoint(self):
        states = gather_object([self.state])     # of every process

        def write():
            try:
                self.write_checkpoint(states)
            except WRITE_ERRORS as error:
                sys.exit(f"Could not write the checkpoint of step {self.step} to "
                         f"{str(self.output)!r} ({reason(error)}): free some space. "
                         f"{self.way_back()}")

        self.agree(write)

    def write_checkpoint(self, states):
        scaler = self.accelerator.scaler
        position = {"step": self.step, "settings": self.settings, "states": states,
                    "schedule": self.schedule.state_dict(),
                    "scaler": scaler.state_dict() if scaler else None,
                    "seconds": time.time() - self.started}
        tensors = all_tensors(self.model, self.average, self.optimizer)
        if not all(value.isfinite().all() for value in tensors.values()):
            sys.exit(f"A weight is no longer a finite number at step {self.step}: start again with "
                     "--overwrite and a lower --learning_rate.")
        write_checkpoint(self.output, tensors, position)

    def __exit__(self, kind, error, trace):
        """Release the folder; a lost process, connection or memory ends in one sentence."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.progress.close()
        cause, code = None, 1                    # of other errors the traceback says more
        if isinstance(error, KeyboardInterrupt):
            cause, code = "interrupted twice", 130
        elif isinstance(error, RuntimeError) and "gloo" in str(error):
            cause = "another process of this run was lost"
        elif isinstance(error, (OSError, torch.OutOfMemoryError, dist.DistError)) or (
                isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")):
            cause = reason(error)
        if error:
            self.release()
        if cause:                                # said by the process that knows it
            tqdm.write(f"Training ended after step {self.step} ({cause}). {self.way_back()}")
            sys.exit(code)

    # -- the end

    def finish(self, origin="trained on"):
        """Save the averaged weights as a pipeline; then measure it, write its card, upload it."""
        if not self.main:
            self.try_to_write(self.args.tracker, self.accelerator.end_training)
            return
        model, args = self.model.eval(), self.args
        self.average.copy_to(model.parameters())
        try:
            DDPMPipeline(model.half() if args.half else model,
                         self.scheduler).save_pretrained(self.output)
        except WRITE_ERRORS as error:
            self.release()
            sys.exit(f"Could not save the pipeline to {str(self.output)!r} ({reason(error)}): free "
                     f"some space. {self.way_back()}")
        self.try_to_write(args.tracker, self.accelerator.end_training)
        model.float()                            # what is drawn and measured are the saved weights
        minutes = (time.time() - self.started) / 60
        self.say(f"Saved {self.output} after {minutes:.1f} minutes.")
        quality = (f"Fréchet distance in the course's fixed random features (DPM-Solver++, 25 "
                   f"steps, seed 0): {self.measured()}." if args.evaluate else "")
        grid = ""
        if args.sample_every:
            self.save_grid(self.output / "samples.png")
            grid = "![32 samples, from noise that was fixed before](samples.png)\n\n"
        card = CARD.format(
            name=self.output.name, parameters=sum(p.numel() for p in model.parameters()),
            size=model.config.sample_size, origin=origin, source=args.source, pictures=self.shown,
            steps=args.steps, batch=self.per_step, minutes=minutes, quality=quality, grid=grid,
            command=shlex.join(["python", *sys.argv]))
        self.try_to_write("README.md", lambda: (self.output / "README.md").write_text(card))
        self.try_to_write("losses.png", self.draw_losses)
        shutil.rmtree(self.output / "checkpoints", ignore_errors=True)   # the run is complete
        if args.push_to_hub:
            self.upload()
        self.release()

    def draw_losses(self):
        losses = np.loadtxt(self.output / "losses.csv", delimiter=",", skiprows=1, ndmin=2)[:, 1]
        figure = plot_loss(losses).figure
        figure.savefig(self.output / "losses.png")
        plt.close(figure)

    def upload(self):
        name, left_out = self.args.push_to_hub, ["logs/*", "samples/*", ".lock"]
        try:
            upload_folder(repo_id=name, folder_path=self.output, ignore_patterns=left_out)
        except Exception as error:               # whatever a network can raise
            command = shlex.join(["hf", "upload", name, str(self.output), ".", "--exclude",
                                  *left_out])
            self.release()
            sys.exit(f"{self.output} is saved, but the upload failed ({reason(error)}); repeat it "
                     f"with: {command}")
        self.say(f"Shared: {name}")
