"""The prompts of a run: from files or the testbed, held out from training, read ahead by threads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidsieve.adapters.adapter import Adapter
from vidsieve.errors import TrainingError
from vidsieve.training.data.prefetch import Prefetch
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.heldout import HeldOut
from vidsieve.training.settings import CaCoVIDConfig, ScoreConfig, SieveConfig, TrainConfig, check

TRAINING_SEED = 100_000
"""Scenes of the testbed come under this plus the run's seed; below it are the seeds of evaluation."""
HELD_OUT_SEED = 77_001
"""Scenes of held-out evaluation: the same for every run, and none that benchmarks measure on."""


@dataclass(frozen=True)
class Files:
    """Files that a run reads; all None: fresh scenes of the testbed.

    Parameters
    ----------
    data : Path, optional
        Videos with questions, captions or, for `sieve`, both, in a layout of `vidsieve.training.data.layouts`. Rows
        that cannot be used are listed in the run's ``skipped.jsonl``.
    eval_data : Path, optional
        Such a file of other videos, for evaluation; default: other scenes on the testbed, else what the setting
        `hold_out` takes out of `data`.
    pseudo : Path, optional
        JSON lines of pseudo-videos (`vidsieve data pseudo`) for SCORE's first `pseudo_steps`.
    cache : Path, optional
        Folder of encoded videos of `data` (`EncodingCache`), which are neither decoded nor encoded again.
    root : Path, optional
        Folder that paths in `data` and `eval_data` start from; default: the folder of each file.
    """

    data: Path | None = None
    eval_data: Path | None = None
    pseudo: Path | None = None
    cache: Path | None = None
    root: Path | None = None

    def __post_init__(self) -> None:
        for name, path in vars(self).items():
            object.__setattr__(self, name, None if path is None else Path(path))


@dataclass(frozen=True)
class Source:
    """Prompts of a run, pseudo-videos before them, `count` held-out prompts, and digests of all (`origin`)."""

    prompts: Any
    pseudo: Any
    held_out: Any
    count: int
    origin: dict[str, str]
    captions: bool
    first: int
    """Prompts taken from `pseudo` before those of `prompts`."""
    workers: int

    def plan(self) -> str:
        """Return the size that the cache of encodings will have, as text; one video is encoded. Empty without a cache.

        Raises
        ------
        OutputError
            If it does not fit on the disk.
        """
        cache = getattr(self.prompts, "cache", None)
        if cache is None:
            return ""
        read = [prompts for prompts in (self.prompts, self.pseudo, self.held_out) if prompts is not None]
        return str(cache.plan(chain.from_iterable(prompts.videos_to_encode(self.captions) for prompts in read)))

    @contextmanager
    def samples(self) -> Iterator[Callable[[int], Any]]:
        """Yield a function from numbers to samples, which threads read ahead, or render where they are scenes."""
        if self.workers == 0:
            yield self._in_turn("caption" if self.captions else "choice")
            return
        with Prefetch(self._in_turn("read_caption" if self.captions else "read_choice"), self.workers) as ahead:
            yield lambda number: self.prompts.finished(ahead(number))

    def _in_turn(self, name: str) -> Callable[[int], Any]:
        """Return a function that gives `first` pseudo-videos, then the prompts from their beginning."""
        then: Callable[[int], Any] = getattr(self.prompts, name)
        if not self.first:
            return then
        # The testbed makes pseudo-videos of its own scenes.
        own = "read_pseudo" if name.startswith("read") else "pseudo"
        before = getattr(self.pseudo, name) if self.pseudo is not None else getattr(self.prompts, own)
        return lambda number: before(number) if number < self.first else then(number - self.first)


