"""The exceptions of vidsieve: every error raised on purpose is a `VidsieveError`."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 2000  # characters of a text that is shown, whatever the file that it quotes holds


class VidsieveError(Exception):
    """Base of all errors raised on purpose; the text says what to do.

    A text over `LONGEST` characters is shown without its middle: its start names what is wrong, its end the remedy.
    """

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


class RetentionError(VidsieveError, ValueError):
    """The retention is not a number in (0, 1], or its calibrated rule is missing or of another method."""


class BudgetError(VidsieveError, ValueError):
    """The method cannot reach the budget; the text names the reachable range."""


class UnknownNameError(VidsieveError, KeyError):
    """A name is not registered; the text offers the nearest ones, those that hold it, or those of the same `sense`."""

    def __init__(
        self, kind: str, name: object, known: Iterable[str], hint: str = "", sense: Iterable[str] = ()
    ) -> None:
        names = sorted(known)
        given = str(name)[:80]
        near = get_close_matches(given, names, n=3, cutoff=0.6)
        near = near or [other for other in names if len(given) > 1 and given in other] or sorted(sense)
        offer = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {', '.join(names)}."
        super().__init__(f"unknown {kind} {given!r}. {offer}{' ' + hint if hint else ''}")


class PluginError(VidsieveError, ImportError):
    """The module of a registered method or model family cannot be imported."""


class ModelError(VidsieveError, ValueError):
    """A model or its processor cannot be loaded, or not onto the device asked for."""


class UnsupportedModelError(VidsieveError, TypeError):
    """No adapter is registered for the model's class."""


class UnsupportedCallError(VidsieveError, ValueError):
    """The call cannot give a right result while a session is attached."""


class StageError(VidsieveError, RuntimeError):
    """The method acts at a stage that this interface does not support."""


class NeedError(VidsieveError, RuntimeError):
    """The method needs a signal that is not available here."""


class PromptError(VidsieveError, ValueError):
    """The placeholders of a prompt do not match its videos."""


class AttachError(VidsieveError, RuntimeError):
    """A session cannot be opened or used, or pruned nothing."""


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


class StreamError(VidsieveError, ValueError):
    """A stream cannot be made of these parts, take these frames, answer, or be read from a file."""


class TrainingError(VidsieveError, RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


class EvaluationError(VidsieveError, ValueError):
    """A benchmark's folder, or the results of a run, cannot be used."""


class OutputError(VidsieveError, OSError):
    """An output path cannot be written."""
