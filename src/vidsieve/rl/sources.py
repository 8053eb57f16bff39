"""Where training prompts come from, and which others are held out from training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsieve.adapters.base import Adapter
from vidsieve.errors import TrainingError
from vidsieve.rl.heldout import HeldOut
from vidsieve.rl.settings import CaCoVIDConfig, TrainConfig

TRAINING_SEED = 100_000
"""Scenes of the testbed come under this plus the run's seed; below it are the seeds of evaluation."""
HELD_OUT_SEED = 77_001
"""Scenes of held-out evaluation: the same for every run, and none that benchmarks measure on."""


@dataclass(frozen=True)
class Source:
    """Prompts by number, and a hash or name of where they come from."""

    prompts: Any
    held_out: Any
    count: int
    origin: dict[str, str]


def source(
    adapter: Adapter, processor: Any, config: TrainConfig, data: Path | None, eval_data: Path | None
) -> Source:  # fmt: skip
    """Return the prompts of a run: `prompts`, and `count` of `held_out` (0: none).

    Parameters
    ----------
    data, eval_data : Path, optional
        Files of prompts; without `data` fresh scenes of the testbed, some others of which are held out.

    Raises
    ------
    TrainingError
        If a file is malformed, a share is held out of what is no file, or a video is in both files.
    """
    from vidsieve.data.prompts import FilePrompts, held_out_videos
    from vidsieve.testbed.data import ScenePrompts

    kinds: Any = None if isinstance(config, CaCoVIDConfig) and config.reward == "generate" else "multiple choice"
    captions = not isinstance(config, CaCoVIDConfig)
    if config.hold_out and data is None:
        raise TrainingError("hold_out takes videos out of --data, and none was given: leave it out")
    if config.hold_out and eval_data is not None:
        raise TrainingError("hold_out and --eval-data both say what is held out: give one of them")
    prompts: Any
    held: Any = None
    if data is None:
        prompts = ScenePrompts(adapter, processor, seed=TRAINING_SEED + config.seed)
        if eval_data is None:
            held = ScenePrompts(adapter, processor, seed=HELD_OUT_SEED)
    else:
        apart = held_out_videos(data, config.hold_out, kinds) if config.hold_out else frozenset()
        prompts = FilePrompts(
            adapter, processor, data, seed=config.seed, kinds=kinds, only=lambda video: video not in apart
        )
        if apart:
            held = FilePrompts(adapter, processor, data, kinds=kinds, only=lambda video: video in apart)
    if eval_data is not None:
        held = FilePrompts(adapter, processor, eval_data, kinds=kinds)
        if isinstance(prompts, FilePrompts):
            both = sorted(prompts.videos & held.videos)
            if both:
                raise TrainingError(
                    f"{len(both)} videos of {eval_data} are in {data} too, first {both[0].name}: take them out of one"
                )
    count = 0 if held is None else config.eval_prompts
    if count and isinstance(held, FilePrompts):
        there = len(held.captions if captions else held.choices)
        if not there:
            what = "caption" if captions else "question"
            raise TrainingError(f"none of the held-out rows of {held.path} has a {what}: hold out others")
        count = min(count, there)
    return Source(prompts, held, count, {"data": digest(data), "eval_data": digest(eval_data)})


def digest(data: Path | None) -> str:
    """Return what names a file of prompts: a hash of it, or the testbed."""
    return "testbed" if data is None else hashlib.sha256(data.read_bytes()).hexdigest()[:16]


def held_out(found: Source, adapter: Adapter, processor: Any, config: TrainConfig) -> HeldOut | None:
    """Return what a run is evaluated on, if anything is held out."""
    if not found.count:
        return None
    if not isinstance(config, CaCoVIDConfig):
        return HeldOut(adapter, found.held_out.caption, found.count, config.eval_retention)

    def decode(ids: Any) -> list[str]:
        texts: list[str] = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    return HeldOut(
        adapter, found.held_out.choice, found.count, config.eval_retention, decode, config.answer_tokens
    )  # fmt: skip
