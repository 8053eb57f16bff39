"""From a name or a policy folder to a compressor."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from vidsieve import registry
from vidsieve.compressors.base import Compressor
from vidsieve.errors import PolicyError, UnknownNameError
from vidsieve.policies import CONFIG, read_config

_ASSETS = Path(__file__).parent / "testbed" / "assets"
_MODELS = ("model", "talker")


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
    found = (path.parent.name for path in _ASSETS.glob(f"*/{CONFIG}") if path.parent.name not in _MODELS)
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
