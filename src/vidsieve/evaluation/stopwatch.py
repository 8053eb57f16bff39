"""The whole way from a video file to an answer on the clock, for every method beside all tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import on_device
from vidsieve.answering import Clock, generated, read
from vidsieve.errors import BudgetError, EvaluationError, NeedError, StageError, UnsupportedCallError
from vidsieve.evaluation.examiner import Condition
from vidsieve.evaluation.flops import paper_flops, prefill_flops
from vidsieve.io.faults import contained
from vidsieve.io.machine import peak_memory
from vidsieve.video.reading import Video

PARTS = ("decode", "preprocess", "vision encoder", "projector", "select", "prefill", "decode-text")
Prompts = Callable[[Video], Mapping[str, Tensor]]
"""What makes the model's inputs of a video's frames."""


@dataclass(frozen=True)
class Pass:
    """One way from file to answer: milliseconds of every part, tokens, operations, and bytes at the peak."""

    ms: dict[str, float]
    visual: tuple[int, int]
    prompt: tuple[int, int]
    layers: float
    flops: tuple[float, float]
    peak: int

    @property
    def total(self) -> float:
        """Milliseconds of all parts."""
        return sum(self.ms.values())


@contextmanager
def _projecting(adapter: Adapter, clock: Clock) -> Iterator[None]:
    """Put what the projector takes on the clock while a video is encoded."""
    starts: list[Any] = []

    def begin(*_: Any) -> None:
        part = clock.part("projector", adapter.device)
        part.__enter__()
        starts.append(part)

    def end(*_: Any) -> None:
        starts.pop().__exit__(None, None, None)

    module = adapter.model.get_submodule(adapter.projector)
    handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def once(
    adapter: Adapter, path: Path, frames: int, prompts: Prompts, condition: Condition, *, new_tokens: int, seed: int = 0
) -> Pass:
    """Take one way from a video file to an answer of exactly `new_tokens` tokens.

    Raises
    ------
    BudgetError, NeedError, StageError, UnsupportedCallError
        If the method cannot run on this model, or keep so little.
    """
    method, device, clock = condition.compressor, adapter.device, Clock()
    _reset_peak(device)
    video = read(path, clock, frames=frames, fps=None, max_frames=None)
    with clock.part("preprocess", device):
        inputs = on_device(prompts(video), device)
    with clock.part("vision encoder", device), _projecting(adapter, clock):
        encoded = adapter.encode(inputs, needs=method.needs if method is not None else frozenset())
    clock.ms["vision encoder"] -= clock.ms.setdefault("projector", 0.0)
    made = generated(adapter, encoded, method, clock, tokens=new_tokens, seed=seed, exactly=True)
    traces = made.plan.traces
    text = adapter.model.config.get_text_config()
    total = sum(span.features.grid.num_tokens for span in encoded.videos)
    before, after = int(encoded.input_ids.shape[1]), int(made.plan.inputs["input_ids"].shape[1])
    kept = sum(trace.kept for trace in traces) if traces else total
    layers = sum(trace.layer_retention * trace.total for trace in traces) / total if traces else 1.0
    # What layers see on average, text included: methods inside the LLM begin with more and end with fewer.
    seen = round(before - total + layers * total) if traces and traces[0].held is not None else after
    return Pass(
        {part: clock.ms.get(part, 0.0) for part in PARTS},
        (total, kept),
        (before, after),
        layers,
        (paper_flops(text, seen), prefill_flops(text, seen)),
        _peak(device),
    )


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak_memory(reset=True)


def _peak(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_memory()


def measure(
    adapter: Adapter,
    paths: Mapping[int, Path] | Path,
    lengths: Sequence[int],
    prompts: Prompts,
    conditions: Sequence[Condition],
    *,
    repeats: int = 3,
    warm_up: int = 1,
    new_tokens: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return what every condition takes, over videos of several lengths.

    Conditions take turns, round after round, so that what the machine does meanwhile falls on all alike; the first
    `warm_up` rounds are not counted.

    Parameters
    ----------
    paths : the video file, or one for each length
    lengths : frames taken of the video; a length that is there twice counts twice
    conditions : of any number of frames: lengths say how many; the first one is what others are compared with

    Returns
    -------
    dict
        ``lengths, repeats, new_tokens, rows, refused``; per row what the condition is, and: ``ms``, per part and in
        all ``{mean, sd, p50, p95, min, max}`` (mean and sd over lengths, of each one's median; the others over all
        runs), ``by_length``, ``visual``, ``prompt`` (before and after, means over lengths), ``flops`` (the papers'
        formula and our count), ``peak_MiB``, ``times_faster`` (prefill with selecting, and all) and ``pays_from``:
        the fewest frames from which on all together takes less than with all tokens; None: at none.
    """
    found: dict[str, dict[int, list[Pass]]] = {c.key: {} for c in conditions}
    refused: dict[str, str] = {}
    rounds = warm_up + repeats
    steps, done = rounds * len(lengths) * len(conditions), 0
    for turn in range(rounds):
        for place, frames in enumerate(lengths):
            path = paths if isinstance(paths, Path) else paths[frames]
            for condition in conditions:
                done += 1
                if condition.key not in refused:
                    with contained(refused, condition.key, BudgetError, NeedError, StageError, UnsupportedCallError):
                        made = once(adapter, path, frames, prompts, condition, new_tokens=new_tokens, seed=seed)
                        if turn >= warm_up:
                            found[condition.key].setdefault(place, []).append(made)
                if progress:
                    progress(done, steps)
    if conditions[0].key in refused:
        raise EvaluationError(f"nothing to compare with: {refused[conditions[0].key]}")
    rows = [_row(c, lengths, found[c.key]) for c in conditions if c.key not in refused]
    first = rows[0]
    for row in rows:
        row["times_faster"] = {
            "prefill": _llm(first) / _llm(row),
            "all": first["ms"]["all"]["mean"] / row["ms"]["all"]["mean"],
        }
        row["pays_from"] = _pays_from(first, row)
    reasons = [{**c.described(), "reason": refused[c.key]} for c in conditions if c.key in refused]
    return {"lengths": list(lengths), "repeats": repeats, "new_tokens": new_tokens, "rows": rows, "refused": reasons}


