"""vidsieve as a model of lmms-eval: what its plug-in entry point gives it, and what it may be asked for.

lmms-eval itself is imported by what it calls, so that these modules load without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vidsieve.errors import EvaluationError, RetentionError, UnknownNameError
from vidsieve.io.versions import installed, warn_untested

if TYPE_CHECKING:
    from vidsieve.compressors.base import Compressor
    from vidsieve.types import Tokens

DTYPES = ("float32", "bfloat16", "float16")
FRAMES = 32
"""Frames that are read where nothing is said of them, as by `vidsieve eval`."""
RETENTION = 0.25
NEW_TOKENS = 1024
"""The longest answer where a task does not say."""
DRAWING = ("temperature", "top_p", "top_k")


def manifest() -> Any:
    """Return what lmms-eval registers: the model id ``vidsieve`` and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    if version := installed("lmms-eval"):
        warn_untested("lmms-eval", version)
    return ModelManifest(model_id="vidsieve", simple_class_path="vidsieve.evaluation.lmms_model.VidsieveModel")


@dataclass(frozen=True)
class ModelArguments:
    """What ``--model_args`` may say; `read` takes them as lmms-eval hands them over.

    Parameters
    ----------
    pretrained : str
        Folder or hub id of a model, or ``"testbed"``.
    method : str
        A name, ``name:variant`` or policy folder; ``"full"``: all tokens.
    policy : str, optional
        Folder of the policy, for a trained method that is given by name.
    retention : float or Tokens, optional
        None with ``"full"``.
    frames, max_frames : int, optional
        So many frames; or at most so many, with `fps`.
    fps : float, optional
    layout, dtype : str, optional
    device : str
    seed : int
    tokens_per_frame : int, optional
    earliest : bool
    """

    pretrained: str
    method: str
    policy: str | None = None
    retention: float | Tokens | None = None
    frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    layout: str | None = None
    dtype: str | None = None
    device: str = "auto"
    seed: int = 0
    tokens_per_frame: int | None = None
    earliest: bool = False

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ModelArguments:
        """Return the arguments, checked.

        Raises
        ------
        UnknownNameError
            If one is not known, or there is no such method or dtype.
        EvaluationError
            If one is missing, is not of its kind, or contradicts another.
        RetentionError
        """
        from vidsieve.evaluation.conditions import check_known

        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in (*known, "batch_size"):
                raise UnknownNameError("model argument", name, known)
        if str(given.get("batch_size", 1)) != "1":
            raise EvaluationError(
                f"batch_size={given['batch_size']}: prompts keep other tokens each and run one at a time; leave it out"
            )
        for name, example in (("pretrained", "FOLDER, a hub id or testbed"), ("method", "divprune, or full")):
            if not str(given.get(name, "")).strip():
                raise EvaluationError(f"--model_args lacks {name}: give {name}={example}")
        read = {name: _READ[name](name, given[name]) for name in known if name in given}
        method = read["method"]
        if method == "full":
            extra = [name for name in ("policy", "retention", "earliest") if name in read]
            if extra:
                raise EvaluationError(f"method=full keeps all tokens: leave {', '.join(extra)} out")
        elif method == "all":
            raise EvaluationError("one run of lmms-eval measures one method: name it")
        check_known(method)
        if method != "full":
            read.setdefault("retention", RETENTION)
        if "fps" in read and "frames" in read:
            raise EvaluationError("give frames, or fps (with max_frames), not both")
        if "max_frames" in read and "fps" not in read:
            raise EvaluationError("max_frames limits fps: give frames instead")
        if read.get("dtype", DTYPES[0]) not in DTYPES:
            raise UnknownNameError("dtype", read["dtype"], DTYPES)
        return cls(**read)

    @property
    def most_frames(self) -> int:
        """The number of frames, or the most of them with `fps`."""
        return self.frames or self.max_frames or FRAMES

    def compressor(self) -> Compressor | None:
        """Return the method; None: all tokens.

        Raises
        ------
        UnknownNameError, PolicyError
        """
        from vidsieve.evaluation.conditions import method_for

        if self.method == "full":
            return None
        asked = {"earliest": True} if self.earliest else {}
        return method_for(self.method, self.pretrained, self.policy, retention=self.retention, **asked)


def _text(name: str, value: Any) -> str:
    return str(value).strip()  # lmms-eval makes numbers of what looks like one, folders' names too


def _whole(name: str, value: Any) -> int:
    least = 0 if name == "seed" else 1
    word = str(value).strip()
    if not word.isdecimal() or int(word) < least:
        raise EvaluationError(f"{name} is a whole number from {least} on; got {value!r}")
    return int(word)


def _rate(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not 0 < number < float("inf"):
        raise EvaluationError(f"{name} is a number above 0; got {value!r}")
    return number


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise EvaluationError(f"{name} is true or false; got {value!r}")
    return value


def _retention(name: str, value: Any) -> float | Tokens:
    from vidsieve.retention import parse_retention

    if isinstance(value, bool):
        raise RetentionError(f"retention is a number in (0, 1], or a token count such as 512t; got {value!r}")
    return parse_retention(str(value))


_READ: dict[str, Callable[[str, Any], Any]] = {
    "pretrained": _text,
    "method": _text,
    "policy": _text,
    "retention": _retention,
    "frames": _whole,
    "fps": _rate,
    "max_frames": _whole,
    "layout": _text,
    "dtype": _text,
    "device": _text,
    "seed": _whole,
    "tokens_per_frame": _whole,
    "earliest": _switch,
}


@dataclass(frozen=True)
class Wish:
    """How a task wants its answers.

    Parameters
    ----------
    max_new_tokens : int
    until : tuple of str
        An answer ends before the first of these in its text.
    options : tuple of (str, value)
        What `generate` is told where the answer is not the greedy one; empty: it is.
    ignored : tuple of str
        Settings that mean nothing here.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Wish:
        """Return the wish in a task's generation settings.

        An answer is drawn where there is a temperature above 0, or ``do_sample`` without a temperature;
        ``do_sample: false`` is never drawn.

        Raises
        ------
        EvaluationError
            If one is not of its kind.
        """
        stops = given.get("until") or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(isinstance(stop, str) for stop in stops):
            raise EvaluationError(f"until is a text or a list of texts; got {given['until']!r}")
        temperature, sample = given.get("temperature"), given.get("do_sample")
        drawn = sample is not False and (bool(sample) if temperature is None else temperature > 0)
        beams = int(given.get("num_beams") or 1)
        options: dict[str, Any] = {}
        if drawn:
            options = {name: given[name] for name in DRAWING if given.get(name) is not None}
        if drawn or beams > 1:
            options |= {"do_sample": drawn, "num_beams": beams}
        known = ("max_new_tokens", "until", "do_sample", "num_beams", *DRAWING)
        return cls(
            _whole("max_new_tokens", given.get("max_new_tokens", NEW_TOKENS)),
            tuple(stop for stop in stops if stop),
            tuple(sorted(options.items())),
            tuple(sorted(name for name in given if name not in known)),
        )

    def cut(self, text: str) -> str:
        """Return an answer up to the first text that ends it."""
        ends = [place for place in (text.find(stop) for stop in self.until) if place >= 0]
        return text[: min(ends)].rstrip() if ends else text
