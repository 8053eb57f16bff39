"""How long methods before the LLM take to select, on random video tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError, NeedError, StageError
from vidsieve.io.faults import contained
from vidsieve.io.machine import spread
from vidsieve.testing import make_video
from vidsieve.types import EncoderOutputs, Stage, TokenGrid, Tokens


@torch.no_grad()
def select_times(
    methods: Mapping[str, Compressor],
    grid: TokenGrid,
    width: int,
    retention: float | Tokens,
    *,
    repeats: int,
    dtype: torch.dtype,
    device: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return milliseconds by method, and those that cannot select by themselves or keep so little, with the reason.

    One run is not counted. Signals of the vision encoder are there already: a model has them without effort.
    """
    video = make_video(grid, width)
    signals = video.encoder or EncoderOutputs(None, None)
    video = replace(
        video,
        embeds=video.embeds.to(device, dtype),
        positions=video.positions.to(device),
        encoder=EncoderOutputs(*(None if s is None else s.to(device) for s in (signals.attention, signals.keys))),
    )
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for number, (name, method) in enumerate(methods.items(), 1):
        with contained(refused, name, BudgetError, NeedError, StageError):
            asked = method.with_retention(retention)
            if asked.acts is not Stage.PRE_LLM:
                raise StageError(f"{name} acts {asked.acts.value}: time it with `vidsieve bench pipeline`")
            spent, kept = [], 0
            for _ in range(repeats + 1):
                _wait(device)
                start = time.perf_counter()
                kept = asked.compress(video).num_kept
                _wait(device)
                spent.append(1e3 * (time.perf_counter() - start))
            rows.append({"name": name, "kept": kept, "ms": spread(spent[1:])})
        if progress:
            progress(number, len(methods))
    return rows, [{"name": name, "reason": reason} for name, reason in refused.items()]


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
