"""Modules that were renamed are found by their old names for one release, with a warning."""

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
    "store": "io.store",
    "checkpoints": "io.checkpoints",
    "versions": "io.versions",
    "data.video": "video.reading",
    "data.decoding": "video.decoding",
    "data.koala": "training.data.formats.koala",
    "data.llava": "training.data.formats.llava",
    "data.video_r1": "training.data.formats.video_r1",
    "eval.letters": "options",
    "eval.runner": "evaluation.examiner",
    "eval.running": "evaluation.runs",
    "rl.samples": "training.data.samples",
    "adapters.base": "adapters.adapter",
    "adapters.batch": "adapters.encoded",
}
"""Old and new names below ``vidsieve``; what is in neither table keeps its name in the new package."""


class MovedFinder(MetaPathFinder, Loader):
    """Finds old names where nothing else does."""

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return a spec for an old name, None for any other."""
        top, _, old = fullname.partition(".")
        if top != "vidsieve" or (old not in MODULES and old.partition(".")[0] not in PACKAGES):
            return None
        return ModuleSpec(fullname, self, is_package=old in PACKAGES)

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that has the new name in the place of `module`; packages stay empty."""
        old = module.__name__.removeprefix("vidsieve.")
        if old in PACKAGES:
            return
        package, _, rest = old.partition(".")
        new = f"vidsieve.{MODULES.get(old) or f'{PACKAGES[package]}.{rest}'}"
        sys.modules[module.__name__] = importlib.import_module(new)
        warnings.warn(f"vidsieve.{old} is {new} now", DeprecationWarning, stacklevel=2)
