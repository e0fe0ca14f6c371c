"""Measure imports, sampling, training, loading and memory, beside plain loops in the same run.

`make bench` prints a table. It judges nothing: machines differ. What a notebook takes stands at the
end of `make course`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
from run_notebooks import ROOT
from torchvision import transforms

from course_utils.data import load_images
from course_utils.training import Draws, Run, read_pictures

sys.path.insert(0, str(ROOT / "unit1"))
import train_unconditional as script

STEPS, SKIP = 30, 8                              # steps timed, and not, of each training
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def import_seconds(statement):
    code = ("import time, torch, diffusers; started = time.perf_counter(); "
            f"{statement}; print(time.perf_counter() - started)")
    return float(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT))


@torch.no_grad()
def sampling_seconds(count=32, steps=20, at_once=32):
    unet = DDPMPipeline.from_pretrained(ROOT / "course_utils/pretrained/butterflies-32").unet
    solver = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    started = time.perf_counter()
    for x in torch.randn(count, 3, 32, 32).split(at_once):
        solver.set_timesteps(steps)
        for t in solver.timesteps:
            x = solver.step(unet(x, t).sample, t, x).prev_sample
    return time.perf_counter() - started


# ---- training: pictures a second ---------------------------------------------------------------

def plain_loader(args):
    """Pictures decoded and transformed one at a time, as in many tutorials."""
    to_tensor = transforms.Compose([
        transforms.Resize(args.image_size), transforms.CenterCrop(args.image_size),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5])])
    dataset = load_images("butterflies", limit=args.limit)
    dataset.set_transform(lambda rows: {"x0": [to_tensor(image) for image in rows["image"]]})
    return torch.utils.data.DataLoader(dataset.select_columns("image"), args.batch_size,
                                       shuffle=True, drop_last=True)


def plain_rate(args, loader):
    """The loop of many tutorials: float32, nothing fused, .item() at every step."""
    torch.manual_seed(0)
    model, scheduler = script.build_model(args), script.make_scheduler()
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, foreach=False)
    marks = []
    while len(marks) <= STEPS + SKIP:
        for batch in loader:
            marks.append(time.perf_counter())
            x0 = batch["x0"]
            t, eps = torch.randint(1000, (len(x0),)), torch.randn_like(x0)
            prediction = model(scheduler.add_noise(x0, eps, t), t).sample
            loss = F.mse_loss(prediction, scheduler.get_velocity(x0, eps, t))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()
            with torch.no_grad():
                for slow, fast in zip(average, model.parameters(), strict=True):
                    slow.mul_(0.999).add_(0.001 * fast)
    return args.batch_size * STEPS / (marks[SKIP + STEPS] - marks[SKIP])


class Timed(Run):
    """A run that notes when each step begins."""

    def batches(self):
        self.marks = [*getattr(self, "marks", []), time.perf_counter()]
        return super().batches()


def script_rate(*options):
    """Pictures a second of the script's own loop, over all processes of this launch."""
    with tempfile.TemporaryDirectory() as folder:
        args = script.parse_args([
            "--limit=512", "--tracker=none", "--sample_every=0", "--checkpoint_every=0",
            f"--steps={STEPS + SKIP + 1}", f"--output={folder}/model", *options])
        timed = Timed(args, args.image_size, args.channels, script.make_scheduler(),
                      script.draw_timesteps)
        with timed:
            script.run_training(args, timed, script.build_model(args))
        seconds = timed.marks[SKIP + STEPS] - timed.marks[SKIP]
        return args.batch_size * timed.processes * STEPS / seconds


