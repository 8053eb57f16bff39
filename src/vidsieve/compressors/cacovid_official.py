"""The published CaCoVID checkpoint, read into our policy.

The release trains its policy as the module ``compression_policy`` of LLaVA-OneVision-7B and publishes the whole
model, so a folder of it holds some 16 GB of which the policy is half a gigabyte. Only the policy's tensors are read:

>>> import vidsieve
>>> from vidsieve.compressors.cacovid_official import read_official
>>> read_official("CaCoVID_LLaVA-OneVision").save_pretrained("cacovid-official")
>>> method = vidsieve.load("cacovid", "cacovid-official", variant="official", retention=0.25)
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.errors import PolicyError
from vidsieve.policies import CONFIG, WEIGHTS, parameters_without_nan, pickles_in

QWEN2_7B = BlockShape(3584, 28, 4, 128, 18944, rms_norm_eps=1e-6, rope_theta=1e6)
"""A decoder block of the language model in LLaVA-OneVision-7B."""

INDEX = "model.safetensors.index.json"
_BASE_MODEL = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
_ANCHOR = "token_compress.0.weight"
_UNUSED = "mode_selection."
_FLOATS = {"BF16", "F16", "F32"}

Shape = tuple[int, ...]


def official_shapes(shape: BlockShape = QWEN2_7B) -> dict[str, Shape]:
    """Return the names and shapes of the released policy's parameters, without prefix.

    Parameters
    ----------
    shape : BlockShape
        One decoder block of its LLM.

    References
    ----------
    LivingFutureLab/CaCoVID @ 384752da, `compression_policy.py` and `attention_utils.py` of the trainer.
    """
    width, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (width, queries),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    names: dict[str, Shape] = {f"layers.0.{name}": sizes for name, sizes in layer.items()}
    names["layernorm.weight"] = (width,)
    for head, outputs in (("token_compress", 2), ("frame_compress", 2), ("mode_selection", 3)):
        sizes = [width, *(width // 2**i for i in range(1, 5)), outputs]
        for i, (wide, narrow) in enumerate(pairwise(sizes)):
            # Every second place of the release's sequence is an activation.
            names[f"{head}.{2 * i}.weight"], names[f"{head}.{2 * i}.bias"] = (narrow, wide), (narrow,)
    return names


def policy_prefix(names: Iterable[str]) -> str:
    """Return what stands before the policy's names in a checkpoint: ``"compression_policy."`` in the release.

    Raises
    ------
    PolicyError
        If the checkpoint holds no CaCoVID policy, or several.
    """
    found = sorted(name[: -len(_ANCHOR)] for name in names if name == _ANCHOR or name.endswith(f".{_ANCHOR}"))
    if len(found) > 1:
        raise PolicyError(f"the checkpoint holds {len(found)} CaCoVID policies, under {_few(found)}: leave one")
    if not found:
        raise PolicyError(
            f"the checkpoint holds no CaCoVID policy: no name ends with {_ANCHOR}; the release's is "
            "moraleyc/CaCoVID_LLaVA-OneVision, not the LLaVA-OneVision it was trained on"
        )
    return found[0]


def policy_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Return checkpoint name → name in `CaCoVIDPolicy` for the names under `prefix`.

    The head ``mode_selection`` is left out: the release computes it and reads it neither at inference nor in its
    loss.
    """
    under = {name: name[len(prefix) :] for name in names if name.startswith(prefix)}
    return {name: ours for name, ours in under.items() if not ours.startswith(_UNUSED)}


