"""From names on a command line to rows of a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from vidsieve import registry
from vidsieve.compressors.base import Compressor
from vidsieve.errors import UnknownNameError
from vidsieve.eval.testbed import Row, compressor_row
from vidsieve.loading import load, shipped_policies, shipped_policy
from vidsieve.policies import CONFIG
from vidsieve.types import Need


def named_methods(names: Sequence[str]) -> list[Compressor]:
    """Return methods by name, ``name:variant``, or policy folder; ``all`` is everything that comes with the package.

    Raises
    ------
    UnknownNameError, PolicyError
    """
    wanted: list[str] = []
    for name in names:
        wanted += [*registry.compressors.names(), *shipped_policies()] if name == "all" else [name]
    made = []
    for name in dict.fromkeys(wanted):
        if (Path(name) / CONFIG).is_file():
            made.append(load(name))
            continue
        base, _, variant = name.partition(":")
        method = registry.compressors.get(base)
        if not method.trained:
            made.append(load(base, **({"variant": variant} if variant else {})))
        else:
            made.append(load(base, shipped_policy(name)))
    return made


def rows_for(methods: Sequence[Compressor], retentions: Sequence[float], probes: bool = False) -> list[Row]:
    """Return the rows of every method at every retention.

    `probes` adds, for methods that read the question, the same method given another question, and, where it
    has them, its other ways of spending the budget.
    """
    rows = []
    for retention in retentions:
        for method in methods:
            at = method.with_retention(retention)
            rows.append(compressor_row(at))
            if not probes or Need.QUESTION not in at.needs:
                continue
            rows.append(compressor_row(at, f"{at.name}[other question]", other_question=True))
            current = getattr(at, "allocation", None)
            for way in ("frame_avg", "frame_ada", "frame_ada_st"):
                if current is not None and way != current:
                    rows.append(compressor_row(dataclasses.replace(at, allocation=way), f"{at.name}[{way}]"))  # type: ignore[call-arg]
    return rows


def check_known(name: str) -> None:
    """Refuse an unknown method name early.

    Raises
    ------
    UnknownNameError
    """
    base = name.partition(":")[0]
    if name != "all" and not (Path(name) / CONFIG).is_file() and base not in registry.compressors:
        raise UnknownNameError("compressor", name, registry.compressors)
