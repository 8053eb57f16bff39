"""A video LLM as its configuration describes it: parameters, token grids, and the vision encoder's operations."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import ModelError, SelectionError, UnknownNameError, UnsupportedModelError
from vidsieve.evaluation.blueprints import BLUEPRINTS
from vidsieve.types import TokenGrid


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights.

    Parameters
    ----------
    name, family : str
        As it was asked for; as its adapter is called.
    config : the transformers configuration
    parameters : int
        Of all parts.
    decoder : int
        Of what every new token reads: the LLM's layers and its head.
    encoder : int
        Of the vision encoder and what stands between it and the LLM.
    """

    name: str
    family: str
    config: Any
    parameters: int
    decoder: int
    encoder: int

    @property
    def text(self) -> Any:
        """The LLM's configuration."""
        return self.config.get_text_config()


@dataclass(frozen=True)
class Clip:
    """One video as a family sees it.

    Parameters
    ----------
    frames : int
    patches : tuple of int
        What the encoder reads: time, height, width.
    grid : TokenGrid
        What may be pruned.
    newlines : int
        Tokens of the model's own that stay; with a newline for each row, where the row keeps a token.
    markers : int
        Words that the processor puts around frames.
    note : str
        How frames become tokens, for people.
    """

    frames: int
    patches: tuple[int, int, int]
    grid: TokenGrid
    newlines: int
    markers: int
    note: str


def read_model(name: str, layout: str | None = None) -> Model:
    """Return a model of a size in `BLUEPRINTS`, of ``"testbed"``, or of a folder's or hub id's ``config.json``.

    Raises
    ------
    UnknownNameError
        If it is none of these.
    ModelError
        If the configuration cannot be read.
    UnsupportedModelError, UnsupportedCallError
        If its family is not supported, or has no such layout.
    """
    size = name.lower()
    return model_of(name, BLUEPRINTS[size][1]() if size in BLUEPRINTS else _config(name), layout)


def model_of(name: str, config: Any, layout: str | None = None) -> Model:
    """Return a model of a configuration, its parameters counted on a copy without memory.

    Raises
    ------
    UnsupportedModelError, UnsupportedCallError
    """
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            made = AutoModelForImageTextToText.from_config(config)
    except ValueError:
        raise UnsupportedModelError(
            f"{name!r} is a {config.model_type!r}, which is no video LLM that vidsieve knows; sizes without a "
            f"download: {', '.join(BLUEPRINTS)}"
        ) from None
    adapter = adapter_for(made, layout=layout)
    head, words = made.get_output_embeddings().weight, adapter.language_model.get_input_embeddings().weight
    decoder = sum(p.numel() for p in adapter.language_model.parameters()) - words.numel() + head.numel()
    total = sum(p.numel() for p in made.parameters())
    rest = total - (decoder if head is words else decoder + words.numel())
    return Model(name, adapter.family, config, total, decoder, rest)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    from vidsieve.loading import shipped_model

    source = str(shipped_model()) if name == "testbed" else name
    if "/" not in source and not os.path.exists(Path(source)):  # no hub id: asking the hub would only take long
        raise UnknownNameError("model", name, [*BLUEPRINTS, "testbed"], "Or give a folder, or a hub id as OWNER/NAME.")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot read the configuration of {name!r}: {first}. Give a folder with a config.json, a hub id that can "
            "be reached, or a size that needs neither, as qwen2.5-vl-7b"
        ) from None


# -- tokens -------------------------------------------------------------------------------------------------

SIZE = (360, 640)
"""Height and width of frames unless they are given; for families that keep a frame's shape."""
LIMITS = {"qwen2_5_vl": (128, 768), "qwen3_vl": (4, 24576)}
"""Fewest and most tokens' worth of pixels that the published processors scale frames to: of Qwen2.5-VL, of one frame
(the class's own limits, and those of qwen-vl-utils); of Qwen3-VL, of all frames together."""
MARKERS = {"qwen2_5_vl": 2, "qwen3_vl": 8, "internvl": 7, "smolvlm": 13}
"""Words around a video (Qwen2.5-VL), around two frames ("<0.5 seconds>"), a frame ("Frame1: "; "Frame from 00:00:"),
with the two or three tokens that open and close it; as the tokenizers cut them, to within one or two."""