def read_official(folder: str | Path, *, family: str = "llava_onevision") -> CaCoVIDPolicy:
    """Return the released policy in `folder`, in evaluation mode, float32, on the CPU.

    `folder` holds ``model.safetensors``, or shards with ``model.safetensors.index.json`` (those with the policy's
    tensors are enough), or any one ``.safetensors`` file; and the ``config.json`` of the model, which is needed
    for widths other than 3584. Stored bfloat16 is widened to float32, as `CaCoVIDPolicy.from_pretrained` gives it,
    so that scores are the same before and after saving.

    The policy is of variant ``"official"``: its attention is causal, as that of the release is in effect, so its
    scores do not depend on a question after the video. `PolicyConfig.training` notes where it came from.

    Parameters
    ----------
    folder : str or Path
    family : str
        The adapter family of the model it belongs to; the release has LLaVA-OneVision's only.

    Raises
    ------
    PolicyError
        If the folder holds no such checkpoint, a file is missing or corrupt, a parameter is missing, superfluous,
        of another shape or type or not finite, or `config.json` does not tell the attention's heads.

    References
    ----------
    CaCoVID, AAAI 2026 (arXiv 2602.01649), hub moraleyc/CaCoVID_LLaVA-OneVision; LivingFutureLab/CaCoVID @ 384752da.
    """
    folder = Path(folder)
    places = _places(folder)
    prefix = policy_prefix(places)
    places = {name: path for name, path in places.items() if name.startswith(prefix)}
    _check_names({name[len(prefix) :] for name in places}, folder)
    shapes = {name[len(prefix) :]: sizes for name, sizes in _stored_shapes(places).items()}
    shape = _block_shape(folder, shapes)
    _check_shapes(shapes, official_shapes(shape), folder)
    weights = _tensors(places, policy_names(places, prefix))
    base_model = _BASE_MODEL if shape == QWEN2_7B else ""
    with torch.device("meta"):
        policy = CaCoVIDPolicy.start(shape, family, variant="official", base_model=base_model)
    policy.load_state_dict(weights, assign=True)
    if not parameters_without_nan(policy):
        raise PolicyError(f"the policy's weights in {folder} are not all finite numbers: fetch the checkpoint again")
    origin = {"source": "the release's checkpoint", "folder": folder.resolve().name, "prefix": prefix}
    policy.config = replace(policy.config, training=origin)
    return policy.eval()


def _places(folder: Path) -> dict[str, Path]:
    """Return every tensor name of the checkpoint in `folder` and the file that holds it."""
    if not os.path.isdir(folder):
        raise PolicyError(f"{folder} is no folder: fetch the checkpoint and give the folder that holds it")
    if not os.path.isfile(folder / WEIGHTS) and os.path.isfile(folder / INDEX):
        return _indexed(folder)
    files = [folder / WEIGHTS] if os.path.isfile(folder / WEIGHTS) else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = pickles_in(folder)
        advice = f"; {_few(pickles)} will not be loaded, because pickles can run code" if pickles else ""
        raise PolicyError(f"{folder} holds no .safetensors file{advice}")
    if len(files) > 1:
        raise PolicyError(f"{folder} holds {len(files)} .safetensors files and no {INDEX}: fetch the index too")
    with _opened(files[0]) as file:
        return dict.fromkeys(file.keys(), files[0])


