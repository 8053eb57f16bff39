"""What becomes of an unexpected error of one method among several: its own row says so, the others keep theirs."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from vidsieve._version import __version__
from vidsieve.errors import VidsieveError
from vidsieve.io.versions import installed

debug = False
"""Whether unexpected errors are raised, with their traceback, and not kept to their row (``vidsieve --debug``)."""

seen = False
"""Whether one was kept to its row: the command then ends with exit code 1."""


def described(error: Exception) -> str:
    """Return in one line what happened, with which versions, and how to see more."""
    lines = str(error).strip().splitlines()
    what = f"unexpected {type(error).__name__}{': ' + lines[0] if lines else ''}"
    versions = ", ".join(f"{name} {installed(name)}" for name in ("transformers", "torch"))
    return f"{what} (vidsieve {__version__}, {versions}; `vidsieve --debug …` shows the traceback)"


@contextmanager
def contained(reasons: MutableMapping[str, str], key: str, *expected: type[VidsieveError]) -> Iterator[None]:
    """Keep an error that is in `expected`, or that nobody raises on purpose, to `key`: its reason goes into `reasons`.

    Other errors of vidsieve's concern the whole run and pass.
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
