"""Tiny random models of the families that `vidsieve.testing.tiny_models` does not hold: one file each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from vidsieve import registry
from vidsieve.testing import doctor

Batch = list[list[int]]
"""Per prompt, the number of frames (Qwen: temporal pairs) of each of its videos."""


@dataclass(frozen=True)
class Tiny:
    """A family in small: its model, and inputs as its processor returns them.

    Parameters
    ----------
    model : callable
        ``model(seed, layers)`` returns a random float32 model of transformers' own class, in evaluation mode, with
        weights spread enough that answers differ.
    inputs : callable
        ``inputs(batch, words, pad)`` returns the inputs of prompts with these videos, with so many words after the
        last, padded on the side `pad`. Some take ``image=True``: a still image after each prompt's first video.
    layers : int
        Fewest layers of the LLM that hold one of each kind and let a fault in it reach the answer.
    """

    model: Callable[[int, int], Any]
    inputs: Callable[..., dict[str, Tensor]]
    layers: int = 3


def tiny(family: str) -> Tiny:
    """Return the tiny model of a family; its file has its name and a constant `TINY`."""
    found: Tiny = import_module(f"workbench.families.{family}").TINY
    return found


def families() -> list[str]:
    """Return every family with a file here, sorted."""
    names = [module.name for module in iter_modules(__path__)]
    return sorted(name for name in names if not name.startswith("_"))


@cache
def absent(family: str) -> str:
    """Return in words why the installed transformers cannot run a family that has an adapter; "" if it can."""
    names = (name for name in registry.families if registry.families.get(name).family == family)
    return next(map(doctor.absent, names), "")