def source(
    adapter: Adapter, processor: Any, config: TrainConfig, files: Files, skipped: Skipped | None = None
) -> Source:
    """Return the prompts of a run and those held out; rows that cannot be used are counted in `skipped`.

    Raises
    ------
    TrainingError
        If a file is unreadable, would not be read, or has nothing that can be used, or a video is in two files.
    """
    from vidsieve.training.data.encodings import EncodingCache
    from vidsieve.training.data.prompts import FilePrompts, described, load_prompts
    from vidsieve.training.data.scenes import ScenePrompts
    from vidsieve.training.data.table import View, held_out

    data, eval_data = files.data, files.eval_data
    captions = not isinstance(config, CaCoVIDConfig)
    captioned = isinstance(config, SieveConfig) and config.captioned
    kinds: Any = None if isinstance(config, CaCoVIDConfig) and config.reward == "generate" else "multiple choice"
    needed = not (isinstance(config, CaCoVIDConfig) and config.reward == "agreement")  # answers, for training
    first = config.pseudo_steps * config.prompts_per_step if isinstance(config, ScoreConfig) else 0
    _check(config, files, first)
    skipped = Skipped() if skipped is None else skipped
    cache = EncodingCache(files.cache, adapter, processor, config.frames) if files.cache is not None else None

    def rows_of(path: Path, root: Path | None = files.root, skips: Skipped = skipped, **options: Any) -> View:
        options = {"kinds": kinds, "captions": captions} | options
        return load_prompts(processor, path, root, skipped=skips, **options)

    def read(
        path: Path,
        rows: View,
        seed: int = 0,
        only: Callable[[frozenset[str]], bool] | None = None,
        paired: bool = False,
    ) -> FilePrompts:
        options: dict[str, Any] = {"frames": config.frames, "cache": cache, "skipped": skipped, "rows": rows}
        prompts = FilePrompts(adapter, processor, path, seed=seed, only=only, captioned=paired, **options)
        if not (prompts.captions if captions else prompts.choices):
            part = "" if only is None else " (in a part of it: hold_out)"
            what = "a caption" if captions else "a question"
            if paired:
                what += " about a video with a caption, as blind_reward 'caption' needs (or set it to 'answer')"
            raise TrainingError(f"{path} has no rows with {what}{part}: {skipped.summary() or 'it has others'}")
        return prompts

    prompts: Any
    held: Any = None
    if data is None:
        filtered = isinstance(config, CaCoVIDConfig) and config.blind_filter
        wanted = {"blind_filter": filtered, "captioned": captioned}
        prompts = ScenePrompts(adapter, processor, config.world, TRAINING_SEED + config.seed, **wanted)
        held = ScenePrompts(adapter, processor, config.world, HELD_OUT_SEED) if eval_data is None else None
    else:
        if captioned:  # questions of every kind
            rows = described(rows_of(data, answers=needed, captions=None, kinds=None), skipped)
        else:
            rows = rows_of(data, answers=needed)
        apart = held_out(rows, config.hold_out, data) if config.hold_out else frozenset()
        prompts = read(data, rows, config.seed, (lambda shown: not shown & apart) if apart else None, captioned)
        if apart:
            same = needed and not captioned
            held = read(data, rows if same else rows_of(data, skips=Skipped()), only=lambda shown: bool(shown & apart))
    pseudo = read(files.pseudo, rows_of(files.pseudo, None), config.seed) if files.pseudo is not None else None
    if eval_data is not None:
        held = read(eval_data, rows_of(eval_data))
        for trained in (part for part in (prompts, pseudo) if isinstance(part, FilePrompts)):
            both = np.intersect1d(trained.videos, held.videos).tolist()
            if both:
                raise TrainingError(
                    f"{eval_data} and {trained.path} have {'a video' if len(both) == 1 else f'{len(both)} videos'} in "
                    f"common, first {Path(held.first_of(both)).name}: take what they share out of one of them"
                )
    count = 0 if held is None else config.eval_prompts
    if isinstance(held, FilePrompts):
        count = min(count, len(held.captions if captions else held.choices))
    origin = {"data": digest(data), "eval_data": digest(eval_data)}
    origin |= {"pseudo": digest(files.pseudo)} if first else {}
    # Scenes of the testbed are computed: one thread keeps pace, and gains nothing where torch uses every core.
    workers = config.workers if data is not None else min(config.workers, 1, spare_cores(adapter.device))
    return Source(prompts, pseudo, held, count, origin, captions, first, workers)


def spare_cores(device: torch.device) -> int:
    """Return the number of cores that the processes of this run leave idle on this machine, at least 0."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = torch.get_num_threads() if device.type == "cpu" else 1
    return max(0, cores - busy * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's


def _check(config: TrainConfig, files: Files, first: int) -> None:
    """Raise TrainingError if settings and files do not go together."""
    root = files.root if files.eval_data is None else None
    unread = {"hold_out": config.hold_out, "a cache": files.cache, "--pseudo": files.pseudo, "--video-root": root}
    needless = next((name for name, value in unread.items() if value), "") if files.data is None else ""
    on_files = files.data is not None
    filtered = isinstance(config, CaCoVIDConfig) and config.blind_filter
    check(
        (needless, f"{needless} is for the videos of --data, and none was given: leave it out"),
        (on_files and filtered, "blind_filter is for the testbed's scenes: filter the file by `vidsieve data filter`"),
        (
            on_files and first and files.pseudo is None,
            "pseudo_steps needs pseudo-videos: make some with `vidsieve data pseudo`, pass --pseudo FILE",
        ),
        (files.pseudo and not first, f"{files.pseudo} is for the first pseudo_steps, which are 0: set pseudo_steps"),
        (
            config.eval_every and on_files and not config.hold_out and files.eval_data is None,
            "eval_every needs held-out videos: give --hold-out or --eval-data, or leave it out",
        ),
        (config.hold_out and files.eval_data, "hold_out and --eval-data both choose held-out videos: give one of them"),
    )


def digest(data: Path | None) -> str:
    """Return the SHA-256 of a file of prompts, 16 digits, or the testbed's name."""
    if data is None:
        return "testbed"
    with data.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def held_out(prompts: Source, adapter: Adapter, processor: Any, config: TrainConfig) -> HeldOut | None:
    """Return the held-out prompts of a run, None if there are none."""
    count, retention = prompts.count, config.eval_retention
    if not count:
        return None
    if not isinstance(config, CaCoVIDConfig):
        return HeldOut(adapter, prompts.held_out.caption, count, retention)
    decode = partial(processor.tokenizer.batch_decode, skip_special_tokens=True)
    return HeldOut(adapter, prompts.held_out.choice, count, retention, decode, config.answer_tokens)
