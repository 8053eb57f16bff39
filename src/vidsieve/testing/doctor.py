"""What of vidsieve works with what is installed here: versions, extras, model families and methods."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import warnings
from dataclasses import dataclass, replace
from typing import Any

from vidsieve import registry
from vidsieve._version import __version__
from vidsieve.compressors.base import Compressor
from vidsieve.errors import VidsieveError
from vidsieve.io import versions

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "accelerate",
    "av",
    "numpy",
    "pillow",
    "safetensors",
    "peft",
    "bitsandbytes",
    "flash-attn",
)
"""Distributions that bug reports are often about, beside those of `versions.TESTED`."""

EXTRAS = {
    "benchmarks": "pyarrow",
    "lmms-eval": "lmms_eval",
    "ray": "ray.data",
    "teacher": "openai",
    "tensorboard": "torch.utils.tensorboard",
    "ui": "gradio",
    "vllm": "vllm",
    "wandb": "wandb",
}
"""Each extra of the package, and the module that it is for."""


_LAYERS = 8
"""Of the tiny models: enough for every method's own layers."""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes
    ----------
    kind : {"version", "extra", "family", "method"}
    name : str
    state : str
        A version, or what became of trying.
    ok : bool or None
        None where there is nothing to judge: an absent extra, a package without a tested range.
    """

    kind: str
    name: str
    state: str
    ok: bool | None


def found_versions() -> list[Finding]:
    """Return the versions of what matters, and whether our tests have passed with them."""
    rows = [
        Finding("version", "vidsieve", __version__, None),
        Finding("version", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", None),
    ]
    for name in dict.fromkeys((*PACKAGES, *versions.TESTED)):
        version = versions.installed(name)
        if version is None:
            continue
        if name in versions.TESTED:
            ok = versions.is_tested(name, version)
            said = f"tested: {versions.tested_range(name)}"
            rows.append(Finding("version", name, f"{version} ({said})", ok))
        else:
            rows.append(Finding("version", name, version, None))
    return [*rows, Finding("version", "accelerator", _accelerator(), None)]


def _accelerator() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def found_extras() -> list[Finding]:
    """Return which extras can be imported."""
    rows = []
    for extra, module in EXTRAS.items():
        if versions.installed(extra) is None and not _there(module):
            rows.append(Finding("extra", extra, f"not installed: pip install 'vidsieve[{extra}]'", None))
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except Exception as error:  # whatever another package raises while it is imported is the finding
            rows.append(Finding("extra", extra, f"importing {module} fails: {_line(error)}", False))
        else:
            rows.append(Finding("extra", extra, "can be imported", True))
    return rows


def _there(module: str) -> bool:
    """Return whether a module's package can be found, without importing more than its parents."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def found_families() -> list[Finding]:
    """Return whether each family's adapter prunes a tiny model of what is installed."""
    from vidsieve.testing.tiny_models import FAMILIES

    rows = []
    for family in FAMILIES:
        reasons = [reason for name in ("random", "fastv") if (reason := _tried(family, name)) is not None]
        state = reasons[0] if reasons else "prunes before the LLM and inside it"
        rows.append(Finding("family", family, state, not reasons))
    return rows


def found_methods() -> list[Finding]:
    """Return whether each method prunes a tiny model of the first family that it is not refused on."""
    from vidsieve.testing.tiny_models import FAMILIES

    rows = []
    for name in registry.compressors:
        for family in FAMILIES:
            reason = _tried(family, name)
            if reason is None:
                break
        rows.append(Finding("method", name, f"works on {family}" if reason is None else reason, reason is None))
    return rows


def _tried(family: str, name: str) -> str | None:
    """Return why a method does not generate from a tiny model of a family, or None where it does."""
    from vidsieve.adapters.session import attach
    from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for

    try:
        model = FAMILIES[family](layers=_LAYERS)
        with attach(model, _example(registry.compressors.get(name), model, family)):
            model.generate(**inputs_for(family, [[default_grid(family, 4)]]), max_new_tokens=2, do_sample=False)
    except VidsieveError as error:
        return str(error)
    except Exception as error:  # the finding that a doctor is asked for
        return f"unexpected {_line(error)}"
    return None


def _example(method: Any, model: Any, family: str) -> Compressor:
    """Return a method as it comes, with random weights where it is trained."""
    if not method.trained:
        plain: Compressor = method(retention=0.5)
        return plain
    trained: Any = method.untrained(model.get_input_embeddings().embedding_dim, retention=0.5)
    trained.policy.config = replace(trained.policy.config, family=family)
    made: Compressor = trained
    return made


def _line(error: Exception) -> str:
    """Return an error's kind and its text's first line."""
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0]}" if lines else "")
