"""`vidsieve stream`: questions about a video while it plays, from bounded memory."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Annotated, Any

import typer
from rich.markup import escape

from vidsieve.cli import options, output, shared
from vidsieve.cli.progress import Bar
from vidsieve.errors import StreamError
from vidsieve.retention import Calibration, parse_budget
from vidsieve.video import check_file

PART = 64  # frames that are read from the file at a time


def stream(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    question: Annotated[
        list[str] | None,
        typer.Option(
            help="What to ask at the end, or SECONDS=QUESTION; may be repeated. Without it: the lines you type.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    method: Annotated[
        str,
        typer.Option(help="What tokens stay: a method that scores, name:variant, a policy, random, uniform or recent."),
    ] = "frame_difference",
    memory: Annotated[int, typer.Option(help="Tokens kept at most.", min=1)] = 2048,
    reader: Annotated[
        str | None,
        typer.Option(help="A method that chooses among them for each question.", show_default=False),
    ] = None,
    retention: Annotated[
        str | None,
        typer.Option(
            help="Fraction of the tokens in memory that the reader keeps, or a count such as 512t.", show_default="0.25"
        ),
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second.", callback=options.positive)] = 1.0,
    layout: options.Layout = None,
    positions: options.Positions = None,
    max_new_tokens: options.NewTokens = 64,
    seed: options.Seed = 0,
    threads: options.Threads = 0,
    json: options.Json = None,
) -> None:
    """Ask questions about a video while it is read; only its best tokens are remembered.

    Without --question the video plays at its own speed, and lines that you type are asked as they come.
    """
    check_file(video)
    output.check_output(json, reads=[video])
    if retention is not None and reader is None:
        raise StreamError("--retention is what a reader keeps of the memory: give --reader too, or leave it out")
    budget = parse_budget(retention or "0.25")
    if isinstance(budget, Calibration):
        raise StreamError("a reader has a retention or a count, and no calibrated one: give --retention 0.25")
    waiting = sorted((_timed(text) for text in question or ()), key=lambda asked: asked[0])
    shared.set_threads(threads)
    from vidsieve import loading
    from vidsieve.evaluation.conditions import method_for
    from vidsieve.streaming import BASELINES, Stream
    from vidsieve.testbed.files import is_scene, toy_warning
    from vidsieve.video.reading import read_parts, read_video

    shared.quiet()
    first = read_video(video, frames=1)
    model = options.named_model(model or ("testbed" if is_scene(first) else None))
    toy = loading.is_testbed(model)
    chosen: Any = method if method in BASELINES else method_for(method, model)
    chooser = method_for(reader, model).with_retention(budget) if reader else None
    network, processor = shared.load_model(model, layout, dtype, device, positions)
    watched = Stream(network, processor, chosen, memory, reader=chooser, seed=seed)
    answers: list[dict[str, Any]] = []

    def ask(text: str, second: float) -> None:
        if toy and (warning := toy_warning(first, text, processor)):
            output.note(warning)
        result = watched.ask(text, max_new_tokens=max_new_tokens)
        output.out.print(f"{second:g} s: [bold]{escape(result.text)}[/]", highlight=False)
        output.out.print(f"  {result.memory}", highlight=False)
        answers.append({"question": text, "second": second, **result.as_dict()})

    live, second = not waiting, 0.0
    if live:
        output.err.print("playing: type a question and press Enter; Ctrl-D ends the questions")
    typed, begun = _typed() if live else SimpleQueue(), time.monotonic()
    bar: AbstractContextManager[Any] = nullcontext() if live else Bar("frames")
    with bar as advance:
        number = 0
        for part, total in read_parts(video, fps, frames=1 if live else PART):
            for picture, moment in zip(part.pixels, part.timestamps.tolist(), strict=True):
                while waiting and waiting[0][0] < moment and number:
                    at, text = waiting.pop(0)
                    ask(text, at)
                if live:
                    time.sleep(max(0.0, begun + moment - time.monotonic()))
                watched.push(picture[None], moment)
                number, second = number + 1, moment
                for text in _arrived(typed):
                    ask(text, second)
            if not live:
                advance(number, total)
    for at, text in waiting:
        if second < at < math.inf:
            output.note(f"the video ends at {second:g} s, before {at:g} s")
        ask(text, second)
    if live:
        for text in iter(typed.get, None):
            ask(text, second)
    output.write_json(json, {"video": str(video), "model": model, "memory": memory, "answers": answers})


def _timed(text: str) -> tuple[float, str]:
    """Return the time and the words of a question: SECONDS=QUESTION, or the end."""
    head, sign, rest = text.partition("=")
    try:
        second, words = (float(head), rest) if sign else (math.inf, text)
    except ValueError:
        if re.fullmatch(r"[\d:., ]+[a-z]*", head):
            raise StreamError(f"a question's time is a number of seconds, as 90=what ?; got {head!r}") from None
        second, words = math.inf, text
    options.check_question(words)
    if not second >= 0:
        raise StreamError(f"a question is asked at 0 seconds or later, got {head}")
    return second, words


def _typed() -> SimpleQueue[str | None]:
    """Return a queue that the lines of stdin arrive in, None at its end."""
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            if line.strip():
                lines.put(line.strip())
        lines.put(None)

    Thread(target=read, daemon=True).start()
    return lines


def _arrived(lines: SimpleQueue[str | None]) -> Iterator[str]:
    """Yield the questions that have arrived; the end of the input stays for later."""
    while True:
        try:
            line = lines.get_nowait()
        except Empty:
            return
        if line is None:
            lines.put(None)
            return
        yield line
