"""Checks of the installation: versions, extras, and every model family and method on a tiny model."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import warnings
from dataclasses import dataclass, replace
from typing import Any

from vidsieve import registry
from vidsieve._version import __version__
from vidsieve.errors import VidsieveError
from vidsieve.io import versions

PACKAGES = (
    *("torch", "torchvision", "transformers", "tokenizers", "accelerate", "av", "numpy", "pillow", "safetensors"),
    *("peft", "bitsandbytes", "flash-attn"),
)
"""Distributions that bug reports are often about; those of `versions.TESTED` are reported too."""

EXTRAS = {
    "benchmarks": "pyarrow",
    "lmms-eval": "lmms_eval",
    "ray": "ray.data",
    "teacher": "httpx2",
    "tensorboard": "torch.utils.tensorboard",
    "ui": "gradio",
    "vllm": "vllm",
    "wandb": "wandb",
}
"""The package's extras, and the module that each one is for."""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes
    ----------
    kind : {"version", "extra", "family", "method"}
    name : str
    state : str
        A version, or the outcome of a check.
    ok : bool or None
        None where nothing is checked: an absent extra, a package without a tested range.
    """

    kind: str
    name: str
    state: str
    ok: bool | None


def found_versions() -> list[Finding]:
    """Return the installed versions, and whether our tests have passed with them."""
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    rows = [Finding("version", "vidsieve", __version__, None), Finding("version", "python", system, None)]
    for name in dict.fromkeys((*PACKAGES, *versions.TESTED)):
        version = versions.installed(name)
        if version is not None and name in versions.TESTED:
            state = f"{version} (tested: {versions.tested_range(name)})"
            rows.append(Finding("version", name, state, versions.is_tested(name, version)))
        elif version is not None:
            rows.append(Finding("version", name, version, None))
    return [*rows, Finding("version", "accelerator", _accelerator(), None)]


def _accelerator() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def found_extras() -> list[Finding]:
    """Return the extras, and whether each can be imported."""
    rows = []
    for extra, module in EXTRAS.items():
        try:
            present = versions.installed(extra) is not None or importlib.util.find_spec(module) is not None
        except ImportError:  # a parent of the module is absent
            present = False
        if not present:
            rows.append(Finding("extra", extra, f"not installed: pip install 'vidsieve[{extra}]'", None))
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except Exception as error:  # another package may raise anything while it is imported
            rows.append(Finding("extra", extra, f"importing {module} fails: {_one_line(error)}", False))
        else:
            rows.append(Finding("extra", extra, "can be imported", True))
    return rows


def found_families() -> list[Finding]:
    """Return the model families: whether each with a tiny model here prunes, and which ones transformers has."""
    from vidsieve.testing.tiny_models import FAMILIES

    rows = []
    for family in FAMILIES:
        error = _failure(family, "random") or _failure(family, "fastv")
        rows.append(Finding("family", family, error or "prunes before the LLM and inside it", error is None))
    for name in registry.families:
        family = registry.families.get(name).family
        if family not in FAMILIES:
            rows.append(Finding("family", family, absent(name) or "not tried: no tiny model here", None))
    return rows


def absent(name: str) -> str:
    """Return in words why the installed transformers cannot run the family registered as `name`; "" if it can."""
    import transformers

    model = name.partition(":")[0]
    if not hasattr(transformers, model):
        return f"transformers {transformers.__version__} has no {model}"
    reason: str = registry.families.get(name).too_old()
    return reason


def found_methods() -> list[Finding]:
    """Return the methods and fronts, and whether each one prunes a tiny model of at least one family."""
    from vidsieve.testing.tiny_models import FAMILIES

    rows = []
    for name in (*registry.compressors, *(f"{front}+random" for front in registry.fronts)):
        for family in FAMILIES:
            error = _failure(family, name)
            if error is None:
                break
        rows.append(Finding("method", name, error or f"works on {family}", error is None))
    return rows


def _failure(family: str, name: str) -> str | None:
    """Return the error of generating from a tiny model under a method, None if there is none."""
    from vidsieve.adapters.session import attach
    from vidsieve.loading import put_before, split_front
    from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for

    try:
        model = FAMILIES[family](layers=8)  # enough for every method's own layers
        front, name = split_front(name)
        method: Any = registry.compressors.get(name)
        if method.trained:
            compressor = method.untrained(model.get_input_embeddings().embedding_dim, retention=0.5)
            compressor.policy.config = replace(compressor.policy.config, family=family)
        else:
            compressor = method(retention=0.5)
        if front:
            compressor = put_before(registry.fronts.get(front)(), compressor)
        with attach(model, compressor):
            model.generate(**inputs_for(family, [[default_grid(family, 4)]]), max_new_tokens=2, do_sample=False)
    except VidsieveError as error:
        return str(error)
    except Exception as error:  # anything else is reported, too
        return f"unexpected {_one_line(error)}"
    return None


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0]}" if lines else "")
