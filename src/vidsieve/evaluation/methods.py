"""From names on a command line to rows of a table."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidsieve import registry
from vidsieve.compressors.base import Compressor
from vidsieve.errors import PolicyError, StageError, UnknownNameError
from vidsieve.evaluation.testbed import TestbedRow, compressor_row
from vidsieve.loading import load, policy_folder, shipped_policies
from vidsieve.policies import CONFIG
from vidsieve.types import Need, Stage


def named_methods(
    names: Sequence[str], model: str = "testbed", *, earliest: bool = False, prefill: bool = False
) -> dict[str, Compressor]:
    """Return methods by name, ``name:variant``, or policy folder; ``all`` is everything that comes with the package.

    ``full`` is left out: tables have it anyway.

    Parameters
    ----------
    model : str
        As the command names it. For others than the testbed's no policy comes with the package: ``all`` is what needs
        none.
    earliest : bool
        Whether methods inside the LLM move to earlier layers where their budget asks for it.
    prefill : bool
        Whether ``all`` has the part before the LLM alone of methods with two parts, as SCORE's tables do.

    Raises
    ------
    UnknownNameError, PolicyError
    """
    found: dict[str, Compressor] = {}
    for name in names:
        if name == "full":
            continue
        if name != "all":
            found[name] = method_for(name, model, **known_fields(name, earliest=earliest))
            continue
        every = [name for name in registry.compressors if not registry.compressors.get(name).trained]
        if model == "testbed":
            every = [*registry.compressors, *shipped_policies()]
        parts = {"inner": False} if prefill else {}
        found |= {known: method_for(known, model, **known_fields(known, earliest=earliest, **parts)) for known in every}
    return found


def known_fields(name: str, *, earliest: bool, **fields: Any) -> dict[str, Any]:
    """Return those of the fields that a method has, `earliest` only where it is asked for."""
    if is_folder(name):
        return {}
    known = {field.name for field in dataclasses.fields(registry.compressors.get(name.partition(":")[0]))}
    asked = fields | ({"earliest": True} if earliest else {})
    return {field: value for field, value in asked.items() if field in known}


def method_for(name: str, model: str, policy: str | None = None, **fields: Any) -> Compressor:
    """Return the method of one such name for a model: trained ones take `policy`, or what comes with the testbed's.

    Raises
    ------
    UnknownNameError, PolicyError
    """
    base = name.partition(":")[0]
    if policy is not None and not is_folder(name) and not registry.compressors.get(base).trained:
        raise PolicyError(f"{base} is not trained and takes no policy; leave {policy} out")
    if policy is None and not is_folder(name):
        if model == "testbed":
            policy = "testbed"
        elif registry.compressors.get(base).trained:
            raise PolicyError(f"{base} needs a policy made for this model: give the folder of one as the method")
    return named_method(name, policy, **fields)


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
    return name not in registry.compressors and os.path.isfile(policy_folder(name) / CONFIG)


def rows_for(methods: Mapping[str, Compressor], retentions: Sequence[float], probes: bool = False) -> list[TestbedRow]:
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
