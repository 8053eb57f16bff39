"""Predict time and memory of serving a video LLM from its configuration and a GPU's datasheet; nothing is run.

A part takes as long as its matrix products, or as reading its weights and caches, whichever is longer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import Conv2d, Conv3d, Linear

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.families.frames import FrameAdapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.transformers_api import head_sizes
from vidsieve.errors import ModelError, SelectionError, UnknownNameError
from vidsieve.evaluation.blueprints import BLUEPRINTS, PIXELS
from vidsieve.evaluation.flops import prefill_flops
from vidsieve.io.machine import total_memory
from vidsieve.io.texts import percent
from vidsieve.loading import is_testbed, shipped_model
from vidsieve.selection import kept_tokens
from vidsieve.types import TokenGrid

USABLE_MEMORY = 0.9
"""Share of the memory for weights and caches; activations and fragmentation take the rest."""
GPUS = {
    "H100": (989.4, 3350, 80),  # SXM5
    "H200": (989.4, 4800, 141),
    "A100-80GB": (312, 2039, 80),  # SXM4
    "A100-40GB": (312, 1555, 40),
    "L40S": (362, 864, 48),
    "L4": (121, 300, 24),
    "A10": (125, 600, 24),
    "RTX4090": (165.2, 1008, 24),  # products summed in float32
}
"""Peak, bandwidth and memory as `Gpu`, from NVIDIA's datasheets; where these count sparse operations, half of them."""


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
    cpu: bool = False

    @classmethod
    def here(cls, dtype: torch.dtype = torch.float32) -> Gpu:
        """Return this machine's GPU, or its CPU, with the speed of products and copies in `dtype`, measured now."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        side = 8192 if device.type == "cuda" else 1024
        left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        product, copy = _seconds(lambda: left @ right), _seconds(lambda: left.clone())
        if device.type == "cuda":
            name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
        else:
            threads = torch.get_num_threads()
            name, memory = f"this CPU, {threads} thread{'s' * (threads != 1)}", total_memory()
        moved = 2 * left.numel() * left.itemsize
        return cls(name, 2e-12 * side**3 / product, 1e-9 * moved / copy, 1e-9 * memory, 1, 1, cpu=device.type == "cpu")

    def seconds(self, operations: float, size: float) -> float:
        """Return the longer of the times for `operations` and for reading `size` bytes."""
        reached, share = 1e12 * self.tflops * self.efficiency, 1e9 * self.bandwidth * self.bandwidth_share
        return max(operations / reached, size / share)


def _seconds(work: Callable[[], object], least: float = 0.2) -> float:
    """Return the mean time of `work` over `least` seconds, after one call that does not count."""
    work()
    count, start = 0, time.perf_counter()
    while (now := time.perf_counter() - start) < least or not count:
        work()
        count += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return now / count


def read_gpu(name: str) -> Gpu:
    """Return a GPU of the table, or one given as ``TFLOPs,GB/s,GB``.

    Raises
    ------
    UnknownNameError
    """
    try:
        tflops, bandwidth, memory = GPUS.get(name.upper()) or map(float, name.split(","))
        if not min(tflops, bandwidth, memory) > 0:
            raise ValueError
    except ValueError:
        hint = "Any other GPU is given by its TFLOP/s, GB/s and GB, all positive, as 2250,8000,180."
        raise UnknownNameError("GPU", name.upper(), GPUS, hint) from None
    return Gpu(name.upper(), tflops, bandwidth, memory)


def read_model(name: str, layout: str | None = None) -> Adapter:
    """Return the adapter, without weights, of a model of `BLUEPRINTS`, the testbed's, or one with a ``config.json``.

    Raises
    ------
    UnknownNameError, ModelError, UnsupportedModelError, UnsupportedCallError
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    blueprint, source = BLUEPRINTS.get(name.lower()), str(shipped_model(name)) if is_testbed(name) else name
    if not blueprint and "/" not in source and not os.path.exists(source):  # asking the hub would take long
        raise UnknownNameError("model", name, [*BLUEPRINTS, "testbed"], "Or give a folder, or a hub id as OWNER/NAME.")
    try:
        config = blueprint[1]() if blueprint else AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            network = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"cannot read {name!r} as a model for videos: {str(error).strip().splitlines()[0]}. Give a folder with a "
            "config.json, a hub id that can be reached, or a size that needs neither, such as qwen2.5-vl-7b"
        ) from None
    return adapter_for(network, layout=layout)


