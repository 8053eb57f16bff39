"""Predict what serving a video LLM takes, from its configuration and a GPU's datasheet; nothing is run.

A part takes as long as its matrix products, or as reading its weights and caches, whichever is longer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import EvaluationError, ModelError, SelectionError, UnknownNameError, UnsupportedModelError
from vidsieve.evaluation.blueprints import BLUEPRINTS
from vidsieve.evaluation.flops import prefill_flops
from vidsieve.loading import shipped_model
from vidsieve.selection import kept_tokens
from vidsieve.types import TokenGrid

USABLE_MEMORY = 0.9
"""Share of the memory for weights and caches; activations and fragmentation take the rest."""
LIMITS = {"qwen2_5_vl": (128, 768), "qwen3_vl": (4, 24576)}
"""Fewest and most tokens that the published processors scale one frame to (Qwen2.5-VL), or all together (Qwen3-VL)."""
MARKERS = {"qwen2_5_vl": 2, "qwen3_vl": 8, "internvl": 7, "smolvlm": 13}
"""Tokens of text around a video (Qwen2.5-VL), two frames (Qwen3-VL) or a frame, within one or two."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: its dense bfloat16 peak in 10¹² operations per second, bandwidth in GB/s and memory in GB (10⁹ bytes).

    `efficiency` and `bandwidth_share` of peak and bandwidth are reached: round figures, not measurements. `width` is
    the number of bytes of a weight or cached value.
    """

    name: str
    tflops: float
    bandwidth: float
    memory: float
    efficiency: float = 0.5
    bandwidth_share: float = 0.8
    width: int = 2

    def seconds(self, operations: float, size: float) -> float:
        """Return the longer of the times for `operations` and for reading `size` bytes."""
        reading = size / (1e9 * self.bandwidth * self.bandwidth_share)
        return max(operations / (1e12 * self.tflops * self.efficiency), reading)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 989.4, 3350, 80),  # SXM5
        Gpu("H200", 989.4, 4800, 141),
        Gpu("A100-80GB", 312, 2039, 80),  # SXM4
        Gpu("A100-40GB", 312, 1555, 40),
        Gpu("L40S", 362, 864, 48),
        Gpu("L4", 121, 300, 24),
        Gpu("A10", 125, 600, 24),
        Gpu("RTX4090", 165.2, 1008, 24),  # products summed in float32
    )
}
"""From NVIDIA's datasheets; where these state operations with sparsity, half of them."""


def read_gpu(name: str) -> Gpu:
    """Return a GPU of the table, or one given as ``TFLOPs,GB/s,GB``.

    Raises
    ------
    UnknownNameError
    EvaluationError
        If a figure is not positive.
    """
    if name.upper() in GPUS:
        return GPUS[name.upper()]
    try:
        tflops, bandwidth, memory = map(float, name.split(","))
    except ValueError:
        hint = "Any other GPU is given by its TFLOP/s, GB/s and GB, as 2250,8000,180."
        raise UnknownNameError("GPU", name.upper(), GPUS, hint) from None
    if not min(tflops, bandwidth, memory) > 0:
        raise EvaluationError(f"a GPU's TFLOP/s, GB/s and GB must be positive, got {name}")
    return Gpu(name, tflops, bandwidth, memory)


@dataclass(frozen=True)
class SizedModel:
    """A model's configuration and its numbers of parameters, counted on a copy without memory.

    `decoder`: read for every new token, the LLM's layers and its head. `encoder`: the vision encoder and the projector.
    `patch_weights` and `token_weights`: matrices of the encoder that are applied to every patch, and to every token.
    """

    name: str
    family: str
    config: Any
    parameters: int
    decoder: int
    encoder: int
    patch_weights: int
    token_weights: int

    @property
    def text(self) -> Any:
        """The LLM's configuration."""
        return self.config.get_text_config()


def read_model(name: str, layout: str | None = None) -> SizedModel:
    """Return a model of `BLUEPRINTS`, ``"testbed"``, or that of a folder's or hub id's ``config.json``.

    Raises
    ------
    UnknownNameError
        If it is none of these.
    ModelError
        If the configuration cannot be read.
    UnsupportedModelError, UnsupportedCallError
        If its family is not supported, or has no such layout.
    """
    if name.lower() in BLUEPRINTS:
        return model_of(name, BLUEPRINTS[name.lower()][1](), layout)
    from transformers import AutoConfig

    source = str(shipped_model()) if name == "testbed" else name
    if "/" not in source and not os.path.exists(source):  # not a hub id, and asking the hub would take long
        raise UnknownNameError("model", name, [*BLUEPRINTS, "testbed"], "Or give a folder, or a hub id as OWNER/NAME.")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"cannot read the configuration of {name!r}: {str(error).strip().splitlines()[0]}. Give a folder with a "
            "config.json, a hub id that can be reached, or a size that needs neither, such as qwen2.5-vl-7b"
        ) from None
    return model_of(name, config, layout)


