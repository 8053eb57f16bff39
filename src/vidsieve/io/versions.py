"""Tested and installed versions of the packages that vidsieve depends on."""

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
"""Oldest and newest tested minor release of dependencies whose internals we use, as in `pyproject.toml`."""

_warned: set[str] = set()


def installed(name: str) -> str | None:
    """Return the installed version of a distribution, None if it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def minor(version: str) -> tuple[int, int]:
    """Return major and minor number of a version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"{version!r} is not a version")
    return int(match[1]), int(match[2])


def tested_range(name: str) -> str:
    """Return the tested releases of a dependency as text, such as "5.19 to 5.24"."""
    oldest, newest = TESTED[name]
    return oldest if oldest == newest else f"{oldest} to {newest}"


def is_tested(name: str, version: str) -> bool:
    """True if a version is in the tested range."""
    oldest, newest = TESTED[name]
    return minor(oldest) <= minor(version) <= minor(newest)


def warn_untested(name: str, version: str) -> None:
    """Warn, once per process, about a version outside the tested range."""
    if not is_tested(name, version) and name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} {version} is untested with this vidsieve: its tests passed with {tested_range(name)}. Check "
            "results, or install a tested version",
            stacklevel=3,
        )
