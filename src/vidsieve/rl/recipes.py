"""Complete training runs: policy, data and settings put together by variant."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidsieve.adapters.base import Adapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.compressors.score import ScorePolicy
from vidsieve.data.prefetch import Prefetch
from vidsieve.data.video_r1 import Kind
from vidsieve.errors import TrainingError, UnknownNameError
from vidsieve.rl.cacovid import CaCoVIDTrainer
from vidsieve.rl.score import ScoreTrainer
from vidsieve.rl.settings import SETTINGS, CaCoVIDConfig, ScoreConfig

FRAMES = 16
"""Frames taken from each video of a file."""


def train_policy(
    method: str, model: Any, processor: Any, folder: Path, settings: dict[str, Any], *, variant: str = "ours",
    data: Path | None = None, model_name: str = "", resume: bool = False,
    report: Callable[[int, int, dict[str, float]], None] | None = None, cache: Path | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a policy for a frozen model and return its training record; the policy is in ``folder/policy``.

    Parameters
    ----------
    method : {"cacovid", "score"}
    settings : dict
        Fields of the trainer's configuration that differ from the variant's.
    data : Path, optional
        JSON lines of videos with questions or captions, or Video-R1's .json; default: endless scenes of the testbed.
    cache : Path, optional
        Folder of encoded videos of `data` (`EncodingCache`): what is there is neither decoded nor encoded again.
    announce : callable, optional
        Called with what the cache will take, in words, before training begins.

    Raises
    ------
    UnknownNameError, TrainingError, OutputError
    """
    if (method, variant) not in SETTINGS:
        raise UnknownNameError(f"variant of {method}", variant, [v for m, v in SETTINGS if m == method])
    if cache is not None and data is None:
        raise TrainingError("a cache is for the videos of a file: give --data too; the testbed's scenes never end")
    model.requires_grad_(False)
    adapter = adapter_for(model)
    chosen = SETTINGS[method, variant] | settings
    config = (CaCoVIDConfig if method == "cacovid" else ScoreConfig)(**chosen)
    generated = isinstance(config, CaCoVIDConfig) and config.reward == "generate"
    kinds: Kind | None = None if generated else "multiple choice"
    prompts = _prompts(adapter, processor, data, config.seed, kinds, cache)
    origin = {"variant": variant, "model": model_name, "data": _digest(data)}
    what = "choice" if method == "cacovid" else "caption"
    if cache is not None:
        plan = prompts.plan(prompts.choices if what == "choice" else prompts.captions)
        (announce or (lambda words: None))(str(plan))
    # Scenes of the testbed are encoded by the model itself: no work for other threads.
    load = getattr(prompts, what if data is None else f"read_{what}")
    with Prefetch(load, config.workers if data is not None else 0) as ahead:
        samples = ahead if data is None else lambda number: prompts.finished(ahead(number))
        trainer = _trainer(config, adapter, processor, samples, folder, variant, model_name, report, origin)
        return dataclasses.replace(trainer.fit(resume).config).training


def _trainer(
    config: CaCoVIDConfig | ScoreConfig, adapter: Adapter, processor: Any, samples: Callable[[int], Any], folder: Path,
    variant: str, model_name: str, report: Callable[[int, int, dict[str, float]], None] | None, origin: dict[str, str],
) -> CaCoVIDTrainer | ScoreTrainer:  # fmt: skip
    """Return the trainer of a fresh policy."""
    if isinstance(config, CaCoVIDConfig):
        depth, deepest = config.depth, len(adapter.decoder_layers)
        if depth > deepest:
            raise TrainingError(f"depth is {depth}, and this model's LLM has {deepest} layers to start from")
        states = [adapter.layer_state(number) for number in range(depth)]
        policy = CaCoVIDPolicy.start(
            states[0].shape, adapter.family, variant=variant, layers=[state.weights for state in states],
            seed=config.seed, base_model=model_name, body=None if config.body == "variant" else config.body,
        )  # fmt: skip
        return CaCoVIDTrainer(adapter, policy, config, samples, folder, report, origin, tokenizer=processor.tokenizer)
    scorer = ScorePolicy.start(
        adapter.hidden_size, adapter.family, variant=variant, seed=config.seed, base_model=model_name,
        hidden=config.hidden, residual=config.residual,
    )  # fmt: skip
    return ScoreTrainer(adapter, scorer, config, samples, folder, report, origin)


def _digest(data: Path | None) -> str:
    """Return what names the training data: a hash of the file, or the testbed."""
    return "testbed" if data is None else hashlib.sha256(data.read_bytes()).hexdigest()[:16]


def _prompts(
    adapter: Adapter, processor: Any, data: Path | None, seed: int, kinds: Kind | None, cache: Path | None
) -> Any:
    if data is None:
        from vidsieve.testbed.data import ScenePrompts

        return ScenePrompts(adapter, processor, seed=100_000 + seed)
    from vidsieve.data.encodings import EncodingCache
    from vidsieve.data.prompts import FilePrompts

    encodings = EncodingCache(cache, adapter, processor, FRAMES) if cache is not None else None
    return FilePrompts(adapter, processor, data, seed=seed, frames=FRAMES, kinds=kinds, cache=encodings)