def model_of(name: str, config: Any, layout: str | None = None) -> SizedModel:
    """Return the model of a configuration.

    Raises
    ------
    UnsupportedModelError, UnsupportedCallError
    """
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            network = AutoModelForImageTextToText.from_config(config)
    except ValueError:
        raise UnsupportedModelError(f"{name!r} is a {config.model_type!r}, which vidsieve does not support") from None
    adapter = adapter_for(network, layout=layout)
    head, words = network.get_output_embeddings(), adapter.language_model.get_input_embeddings()
    decoder = sum(p.numel() for p in adapter.language_model.parameters()) - words.weight.numel() + head.weight.numel()
    total = sum(p.numel() for p in network.parameters())
    encoder = total - decoder - (0 if head.weight is words.weight else words.weight.numel())
    llm, patches, tokens = {head, *adapter.language_model.modules()}, 0, 0
    for path, module in network.named_modules():
        if module not in llm and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)):
            if "merger" in path or "connector" in path or (adapter.family == "internvl" and "projector" in path):
                tokens += module.weight.numel()
            else:
                patches += module.weight.numel()
    return SizedModel(name, adapter.family, config, total, decoder, encoder, patches, tokens)


@dataclass(frozen=True)
class ClipTokens:
    """A video as a family sees it.

    `patches`: time, height and width that the encoder reads. `grid`: tokens that may be pruned. `newlines`: the model's
    own tokens, which stay, one for each row of the grid or one in all. `markers`: text around frames.
    """

    patches: tuple[int, int, int]
    grid: TokenGrid
    newlines: int
    markers: int


