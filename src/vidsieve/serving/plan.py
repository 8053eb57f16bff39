"""What a video costs a machine, with all its tokens and with fewer: tokens, operations, memory, time, machines.

Every figure is a roofline: a part takes as long as its matrix products at a share of the machine's peak, or as reading
its weights and caches at a share of its bandwidth, whichever is longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vidsieve import registry
from vidsieve.errors import ModelError, UnknownNameError
from vidsieve.evaluation.flops import prefill_flops
from vidsieve.selection import kept_tokens
from vidsieve.serving.machines import DTYPES, Machine
from vidsieve.serving.models import Clip, Model, clip_of, encoder_flops
from vidsieve.types import Stage

USABLE = 0.9
"""Share of the memory for weights and caches; activations and fragments get the rest."""
SCORE_WIDTH, LOOK_WIDTH = 512, 384
"""Units of SCORE's hidden layer; outputs of CaCoVID's products on every token, the keys of its first look aside."""
PASSES = 4
"""Times that a method without products of its own reads the tokens."""


@dataclass(frozen=True)
class Load:
    """What is asked of a model.

    Parameters
    ----------
    frames : int
    size : tuple of int, optional
        Height and width of frames, for families that keep their shape.
    prompt_tokens, answer_tokens : int
        Text around the video, template included; tokens of an answer.
    batch : int
        Requests that are decoded together.
    dtype : str
        Of weights, caches and products: bf16, fp16 or fp32.
    method : str, optional
        The method whose own cost is counted; none: selecting is free.
    videos_per_day : float
    """

    frames: int = 32
    size: tuple[int, int] | None = None
    prompt_tokens: int = 64
    answer_tokens: int = 64
    batch: int = 8
    dtype: str = "bf16"
    method: str | None = None
    videos_per_day: float = 1e6


@dataclass(frozen=True)
class PlanRow:
    """What one retention takes.

    Parameters
    ----------
    video_tokens, llm_tokens : int
        Kept of the video; of the whole prompt as the LLM reads it.
    prefill_flops, encoder_flops : float
    kv_bytes : float
        One request's keys and values after its answer.
    encoder_s, select_s, prefill_s, decode_s : float
        Seconds; decode: of one step for the whole batch.
    concurrent, batch : int
        Requests that the memory holds at once; those decoded together, no more than these.
    latency_s, busy_s : float or None, float
        Of one request from frames to the end of its answer; of the machine, which decodes others with it.
    missing_bytes : float
        What a request's cache takes more than the weights leave; 0 where it fits.
    per_second, machine_hours : float or None
        Requests; hours of one machine for the videos of a day.
    machines : int or None
        So many for the videos of a day. These three and `latency_s` are None where no request fits.
    """

    retention: float
    video_tokens: int
    llm_tokens: int
    prefill_flops: float
    encoder_flops: float
    kv_bytes: float
    encoder_s: float
    select_s: float
    prefill_s: float
    decode_s: float
    concurrent: int
    batch: int
    latency_s: float | None
    busy_s: float
    missing_bytes: float
    per_second: float | None
    machine_hours: float | None
    machines: int | None


def kv_bytes(text: Any, tokens: int, dtype: str) -> int:
    """Return the bytes of keys and values of so many tokens in all layers of an LLM with this configuration."""
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers * text.num_key_value_heads * size) * tokens * DTYPES[dtype].itemsize


def step_flops(text: Any, tokens: int) -> float:
    """Return the operations of one new token after so many, from what a prefill takes."""
    head = prefill_flops(text, 0)
    return prefill_flops(text, tokens + 1) - prefill_flops(text, tokens) + head


def selecting(method: str | None, clip: Clip, kept: int, text: Any) -> tuple[float, float]:
    """Return the operations of a method's own, and how many times it reads the tokens.

    Counted are the products of DivPrune (every token with every kept one), SCORE (two layers' worth on each token) and
    CaCoVID, variant "ours" (keys and features of each token); all others read the tokens a few times.
    """
    if method is None or kept == clip.grid.num_tokens:
        return 0.0, 0.0
    count, width = clip.grid.num_tokens, text.hidden_size
    size = getattr(text, "head_dim", None) or width // text.num_attention_heads
    products = {
        "divprune": 2 * count * kept * width,
        "score": 4 * count * width * SCORE_WIDTH,
        "cacovid": 2 * count * width * (text.num_key_value_heads * size + LOOK_WIDTH),
    }
    return float(products.get(method, 0)), 1.0 if method in products else PASSES


def check_method(method: str | None) -> None:
    """Refuse a method that is not registered.

    Raises
    ------
    UnknownNameError
    """
    if method is not None and method not in registry.compressors:
        raise UnknownNameError("compressor", method, registry.compressors)


def weights_bytes(model: Model, dtype: str) -> int:
    """Return the bytes of all parameters."""
    return model.parameters * DTYPES[dtype].itemsize


def free_bytes(model: Model, machine: Machine, dtype: str) -> float:
    """Return what the weights leave of a machine's memory.

    Raises
    ------
    ModelError
        If they do not fit.
    """
    size, usable = weights_bytes(model, dtype), 1e9 * USABLE * machine.memory
    if size > usable:
        raise ModelError(
            f"{model.name} does not fit on {machine.name}: its weights in {dtype} take {size / 1e9:.1f} GB, "
            f"{(size - usable) / 1e9:.1f} GB more than the {usable / 1e9:.1f} GB to be used of {machine.memory:g}. "
            "Take a machine with more memory, a smaller model or a shorter dtype"
        )
    return usable - size


def row(model: Model, machine: Machine, load: Load, retention: float) -> PlanRow:
    """Return what one retention takes.

    Raises
    ------
    RetentionError
        Outside (0, 1].
    ModelError
        If frames do not go into this model, or its weights not into the memory.
    """
    clip, text, dtype = clip_of(model, load.frames, load.size), model.text, load.dtype
    free, width = free_bytes(model, machine, dtype), DTYPES[dtype].itemsize
    kept = kept_tokens(retention, clip.grid.num_tokens)
    # A row of tokens that keeps none gives up its newline; how many do is the method's choice, so the most is counted.
    prompt = kept + min(clip.newlines, kept) + clip.markers + load.prompt_tokens
    cache = kv_bytes(text, prompt + load.answer_tokens - 1, dtype)  # the last token is never read
    concurrent = int(free // cache)
    batch = max(1, min(load.batch, concurrent))

    operations, reads = selecting(load.method, clip, kept, text)
    seen, first = encoder_flops(model, clip), prefill_flops(text, prompt)
    encode = machine.seconds(seen, model.encoder * width, dtype)
    select = machine.seconds(operations, reads * clip.grid.num_tokens * text.hidden_size * width, dtype)
    prefill = machine.seconds(first, model.decoder * width, dtype)
    half = prompt + load.answer_tokens // 2
    read = model.decoder * width + batch * kv_bytes(text, half, dtype)
    step = machine.seconds(batch * step_flops(text, half), read, dtype)

    steps = load.answer_tokens - 1  # the prefill gives the first
    busy = encode + select + prefill + steps * step / batch
    hours, latency = load.videos_per_day * busy / 3600, encode + select + prefill + steps * step
    if not concurrent:
        return PlanRow(
            retention,
            kept,
            prompt,
            first,
            seen,
            cache,
            encode,
            select,
            prefill,
            step,
            0,
            batch,
            None,
            busy,
            cache - free,
            None,
            None,
            None,
        )
    return PlanRow(
        retention,
        kept,
        prompt,
        first,
        seen,
        cache,
        encode,
        select,
        prefill,
        step,
        concurrent,
        batch,
        latency,
        busy,
        0.0,
        1 / busy,
        hours,
        math.ceil(hours / 24),
    )


def plan(model: Model, machine: Machine, load: Load, retentions: Sequence[float]) -> dict[str, Any]:
    """Return a row for each retention, with the settings and the assumptions behind them, as plain values.

    Raises
    ------
    RetentionError, ModelError, UnknownNameError
    """
    check_method(load.method)
    free_bytes(model, machine, load.dtype)
    rows = [row(model, machine, load, retention) for retention in retentions]
    return {
        "model": model.name,
        "family": model.family,
        "parameters": model.parameters,
        "weights_bytes": weights_bytes(model, load.dtype),
        "machine": asdict(machine),
        "load": asdict(load),
        "rows": [asdict(one) for one in rows],
        "assumptions": assumptions(model, machine, load),
    }


def assumptions(model: Model, machine: Machine, load: Load) -> list[str]:
    """Return what the figures rest on, a sentence each."""
    clip = clip_of(model, load.frames, load.size)
    found = [
        "predicted from the configuration and the machine's figures; no part was run",
        f"{machine.name}: {machine.tflops[load.dtype]:.4g} TFLOP/s in {load.dtype} without sparsity, "
        f"{machine.bandwidth:.4g} GB/s, {machine.memory:.4g} GB; reached: {100 * machine.efficiency:g} % of the "
        f"operations, {100 * machine.bandwidth_share:g} % of the bandwidth",
        f"{clip.note}; beside these, tokens of the model's own: {clip.newlines}, around frames: "
        f"{clip.markers}, of text: {load.prompt_tokens}",
        "every part takes its matrix products or the reading of its weights and caches, whichever is longer; nothing "
        "for starting kernels, norms, softmax, sampling, or moving data to the machine",
        "encoder and prefill: one request at a time, the causal half of attention, the head for the last token alone",
        f"decode: {load.batch} requests together, or as many as fit; weights and all their caches are read at each of "
        f"{load.answer_tokens - 1} steps, with half the answer in the cache",
        "requests a second: all parts one after the other on one machine, decoding shared by the batch; a day is full "
        "24 hours of even load",
        f"memory: {100 * USABLE:g} % of it for weights and caches, all requests of the same length",
        "reading, decoding and scaling video files is CPU work that pruning leaves as it is, and is not counted",
        _selection_note(load.method),
    ]
    longest = clip.grid.num_tokens + clip.newlines + clip.markers + load.prompt_tokens + load.answer_tokens
    if longest > model.text.max_position_embeddings:
        known = model.text.max_position_embeddings
        found.append(
            f"the model is made for {known:,} tokens; before pruning there are {longest:,}, and positions stay"
        )
    if clip.newlines > 1:
        found.append("every row of tokens keeps its newline, the most there can be")
    return found


def _selection_note(method: str | None) -> str:
    if method is None:
        return "selecting is free; --method counts a method's own cost"
    counted = {
        "divprune": "products of all tokens with the kept; that its steps wait for each other is not counted",
        "score": f"a hidden layer of {SCORE_WIDTH} units on each token and its change",
        "cacovid": "variant ours: keys and features of each token",
    }
    note = f"{method}: {counted.get(method, f'the tokens are read {PASSES} times, no products')}"
    if registry.compressors.get(method).stage is not Stage.PRE_LLM:
        note += "; its budget is the mean over layers, counted as if each layer saw just so many tokens"
    return note