def _indexed(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    files = _json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise PolicyError(f"{index} has no weight_map from names to files: fetch it again")
    outside = sorted({name for name in files.values() if Path(name).name != name})
    if outside:
        raise PolicyError(f"{index} names {_few(outside)}, which is no file of its folder: fetch it again")
    return {name: folder / file for name, file in files.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path} is no readable JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise PolicyError(f"{path} holds no JSON object: fetch it again")
    return content


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not os.path.isfile(path):
        raise PolicyError(f"{path.name} holds a part of the policy and is missing in {path.parent}: fetch it too")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{path} is no readable safetensors file ({error}); fetch it again") from None


def _by_file(places: Mapping[str, Path]) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = defaultdict(list)
    for name, path in places.items():
        files[path].append(name)
    return files


def _stored_shapes(places: Mapping[str, Path]) -> dict[str, Shape]:
    """Return the shape of each tensor, from the files' headers alone."""
    shapes: dict[str, Shape] = {}
    other: list[str] = []
    for path, names in _by_file(places).items():
        with _opened(path) as file:
            for name in names:
                part = file.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                if part.get_dtype() not in _FLOATS:
                    other.append(f"{name} as {part.get_dtype()}")
    if other:
        raise PolicyError(f"the checkpoint stores {_few(other)}: fetch the one that is not quantised")
    return shapes


def _tensors(places: Mapping[str, Path], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of `names` under our names, float32."""
    weights: dict[str, Tensor] = {}
    for path, inside in _by_file({name: places[name] for name in names}).items():
        with _opened(path) as file:
            for name in inside:
                # A copy: the file stays mapped into memory otherwise.
                weights[names[name]] = file.get_tensor(name).to(torch.float32, copy=True)
    return weights


def _check_names(names: set[str], folder: Path) -> None:
    expected = official_shapes().keys()
    missing, superfluous = sorted(expected - names), sorted(names - expected)
    said = [f"{word} {_few(which)}" for word, which in (("lacks", missing), ("also has", superfluous)) if which]
    if said:
        raise PolicyError(f"the policy in {folder} {' and '.join(said)}: it is not the one the release trains")


def _check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], folder: Path) -> None:
    wrong = [f"{name} is {found[name]}, not {wanted}" for name, wanted in expected.items() if found[name] != wanted]
    if wrong:
        raise PolicyError(
            f"the policy in {folder} has not the shapes that its width and {CONFIG} call for: {_few(wrong)}"
        )


def _block_shape(folder: Path, shapes: Mapping[str, Shape]) -> BlockShape:
    """Return the shape of the policy's block: sizes from its tensors, heads and positions from `config.json`."""
    gate = "layers.0.mlp.gate_proj.weight"
    for name in (_ANCHOR, gate):
        if len(shapes[name]) != 2:
            # What ZeRO-3 leaves of a parameter that was not gathered before saving.
            raise PolicyError(f"{name} in {folder} has shape {shapes[name]}, a matrix is needed: save it gathered")
    width, inner = shapes[_ANCHOR][1], shapes[gate][0]
    text = _json(folder / CONFIG).get("text_config") if os.path.isfile(folder / CONFIG) else None
    if text is None:
        if width != QWEN2_7B.hidden_size:
            raise PolicyError(
                f"the policy in {folder} has width {width}, not the {QWEN2_7B.hidden_size} of LLaVA-OneVision-7B: "
                f"put the {CONFIG} of its model there, whose text_config tells the attention's heads"
            )
        return QWEN2_7B
    where = f"text_config in {folder / CONFIG}"
    if not isinstance(text, dict):
        raise PolicyError(f"{where} is no JSON object: fetch it again")
    if text.get("hidden_size", width) != width:
        raise PolicyError(
            f"{where} is of width {text['hidden_size']}, the policy of {width}: they do not belong together"
        )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise PolicyError(f"{where} asks for rotary positions of type {kind!r}, which our policy does not know")
    heads = _whole(text, "num_attention_heads", where)
    return BlockShape(
        width,
        heads,
        _whole(text, "num_key_value_heads", where),
        _whole({"head_dim": text.get("head_dim") or width // heads}, "head_dim", where),
        inner,
        # transformers does not write what equals its default, here 1e-6.
        rms_norm_eps=_number({"rms_norm_eps": 1e-6} | text, "rms_norm_eps", where),
        rope_theta=_number(text | rope, "rope_theta", where),
    )


def _number(table: Mapping[str, Any], key: str, where: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        said = "is missing" if key not in table else f"is {value!r}"
        raise PolicyError(f"{key} {said} in {where}; it must be a number above 0: fetch the model's {CONFIG} again")
    return float(value)


def _whole(table: Mapping[str, Any], key: str, where: str) -> int:
    value = _number(table, key, where)
    if not value.is_integer():
        raise PolicyError(f"{key} is {value} in {where}; it must be a whole number: fetch the model's {CONFIG} again")
    return int(value)


def _few(names: Collection[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    shown = [name or "no prefix" for name in list(names)[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
