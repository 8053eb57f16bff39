"""Options that commands share, and what their values mean."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidsieve.cli.output import STDOUT, err, out
from vidsieve.errors import EvaluationError, ModelError, PromptError, RetentionError, UnknownNameError
from vidsieve.io.limits import limits
from vidsieve.retention import parse_frames

if TYPE_CHECKING:
    from vidsieve.compressors.base import Compressor


def _json_place(path: Path | None) -> Path | None:
    """Print for people on stderr where the JSON goes to stdout."""
    out.stderr, out.quiet = path == STDOUT, path == STDOUT and err.quiet
    return path


Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the result as JSON to this file; '-': to stdout, and the text to stderr.",
        show_default=False,
        callback=_json_place,
    ),
]
Share = Annotated[
    str | None,
    typer.Option("--share", help="2/4: shard 2 of 4 processes; torchrun's ranks by default.", show_default=False),
]
Report = Annotated[
    Path | None, typer.Option("--report", help="Write a self-contained HTML report.", show_default=False)
]
Figures = Annotated[
    Path | None,
    typer.Option("--figures", help="Write the report's charts as PNG and SVG into this folder.", show_default=False),
]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads; 0 = torch's default.", min=0)]
MODEL = "Folder or hub id of a model of a supported family; 'testbed': a toy for its own scenes."
Model = Annotated[str | None, typer.Option("--model", help=MODEL, show_default=False)]
DTYPES = ("float32", "bfloat16", "float16")


def known_dtype(value: str | None) -> str | None:
    """Return the value of an option ``--dtype``.

    Raises
    ------
    UnknownNameError
    """
    if value is not None and value not in DTYPES:
        raise UnknownNameError("dtype", value, DTYPES)
    return value


def device_option(panel: str | None = None) -> Any:
    """Return the option ``--device``, in a panel of the help."""
    about = "Where the model runs: cpu, cuda, cuda:1; auto: a GPU if there is one."
    return typer.Option("--device", help=about, rich_help_panel=panel)


def dtype_option(panel: str | None = None) -> Any:
    """Return the option ``--dtype``, in a panel of the help."""
    about, filed = f"Number type of the model: {', '.join(DTYPES)}.", "as in the model's files"
    return typer.Option("--dtype", help=about, show_default=filed, callback=known_dtype, rich_help_panel=panel)


Device = Annotated[str, device_option()]
Dtype = Annotated[str | None, dtype_option()]
Frames = Annotated[
    str | None,
    typer.Option(
        "--frames",
        help="Frames taken evenly; with --fps at most this many; 'auto[:FILE]': by `calibrate --tokens`.",
        show_default="16",
    ),
]


def positive(param: typer.CallbackParam, value: float | None) -> float | None:
    """Return an option's value if it is a finite number above 0, or None where it was not given.

    Raises
    ------
    EvaluationError
    """
    if value is not None and not (math.isfinite(value) and value > 0):
        raise EvaluationError(f"{param.opts[0]} must be a finite number above 0, got {value:g}")
    return value


def set_limit(param: typer.CallbackParam, value: int) -> int:
    """Set the limit that an option ``--max-NAME`` is of, for this process."""
    setattr(limits, str(param.name).removeprefix("max_"), value)
    return value


MaxRow = Annotated[
    int,
    typer.Option(
        "--max-row", help="Longest row of a file, in bytes; longer ones are bad rows.", min=1, callback=set_limit
    ),
]
MaxPixels = Annotated[
    int,
    typer.Option("--max-pixels", help="Most frames × height × width read from a video.", min=1, callback=set_limit),
]
Fps = Annotated[float | None, typer.Option("--fps", help="Frames per second.", show_default=False, callback=positive)]


def layout_option(panel: str | None = None) -> Any:
    """Return the option ``--layout``, in a panel of the help."""
    about = "Token layout; use 'grid' for LLaVA-Video checkpoints."
    return typer.Option("--layout", help=about, show_default=False, rich_help_panel=panel)


Layout = Annotated[str | None, layout_option()]
Positions = Annotated[
    str | None,
    typer.Option(
        "--positions",
        help="'compact': counted over the kept tokens, for videos longer than in training.",
        show_default=False,
    ),
]
Earliest = Annotated[
    bool,
    typer.Option("--earliest", help="Move methods inside the LLM to earlier layers if the retention needs it."),
]


def retention_option(default: str | bool = True) -> Any:
    """Return the option ``--retention``; `default` is shown where the command sets it itself."""
    about = "Fraction of video tokens kept, a count such as 512t, or calibrated[:FILE]."
    return typer.Option("--retention", help=about, show_default=default)


Retention = Annotated[str, retention_option()]
TokensKept = Annotated[
    int | None,
    typer.Option(
        "--tokens", help="Video tokens kept, in place of --retention: 512 is 512t.", min=1, show_default=False
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.", min=1)]


def check_question(question: str) -> None:
    """Refuse an empty question.

    Raises
    ------
    PromptError
    """
    if not question.strip():
        raise PromptError("the question is empty: write what you want to know")


def budget_asked(retention: str | None, tokens: int | None) -> str | None:
    """Return the retention asked for as a text, be it as a number of tokens.

    Raises
    ------
    EvaluationError
        If both were given.
    """
    if tokens is None:
        return retention
    if retention is not None:
        raise EvaluationError(f"--tokens {tokens} and --retention {retention} are two budgets: leave one of them out")
    return f"{tokens}t"


def named_model(model: str | None) -> str:
    """Return the model of ``--model``, which has no default for videos and questions of one's own.

    Raises
    ------
    ModelError
    """
    if model is None:
        raise ModelError(
            "which model? Give --model: a folder, a hub id as OWNER/NAME, or 'testbed', a toy that knows only the "
            "scenes of `vidsieve testbed render`"
        )
    return model


def frames_asked(frames: str | None, fps: float | None) -> dict[str, Any] | None:
    """Return what `answering.read` takes; None where a rule decides.

    By default these are 16 frames; with a rate, `frames` is the most.
    """
    count = None if frames is None else parse_frames(frames)
    if count is not None and not isinstance(count, int):
        return None
    if fps is None:
        return {"frames": 16 if count is None else count, "fps": None, "max_frames": None}
    return {"frames": None, "fps": fps, "max_frames": count}


def frames_by_rule(frames: str, fps: float | None, methods: Sequence[Compressor], model: Any = None) -> dict[str, Any]:
    """Return what `answering.read` takes where the rule of the one method decides, and print how many frames it reads.

    Raises
    ------
    RetentionError
        If there is no rule, not exactly one method, or a rate too; if the rule is not of `model`, where it is given.
    """
    rule = parse_frames(frames)
    assert not isinstance(rule, int)
    if len(methods) != 1:
        raise RetentionError(f"--frames {frames} is for one method that keeps --tokens: name one with --method")
    if fps is not None:
        raise RetentionError(f"--frames {frames} chooses the frames: leave --fps out")
    from vidsieve.adapters.fingerprint import model_digest
    from vidsieve.compressors.calibrated import frames_for

    count = frames_for(methods[0], rule, "" if model is None else model_digest(model))
    out.print(
        f"frames: {count}, by the rule of {methods[0].describe()}; the vision encoder's cost grows with them",
        markup=False,
        soft_wrap=True,
    )
    return {"frames": count, "fps": None, "max_frames": None}


def parse_share(text: str | None, in_folder: bool = True) -> tuple[int, int]:
    """Return this process's shard, counted from 0, and the number of shards: from ``2/4``, or torchrun's environment.

    Raises
    ------
    EvaluationError
    """
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise EvaluationError(f"--share is the number of a process and how many there are, as 2/4; got {text!r}")
    if not in_folder:  # nothing could put the shares together
        raise EvaluationError("--share is of a run in a folder that all processes write to: give --out FOLDER too")
    return int(first) - 1, int(second)


def words(text: str) -> list[str]:
    """Return the parts of a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]
