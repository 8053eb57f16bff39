"""Load a method, or a model with its processor, by name or folder."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidsieve import registry
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.calibrated import calibrated
from vidsieve.compressors.composed import AllTokens, Pipeline
from vidsieve.compressors.front import Front
from vidsieve.errors import ModelError, PolicyError, UnknownNameError
from vidsieve.io.bounded import read_json
from vidsieve.io.hub import is_repository, no_policy
from vidsieve.policies import CONFIG, policy_folder, read_config
from vidsieve.retention import Calibration, parse_budget

if TYPE_CHECKING:
    import torch

_ASSETS = Path(__file__).parent / "testbed" / "assets"
MODELS = ("deep", "shallow")
"""The testbed's models: question words meet the video in the third layer, or in the first."""


def load(name_or_path: str | Path, policy: str | Path | None = None, **fields: Any) -> Compressor:
    """Return a method ready to use.

    Parameters
    ----------
    name_or_path : str or Path
        A registered name; or a trained policy, by its folder, that of its training run, or its name on the Hugging
        Face Hub: ``OWNER/NAME``, or ``OWNER/NAME@REVISION``. ``:VARIANT`` may follow either; ``reuse+NAME`` puts
        `Reuse` before it, and ``reuse`` alone keeps every token.
    policy : str or Path, optional
        The policy of a trained method, by folder or name on the hub; ``"testbed"`` for the one in the package.
    **fields
        Fields of the method: ``retention``, ``variant``, … With ``retention="calibrated"``, or ``"calibrated:FILE"``,
        also ``floor`` and ``cap``, the least and the most that is kept.

    Raises
    ------
    UnknownNameError
        If there is no such method, or it has no such field.
    PolicyError
        If a policy is missing, not needed, unreadable, or of another method.
    """
    if isinstance(asked := fields.get("retention"), str) and isinstance(rule := parse_budget(asked), Calibration):
        limits = {name: fields.pop(name) for name in ("floor", "cap") if name in fields}
        del fields["retention"]
        return calibrated(load(name_or_path, policy, **fields), rule, **limits)
    front, rest = split_front(str(name_or_path))
    if front:
        known = {field.name for field in dataclasses.fields(registry.fronts.get(front))}
        first = registry.fronts.get(front)(**{name: fields.pop(name) for name in known & fields.keys()})
        if rest:
            return put_before(first, load(rest, policy, **fields))
        _check_fields(front, AllTokens, fields)
        if policy is not None:
            raise PolicyError(f"{front} is not trained and takes no policy, got {policy}")
        return AllTokens(ahead=first, **fields)
    base, variant = split_variant(rest)
    if base != rest:
        if "variant" in fields:
            raise PolicyError(f"{rest} names a variant, and variant={fields['variant']!r} another: leave one out")
        return load(base, policy, variant=variant, **fields)
    folder = policy_folder(name_or_path)
    if policy is None and str(name_or_path) not in registry.compressors and os.path.isfile(folder / CONFIG):
        name, policy = read_config(folder).type, folder
    else:
        name = str(name_or_path)
        if name not in registry.compressors and len(Path(name).parts) > 1:
            raise no_policy(name)
    method = registry.compressors.get(name)
    _check_fields(name, method, fields)
    if not method.trained:
        if policy is not None:
            raise PolicyError(f"{name} is not trained and takes no policy, got {policy}")
        untrained: Compressor = method(**fields)
        return untrained
    if policy is None:
        shipped = f"or load({name!r}, 'testbed') for the testbed"
        trained = shipped if name in shipped_policies() else f"which `vidsieve train {name} FOLDER` makes"
        raise PolicyError(f"{name} needs a trained policy: load({name!r}, FOLDER), {trained}")
    if policy == "testbed":
        policy = shipped_policy(f"{name}:{fields.get('variant', 'ours')}")
    loaded: Compressor = method.from_pretrained(policy_folder(policy), **fields)
    return loaded


