"""The state of a run in one safetensors file: networks, optimiser, and a header of plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidsieve.errors import TrainingError
from vidsieve.io.tensors import load_tensors, save_tensors


def save_state(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None,
    header: Mapping[str, Any],
    keep: Path | None = None,
) -> None:
    """Write the state of a run atomically; the one before is renamed to `keep`, if that is given.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            if value.data_ptr() in seen:  # a tied weight is stored once
                continue
            seen.add(value.data_ptr())
            tensors[f"{name}.{key}"] = value
    state = optimizer.state_dict()["state"] if optimizer is not None else {}
    for number, entry in state.items():
        for key, value in entry.items():
            tensors[f"optimizer.{number}.{key}"] = torch.as_tensor(value)
    save_tensors(path, tensors, header, keep)


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a checkpoint.

    Raises
    ------
    TrainingError
        If the file is no readable checkpoint, or damaged.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        header, tensors, _ = load_tensors(path)
        if not header:
            raise ValueError("it has no header")
    except ValueError as error:
        raise TrainingError(
            f"{path} is no readable checkpoint ({error!s:.300}); start again in another folder"
        ) from None
    return header, tensors


def load_state(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Restore the state of a run into `modules` and `optimizer`, and return its header.

    Raises
    ------
    TrainingError
        If the file is no readable checkpoint, or belongs to other networks.
    """
    header, tensors = _read(path)
    try:
        _restore(path, tensors, modules, optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(f"{path} belongs to another network: {str(error).splitlines()[-1].strip():.300}") from None
    return header


def _restore(
    path: Path,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    for name, module in modules.items():
        state = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        missing, unexpected = module.load_state_dict(state, strict=False)
        stored = {module.state_dict()[key].data_ptr() for key in state if key not in unexpected}
        lacking = [key for key in missing if module.state_dict()[key].data_ptr() not in stored]
        if unexpected or lacking:
            raise TrainingError(f"{path} belongs to another network: {', '.join([*lacking, *unexpected][:5])}")
    if optimizer is not None:
        restored = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                restored["state"].setdefault(int(number), {})[key] = value
        optimizer.load_state_dict(restored)
        for weight, state in optimizer.state.items():
            if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys() or any(
                value.dim() and value.shape != weight.shape for value in state.values()
            ):
                raise ValueError("the optimiser's state does not fit the weights")
