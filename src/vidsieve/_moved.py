"""Old names of renamed modules, which still import for one release, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGES = {"rl": "training", "data": "training.data", "eval": "evaluation"}
MODULES = {
    "pipeline": "answering",
    "files": "io.files",
    "store": "io.journal",
    "checkpoints": "io.checkpoints",
    "versions": "io.versions",
    "data.video": "video.reading",
    "data.decoding": "video.decoding",
    "data.koala": "training.data.formats.koala",
    "data.llava": "training.data.formats.llava",
    "data.video_r1": "training.data.formats.video_r1",
    "eval.letters": "options",
    "eval.lmms": "evaluation.lmms_bridge",
    "eval.lmms_model": "evaluation.lmms_bridge",
    "eval.runner": "evaluation.tasks.questions",
    "eval.running": "evaluation.experiment",
    "testing.tiny_processors": "testing.tiny_models",
    "rl.samples": "training.data.samples",
    "rl.answers": "training.judging",
    "rl.official": "training.release_sampling",
    "rl.packing": "training.rollouts",
    "rl.runs": "training.run_folder",
    "adapters.base": "adapters.adapter",
    "adapters.batch": "adapters.encoded",
    "compressors.pipeline": "compressors.composed",
}
"""Old and new names below ``vidsieve``; other modules of a renamed package keep their names."""


class MovedFinder(MetaPathFinder, Loader):
    """Imports modules by their old names, if nothing else finds them."""

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return a spec for an old name, else None."""
        top, _, old = fullname.partition(".")
        if top != "vidsieve" or (old not in MODULES and old.partition(".")[0] not in PACKAGES):
            return None
        return ModuleSpec(fullname, self, is_package=old in PACKAGES)

    def exec_module(self, module: ModuleType) -> None:
        """Replace `module` by the renamed one; packages stay empty."""
        old = module.__name__.removeprefix("vidsieve.")
        if old in PACKAGES:
            return
        package, _, rest = old.partition(".")
        new = f"vidsieve.{MODULES.get(old) or f'{PACKAGES[package]}.{rest}'}"
        sys.modules[module.__name__] = importlib.import_module(new)
        warnings.warn(f"vidsieve.{old} is {new} now", DeprecationWarning, stacklevel=2)
