"""vidsieve makes video language models fast: it keeps the video tokens that an answer depends on.

>>> import vidsieve
>>> with vidsieve.attach(model, vidsieve.load("divprune", retention=0.25)) as session:
...     out = model.generate(**inputs)
>>> print(session.trace)

The public names are those of the stub `__init__.pyi`.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8"))
_HOME = {alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import vidsieve` alone loads neither torch nor transformers."""
    if name in ("registry", "testing"):
        return importlib.import_module(f"vidsieve.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'vidsieve' has no attribute {name!r}")
    return getattr(importlib.import_module(str(_HOME[name])), name)


def __dir__() -> list[str]:
    return __all__
