"""Unexpected errors of one method among several: its own row reports the error, the others are kept."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from vidsieve._version import __version__
from vidsieve.errors import VidsieveError
from vidsieve.io.versions import installed

debug = False
"""True if unexpected errors are raised, with their traceback (``vidsieve --debug``)."""

seen = False
"""True once an unexpected error was recorded: the command then ends with exit code 1."""


def described(error: Exception) -> str:
    """Return the error in one line, with the versions, and how to see its traceback."""
    lines = str(error).strip().splitlines()
    what = f"unexpected {type(error).__name__}{': ' + lines[0] if lines else ''}"
    versions = ", ".join(f"{name} {installed(name)}" for name in ("transformers", "torch"))
    return f"{what} (vidsieve {__version__}, {versions}; `vidsieve --debug …` shows the traceback)"


@contextmanager
def contained(reasons: MutableMapping[str, str], key: str, *expected: type[VidsieveError]) -> Iterator[None]:
    """Record an error that is in `expected`, or not a `VidsieveError`, as ``reasons[key]``.

    Other errors of vidsieve are about the whole run and propagate.
    """
    try:
        yield
    except expected as error:
        reasons[key] = str(error)
    except VidsieveError:
        raise
    except Exception as error:
        global seen
        if debug:
            raise
        seen = True
        reasons[key] = described(error)