def encoded_video(adapter: Adapter, frames: int, size: tuple[int, int]) -> tuple[TokenGrid, int, int, float]:
    """Return a video's grid of tokens, its newlines and patches, and the operations of encoder and projector.

    `size`, height and width in pixels, matters to families that keep the frames' shape. Newlines are the model's own
    tokens, which stay: one for each row of the grid or one in all. Operations are those of all matrix products, a
    multiplication and an addition as two, with attention inside each frame, or inside Qwen2.5-VL's windows.

    Raises
    ------
    ModelError
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_video

    family, vision, newlines = adapter.family, adapter.model.config.vision_config, 0
    if family in PIXELS:
        depth, together, patch = vision.depth, vision.temporal_patch_size, vision.patch_size
        unit = patch * vision.spatial_merge_size
        least, most = PIXELS[family]
        try:
            if family == "qwen3_vl":
                height, width = resize_video(max(frames, together), *size, together, unit, least, most)
            else:
                height, width = smart_resize(*size, unit, least, most)
            grid = TokenGrid(-(-frames // together), height // unit, width // unit)
        except (ValueError, SelectionError) as error:
            raise ModelError(f"the model cannot take {frames} frames of this size: {error}") from None
        patches = height * width // patch**2  # of a frame
    else:
        depth, image, patch = vision.num_hidden_layers, vision.image_size, vision.patch_size
        side = image[0] // patch[0] if isinstance(image, (list, tuple)) else image // patch
        patches = side**2 + (family == "internvl")  # its class token
        pooled = (side + (family == "llava_onevision")) // 2  # which rounds up
        tokens = adapter.frame_side if isinstance(adapter, FrameAdapter) else pooled
        newlines = {"llava_onevision": 1, "llava_video": frames * tokens}.get(family, 0)
        grid = TokenGrid(frames, tokens, tokens)
    pairs = depth * patches**2
    if family == "qwen2_5_vl":
        full = sum(layer < depth for layer in set(vision.fullatt_block_indexes))
        pairs = full * patches**2 + (depth - full) * patches * (vision.window_size // patch) ** 2
    llm = {adapter.model.get_output_embeddings(), *adapter.language_model.modules()}
    products = 0
    for path, module in adapter.model.named_modules():
        if module not in llm and isinstance(module, (Linear, Conv2d, Conv3d)):
            merged = "merger" in path or "connector" in path or (family == "internvl" and "projector" in path)
            products += module.weight.numel() * (grid.num_tokens if merged else grid.frames * patches)
    return grid, newlines, grid.frames * patches, float(2 * products + 4 * grid.frames * vision.hidden_size * pairs)


def plan(
    model: str,
    gpu: Gpu,
    retentions: Sequence[float],
    *,
    layout: str | None = None,
    frames: int = 32,
    size: tuple[int, int] = (360, 640),
    prompt_tokens: int = 64,
    answer_tokens: int = 64,
    batch: int = 8,
) -> dict[str, Any]:
    """Return a row for each retention, the settings and the assumptions, as plain values.

    `size` is height and width of the frames in pixels, `prompt_tokens` counts text, `batch` requests decoded together.
    Of a row, ``llm_tokens`` is the whole prompt, ``kv_bytes`` the cache of one request after its answer, ``concurrent``
    the number of requests that fit in memory, ``decode_s`` the time of one step for the whole ``batch``. If no request
    fits, ``latency_s`` is None and ``per_hour`` 0.

    Raises
    ------
    ModelError, RetentionError, UnknownNameError, UnsupportedModelError, UnsupportedCallError
    """
    adapter = read_model(model, layout)
    language, text = adapter.language_model, adapter.model.config.get_text_config()
    head, words = adapter.model.get_output_embeddings().weight, language.get_input_embeddings().weight
    parameters = sum(p.numel() for p in adapter.model.parameters())
    llm = sum(p.numel() for p in language.parameters()) - words.numel() + head.numel()  # read for every new token
    encoder = parameters - llm - (0 if head is words else words.numel())
    weights, usable = gpu.width * parameters, 1e9 * USABLE_MEMORY * gpu.memory
    if weights > usable:
        raise ModelError(
            f"{model} does not fit on {gpu.name}: its weights take {weights / 1e9:.1f} GB of the {usable / 1e9:.1f} GB "
            "that can be used; choose a GPU with more memory or a smaller model"
        )
    grid, newlines, _, encoder_flops = encoded_video(adapter, frames, size)
    encoder_s = gpu.seconds(encoder_flops, gpu.width * encoder)
    token_bytes = 2 * gpu.width * sum(width * heads for width, heads in head_sizes(text))  # keys and values
    rows: list[dict[str, float | None]] = []
    for retention in retentions:
        kept = kept_tokens(retention, grid.num_tokens)
        # A row of the grid without tokens loses its newline; the method decides how many, so the most are counted.
        prompt = kept + min(newlines, kept) + prompt_tokens
        kv_bytes = (prompt + answer_tokens - 1) * token_bytes  # the last token is not read
        concurrent = int((usable - weights) // kv_bytes)
        together, middle = max(1, min(batch, concurrent)), prompt + answer_tokens // 2
        prefill = prefill_flops(text, prompt)
        prefill_s = gpu.seconds(prefill, gpu.width * llm)
        step = prefill_flops(text, middle + 1) - prefill_flops(text, middle) + prefill_flops(text, 0)
        decode_s = gpu.seconds(together * step, gpu.width * llm + together * middle * token_bytes)
        first, further = encoder_s + prefill_s, (answer_tokens - 1) * decode_s
        row = {
            "retention": retention,
            "video_tokens": kept,
            "llm_tokens": prompt,
            "encoder_flops": encoder_flops,
            "prefill_flops": prefill,
            "kv_bytes": kv_bytes,
            "concurrent": concurrent,
            "batch": together,
            "encoder_s": encoder_s,
            "prefill_s": prefill_s,
            "decode_s": decode_s,
            "first_token_s": first,
            "latency_s": first + further if concurrent else None,
            "per_hour": 3600 / (first + further / together) if concurrent else 0.0,
        }
        rows.append(row)
    load = {"frames": frames, "size": size, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}
    return {
        "model": model,
        "parameters": parameters,
        "gpu": asdict(gpu),
        "load": load | {"batch": batch},
        "rows": rows,
        "assumptions": [
            f"nothing was run; {gpu.tflops:.4g} TFLOP/s in bfloat16 without sparsity, {gpu.bandwidth:.4g} GB/s, "
            f"{gpu.memory:.4g} GB; assumed: {percent(gpu.efficiency)} of the operations, "
            f"{percent(gpu.bandwidth_share)} of the bandwidth, {percent(USABLE_MEMORY)} of the memory for weights "
            f"({weights / 1e9:.2f} GB) and caches",
            f"a prompt has {grid.frames}×{grid.height}×{grid.width} video tokens, {newlines} "
            f"newline{'s' * (newlines != 1)} and {prompt_tokens} tokens of text; models that write text around frames "
            f"add up to 13 a frame; this one is made for {text.max_position_embeddings:,}, and pruning does not "
            "shorten positions",
            "encoder and prefill run one request at a time, decoding the whole batch; parts do not overlap; reading "
            "videos, kernel launches, norms, softmax, sampling and selection take no time",
        ],
    }
