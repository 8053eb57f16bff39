"""From a benchmark's folder, a model and methods to a finished run: what `eval` and `reproduce` have in common."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.base import Compressor
from vidsieve.evaluation.examiner import Condition, Examiner
from vidsieve.evaluation.items import Benchmark, Item, check_videos
from vidsieve.evaluation.methods import is_folder
from vidsieve.evaluation.runs import configuration, run
from vidsieve.loading import load_model
from vidsieve.types import Tokens


@dataclass(frozen=True)
class AskSettings:
    """How a model is asked: everything but the questions and the methods.

    Parameters
    ----------
    model : str
        Folder or hub id.
    frames : tuple of int
        Taken evenly of every video, or the most where there is a rate.
    fps, tokens_per_frame, layout, protocol : optional
    answer : str
        As `Examiner.way`.
    max_new_tokens, seed : int
    indices, earliest : bool
        Whether kept indices are stored; whether methods inside the LLM were moved to earlier layers.
    device : str
    """

    model: str
    frames: tuple[int, ...]
    fps: float | None = None
    tokens_per_frame: int | None = None
    layout: str | None = None
    protocol: str | None = None
    answer: str = "generate"
    max_new_tokens: int = 16
    seed: int = 0
    indices: bool = False
    earliest: bool = False
    device: str = "auto"


def items_of(
    benchmark: Benchmark,
    data: Path,
    *,
    subset: int | None = None,
    seed: int = 0,
    allow_missing: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[Item]:
    """Return a benchmark's questions, or `subset` of them, drawn by the seed; `note` hears of another number.

    Raises
    ------
    EvaluationError
        If files are missing, doubled or malformed; missing videos count unless they are allowed.
    """
    items = benchmark.read(data)
    found = len(items)
    if benchmark.questions and found != benchmark.questions:
        note(f"{data} has {found} questions, {benchmark.questions} are published: compare figures with that in mind")
    if subset is not None and subset < found:
        chosen = set(random.Random(seed).sample(range(found), subset))
        items = [item for place, item in enumerate(items) if place in chosen]
    if not allow_missing:
        check_videos(items)
    return items


def conditions_of(
    counts: Sequence[int], methods: Mapping[str, Compressor], amounts: Sequence[float | Tokens]
) -> list[Condition]:
    """Return all tokens, and every method at every retention, for each number of frames."""
    found = []
    for count in counts:
        found.append(Condition(count))
        for amount in amounts:
            for name, method in methods.items():
                found.append(Condition(count, method.with_retention(amount), name if is_folder(name) else ""))
    return found


def measured(
    benchmark: Benchmark,
    items: Sequence[Item],
    conditions: Sequence[Condition],
    asking: AskSettings,
    folder: Path,
    *,
    about: Mapping[str, Any],
    share: tuple[int, int] = (0, 1),
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any] | None:
    """Return the result of a run in a folder, as `running.run` does; `about` is noted in its configuration.

    `loaded` is the model with its processor, where they are there already.

    Raises
    ------
    ModelError, EvaluationError, OutputError
    """
    network, processor = loaded or load_model(asking.model, asking.layout, device=asking.device)
    adapter = adapter_for(network)
    if asking.tokens_per_frame is not None:
        adapter.limit_frames(processor, asking.tokens_per_frame)
    examiner = Examiner(
        adapter,
        processor,
        conditions,
        benchmark.closing,
        asking.answer,
        asking.fps,
        asking.max_new_tokens,
        asking.seed,
        asking.indices,
    )
    more = {
        **about,
        "protocol": asking.protocol,
        "tokens_per_frame": asking.tokens_per_frame,
        "earliest": asking.earliest,
        "layout": asking.layout,
    }
    config = configuration(benchmark, items, examiner, asking.model, more)
    return run(folder, benchmark, items, examiner, config, share=share, command=command, progress=progress)
