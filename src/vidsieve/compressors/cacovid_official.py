"""The published CaCoVID checkpoint, read into our policy.

The release trains its policy as the module ``compression_policy`` of LLaVA-OneVision-7B and publishes the whole
model, so a folder of it holds some 16 GB, half a gigabyte of them the policy. Only the policy's tensors are read:

>>> import vidsieve
>>> from vidsieve.compressors.cacovid_official import read_official
>>> read_official("CaCoVID_LLaVA-OneVision").save_pretrained("cacovid-official")
>>> method = vidsieve.load("cacovid", "cacovid-official", variant="official", retention=0.25)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.errors import PolicyError
from vidsieve.io.bounded import read_json
from vidsieve.policies import CONFIG, WEIGHTS, Size, parameters_without_nan, pickles_in

QWEN2_7B = BlockShape(3584, 28, 4, 128, 18944, rms_norm_eps=1e-6, rope_theta=1e6)
"""A decoder block of the language model in LLaVA-OneVision-7B."""

_ANCHOR, _GATE = "token_compress.0.weight", "layers.0.mlp.gate_proj.weight"
_UNUSED = "mode_selection."
"""A head that the release reads neither at inference nor in its loss."""


class _Text(msgspec.Struct):
    num_attention_heads: Size
    num_key_value_heads: Size
    hidden_size: int | None = None
    head_dim: Size | None = None
    rms_norm_eps: float = 1e-6  # transformers does not write values that equal its defaults
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


class _Config(msgspec.Struct):
    text_config: _Text | None = None


def read_official(folder: str | Path, *, family: str = "llava_onevision") -> CaCoVIDPolicy:
    """Return the released policy in `folder`, in evaluation mode, float32, on the CPU.

    `folder` holds ``model.safetensors`` or shards of it (those with the policy's tensors are enough), and the
    ``config.json`` of the model, which is needed for widths other than 3584. The policy is of variant ``"official"``:
    its attention is causal, as in the release in effect. `PolicyConfig.training` notes its origin.

    Parameters
    ----------
    folder : str or Path
    family : str
        The adapter family of the model it belongs to; the release has LLaVA-OneVision's only.

    Raises
    ------
    PolicyError
        If a file is missing or corrupt, a parameter is missing, superfluous, quantised, of another shape or not finite,
        or `config.json` does not describe the attention's heads.

    References
    ----------
    CaCoVID, AAAI 2026 (arXiv 2602.01649), hub moraleyc/CaCoVID_LLaVA-OneVision; LivingFutureLab/CaCoVID @ 384752da.
    """
    folder = Path(folder)
    prefix, weights = _weights(folder)
    shape = _block_shape(folder / CONFIG, weights)
    with torch.device("meta"):
        base_model = "llava-hf/llava-onevision-qwen2-7b-ov-hf" if shape == QWEN2_7B else ""
        policy = CaCoVIDPolicy.of_shape(shape, family, variant="official", base_model=base_model)
    try:
        policy.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise PolicyError(f"{folder} lacks a shard, or holds another policy than the release's: {error}") from None
    if not parameters_without_nan(policy):
        raise PolicyError(f"the policy's weights in {folder} are not all finite numbers: fetch the checkpoint again")
    origin = {"source": "the release's checkpoint", "folder": folder.resolve().name, "prefix": prefix}
    policy.config = replace(policy.config, training=origin)
    return policy.eval()


def _weights(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the prefix of the policy's names in a checkpoint, and its tensors by name without it, float32."""
    paths = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = f"; {', '.join(pickles_in(folder))} will not be loaded, because pickles can run code"
        raise PolicyError(f"{folder} holds no .safetensors file{pickles if pickles_in(folder) else ''}")
    try:
        opened: list[Any] = [safe_open(path, "pt") for path in paths]
    except (SafetensorError, OSError) as error:
        raise PolicyError(
            f"{folder} has a file that is not readable safetensors ({error!s:.300}): fetch it again"
        ) from None
    files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a mapping)
    prefixes = [name.removesuffix(_ANCHOR) for name in files if f".{name}".endswith(f".{_ANCHOR}")]
    if len(prefixes) != 1:
        raise PolicyError(
            f"{folder} holds {len(prefixes)} CaCoVID policies (tensors {_ANCHOR} under any prefix), and one is needed: "
            "the release's checkpoint is moraleyc/CaCoVID_LLaVA-OneVision"
        )
    weights: dict[str, Tensor] = {}
    for name, file in files.items():
        if name.startswith(prefixes[0]) and not name.startswith(prefixes[0] + _UNUSED):
            tensor = file.get_tensor(name)
            if not tensor.is_floating_point():
                raise PolicyError(f"{folder} stores {name} as {tensor.dtype}: fetch the unquantised checkpoint")
            # A copy: the file stays mapped into memory otherwise.
            weights[name.removeprefix(prefixes[0])] = tensor.to(torch.float32, copy=True)
    return prefixes[0], weights


def _block_shape(path: Path, weights: dict[str, Tensor]) -> BlockShape:
    """Return the shape of the policy's block: sizes from its tensors, heads and positions from the model's `path`."""
    width, inner = weights[_ANCHOR].shape[-1], weights[_GATE].shape[0] if _GATE in weights else 1
    advice = f"fetch the model's {CONFIG} again"
    raw = read_json(path, PolicyError, advice) if path.is_file() else {}
    try:
        text = msgspec.convert(raw, _Config).text_config
    except msgspec.ValidationError as error:
        raise PolicyError(f"{path} cannot be used ({error!s:.300}): {advice}") from None
    if text is None:
        if width == QWEN2_7B.hidden_size:
            return QWEN2_7B
        raise PolicyError(f"the policy has width {width}, not {QWEN2_7B.hidden_size}: put its model's {CONFIG} there")
    rope = text.rope_parameters or text.rope_scaling or {}
    kind, theta = rope.get("rope_type", rope.get("type", "default")), rope.get("rope_theta", text.rope_theta)
    if text.hidden_size not in (None, width) or kind != "default" or not isinstance(theta, int | float):
        raise PolicyError(
            f"the text_config in {path} does not fit this policy: width {text.hidden_size} for {width}, "
            f"rotary positions of type {kind!r} (default is needed), rope_theta {theta}"
        )
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    return BlockShape(width, heads, groups, text.head_dim or width // heads, inner, text.rms_norm_eps, float(theta))
