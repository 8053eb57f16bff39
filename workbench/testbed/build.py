"""The testbed's recipes: from nothing to the shallow model, from that to the deep one, and a second deep one."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaOnevisionForConditionalGeneration

from vidsieve._version import __version__
from vidsieve.io.checkpoints import load_state, save_state
from vidsieve.loading import load_model
from vidsieve.testbed.vocabulary import VOCABULARY
from vidsieve.testbed.world import WORLD_VERSION, WORLDS
from workbench.testbed.curriculum import CURRICULUM, TrainingStage, run_stage
from workbench.testbed.deepen import STAGE_T, TranslationRecipe, deepened, question_words, train_translation
from workbench.testbed.language import Scenes, prepare
from workbench.testbed.model import build_model, save_model
from workbench.testbed.tower import ProjectorRecipe, TowerRecipe, train_projector, train_tower

Log = Callable[[str], None]
DEEP_SCENES = 300
"""Training scenes of the deep model's two stages, at most."""


@dataclass
class Recipe:
    """A training of several stages in a folder; a stage that was finished before is read, not trained again.

    Parameters
    ----------
    seed : int
    scenes : int
        Training scenes of the language model.
    quick : bool
        A handful of steps of everything, to see that it runs.
    """

    folder: Path
    model: Any
    seed: int
    scenes: int
    quick: bool
    log: Log
    record: dict[str, Any] = field(default_factory=dict)

    def run(self, name: str, work: Callable[[], dict[str, float]]) -> None:
        """Run a stage, or take its result."""
        path = self.folder / f"{name}.safetensors"
        stages = self.record.setdefault("stages", {})
        if os.path.exists(path):
            stages[name] = load_state(path, {"model": self.model})["stage"]
            self.log(f"{name}: done before, {stages[name]['minutes']:.1f} minutes then")
            return
        start = time.perf_counter()
        figures = work()
        minutes = (time.perf_counter() - start) / 60
        stages[name] = {"minutes": minutes, **figures}  # a stage of several sittings counts its own
        save_state(path, {"model": self.model}, None, {"stage": stages[name]})
        self.log(f"{name}: {stages[name]['minutes']:.1f} minutes")

    def missing(self, names: Sequence[str]) -> bool:
        """True if a stage of these is still to be trained."""
        return not all(os.path.exists(self.folder / f"{name}.safetensors") for name in names)

    def prepared(self) -> tuple[Scenes, Scenes]:
        """Return scenes of the dense world through tower and projector: to train on, and held out."""
        scenes = min(self.scenes, 6) if self.quick else self.scenes
        self.log(f"rendering and encoding {scenes} scenes")
        held = min(60, scenes)
        return prepare(self.model, "dense", self.seed + 10, scenes), prepare(self.model, "dense", self.seed + 11, held)

    def languages(self, stages: Sequence[TrainingStage], frozen: Sequence[int] = ()) -> None:
        """Run stages of the language model, which leave the vectors of the words `frozen` as they are."""
        if self.quick:
            stages = [replace(stage, steps=4, batch=4) for stage in stages]
        ready = self.prepared() if self.missing([stage.name for stage in stages]) else None
        for stage in stages:
            self.run(stage.name, partial(self._language, stage, ready, frozen))

    def _language(self, stage: TrainingStage, ready: Any, frozen: Sequence[int]) -> dict[str, float]:
        train, held = ready
        begun = self.folder / f"{stage.name}.begun.safetensors"
        figures = run_stage(self.model, stage, train, held, self.seed, begun, self.log, frozen)
        begun.unlink(missing_ok=True)
        return figures

    def finish(self, name: str) -> dict[str, Any]:
        """Write the model to ``folder/name`` with the record of its training, and return that."""
        self.record |= {
            "model": name,
            "seed": self.seed,
            "scenes": self.scenes,
            "quick": self.quick,
            "minutes": sum(entry["minutes"] for entry in self.record["stages"].values()),
            "vidsieve_version": __version__,
            "world_version": WORLD_VERSION,
            "torch": torch.__version__,
            "world": dataclasses.asdict(WORLDS["dense"].settings),
            "threads": torch.get_num_threads(),
        }
        save_model(self.model, self.folder / name, self.record)
        self.log(f"model in {self.folder / name}, {self.record['minutes']:.1f} minutes of training in all")
        return self.record


