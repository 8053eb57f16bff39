"""Short hashes that identify models, policies and settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vidsieve.compressors.base import Compressor

_WEIGHTS: WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], str]] = WeakKeyDictionary()
"""Of each model: its weights by address and number of changes in place, and their hash."""


def digest(value: Any) -> str:
    """Return a hash of a value as JSON has it; other values count as their text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def lasting(config: Any) -> Any:
    """Return a configuration without values that may differ for the same model: its path, versions, dtypes."""
    if isinstance(config, dict):
        passing = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
        return {str(key): lasting(value) for key, value in config.items() if key not in passing}
    return [lasting(value) for value in config] if isinstance(config, list | tuple) else config


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of names, shapes and some values of weights; of offloaded ones only names and shapes."""
    digest_ = hashlib.sha256()
    for name, weight in weights:
        digest_.update(f"{name} {tuple(weight.shape)}".encode())
        if not weight.is_meta:
            places = torch.linspace(0, weight.numel() - 1, min(64, weight.numel())).long().to(weight.device)
            digest_.update(weight.detach().flatten()[places].float().cpu().numpy().tobytes())
    return digest_.hexdigest()[:16]


def policy_digest(method: Compressor) -> str:
    """Return a hash of a method's weights; empty where it has none."""
    policy = getattr(method, "policy", None)
    return weights_digest(policy.named_parameters()) if isinstance(policy, nn.Module) else ""


def model_digest(model: Any) -> str:
    """Return a hash of a model's configuration and some values of all its weights, which are read again if changed."""
    state = [(id(weight), 0 if weight.is_inference() else weight._version) for weight in model.parameters()]
    if _WEIGHTS.get(model, (None, ""))[0] != state:
        _WEIGHTS[model] = state, weights_digest(model.named_parameters())
    return digest([lasting(model.config.to_dict()), _WEIGHTS[model][1]])


def folder_digest(folder: Path) -> str:
    """Return a hash of the names and bytes of the files in a folder."""
    digest_ = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if os.path.isfile(path)):
        digest_.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest_.hexdigest()[:16]


def model_files_digest(model: str) -> str:
    """Return a hash of the names, sizes, beginnings and ends of a model's files, or the revision of a hub id."""
    folder, part = Path(model), 2**20
    if not os.path.isdir(folder):
        from transformers import AutoConfig

        try:
            return str(getattr(AutoConfig.from_pretrained(model), "_commit_hash", None) or "")
        except (OSError, ValueError, KeyError):
            return ""  # loading the model raises with the reason
    digest_ = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.iterdir() if os.path.isfile(path)):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest_.update(f"{path.name} {size}".encode() + file.read(part))
            file.seek(max(0, size - part))
            digest_.update(file.read(part))
    return digest_.hexdigest()
