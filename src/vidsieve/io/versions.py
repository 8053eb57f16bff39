"""Versions of what this package builds on: which ones its tests have passed with, and which are installed."""

from __future__ import annotations

import importlib.metadata
import re
import warnings

TESTED = {
    "transformers": ("5.19", "5.24"),
    "vllm": ("0.32", "0.32"),
    "gradio": ("5.20", "6.31"),
    "lmms-eval": ("0.7", "0.7"),
    "ray": ("2.40", "2.60"),
}
"""Oldest and newest minor release, of every dependency whose insides we touch; `pyproject.toml` has the same bounds."""

_warned: set[str] = set()


def installed(name: str) -> str | None:
    """Return the installed version of a distribution, None where it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def minor(version: str) -> tuple[int, int]:
    """Return major and minor number of a version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"{version!r} is no version")
    return int(found[1]), int(found[2])


def tested_range(name: str) -> str:
    """Return the tested releases of a dependency in words, as "5.19 to 5.24"."""
    oldest, newest = TESTED[name]
    return oldest if oldest == newest else f"{oldest} to {newest}"


def is_tested(name: str, version: str) -> bool:
    """Return whether a version lies in the tested range."""
    oldest, newest = TESTED[name]
    return minor(oldest) <= minor(version) <= minor(newest)


def warn_untested(name: str, version: str) -> None:
    """Warn, once in a process, about a version newer or older than any that was tested."""
    if not is_tested(name, version) and name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} {version} is untested with this vidsieve: its tests passed with {tested_range(name)}. Check "
            "results, or install a tested version",
            stacklevel=3,
        )
