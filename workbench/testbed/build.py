"""The testbed's recipe from nothing to a shipped model: V, A, then the stages of the curriculum."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vidsieve._version import __version__
from vidsieve.io.checkpoints import load_state, save_state
from vidsieve.testbed.model import build_model, save_model
from vidsieve.testbed.world import WORLD_VERSION, WorldSettings
from workbench.testbed.curriculum import CURRICULUM, run_stage
from workbench.testbed.language import prepare
from workbench.testbed.tower import ProjectorRecipe, TowerRecipe, train_projector, train_tower

Log = Callable[[str], None]


def build_testbed(folder: Path, *, seed: int, scenes: int, quick: bool, log: Log) -> dict[str, Any]:
    """Train the testbed's model and write it, with its processor and record, to ``folder/model``.

    Every finished stage is kept in ``folder``; a stage that was stopped goes on from its last checkpoint.

    Parameters
    ----------
    scenes : int
        Training scenes of the language model.
    quick : bool
        A handful of steps of everything, to see that it runs.

    Returns
    -------
    dict
        Seeds, settings, minutes and held-out figures of every stage.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    model = build_model(seed)
    tower, projector, stages = TowerRecipe(), ProjectorRecipe(), list(CURRICULUM)
    if quick:
        scenes = min(scenes, 6)
        tower, projector = replace(tower, scenes=4, steps=4), replace(projector, scenes=4, steps=4)
        stages = [replace(stage, steps=4, batch=4) for stage in stages]
    record: dict[str, Any] = {"seed": seed, "scenes": scenes, "quick": quick, "stages": {}}

    def run(name: str, work: Callable[[], dict[str, float]]) -> None:
        """Run a stage that was not finished before, or take its result."""
        path = folder / f"{name}.safetensors"
        if os.path.exists(path):
            record["stages"][name] = load_state(path, {"model": model})["stage"]
            log(f"{name}: done before, {record['stages'][name]['minutes']:.1f} minutes then")
            return
        start = time.perf_counter()
        figures = work()
        minutes = (time.perf_counter() - start) / 60
        record["stages"][name] = {"minutes": minutes, **figures}  # a stage of several sittings counts its own
        save_state(path, {"model": model}, None, {"stage": record["stages"][name]})
        log(f"{name}: {record['stages'][name]['minutes']:.1f} minutes")

    run("V", lambda: train_tower(model, tower, seed, log))
    run("A", lambda: train_projector(model, projector, seed, log))
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    waiting = [stage for stage in stages if not os.path.exists(folder / f"{stage.name}.safetensors")]
    ready = None
    if waiting:
        log(f"rendering and encoding {scenes} scenes")
        ready = prepare(model, "A", seed + 10, scenes), prepare(model, "A", seed + 11, min(60, scenes))
    for stage in stages:
        run(stage.name, partial(_language_stage, model, stage, ready, seed, folder, log))

    record["minutes"] = sum(entry["minutes"] for entry in record["stages"].values())
    record |= {
        "vidsieve_version": __version__,
        "world_version": WORLD_VERSION,
        "torch": torch.__version__,
        "world": dataclasses.asdict(WorldSettings()),
        "threads": torch.get_num_threads(),
    }
    save_model(model, folder / "model", record)
    log(f"model in {folder / 'model'}, {record['minutes']:.0f} minutes of training in all")
    return record


def _language_stage(model: Any, stage: Any, ready: Any, seed: int, folder: Path, log: Log) -> dict[str, float]:
    train, held = ready
    begun = folder / f"{stage.name}.begun.safetensors"
    figures = run_stage(model, stage, train, held, seed, begun, log)
    begun.unlink(missing_ok=True)
    return figures
