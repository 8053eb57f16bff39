"""vidsieve makes video language models fast: it keeps the video tokens that an answer depends on.

>>> import vidsieve
>>> with vidsieve.attach(model, vidsieve.load("divprune", retention=0.25)) as session:
...     out = model.generate(**inputs)
>>> print(session.trace)
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from vidsieve._moved import MovedFinder
from vidsieve._version import __version__

if TYPE_CHECKING:
    from vidsieve.adapters import Adapter, Session, Template, attach, prune
    from vidsieve.compressors.base import Compressor, ScoreCompressor
    from vidsieve.compressors.composed import Pipeline
    from vidsieve.errors import VidsieveError
    from vidsieve.loading import load
    from vidsieve.registry import compressors, families
    from vidsieve.types import Need, Prompt, Selection, Stage, TokenGrid, Tokens, VideoTokens
    from vidsieve.video.reading import read_video

sys.meta_path.append(MovedFinder())

_HOME = {
    "Adapter": "adapters",
    "Compressor": "compressors.base",
    "Need": "types",
    "Pipeline": "compressors.composed",
    "Prompt": "types",
    "ScoreCompressor": "compressors.base",
    "Selection": "types",
    "Session": "adapters",
    "Stage": "types",
    "Template": "adapters",
    "TokenGrid": "types",
    "Tokens": "types",
    "VideoTokens": "types",
    "VidsieveError": "errors",
    "attach": "adapters",
    "compressors": "registry",
    "families": "registry",
    "load": "loading",
    "prune": "adapters",
    "read_video": "video.reading",
}

__all__ = [
    "Adapter",
    "Compressor",
    "Need",
    "Pipeline",
    "Prompt",
    "ScoreCompressor",
    "Selection",
    "Session",
    "Stage",
    "Template",
    "TokenGrid",
    "Tokens",
    "VideoTokens",
    "VidsieveError",
    "__version__",
    "attach",
    "compressors",
    "families",
    "load",
    "prune",
    "read_video",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import vidsieve` alone loads neither torch nor transformers."""
    if name in ("registry", "testing"):
        return importlib.import_module(f"vidsieve.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'vidsieve' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vidsieve.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