def clip_tokens(model: SizedModel, frames: int, size: tuple[int, int] = (360, 640)) -> ClipTokens:
    """Return the tokens of a video; `size`, height and width, matters to families that keep the frames' shape.

    Raises
    ------
    ModelError
        If the model cannot take frames of this size or number.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_video

    family, config, vision = model.family, model.config, model.config.vision_config
    try:
        if family in LIMITS:
            together, unit = vision.temporal_patch_size, vision.patch_size * vision.spatial_merge_size
            least, most = (tokens * unit**2 for tokens in LIMITS[family])
            if family == "qwen3_vl":
                height, width = resize_video(max(frames, together), *size, together, unit, least, most)
            else:
                height, width = smart_resize(*size, unit, least, most)
            steps = -(-frames // together)
            grid = TokenGrid(steps, height // unit, width // unit)
            markers = MARKERS[family] * (steps if family == "qwen3_vl" else 1)
            return ClipTokens((steps, height // vision.patch_size, width // vision.patch_size), grid, 0, markers)
        pixels, patch = (
            value[0] if isinstance(value, (list, tuple)) else value for value in (vision.image_size, vision.patch_size)
        )
        side = int(pixels // patch)
        tokens = {
            "llava_onevision": -(-side // 2),
            "llava_video": side // 2,
            "internvl": int(side * getattr(config, "downsample_ratio", 1)),
            "smolvlm": side // int(getattr(config, "scale_factor", 1)),
        }[family]
        grid = TokenGrid(frames, tokens, tokens)
    except (ValueError, SelectionError) as error:
        raise ModelError(f"{model.name} cannot take {frames} frames of this size: {error}") from None
    newlines = {"llava_onevision": 1, "llava_video": frames * tokens}.get(family, 0)
    return ClipTokens((frames, side, side), grid, newlines, MARKERS.get(family, 0) * frames)


def encoder_flops(model: SizedModel, clip: ClipTokens) -> float:
    """Return the operations from pixels to video tokens: all matrix products, a multiplication and an addition as two.

    Attention looks at all pairs of patches of a frame, in Qwen2.5-VL's windowed layers of a window.
    """
    vision, (steps, height, width) = model.config.vision_config, clip.patches
    depth = vision.depth if model.family in LIMITS else vision.num_hidden_layers
    patches = height * width + (model.family == "internvl")  # its class token
    pairs = depth * patches**2
    if model.family == "qwen2_5_vl":
        full = len([layer for layer in set(vision.fullatt_block_indexes) if layer < depth])
        side = vision.window_size // vision.patch_size
        windows = [(n // side) * side**2 + (n % side) ** 2 for n in (height, width)]
        pairs = full * patches**2 + (depth - full) * windows[0] * windows[1]
    attention = 4 * vision.hidden_size * pairs
    products = 2 * steps * patches * model.patch_weights + 2 * clip.grid.num_tokens * model.token_weights
    return float(products + steps * attention)


def kv_bytes(text: Any, tokens: int, width: int) -> int:
    """Return the bytes of keys and values of `tokens` tokens, `width` bytes a value, in all layers of an LLM."""
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers * text.num_key_value_heads * size) * tokens * width


def step_flops(text: Any, tokens: int) -> float:
    """Return the operations of decoding one token after `tokens` others."""
    return prefill_flops(text, tokens + 1) - prefill_flops(text, tokens) + prefill_flops(text, 0)


@dataclass(frozen=True)
class Load:
    """Requests: frames, their height and width, tokens of text and of the answer, and requests decoded together."""

    frames: int = 32
    size: tuple[int, int] = (360, 640)
    prompt_tokens: int = 64
    answer_tokens: int = 64
    batch: int = 8


def plan(model: SizedModel, gpu: Gpu, load: Load, retentions: Sequence[float]) -> dict[str, Any]:
    """Return a row for each retention, the settings and the assumptions, as plain values.

    Of a row, ``llm_tokens`` is the whole prompt, ``kv_bytes`` the cache of one request after its answer, ``concurrent``
    the number of requests that fit in memory, ``decode_s`` the time of one step for the whole ``batch``. If no request
    fits, ``latency_s`` is None and ``per_hour`` 0.

    Raises
    ------
    RetentionError
        Outside (0, 1].
    ModelError
        If the model cannot take the frames, or its weights do not fit in memory.
    """
    weights, usable = model.parameters * gpu.width, 1e9 * USABLE_MEMORY * gpu.memory
    if weights > usable:
        raise ModelError(
            f"{model.name} does not fit on {gpu.name}: its weights take {weights / 1e9:.1f} GB of the "
            f"{usable / 1e9:.1f} GB that can be used; choose a GPU with more memory or a smaller model"
        )
    clip, text = clip_tokens(model, load.frames, load.size), model.text
    return {
        "model": model.name,
        "parameters": model.parameters,
        "gpu": asdict(gpu),
        "load": asdict(load),
        "rows": [_row(model, gpu, load, clip, usable - weights, retention) for retention in retentions],
        "assumptions": [
            "predicted from the configuration and the datasheet; nothing was run",
            f"{gpu.name}: {gpu.tflops:.4g} TFLOP/s in bfloat16 without sparsity, {gpu.bandwidth:.4g} GB/s, "
            f"{gpu.memory:.4g} GB; reached: {gpu.efficiency:.0%} of the operations, {gpu.bandwidth_share:.0%} of the "
            "bandwidth",
            f"{load.frames} frames become {clip.grid.frames}×{clip.grid.height}×{clip.grid.width} tokens; further "
            f"tokens: {clip.newlines} newlines, {clip.markers} around frames, {load.prompt_tokens} of text; the model "
            f"is made for {text.max_position_embeddings:,}, and pruning does not shorten positions",
            "encoder and prefill run one request at a time; decoding runs the batch together and reads all weights and "
            "caches in each step; parts do not overlap; kernel launches, norms, softmax, sampling and selection take "
            "no time",
            f"weights take {weights / 1e9:.2f} GB; weights and caches may take {USABLE_MEMORY:.0%} of the memory",
            "reading and decoding video files is CPU work, does not shrink with pruning, and is not counted",
        ],
    }


def _row(
    model: SizedModel, gpu: Gpu, load: Load, clip: ClipTokens, free: float, retention: float
) -> dict[str, float | None]:
    text, kept = model.text, kept_tokens(retention, clip.grid.num_tokens)
    # A row of the grid without tokens loses its newline; the method decides how many, so the most are counted.
    prompt = kept + min(clip.newlines, kept) + clip.markers + load.prompt_tokens
    cache = kv_bytes(text, prompt + load.answer_tokens - 1, gpu.width)  # the last token is not read
    concurrent = int(free // cache)
    batch = max(1, min(load.batch, concurrent))

    seen, first = encoder_flops(model, clip), prefill_flops(text, prompt)
    encode = gpu.seconds(seen, model.encoder * gpu.width)
    prefill = gpu.seconds(first, model.decoder * gpu.width)
    half = prompt + load.answer_tokens // 2
    read = model.decoder * gpu.width + batch * kv_bytes(text, half, gpu.width)
    step = gpu.seconds(batch * step_flops(text, half), read)
    steps = load.answer_tokens - 1  # the prefill gives the first token
    return {
        "retention": retention,
        "video_tokens": kept,
        "llm_tokens": prompt,
        "encoder_flops": seen,
        "prefill_flops": first,
        "kv_bytes": cache,
        "concurrent": concurrent,
        "batch": batch,
        "encoder_s": encode,
        "prefill_s": prefill,
        "decode_s": step,
        "latency_s": encode + prefill + steps * step if concurrent else None,
        "per_hour": 3600 / (encode + prefill + steps * step / batch) if concurrent else 0.0,
    }