def _llm(row: Mapping[str, Any]) -> float:
    """Return the mean milliseconds of selecting and of the prefill."""
    return float(row["ms"]["select"]["mean"] + row["ms"]["prefill"]["mean"])


def _row(condition: Condition, lengths: Sequence[int], found: Mapping[int, Sequence[Pass]]) -> dict[str, Any]:
    spent = {part: {place: [run.ms[part] for run in runs] for place, runs in found.items()} for part in PARTS}
    spent["all"] = {place: [run.total for run in runs] for place, runs in found.items()}
    every = [run for runs in found.values() for run in runs]
    one = [runs[0] for runs in found.values()]  # tokens do not differ from run to run
    by_length = [
        {
            "frames": lengths[place],
            "visual": list(runs[0].visual),
            "prompt": list(runs[0].prompt),
            "ms": {part: statistics.median(values[place]) for part, values in spent.items()},
        }
        for place, runs in found.items()
    ]
    return {
        **{key: value for key, value in condition.described().items() if key != "frames"},
        "ms": {part: _spread(values) for part, values in spent.items()},
        "by_length": by_length,
        "visual": np.mean([run.visual for run in one], axis=0).tolist(),
        "prompt": np.mean([run.prompt for run in one], axis=0).tolist(),
        "layer_retention": statistics.mean(run.layers for run in one),
        "flops": dict(zip(("paper", "counted"), np.mean([run.flops for run in one], axis=0).tolist(), strict=True)),
        "peak_MiB": max(run.peak for run in every) / 2**20,
    }


def _spread(values: Mapping[int, Sequence[float]]) -> dict[str, float]:
    medians = [statistics.median(runs) for runs in values.values()]
    every = sorted(ms for runs in values.values() for ms in runs)
    return {
        "mean": statistics.mean(medians),
        "sd": statistics.stdev(medians) if len(medians) > 1 else 0.0,
        "p50": statistics.median(every),
        "p95": every[math.ceil(0.95 * len(every)) - 1],
        "min": every[0],
        "max": every[-1],
    }


def _pays_from(first: Mapping[str, Any], row: Mapping[str, Any]) -> int | None:
    """Return the fewest frames at which, and at all more, everything takes less than with all tokens."""
    saved: dict[int, bool] = {}
    for whole, own in zip(first["by_length"], row["by_length"], strict=True):
        saved[own["frames"]] = saved.get(own["frames"], True) and own["ms"]["all"] < whole["ms"]["all"]
    found = None
    for frames in sorted(saved, reverse=True):
        if not saved[frames]:
            break
        found = frames
    return found