def build_testbed(folder: Path, models: str, *, seed: int, scenes: int, quick: bool, log: Log) -> dict[str, Any]:
    """Train "shallow", "deep", "second", or "all" in this order, and return the record of each.

    A model that another starts from is the one trained here, or the one in the package.
    """
    records: dict[str, Any] = {}
    sizes: dict[str, Any] = {"scenes": scenes, "quick": quick, "log": log}

    def start(name: str) -> Any:
        return load_model(str(folder / name / name) if name in records else f"testbed:{name}")[0].float()

    if models in ("all", "shallow"):
        records["shallow"] = build_shallow(folder / "shallow", seed=seed, **sizes)
    if models in ("all", "deep"):
        records["deep"] = build_deep(folder / "deep", start("shallow"), seed=seed + 1, **sizes)
    if models in ("all", "second"):
        records["second"] = build_second(folder / "second", start("deep"), seed=seed + 2, **sizes)
    return records


def build_shallow(folder: Path, *, seed: int, scenes: int, quick: bool, log: Log) -> dict[str, Any]:
    """Train the shallow model from nothing and write it, with its processor and record, to ``folder/shallow``.

    Every finished stage is kept in ``folder``; a stage that was stopped goes on from its last checkpoint.

    Returns
    -------
    dict
        Seeds, settings, minutes and held-out figures of every stage.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    recipe = Recipe(folder, build_model(seed), seed, scenes, quick, log)
    model, tower, projector = recipe.model, TowerRecipe(), ProjectorRecipe()
    if quick:
        tower, projector = replace(tower, scenes=4, steps=4), replace(projector, scenes=4, steps=4)
    recipe.run("V", lambda: train_tower(model, tower, seed, log))
    recipe.run("A", lambda: train_projector(model, projector, seed, log))
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    recipe.languages(CURRICULUM)
    return recipe.finish("shallow")


def build_deep(folder: Path, shallow: Any, *, seed: int, scenes: int, quick: bool, log: Log) -> dict[str, Any]:
    """Train the deep model from a shallow one: stages P and T; as `build_shallow`, to ``folder/deep``."""
    model, before = deepened(shallow, seed)
    recipe = Recipe(folder, model, seed, min(scenes, DEEP_SCENES), quick, log)
    if recipe.missing(["P"]):
        train, held = recipe.prepared()
        translation = TranslationRecipe(steps=4) if quick else TranslationRecipe()
        recipe.run("P", lambda: train_translation(model, before, train, held, translation, seed, log))
    else:
        recipe.run("P", dict)
    recipe.languages([STAGE_T], question_words())
    return recipe.finish("deep")


def build_second(folder: Path, deep: Any, *, seed: int, scenes: int, quick: bool, log: Log) -> dict[str, Any]:
    """Train a second answerer: all decoder layers from nothing; as `build_shallow`, to ``folder/second``.

    It reads the same tokens and words as the deep model: tower, projector and the vectors of words are shared.
    """
    model = LlavaOnevisionForConditionalGeneration(copy.deepcopy(deep.config)).float().eval()
    shared = {k: v for k, v in deep.state_dict().items() if ".layers." not in k or "vision_tower" in k}
    model.load_state_dict(shared, strict=False)
    model.tie_weights()
    model.generation_config = copy.deepcopy(deep.generation_config)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, ProjectorRecipe.init_std, generator=noise)
    recipe = Recipe(folder, model.requires_grad_(False), seed, scenes, quick, log)
    recipe.languages(CURRICULUM, range(len(VOCABULARY)))
    return recipe.finish("second")
