"""From names on a command line to rows of a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidsieve import registry
from vidsieve.compressors.base import Compressor
from vidsieve.errors import PolicyError, StageError, UnknownNameError
from vidsieve.eval.testbed import Row, compressor_row
from vidsieve.loading import load, policy_folder, shipped_policies
from vidsieve.policies import CONFIG
from vidsieve.types import Need, Stage


def named_methods(names: Sequence[str]) -> dict[str, Compressor]:
    """Return methods by name, ``name:variant``, or policy folder; ``all`` is everything that comes with the package.

    Of methods with a part before the LLM and one inside, ``all`` has the first, as SCORE's tables do. ``full`` is left
    out: tables have it anyway.

    Raises
    ------
    UnknownNameError, PolicyError
    """
    found: dict[str, Compressor] = {}
    for name in names:
        if name == "all":
            found |= {known: _in_prefill(known) for known in registry.compressors}
            found |= {shipped: named_method(shipped) for shipped in shipped_policies()}
        else:
            found[name] = named_method(name)
    return {name: method for name, method in found.items() if name != "full"}


def _in_prefill(name: str) -> Compressor:
    parts = "inner" in {field.name for field in dataclasses.fields(registry.compressors.get(name))}
    return named_method(name, inner=False) if parts else named_method(name)


def named_method(name: str, policy: str | None = "testbed", **fields: Any) -> Compressor:
    """Return the method of one such name; trained ones without a folder take `policy`.

    Raises
    ------
    UnknownNameError, PolicyError
    """
    base, _, variant = name.partition(":")
    if policy == "testbed" and (is_folder(name) or not registry.compressors.get(base).trained):
        policy = None  # only there for trained methods that come without one
    if is_folder(name):
        return load(name, policy, **fields)
    return load(base, policy, **({"variant": variant} if variant else {}), **fields)


def is_folder(name: str) -> bool:
    """Return whether a name is the folder of a policy, or of the run that made it."""
    return name not in registry.compressors and (policy_folder(name) / CONFIG).is_file()


def rows_for(methods: Mapping[str, Compressor], retentions: Sequence[float], probes: bool = False) -> list[Row]:
    """Return the rows of every named method at every retention.

    `probes` adds, for methods that read the question, the same method given another question, and, where it
    has them, its other ways of spending the budget.
    """
    rows = []
    for retention in retentions:
        for name, method in methods.items():
            at, policy = method.with_retention(retention), name if is_folder(name) else ""
            rows.append(compressor_row(at, policy=policy))
            if not probes or Need.QUESTION not in at.needs:
                continue
            rows.append(compressor_row(at, f"{at.name}[other question]", other_question=True, policy=policy))
            current = getattr(at, "allocation", None)
            for way in ("frame_avg", "frame_ada", "frame_ada_st"):
                if current is not None and way != current:
                    spent = dataclasses.replace(at, allocation=way)  # type: ignore[call-arg]
                    rows.append(compressor_row(spent, f"{at.name}[{way}]", policy=policy))
    return rows


def check_known(name: str) -> None:
    """Refuse an unknown method name early.

    Raises
    ------
    UnknownNameError
    """
    base = name.partition(":")[0]
    if name not in ("all", "full") and not is_folder(name) and base not in registry.compressors:
        if len(Path(name).parts) > 1:
            raise PolicyError(f"no policy in {name}: {CONFIG} is missing there; train one with `vidsieve train`")
        raise UnknownNameError("compressor", name, registry.compressors)


def check_prefill(methods: Mapping[str, Compressor]) -> None:
    """Refuse methods that act while decoding: the testbed's answers are read off the prefill.

    Raises
    ------
    StageError
    """
    for method in methods.values():
        if method.acts is Stage.DECODE:
            raise StageError(
                f"{method.name} acts {method.acts.value}, and the testbed's answers are read off the prefill: attach "
                "it to a model, or try it with `vidsieve ask`"
            )
