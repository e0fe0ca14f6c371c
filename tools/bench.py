"""Measure what learners wait for: imports, sampling, and each notebook's time and memory.

`make bench` prints a table. It judges nothing: machines differ.
"""

import subprocess
import sys
import time

import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
from run_notebooks import ROOT, notebooks, run


def import_seconds(statement):
    code = ("import time, torch, diffusers; started = time.perf_counter(); "
            f"{statement}; print(time.perf_counter() - started)")
    return float(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT))


@torch.no_grad()
def sampling_seconds(count=32, steps=20):
    unet = DDPMPipeline.from_pretrained(ROOT / "course_utils/pretrained/butterflies-32").unet
    solver = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    solver.set_timesteps(steps)
    x = torch.randn(count, 3, 32, 32)
    started = time.perf_counter()
    for t in solver.timesteps:
        x = solver.step(unet(x, t).sample, t, x).prev_sample
    return time.perf_counter() - started


def main():
    rows = [("import course_utils, beyond torch and diffusers",
             import_seconds("import course_utils"))]
    for module in ("data", "exercises", "metrics", "plotting", "runtime"):
        statement = f"import course_utils.{module}"
        rows.append((f"import course_utils.{module}", import_seconds(statement)))
    rows.append(("32 pictures of butterflies-32, 20 steps", sampling_seconds()))
    memory = {}
    for path in notebooks():
        name = f"{path.parent.name}/{path.name}"
        seconds, memory[name], results = run(path)
        rows.append((name, seconds))
        rows += [(f"  {key}", value) for key, value in results.items() if "seconds" in key]
    for name, seconds in rows:
        print(f"{name:<60} {seconds:8.2f} s")
    for name, peak in memory.items():
        print(f"{name:<60} {peak:8.2f} GiB at most")


if __name__ == "__main__":
    main()
