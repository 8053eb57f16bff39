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
from vidsieve.data.video_r1 import Kind
from vidsieve.errors import TrainingError, UnknownNameError
from vidsieve.rl.cacovid import CaCoVIDTrainer
from vidsieve.rl.samples import Caption
from vidsieve.rl.score import ScoreTrainer
from vidsieve.rl.settings import SETTINGS, CaCoVIDConfig, ScoreConfig


def train_policy(
    method: str, model: Any, processor: Any, folder: Path, settings: dict[str, Any], *, variant: str = "ours",
    data: Path | None = None, pseudo: Path | None = None, model_name: str = "", resume: bool = False,
    report: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a policy for a frozen model and return its training record; the policy is in ``folder/policy``.

    Parameters
    ----------
    method : {"cacovid", "score"}
    settings : dict
        Fields of the trainer's configuration that differ from the variant's.
    data : Path, optional
        JSON lines of videos with questions or captions, or Video-R1's .json; default: endless scenes of the testbed.
    pseudo : Path, optional
        JSON lines of pseudo-videos (`vidsieve data pseudo`) for SCORE's first `pseudo_steps`, where `data` is a file.

    Raises
    ------
    UnknownNameError, TrainingError, OutputError
    """
    if (method, variant) not in SETTINGS:
        raise UnknownNameError(f"variant of {method}", variant, [v for m, v in SETTINGS if m == method])
    model.requires_grad_(False)
    adapter = adapter_for(model)
    chosen = SETTINGS[method, variant] | settings
    config = (CaCoVIDConfig if method == "cacovid" else ScoreConfig)(**chosen)
    generated = isinstance(config, CaCoVIDConfig) and config.reward == "generate"
    filtered = isinstance(config, CaCoVIDConfig) and config.blind_filter
    if filtered and data is not None:
        raise TrainingError(
            "blind_filter is for the testbed's scenes: make a filtered file with `vidsieve data filter`"
        )
    prompts = _prompts(adapter, processor, data, config.seed, None if generated else "multiple choice", filtered)
    origin = {"variant": variant, "model": model_name, "data": _digest(data)}
    trainer: CaCoVIDTrainer | ScoreTrainer
    if isinstance(config, CaCoVIDConfig):
        depth, deepest = config.depth, len(adapter.decoder_layers)
        if depth > deepest:
            raise TrainingError(f"depth is {depth}, and this model's LLM has {deepest} layers to start from")
        if config.causal and (config.body == "question" or (config.body == "variant" and variant == "ours")):
            raise TrainingError(
                "causal is for bodies that attend over the prompt: choose body layer, attention or local"
            )
        states = [adapter.layer_state(number) for number in range(depth)]
        question = config.body == "question" or (config.body == "variant" and variant == "ours")
        if config.causal and question:
            raise TrainingError(
                "causal is for bodies that attend over the prompt: choose body layer, attention or local"
            )
        network = {"scorer": {"trust": config.trust}} if question else {"causal": config.causal}
        policy = CaCoVIDPolicy.start(
            states[0].shape, adapter.family, variant=variant, layers=[state.weights for state in states],
            seed=config.seed, base_model=model_name, body=None if config.body == "variant" else config.body,
            **network,
        )  # fmt: skip
        trainer = CaCoVIDTrainer(
            adapter, policy, config, prompts.choice, folder, report, origin, tokenizer=processor.tokenizer
        )
    else:
        scorer = ScorePolicy.start(
            adapter.hidden_size, adapter.family, variant=variant, seed=config.seed, base_model=model_name,
            hidden=config.hidden, residual=config.residual,
        )  # fmt: skip
        captions = prompts.caption
        if config.pseudo_steps:
            first = _pseudo(adapter, processor, prompts, data, pseudo, config.seed)
            captions = _in_turn(first, prompts.caption, config.pseudo_steps * config.prompts_per_step)
            origin["pseudo"] = _digest(pseudo)
        elif pseudo is not None:
            raise TrainingError(f"{pseudo} is for the first pseudo_steps, and there are none: set pseudo_steps")
        trainer = ScoreTrainer(adapter, scorer, config, captions, folder, report, origin)
    return dataclasses.replace(trainer.fit(resume).config).training


def _digest(data: Path | None) -> str:
    """Return what names the training data: a hash of the file, or the testbed."""
    return "testbed" if data is None else hashlib.sha256(data.read_bytes()).hexdigest()[:16]


def _pseudo(
    adapter: Adapter, processor: Any, prompts: Any, data: Path | None, pseudo: Path | None, seed: int
) -> Callable[[int], Caption]:
    """Return the pseudo-videos of the curriculum's first stage by number."""
    if pseudo is None and data is None:
        made: Callable[[int], Caption] = prompts.pseudo
        return made
    if pseudo is None:
        raise TrainingError(
            "pseudo_steps needs pseudo-videos: make some with `vidsieve data pseudo`, pass --pseudo FILE"
        )
    found: Callable[[int], Caption] = _prompts(adapter, processor, pseudo, seed, None).caption
    return found


def _in_turn(first: Callable[[int], Caption], then: Callable[[int], Caption], count: int) -> Callable[[int], Caption]:
    """Return a source of samples that gives `count` of one source, then the other's from its beginning."""
    return lambda number: first(number) if number < count else then(number - count)


def _prompts(
    adapter: Adapter, processor: Any, data: Path | None, seed: int, kinds: Kind | None, blind_filter: bool = False
) -> Any:
    if data is None:
        from vidsieve.testbed.data import ScenePrompts

        return ScenePrompts(adapter, processor, seed=100_000 + seed, blind_filter=blind_filter)
    from vidsieve.data.prompts import FilePrompts

    return FilePrompts(adapter, processor, data, seed=seed, kinds=kinds)
