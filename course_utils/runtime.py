"""Set up a notebook: profile, device, seeds, and one line that says what was chosen."""

import os
import platform
import random
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from huggingface_hub import constants

from course_utils.hub import hub_answers

PROFILES = ("quick", "full")


def _pick_profile(device):
    asked = os.environ.get("COURSE_PROFILE", "").strip()
    if asked and asked not in PROFILES:
        raise ValueError(f"COURSE_PROFILE is {asked!r}: set it to 'quick' or 'full', or unset it.")
    if asked == "full" and not constants.HF_HUB_OFFLINE and not hub_answers():
        raise ConnectionError("The full profile needs the Hugging Face Hub, which does not answer: "
                              "check the network, or set COURSE_PROFILE=quick to work offline.")
    if asked:
        return asked, "COURSE_PROFILE is set"
    if device == "cpu":
        return "quick", "no GPU found"
    if constants.HF_HUB_OFFLINE:
        return "quick", "HF_HUB_OFFLINE is set"
    if not hub_answers():
        return "quick", "the Hub does not answer"
    return "full", "a GPU is there and the Hub answers"


def start(seed: int = 0) -> SimpleNamespace:
    """Seed every generator, choose profile and device, and print the choice in one line.

    On a GPU, float32 keeps all its bits (no TF32), so that numbers compare on every device.
    Returns `profile` ("quick" or "full"), `device` (a torch.device), `bf16` (whether to train with
    bfloat16: in full, on a GPU that computes in it; Colab's T4 does not) and `seed`. The
    environment variable COURSE_PROFILE overrides the choice. Raises ValueError when it is misspelt
    and ConnectionError when it asks for "full" and the Hub does not answer.
    """
    device = ("cuda" if torch.cuda.is_available()
              else "mps" if torch.backends.mps.is_available() else "cpu")
    profile, why = _pick_profile(device)
    bf16 = (profile == "full" and device == "cuda"
            and torch.cuda.is_bf16_supported(including_emulation=False))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.allow_tf32 = False      # 10 bits would be too few for our checks
    import datasets
    import diffusers

    datasets.disable_progress_bars()
    versions = [f"Python {platform.python_version()}"] + [
        f"{module.__name__} {module.__version__}" for module in (torch, diffusers, datasets)]
    print(f"Profile {profile} ({why}) · device {device} · {' · '.join(versions)} · to change: "
          "set COURSE_PROFILE=quick or full before starting Jupyter")
    return SimpleNamespace(profile=profile, device=torch.device(device), bf16=bf16, seed=seed)


def choose(profile: str, **columns: tuple) -> SimpleNamespace:
    """Pick one column of a table of settings given as `name=(quick, full)`."""
    index = PROFILES.index(profile)
    return SimpleNamespace(**{name: values[index] for name, values in columns.items()})


def timed(function: Callable, *args, **options) -> tuple:
    """What `function` returns, and its seconds; waits until a GPU has finished."""
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    result = function(*args, **options)
    wait()
    return result, time.perf_counter() - started