def clip_of(model: Model, frames: int, size: tuple[int, int] | None = None) -> Clip:
    """Return a video of so many frames of a height and width as the model's family sees it.

    Raises
    ------
    ModelError
        If frames of this size or number do not go into this model.
    """
    family, config, vision = model.family, model.config, model.config.vision_config
    try:
        if family in LIMITS:
            return _scaled(family, vision, frames, size or SIZE)
        side = int(_first(vision.image_size) // _first(vision.patch_size))
        tokens = _side(family, config, side)
        grid = TokenGrid(frames, tokens, tokens)
    except (ValueError, SelectionError) as error:
        raise ModelError(f"{model.name} cannot take {frames} frames of this size: {error}") from None
    newlines = {"llava_onevision": 1, "llava_video": frames * tokens}.get(family, 0)
    pixels = _first(vision.image_size)
    note = f"frames are scaled to {pixels}×{pixels}, whatever their size, and become {tokens}×{tokens} tokens each"
    return Clip(frames, (frames, side, side), grid, newlines, MARKERS.get(family, 0) * frames, note)


def _side(family: str, config: Any, patches: int) -> int:
    """Return the tokens along one side of a frame of so many patches."""
    if family == "internvl":
        return int(patches * config.downsample_ratio)
    if family == "smolvlm":
        return patches // int(config.scale_factor)
    return -(-patches // 2) if family == "llava_onevision" else patches // 2


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value


def _scaled(family: str, vision: Any, frames: int, size: tuple[int, int]) -> Clip:
    """Return a clip whose frames keep their shape, scaled as the family's processor does it."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_all

    merge, together = vision.spatial_merge_size, vision.temporal_patch_size
    unit = vision.patch_size * merge
    least, most = (tokens * unit**2 for tokens in LIMITS[family])
    steps = -(-frames // together)
    if family == "qwen3_vl":
        height, width = resize_all(max(frames, together), *size, together, unit, least, most)
    else:
        height, width = smart_resize(*size, unit, least, most)
    grid = TokenGrid(steps, height // unit, width // unit)
    note = (
        f"frames of {size[0]}×{size[1]} are scaled to {height}×{width}; {together} of them become "
        f"{grid.height}×{grid.width} tokens"
    )
    markers = MARKERS[family] * (steps if family == "qwen3_vl" else 1)
    return Clip(frames, (steps, grid.height * merge, grid.width * merge), grid, 0, markers, note)


# -- the vision encoder -------------------------------------------------------------------------------------


def encoder_flops(model: Model, clip: Clip) -> float:
    """Return the operations of all matrix products from pixels to the LLM's tokens, counted as `prefill_flops` does.

    Attention is not causal here: all pairs of a frame, or of a window where the encoder has windows.
    """
    vision, steps, patches = model.config.vision_config, clip.patches[0], clip.patches[1] * clip.patches[2]
    depth = vision.depth if model.family in LIMITS else vision.num_hidden_layers
    width, inner = vision.hidden_size, vision.intermediate_size
    seen = patches + (model.family == "internvl")  # its class token
    matrices = 3 if model.family == "qwen2_5_vl" else 2
    blocks = depth * 2 * seen * (4 * width**2 + matrices * width * inner)
    pixels = 3 * _first(vision.patch_size) ** 2 * (vision.temporal_patch_size if model.family in LIMITS else 1)
    attention = 4 * width * _pairs(model, clip, depth, seen)
    return float(steps * (2 * patches * pixels * width + blocks + attention) + _projector(model, clip))


def _pairs(model: Model, clip: Clip, depth: int, seen: int) -> int:
    """Return the pairs of patches that attention of all layers looks at in one step of time."""
    if model.family != "qwen2_5_vl":
        return depth * seen**2
    from transformers.vision_utils import get_vision_window_index

    vision = model.config.vision_config
    ends = get_vision_window_index(
        torch.tensor([[1, *clip.patches[1:]]]),
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )[1]
    whole = len([index for index in set(vision.fullatt_block_indexes) if index < depth])
    return whole * seen**2 + (depth - whole) * int(ends.diff().long().square().sum())


def _projector(model: Model, clip: Clip) -> int:
    """Return the operations between the encoder and the LLM."""
    config, vision, tokens = model.config, model.config.vision_config, clip.grid.num_tokens
    width, out = vision.hidden_size, model.text.hidden_size
    if model.family in LIMITS:
        merged = width * vision.spatial_merge_size**2
        mergers = 1 + len(vision.deepstack_visual_indexes) if model.family == "qwen3_vl" else 1
        return int(2 * mergers * tokens * (merged**2 + merged * out))
    if model.family == "internvl":
        return int(2 * tokens * (int(1 / config.downsample_ratio) ** 2 * width * out + out**2))
    if model.family == "smolvlm":
        return int(2 * tokens * config.scale_factor**2 * width * out)
    chosen = config.vision_feature_layer
    layers = 1 if isinstance(chosen, int) else len(chosen)
    return int(2 * math.prod(clip.patches) * (layers * width * out + out**2))  # before frames are pooled