def _check_fields(name: str, method: type[Compressor], fields: dict[str, Any]) -> None:
    """Refuse arguments that are no fields of a method."""
    known = {field.name for field in dataclasses.fields(method)}
    for field in fields:
        if field not in known:
            raise UnknownNameError(f"field of {name}", field, known - {"policy"})


def split_front(name: str) -> tuple[str, str]:
    """Return the name of what acts before the vision encoder's output, "" if there is none, and the method's, or ""."""
    front, plus, rest = name.partition("+")
    if front in registry.fronts:
        return front, rest
    if plus and (front.partition(":")[0] in registry.compressors or rest.partition(":")[0] in registry.compressors):
        hint = "It comes before a method; two methods in a row are for `vidsieve.Pipeline`."
        raise UnknownNameError("name before a +", front, registry.fronts, hint)
    return "", name


def split_variant(name: str) -> tuple[str, str]:
    """Return the name of a method or policy and what follows its last colon, "" if the name has no variant."""
    base, _, variant = name.rpartition(":")
    return (base, variant) if base and (base in registry.compressors or registry.is_policy(base)) else (name, "")


def put_before(front: Front, method: Compressor) -> Compressor:
    """Return a method with another before it, at its own retention."""
    return Pipeline(front, method, method.retention)


def policy_name(name: str) -> str:
    """Return the name of the policy that serves ``method:variant``: both variants of `sieve` have one."""
    return "sieve" if name == "sieve:blind" else name.removesuffix(":ours")


def shipped_policies(model: str | None = None) -> list[str]:
    """Return the names of the policies in the package, or of those for one of the testbed's models.

    All of these models show a policy the same video tokens, but not the same words: a policy that reads the question
    is for the one that it was trained with.
    """
    names = []
    for path in sorted(_ASSETS.glob(f"*/{CONFIG}")):
        if path.parent.name in MODELS:
            continue
        config = read_config(path.parent)
        if model is None or config.type == "score" or shipped_model(config.base_model) == shipped_model(model):
            names.append(path.parent.name.replace("-", ":"))
    return names


def shipped_policy(name: str) -> Path:
    """Return the folder of a policy in the package; `name` is a method (variant "ours"), or ``method:variant``.

    Raises
    ------
    PolicyError
        If there is none of that name.
    """
    folder = _ASSETS / policy_name(name).replace(":", "-")
    if not os.path.isfile(folder / CONFIG):
        raise PolicyError(f"no policy {name!r} comes with the package; there are: {', '.join(shipped_policies())}")
    return folder


def is_testbed(name: str) -> bool:
    """True if a model's name is one of the testbed's: "testbed", or "testbed:" and one of `MODELS`."""
    return name.partition(":")[0] == "testbed"


def shipped_model(name: str = "testbed") -> Path:
    """Return the folder of one of the testbed's models in the package; "testbed" is "testbed:deep".

    Raises
    ------
    ModelError
        If the testbed has no such model.
    """
    which = name.partition(":")[2] or MODELS[0]
    if which not in MODELS:
        raise ModelError(f"the testbed has no model {which!r}; there are: {', '.join(MODELS)}")
    return _ASSETS / which


