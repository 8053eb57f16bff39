"""Complete training runs: policy, data and settings put together by variant."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from vidsieve.adapters.base import Adapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.compressors.score import ScorePolicy
from vidsieve.data.video_r1 import Kind
from vidsieve.errors import TrainingError, UnknownNameError
from vidsieve.rl.cacovid import CaCoVIDTrainer
from vidsieve.rl.processes import Processes, joined
from vidsieve.rl.score import ScoreTrainer
from vidsieve.rl.settings import SETTINGS, CaCoVIDConfig, ScoreConfig
from vidsieve.rl.trainer import Report


def train_policy(
    method: str, model: Any, processor: Any, folder: Path, settings: dict[str, Any], *, variant: str = "ours",
    data: Path | None = None, model_name: str = "", resume: bool = False, force: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a policy for a frozen model and return its training record; the policy is in ``folder/policy``.

    Under torchrun the processes that it launched share the work.

    Parameters
    ----------
    method : {"cacovid", "score"}
    settings : dict
        Fields of the trainer's configuration that differ from the variant's.
    data : Path, optional
        JSON lines of videos with questions or captions, or Video-R1's .json; default: endless scenes of the testbed.
    resume, force : bool
        As `Trainer.fit` has them.

    Raises
    ------
    UnknownNameError, TrainingError, OutputError
    """
    if (method, variant) not in SETTINGS:
        raise UnknownNameError(f"variant of {method}", variant, [v for m, v in SETTINGS if m == method])
    model.requires_grad_(False)
    with joined(model.device.type) as processes:
        trainer = _trainer(method, model, processor, folder, settings, variant, data, model_name, report, processes)
        return trainer.fit(resume, force).config.training


def _trainer(
    method: str, model: Any, processor: Any, folder: Path, settings: dict[str, Any], variant: str, data: Path | None,
    model_name: str, report: Report | None, processes: Processes,
) -> CaCoVIDTrainer | ScoreTrainer:  # fmt: skip
    """Return the trainer of a method, its policy at its start."""
    adapter = adapter_for(model)
    chosen = SETTINGS[method, variant] | settings
    config = (CaCoVIDConfig if method == "cacovid" else ScoreConfig)(**chosen)
    generated = isinstance(config, CaCoVIDConfig) and config.reward == "generate"
    prompts = _prompts(adapter, processor, data, config.seed, None if generated else "multiple choice")
    origin = {"variant": variant, "model": model_name, "data": _digest(data)}
    if isinstance(config, CaCoVIDConfig):
        depth, deepest = config.depth, len(adapter.decoder_layers)
        if depth > deepest:
            raise TrainingError(f"depth is {depth}, and this model's LLM has {deepest} layers to start from")
        states = [adapter.layer_state(number) for number in range(depth)]
        policy = CaCoVIDPolicy.start(
            states[0].shape, adapter.family, variant=variant, layers=[state.weights for state in states],
            seed=config.seed, base_model=model_name, body=None if config.body == "variant" else config.body,
        )  # fmt: skip
        return CaCoVIDTrainer(
            adapter, policy, config, prompts.choice, folder, report, origin, processes, tokenizer=processor.tokenizer
        )
    scorer = ScorePolicy.start(
        adapter.hidden_size, adapter.family, variant=variant, seed=config.seed, base_model=model_name,
        hidden=config.hidden, residual=config.residual,
    )  # fmt: skip
    return ScoreTrainer(adapter, scorer, config, prompts.caption, folder, report, origin, processes)


def _digest(data: Path | None) -> str:
    """Return what names the training data: a hash of the file, or the testbed."""
    return "testbed" if data is None else hashlib.sha256(data.read_bytes()).hexdigest()[:16]


def _prompts(adapter: Adapter, processor: Any, data: Path | None, seed: int, kinds: Kind | None) -> Any:
    if data is None:
        from vidsieve.testbed.data import ScenePrompts

        return ScenePrompts(adapter, processor, seed=100_000 + seed)
    from vidsieve.data.prompts import FilePrompts

    return FilePrompts(adapter, processor, data, seed=seed, kinds=kinds)