def launched_rate(processes, *options):
    """`script_rate` in processes of their own, of which each takes its share of the cores."""
    threads = str(max(1, torch.get_num_threads() // processes))
    found = subprocess.check_output(
        [*LAUNCH, f"--nproc_per_node={processes}", Path(__file__), "--rate", *options], text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true",
             "PYTHONPATH": str(ROOT)})
    return float(found.split()[-1])


def loader_rate(count=200, **more):
    """Pictures a second that the loader makes ready, without a training."""
    args = argparse.Namespace(source="butterflies", batch_size=16, seed=0, flip=True, limit=512,
                              evaluate=0, streaming=False, buffer=512, workers=4)
    vars(args).update(more)
    pictures, _ = read_pictures(args, 32, 3)
    draw_t = partial(script.draw_timesteps, 1, 1000)
    loader = iter(Draws(args, pictures, (3, 32, 32), draw_t))
    next(loader)
    started = time.perf_counter()
    for _ in islice(loader, count):
        pass
    return 16 * count / (time.perf_counter() - started)


def streamed_rate(count=2000):
    """`loader_rate` of PNG files of 64 x 64 pixels in Parquet shards."""
    with tempfile.TemporaryDirectory() as folder:
        features = datasets.Features({"image": datasets.Image()})
        for i in range(4):
            rows = [image.resize((64, 64)) for image in
                    load_images("butterflies", limit=count // 4)["image"]]
            datasets.Dataset.from_dict({"image": rows}, features).to_parquet(
                Path(folder) / f"{i}.parquet")
        return loader_rate(count=count // 16, source=folder, streaming=True)


def memory_of_pictures(count=200_000):
    """Bytes at the peak for each value of `count` pictures of 32 x 32, in a process of its own."""
    code = f"""
import re, sys
from pathlib import Path
from course_utils.training import read_whole
def peak():                                      # getrusage would count the parent's, too
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
pixels = read_whole(sys.argv[1], 32, 3)
print((peak() - before) / pixels.numel())
assert len(pixels) == {count}
"""
    with tempfile.TemporaryDirectory() as folder:
        drawn = [image.resize((32, 32)) for image in load_images("butterflies", limit=500)["image"]]
        features = datasets.Features({"image": datasets.Image()})
        one = datasets.Dataset.from_dict({"image": drawn}, features)
        datasets.concatenate_datasets([one] * (count // 500)).to_parquet(f"{folder}/all.parquet")
        return float(subprocess.check_output(
            [sys.executable, "-c", code, folder], text=True, cwd=ROOT,
            env={**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache"}).split()[-1])


def training_rows():
    """(what, value, unit) of training, loading and memory, beside plain loops in the same run."""
    plain = {}
    for size in (128, 32, 16):
        args = script.parse_args(["--limit=512", f"--batch_size={size}"])
        loader = plain_loader(args)              # that of 16 is timed below
        plain[size] = plain_rate(args, loader)
        yield f"training, plain loop, {size} pictures a step", plain[size], "pictures/s"
    adamw = "--optimizer=adamw"
    for name, processes, size, options in (
            ("AdamW", 1, 16, [adamw]), ("Muon", 1, 16, []),
            ("AdamW, bf16", 1, 16, [adamw, "--mixed_precision=bf16"]),
            ("AdamW, 128 a step, bf16", 1, 128,
             [adamw, "--batch_size=128", "--mixed_precision=bf16"]),
            ("AdamW, --compile", 1, 16, [adamw, "--compile"]),
            ("AdamW, two processes, 8 each", 2, 16, [adamw, "--batch_size=8"]),
            ("AdamW, two processes, 16 each", 2, 32, [adamw]),
            ("AdamW, two processes, 64 each", 2, 128, [adamw, "--batch_size=64"]),
            ("AdamW, two processes, 64 each, bf16", 2, 128,
             [adamw, "--batch_size=64", "--mixed_precision=bf16"])):
        rate = launched_rate(processes, *options)
        yield f"training, the script with {name}", rate, "pictures/s"
        yield f"  of the plain loop's with {size}", rate / plain[size], "times"
    started = time.perf_counter()
    plain = sum(len(batch["x0"]) for batch in loader) / (time.perf_counter() - started)
    yield "loader, plain", plain, "pictures/s"
    for name, rate in (("in memory", loader_rate()), ("streamed from Parquet", streamed_rate())):
        yield f"loader, {name}", rate, "pictures/s"
        yield "  of the plain loader's", rate / plain, "times"
    yield "memory of 200,000 pictures of 32 x 32", memory_of_pictures(), "bytes/value"


def rows():
    yield ("import course_utils, beyond torch and diffusers",
           import_seconds("import course_utils"), "s")
    for module in ("data", "exercises", "metrics", "plotting", "runtime", "training"):
        statement = f"import course_utils.{module}"
        yield f"import course_utils.{module}", import_seconds(statement), "s"
    seconds = sampling_seconds()
    yield "32 pictures of butterflies-32, 20 steps", seconds, "s"
    yield "sampling, 20 steps", 32 / seconds, "pictures/s"
    yield "  of one picture at a time", sampling_seconds(8, at_once=1) * 4 / seconds, "times"
    yield from training_rows()


def main():
    if "--rate" in sys.argv:                     # a process that `launched_rate` has started
        print(script_rate(*sys.argv[sys.argv.index("--rate") + 1:]))
        return
    for name, value, unit in rows():
        print(f"{name:<60} {value:10.2f} {unit}", flush=True)


if __name__ == "__main__":
    main()