def own_device() -> str:
    """Return the GPU of this process, by its local rank under torchrun, or "cpu" if there is none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


_LONGEST_TEXT = 2**26
"""Bytes of the longest configuration, template or tokenizer of a model; transformers reads them whole."""


def _check_files(folder: Path) -> None:
    """Refuse a folder without a model, or one whose files transformers would wait for, or fill memory with."""
    for path in folder.glob("*"):
        if path.suffix in (".json", ".jinja", ".safetensors", ".bin") and not os.path.isfile(path):
            raise ModelError(f"{path} is a folder, a pipe or a device, or a link to nothing: fetch the model again")
        if path.suffix in (".json", ".jinja") and path.stat().st_size > _LONGEST_TEXT:
            raise ModelError(f"{path} has more than {_LONGEST_TEXT:,} bytes: fetch the model again")
    for path in folder.glob("*.index.json"):
        index = read_json(path, ModelError, "fetch the model again", dict)
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or any(Path(str(name)).name != name for name in shards.values()):
            raise ModelError(f"{path} names weights outside its folder, or none: fetch the model again")
    if not os.path.isfile(folder / "config.json"):
        raise ModelError(f"no model in {folder}: config.json is missing there")


_PATIENCE = 10.0
"""Seconds in which the hub must answer."""


def _check_hub(name: str) -> None:
    """Refuse a model that is neither in the cache of the hub nor on it: transformers would ask for minutes."""
    if not is_repository(name):
        raise ModelError(f"no folder {name}: give a model's folder, a hub id as OWNER/NAME, or 'testbed'")
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    where = f"{name!r} is neither a folder nor in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{where}, and HF_HUB_OFFLINE forbids asking the hub: fetch it there, or unset that variable")
    try:
        HfApi().model_info(name, timeout=_PATIENCE)
    except RepositoryNotFoundError:
        raise ModelError(f"{where}, and {constants.ENDPOINT} has no such model that you may read") from None
    except Exception as error:  # whatever its connection raises
        raise ModelError(
            f"{where}, and {constants.ENDPOINT} does not answer ({type(error).__name__}): give the folder of a model; "
            "HF_ENDPOINT names another hub"
        ) from None


def check_model(name: str) -> None:
    """Refuse the name of a model that is not there, before anything is loaded.

    Raises
    ------
    ModelError
    """
    source = shipped_model(name) if is_testbed(name) else Path(name)
    if os.path.isdir(source):
        _check_files(source)
    else:
        _check_hub(name)


def _policy_in(folder: Path) -> str:
    """Return the method of the policy in a folder, empty if it holds none."""
    try:
        return read_config(folder).type
    except PolicyError:
        return ""


def load_model(
    name: str,
    layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    positions: str | None = None,
) -> tuple[Any, Any]:
    """Return the model and processor of a local folder or hub id; ``"testbed"`` is in the package (`shipped_model`).

    Of a whole Omni model it is the thinker.

    Parameters
    ----------
    name : str
    layout : str, optional
        As in `prune`; stored in the configuration of the loaded model.
    dtype : torch.dtype or its name, optional
        Default: the dtype in its files, float32 for the testbed's models.
    device : str
        A device of torch, or "auto": this process's GPU if there is one.
    positions : str, optional
        As in `prune`; stored in the configuration of the loaded model.

    Raises
    ------
    ModelError
        If they cannot be loaded, or not onto the device.
    UnsupportedModelError
        If the model's family has no adapter.
    UnknownNameError, UnsupportedCallError
        If there is no such layout or position convention, or not in this family.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vidsieve.adapters import adapter_for
    from vidsieve.adapters.template import template_or_reason

    source = str(shipped_model(name)) if is_testbed(name) else name
    check_model(name)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        processor = AutoProcessor.from_pretrained(source)
        default = torch.float32 if is_testbed(name) else "auto"
        config = AutoConfig.from_pretrained(source)
        config = getattr(config, "thinker_config", config)  # of an Omni model, whose talker speaks
        model = AutoModelForImageTextToText.from_pretrained(source, config=config, dtype=dtype or default)
    except Exception as error:  # of a wrong file transformers raises anything
        if kind := _policy_in(Path(source)):
            raise ModelError(
                f"{name} holds a {kind} policy, not a model: name it as the method, and as the model the one that it "
                "was trained for"
            ) from None
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise ModelError(
            f"cannot load the model {name!r}: {first}. Give the folder of a model with its processor, a hub id, or "
            "'testbed'"
        ) from error
    adapter_for(model, layout=layout, positions=positions)
    model.vidsieve_template = template_or_reason(processor)
    if layout is not None:
        model.config.vidsieve_layout = layout
    if positions is not None:
        model.config.vidsieve_positions = positions
    if device != "cpu":
        device = own_device() if device == "auto" else device
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:  # torch raises either for a device that does not exist
            first = str(error).strip().splitlines()[0].rstrip(".")
            raise ModelError(f"cannot put the model on device {device!r}: {first}. Choose 'auto', or 'cpu'") from None
    return model.eval(), processor
