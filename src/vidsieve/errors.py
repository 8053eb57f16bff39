"""Everything vidsieve raises on purpose.

VidsieveError
├── RetentionError(ValueError)            a retention outside (0, 1], or not a number
├── BudgetError(ValueError)               a budget that the method cannot reach
├── UnknownNameError(KeyError)            a method, family or variant that is not registered
├── PluginError(ImportError)              a registered module that cannot be imported
├── ModelError(ValueError)                a model that cannot be loaded, or not onto a device
├── UnsupportedModelError(TypeError)      a model class without an adapter
├── UnsupportedCallError(ValueError)      a call whose result could not be right while attached
├── StageError(RuntimeError)              a method asked to act where it cannot
├── NeedError(RuntimeError)               a signal that a method needs and that cannot be given
├── PromptError(ValueError)               placeholders and videos of a prompt do not agree
├── AttachError(RuntimeError)             attaching twice, using a closed session, nothing pruned
│   └── UnsupportedTransformersError      the installed transformers lacks what a method needs
├── SelectionError(ValueError)            tensors that break the contract of a selection or of its video
├── PolicyError(ValueError)               a policy file that cannot be used
│   └── PolicyMismatchError               made for another width, family or version
├── VideoError(ValueError)                a file that holds no readable video
├── TrainingError(RuntimeError)           training cannot go on (the last good checkpoint is kept)
├── EvaluationError(ValueError)           a benchmark's folder or a run's results that cannot be used
└── OutputError(OSError)                  a path that cannot be written
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VidsieveError(Exception):
    """Base of every error that vidsieve raises on purpose; its text says what to do."""


class RetentionError(VidsieveError, ValueError):
    """The retention ratio is not a number in (0, 1]."""


class BudgetError(VidsieveError, ValueError):
    """The method cannot reach the budget; the text names the reachable range."""


class UnknownNameError(VidsieveError, KeyError):
    """A name is not registered; the text offers the nearest ones."""

    def __init__(self, kind: str, name: object, known: Iterable[str], hint: str = "") -> None:
        names = sorted(known)
        near = get_close_matches(str(name), names, n=3, cutoff=0.4)
        offer = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {', '.join(names)}."
        super().__init__(f"unknown {kind} {str(name)!r}. {offer}{' ' + hint if hint else ''}")

    def __str__(self) -> str:
        return str(self.args[0])


class PluginError(VidsieveError, ImportError):
    """A method or model family is registered, and its module cannot be imported."""


class ModelError(VidsieveError, ValueError):
    """A model or its processor cannot be loaded, or not onto the device asked for."""


class UnsupportedModelError(VidsieveError, TypeError):
    """No adapter is registered for the model's class."""


class UnsupportedCallError(VidsieveError, ValueError):
    """The call cannot give a right result while a session is attached."""


class StageError(VidsieveError, RuntimeError):
    """The method acts at a stage that this door does not reach."""


class NeedError(VidsieveError, RuntimeError):
    """The method needs a signal that cannot be given here."""


class PromptError(VidsieveError, ValueError):
    """The prompt's placeholders and the videos handed over do not agree."""


class AttachError(VidsieveError, RuntimeError):
    """The session cannot be opened or used."""


class UnsupportedTransformersError(AttachError):
    """The installed transformers lacks what a method needs; the text names the versions that work."""


class SelectionError(VidsieveError, ValueError):
    """A tensor breaks the contract of `VideoTokens` or `Selection`."""


class PolicyError(VidsieveError, ValueError):
    """A policy cannot be read or written."""


class PolicyMismatchError(PolicyError):
    """A policy was made for another width, model family or version."""


class VideoError(VidsieveError, ValueError):
    """A file holds no readable video."""


class TrainingError(VidsieveError, RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


class EvaluationError(VidsieveError, ValueError):
    """A benchmark's folder, or the results of a run, cannot be used."""


class OutputError(VidsieveError, OSError):
    """An output path cannot be written."""
