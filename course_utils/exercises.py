"""Checks for the exercises: what was expected, what came, and never a broken Run All."""

from typing import Any

import torch


def _short(value):
    if isinstance(value, torch.Tensor) and value.numel() > 8:
        return f"tensor of shape {tuple(value.shape)}, mean {value.float().mean():.4g}"
    return str(value)


def check(what: str, answer: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Compare an exercise's answer with what was expected and print the verdict.

    `answer` is a value or a function without arguments that returns it, so that an error in
    the learner's code is reported, not raised. `expected` is a value, or a pair (low, high) of
    numbers for a range. None means that the exercise has not been attempted.
    """
    try:
        answer = answer() if callable(answer) else answer
    except Exception as error:                   # the learner's code may fail in any way
        print(f"✗ {what}: your code stopped with {type(error).__name__}: {error}")
        return
    if answer is None or answer is Ellipsis:
        print(f"… {what}: not attempted yet")
        return
    in_range = isinstance(expected, tuple)
    wanted = "between {:.4g} and {:.4g}".format(*expected) if in_range else _short(expected)
    try:
        if in_range:
            good = bool(expected[0] <= answer <= expected[1])
        else:
            a, b = torch.as_tensor(answer).cpu(), torch.as_tensor(expected).cpu()
            good = a.shape == b.shape and torch.allclose(
                a.double(), b.double(), rtol=tolerance, atol=tolerance)
    except (TypeError, ValueError, RuntimeError):
        good = False
    if good:
        print(f"✓ {what}: passed ({_short(answer)})")
    else:
        print(f"✗ {what}: expected {wanted}, got {_short(answer)}")
