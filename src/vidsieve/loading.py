"""From a name or a folder to a compressor, or to a model with its processor."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidsieve import registry
from vidsieve.compressors.base import Compressor
from vidsieve.errors import ModelError, PolicyError, UnknownNameError
from vidsieve.policies import CONFIG, read_config

if TYPE_CHECKING:
    import torch

_ASSETS = Path(__file__).parent / "testbed" / "assets"


def load(name_or_path: str | Path, policy: str | Path | None = None, **fields: Any) -> Compressor:
    """Return a method ready to use.

    Parameters
    ----------
    name_or_path : str or Path
        A registered name, or the folder of a trained policy or of the run that made it.
    policy : str or Path, optional
        The policy's folder, for methods that are trained; ``"testbed"`` for the ones that come with the package.
    **fields
        Fields of the method: ``retention``, ``variant``, …

    Raises
    ------
    UnknownNameError
        If there is no such method, or it has no such field.
    PolicyError
        If a policy is missing, superfluous, unreadable, or of another method.
    """
    folder = policy_folder(name_or_path)
    if policy is None and str(name_or_path) not in registry.compressors and os.path.isfile(folder / CONFIG):
        name, policy = read_config(folder).type, folder
    else:
        name = str(name_or_path)
        if name not in registry.compressors and len(Path(name).parts) > 1:
            raise PolicyError(f"no policy in {name}: {CONFIG} is missing there; train one with `vidsieve train`")
    method = registry.compressors.get(name)
    known = {f.name for f in dataclasses.fields(method)}
    for field in fields:
        if field not in known:
            raise UnknownNameError(f"field of {name}", field, known - {"policy"})
    if not method.trained:
        if policy is not None:
            raise PolicyError(f"{name} is not trained and takes no policy; leave {policy} out")
        made: Compressor = method(**fields)
        return made
    if policy is None:
        raise PolicyError(
            f"{name} needs a trained policy: load({name!r}, FOLDER), or load({name!r}, 'testbed') for the testbed"
        )
    if policy == "testbed":
        policy = shipped_policy(f"{name}:{fields.get('variant', 'ours')}")
    loaded: Compressor = method.from_pretrained(policy_folder(policy), **fields)
    return loaded


def policy_folder(path: str | Path) -> Path:
    """Return the folder of a policy: `path` itself, or ``path/policy`` where it is the folder of a run."""
    path = Path(path)
    inner = path / "policy"
    return inner if os.path.isfile(inner / CONFIG) and not os.path.isfile(path / CONFIG) else path


def shipped_policies() -> list[str]:
    """Return the names of the policies for the testbed's model that come with the package."""
    found = (path.parent.name for path in _ASSETS.glob(f"*/{CONFIG}") if path.parent.name != "model")
    return sorted(name.replace("-", ":") for name in found)


def shipped_policy(name: str) -> Path:
    """Return the folder of a policy for the testbed's model that comes with the package.

    Parameters
    ----------
    name : str
        A method, for its variant "ours", or ``method:variant``.

    Raises
    ------
    PolicyError
        If there is none of that name.
    """
    folder = _ASSETS / name.replace(":ours", "").replace(":", "-")
    if not os.path.isfile(folder / CONFIG):
        have = ", ".join(shipped_policies()) or "none"
        raise PolicyError(f"no policy {name!r} comes with the package; there are: {have}")
    return folder


def shipped_model() -> Path:
    """Return the folder of the testbed's trained model, which comes with the package."""
    return _ASSETS / "model"


def own_device() -> str:
    """Return the GPU of this process, by its local rank under torchrun, or the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _move(model: Any, device: str) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch has both for a device that is not there
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot put the model on device {device!r}: {first}. Choose 'auto', or 'cpu'") from None


def load_model(
    name: str, layout: str | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Any, Any]:
    """Return model and processor of a local folder or hub id; ``"testbed"`` is the one in the package.

    `layout`, as `prune` has it, is noted in the configuration of the loaded model. `dtype` is what it computes in;
    default: what its files say, float32 for the testbed's. `device` is a device of torch, or "auto": this process's GPU
    where there is one.

    Raises
    ------
    ModelError
        If they cannot be loaded; the text says what was tried.
    UnsupportedModelError
        If the model's family has no adapter.
    UnknownNameError, UnsupportedCallError
        If there is no such layout, or not in this family.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vidsieve.adapters import adapter_for

    source = str(shipped_model()) if name == "testbed" else name
    if "/" not in source and not os.path.exists(Path(source)):  # no hub id: asking the hub would only take long
        raise ModelError(f"no model {name!r}: give its folder, a hub id as OWNER/NAME, or 'testbed'")
    try:
        processor = AutoProcessor.from_pretrained(source)
        chosen = dtype or (torch.float32 if name == "testbed" else "auto")
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=chosen)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot load the model {name!r}: {first}. Give the folder of a model with its processor, a hub id, or "
            "'testbed'"
        ) from None
    adapter_for(model, layout=layout)
    if layout is not None:
        model.config.vidsieve_layout = layout
    if device != "cpu":
        _move(model, own_device() if device == "auto" else device)
    return model.eval(), processor
