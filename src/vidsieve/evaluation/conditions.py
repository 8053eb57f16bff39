"""Conditions of an experiment, and the methods behind names on a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vidsieve import registry
from vidsieve.adapters.fingerprint import policy_digest
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.front import Front
from vidsieve.errors import PolicyError, StageError
from vidsieve.loading import is_testbed, load, policy_name, put_before, shipped_policies, split_front
from vidsieve.retention import Calibration, Tokens, budget_text
from vidsieve.types import Stage

BASELINES = ("random", "uniform", "downsample")
"""Methods that every run on a set of questions measures."""


@dataclass(frozen=True)
class Condition:
    """One row of a table: a method and the frames it reads.

    Parameters
    ----------
    method : Compressor or None
        None: all tokens.
    frames : int
        Frames read of every video; 0 where the task chooses them.
    label : str
        Tells conditions of one method apart, such as the folder of a policy that the user named.
    """

    method: Compressor | None = None
    frames: int = 0
    label: str = ""

    def described(self) -> dict[str, Any]:
        """Return the columns of a table that describe the condition, as values for JSON."""
        method = self.method
        return {
            "method": "full" if method is None else method.title,
            "variant": "-" if method is None else method.variant,
            "part": "" if method is None else method.part,
            "policy": self.label,
            "retention": "1" if method is None else budget_text(method.budget_asked),
            "frames": self.frames,
        }

    @property
    def front(self) -> Front | None:
        """What acts before the vision encoder's output, so that conditions do not share it."""
        return None if self.method is None else self.method.front

    @property
    def key(self) -> str:
        """A name that no other condition of a run has."""
        return "/".join(str(value) for value in self.described().values())

    @property
    def digest(self) -> str:
        """A hash of the weights of the method's policy; empty without one."""
        return "" if self.method is None else policy_digest(self.method)


def conditions_of(
    methods: Mapping[str, Compressor], retentions: Sequence[float | Tokens | Calibration], frames: Sequence[int] = (0,)
) -> list[Condition]:
    """Return all tokens, and every named method at every retention, for each number of frames."""
    conditions = []
    for count in frames:
        conditions.append(Condition(None, count))
        for retention in retentions:
            for name, method in methods.items():
                conditions.append(Condition(method.with_retention(retention), count, label_of(name)))
    return conditions


def label_of(name: str) -> str:
    """Return the label of a method's conditions: its name where that is a folder, else empty."""
    return name if registry.is_policy(split_front(name)[1]) else ""


# -- names ------------------------------------------------------------------------------------------------------------


def named_methods(
    names: Sequence[str], model: str = "testbed", *, earliest: bool = False, prefill: bool = False
) -> dict[str, Compressor]:
    """Return methods by name, ``name:variant`` or policy, as `load` takes it.

    ``all`` stands for every method of the package. ``full`` is left out, because every table has it.

    Parameters
    ----------
    model : str
        Name of the model, as in the command. The package has policies for the testbed's models only; for other models
        ``all`` stands for the methods without a policy.
    earliest : bool
        True to move methods inside the LLM to earlier layers where their budget requires it.
    prefill : bool
        True if ``all`` has only the part before the LLM of methods with two parts, as in SCORE's tables.

    Raises
    ------
    UnknownNameError, PolicyError
    """
    methods: dict[str, Compressor] = {}
    for name in names:
        if name == "full":
            continue
        if name != "all":
            methods[name] = method_for(name, model, **known_fields(name, earliest=earliest))
            continue
        every = [name for name in registry.compressors if not registry.compressors.get(name).trained]
        if is_testbed(model):
            every += shipped_policies(model)
        parts = {"inner": False} if prefill else {}
        methods |= {name: method_for(name, model, **known_fields(name, earliest=earliest, **parts)) for name in every}
    return methods


def known_fields(name: str, *, earliest: bool = False, **fields: Any) -> dict[str, Any]:
    """Return those of `fields` that a method has, and ``earliest`` if it is True and the method has it."""
    name = split_front(name)[1]
    if not name or registry.is_policy(name):
        return {}
    known = {field.name for field in dataclasses.fields(registry.compressors.get(name.partition(":")[0]))}
    wanted = fields | ({"earliest": True} if earliest else {})
    return {field: value for field, value in wanted.items() if field in known}


def method_for(name: str, model: str | None = "testbed", policy: str | None = None, **fields: Any) -> Compressor:
    """Return the method with a name, ``name:variant`` or policy, ``reuse+`` before it or alone, for a model.

    Parameters
    ----------
    model : str or None
        For the testbed's models, trained methods have the policies of the package; for others `policy` is required.
    policy : str, optional
        The policy of a trained method, as `load` takes it.

    Raises
    ------
    UnknownNameError, PolicyError
    """
    front, rest = split_front(name)
    if front:
        if not rest:
            return load(front, policy, **fields)
        return put_before(registry.fronts.get(front)(), method_for(rest, model, policy, **fields))
    if registry.is_policy(name):
        return load(name, policy, **fields)
    base = name.partition(":")[0]
    trained = registry.compressors.get(base).trained
    if policy is not None and not trained:
        raise PolicyError(f"{base} is not trained and takes no policy, got {policy}")
    if policy is None and trained:
        if model is None or not is_testbed(model):
            raise PolicyError(f"{base} needs a policy made for this model: give the folder of one as the method")
        there = shipped_policies(model)
        if policy_name(name) not in there:
            raise PolicyError(
                f"no policy of {name} comes with the package for {model}, only {', '.join(there)}: train one with "
                f"`vidsieve train {base} FOLDER`, and give FOLDER/policy as the method"
            )
        policy = "testbed"
    return load(name, policy, **fields)


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
