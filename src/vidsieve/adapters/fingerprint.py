"""Short hashes that identify models, policies and settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidsieve.compressors.base import Compressor


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
    known = list(weights)
    sampled: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for _, weight in known:
        if not weight.is_meta:
            count = weight.numel()
            places = torch.linspace(0, count - 1, min(64, count)).long().clamp(max=count - 1)  # float32 rounds up
            sampled[weight.device].append(weight.detach().flatten()[places.to(weight.device)].float())
    # One copy from each device: a copy for each weight would wait for a GPU hundreds of times.
    values = {
        device: iter(torch.split(torch.cat(parts).cpu(), [len(part) for part in parts]))
        for device, parts in sampled.items()
    }
    digest_ = hashlib.sha256()
    for name, weight in known:
        digest_.update(f"{name} {tuple(weight.shape)}".encode())
        if not weight.is_meta:
            digest_.update(next(values[weight.device]).numpy().tobytes())
    return digest_.hexdigest()[:16]


def policy_digest(method: Compressor) -> str:
    """Return a hash of a method's weights; empty where it has none."""
    policy = getattr(method, "policy", None)
    return weights_digest(policy.named_parameters()) if isinstance(policy, nn.Module) else ""


def model_digest(model: Any) -> str:
    """Return a hash of a model's configuration and some values of all its weights."""
    return digest([lasting(model.config.to_dict()), weights_digest(model.named_parameters())])


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
