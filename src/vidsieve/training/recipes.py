"""Complete training runs: policy, data and settings put together by variant."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.compressors.score import ScorePolicy
from vidsieve.errors import TrainingError, UnknownNameError
from vidsieve.training.cacovid import CaCoVIDTrainer
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.loggers import tracking
from vidsieve.training.processes import is_main, joined
from vidsieve.training.score import ScoreTrainer
from vidsieve.training.settings import SETTINGS, CaCoVIDConfig, ScoreConfig
from vidsieve.training.sources import Files, held_out, source
from vidsieve.training.trainer import Report

SKIPPED = "skipped.jsonl"
"""In the folder of a run: what of its files is not used, and why."""


def train_policy(
    method: str,
    model: Any,
    processor: Any,
    folder: Path,
    settings: dict[str, Any],
    *,
    variant: str = "ours",
    data: Path | None = None,
    eval_data: Path | None = None,
    pseudo: Path | None = None,
    cache: Path | None = None,
    root: Path | None = None,
    model_name: str = "",
    resume: bool = False,
    force: bool = False,
    log_to: Sequence[str] = (),
    report: Report | None = None,
    tick: Report | None = None,
    warn: Callable[[str], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a policy for a frozen model and return its training record; the policy is in ``folder/policy``.

    Under torchrun the processes that it launched share the work.

    Parameters
    ----------
    method : {"cacovid", "score"}
    settings : dict
        Fields of the trainer's configuration that differ from the variant's.
    data : Path, optional
        Videos with questions or captions, in a layout of `vidsieve.training.data.layouts`; default: endless scenes of
        the testbed. What cannot be used is listed in ``folder/skipped.jsonl``.
    eval_data : Path, optional
        Such a file of other videos, for evaluation; default: other scenes where the testbed is the data, else what
        the setting `hold_out` takes out of `data`.
    pseudo : Path, optional
        JSON lines of pseudo-videos (`vidsieve data pseudo`) for SCORE's first `pseudo_steps`, where `data` is a file.
    cache : Path, optional
        Folder of encoded videos of `data` (`EncodingCache`): what is there is neither decoded nor encoded again.
    root : Path, optional
        The folder that paths in `data` and `eval_data` start from; default: the folder of each file.
    resume, force : bool
        As `Trainer.fit` has them.
    log_to : sequence of {"tensorboard", "wandb"}
        Where metrics go beside ``folder/metrics.jsonl``.
    report, tick, warn : callable, optional
        As `Trainer` has them.
    announce : callable, optional
        Called before training begins with what of the files is used, and what the cache will take, in words.

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
    folder = Path(folder)
    if not resume and is_main() and not os.path.exists(folder / "metrics.jsonl"):
        (folder / SKIPPED).unlink(missing_ok=True)  # of a run that never began
    skipped = Skipped(folder / SKIPPED if data is not None or eval_data is not None else None, lists=is_main())
    found = source(adapter, processor, config, Files(data, eval_data, pseudo, cache, root), skipped)
    if announce is not None:
        for line in skipped.lines():
            announce(line)
        if cache is not None:
            announce(found.plan())
    shared: dict[str, Any] = {
        "tick": tick,
        "warn": warn,
        "held_out": held_out(found, adapter, processor, config),
        "origin": {"variant": variant, "model": model_name} | found.origin,
    }
    with (
        tracking(log_to, folder, asdict(config)) as write,
        joined(model.device.type) as processes,
        found.samples() as samples,
    ):

        def log(step: int, steps: int, metrics: dict[str, float]) -> None:
            write(step, metrics)
            if report:
                report(step, steps, metrics)

        shared |= {"processes": processes, "report": log}
        trainer: CaCoVIDTrainer | ScoreTrainer
        if isinstance(config, CaCoVIDConfig):
            policy = _cacovid(adapter, config, variant, model_name).to(model.device)
            trainer = CaCoVIDTrainer(adapter, policy, config, samples, folder, tokenizer=processor.tokenizer, **shared)
        else:
            scorer = ScorePolicy.start(
                adapter.hidden_size,
                adapter.family,
                variant=variant,
                seed=config.seed,
                base_model=model_name,
                hidden=config.hidden,
                residual=config.residual,
            ).to(model.device)
            trainer = ScoreTrainer(adapter, scorer, config, samples, folder, **shared)
        record = trainer.fit(resume, force).config.training
    broken = skipped.videos["broken"]
    if broken and announce is not None:
        announce(f"{broken} broken video{'s' * (broken > 1)} met and passed over: listed in {skipped.path}")
    return record if data is None else {**record, "skipped": skipped.as_dict()}


def _cacovid(adapter: Adapter, config: CaCoVIDConfig, variant: str, model_name: str) -> CaCoVIDPolicy:
    """Return CaCoVID's policy at its start: the LLM's first layers."""
    depth, deepest = config.depth, len(adapter.decoder_layers)
    if depth > deepest:
        raise TrainingError(f"depth is {depth}, and this model's LLM has {deepest} layers to start from")
    question = config.body == "question" or (config.body == "variant" and variant == "ours")
    if config.causal and question:
        raise TrainingError("causal is for bodies that attend over the prompt: choose body layer, attention or local")
    network: dict[str, Any] = (
        {"scorer": {"trust": config.trust, "looks": config.looks}} if question else {"causal": config.causal}
    )
    states = [adapter.layer_state(number) for number in range(depth)]
    return CaCoVIDPolicy.start(
        states[0].shape,
        adapter.family,
        variant=variant,
        layers=[state.weights for state in states],
        seed=config.seed,
        base_model=model_name,
        body=None if config.body == "variant" else config.body,
        **network,
    )
