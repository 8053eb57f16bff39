"""Complete training runs: policy, data and settings put together by variant."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidsieve.adapters.base import Adapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.compressors.score import ScorePolicy
from vidsieve.errors import UnknownNameError
from vidsieve.rl.cacovid import CaCoVIDTrainer
from vidsieve.rl.score import ScoreTrainer
from vidsieve.rl.settings import CaCoVIDConfig, ScoreConfig

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("cacovid", "paper"): {"steps": 400},
    ("cacovid", "ours"): {"reward": "margin", "score_decay": 0.002, "head_lr": 0.002, "steps": 700},
    ("score", "paper"): {"prompts_per_step": 2, "steps": 150},
    ("score", "ours"): {
        "hidden": 256,
        "advantage": "group",
        "rate_low": 0.05,
        "rate_high": 0.25,
        "lr": 0.001,
        "schedule": "cosine",
        "score_decay": 0.003,
        "steps": 150,
    },
}
"""What a variant changes of the defaults; a command's own options come on top."""


def train_policy(
    method: str, model: Any, processor: Any, folder: Path, settings: dict[str, Any], *, variant: str = "ours",
    data: Path | None = None, model_name: str = "", resume: bool = False,
    report: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a policy for a frozen model and return its training record; the policy is in ``folder/policy``.

    Parameters
    ----------
    method : {"cacovid", "score"}
    settings : dict
        Fields of the trainer's configuration that differ from the variant's.
    data : Path, optional
        JSON lines of videos with questions or captions; default: endless scenes of the testbed.

    Raises
    ------
    UnknownNameError, TrainingError, OutputError
    """
    if (method, variant) not in SETTINGS:
        raise UnknownNameError(f"variant of {method}", variant, [v for m, v in SETTINGS if m == method])
    model.requires_grad_(False)
    adapter = adapter_for(model)
    chosen = SETTINGS[method, variant] | settings
    prompts = _prompts(adapter, processor, data, int(chosen.get("seed", 42)))
    first = adapter.layer_state(0)
    trainer: CaCoVIDTrainer | ScoreTrainer
    if method == "cacovid":
        config = CaCoVIDConfig(**chosen)
        policy = CaCoVIDPolicy.start(
            first.shape, adapter.family, variant=variant, layer0=first.weights, seed=config.seed, base_model=model_name
        )
        trainer = CaCoVIDTrainer(adapter, policy, config, prompts.choice, folder, report)
    else:
        settings_of_score = ScoreConfig(**chosen)
        scorer = ScorePolicy.start(
            adapter.hidden_size, adapter.family, variant=variant, seed=settings_of_score.seed, base_model=model_name,
            hidden=settings_of_score.hidden, residual=settings_of_score.residual,
        )  # fmt: skip
        trainer = ScoreTrainer(adapter, scorer, settings_of_score, prompts.caption, folder, report)
    return dataclasses.replace(trainer.fit(resume).config).training


def _prompts(adapter: Adapter, processor: Any, data: Path | None, seed: int) -> Any:
    if data is None:
        from vidsieve.testbed.data import ScenePrompts

        return ScenePrompts(adapter, processor, seed=100_000 + seed)
    from vidsieve.data.prompts import FilePrompts

    return FilePrompts(adapter, processor, data, seed=seed)
