"""The page of `vidsieve ui`: choose a video, ask a question, move the retention; see answer, kept tokens and times."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vidsieve.adapters.encoded import Encoded, on_device
from vidsieve.adapters.pruning import adapter_with
from vidsieve.answering import PARTS, Answer, Clock, chat, reply
from vidsieve.compressors.base import Compressor
from vidsieve.errors import PromptError, UnknownNameError, VidsieveError
from vidsieve.io.texts import percent
from vidsieve.io.versions import warn_untested
from vidsieve.loading import is_testbed
from vidsieve.report.pictures import kept_figure
from vidsieve.testbed.files import toy_warning
from vidsieve.types import ENCODER_NEEDS, Need
from vidsieve.video.reading import Video, read_video

CACHED = 4
"""Number of decoded videos, and of encoded prompts, that are kept."""
MOST_LETTERS = 4000
"""Length of the longest question."""
READING, WAITING, PATIENCE = 8, 16, 120.0
"""Questions whose videos are read at a time, questions that wait for that, and seconds that one waits for the model."""
STYLE = """<style>
.gradio-container { --button-primary-background-fill: #0b57d0; --button-primary-background-fill-hover: #0842a0;
  --button-primary-text-color: #ffffff; --slider-color: #1a73e8; --input-placeholder-color: #6a6a73;
  --body-text-color-subdued: #6a6a73; }
.dark .gradio-container, .gradio-container.dark { --input-placeholder-color: #a1a1aa;
  --body-text-color-subdued: #a1a1aa; }
.gradio-container .prose :is(td, th) { padding: .15rem .8rem; border-color: var(--border-color-primary); }
#kept { overflow-x: auto !important; } #kept img { min-width: 40rem; }
#kept :has(> img) { align-items: safe center; }
.gradio-container :focus-visible { outline: 3px solid #1a73e8 !important; outline-offset: 2px; }
</style>"""
"""Colours in place of gradio's that fall short of WCAG's AA contrast, and a focus that is seen."""


class _Latest:
    """The latest values by key, each made once, however many threads ask for it; an error is made anew each time."""

    def __init__(self) -> None:
        self._lock, self._cells = threading.Lock(), OrderedDict[tuple[Any, ...], tuple[threading.Lock, list[Any]]]()

    def get(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        with self._lock:
            lock, values = self._cells.setdefault(key, (threading.Lock(), []))
            self._cells.move_to_end(key)
            while len(self._cells) > CACHED:
                self._cells.popitem(last=False)
        with lock:
            if not values:
                values.append(make())
            return values[0]

    def forget(self, path: Path) -> None:
        with self._lock:
            for key in [key for key in self._cells if key[0] == path]:
                del self._cells[key]


class Desk:
    """Answers questions, one at a time by the model; the latest videos stay decoded, and the latest prompts encoded.

    Videos are read in the threads that ask, several at a time.

    Parameters
    ----------
    model, processor : of a supported family
    methods : mapping
        Name: method; None keeps all tokens.
    frames : int
        Taken evenly from a video.

    Raises
    ------
    NeedError, StageError, PolicyMismatchError
        If a method does not fit the model.
    """

    def __init__(
        self, model: Any, processor: Any, methods: Mapping[str, Compressor | None], *, frames: int = 16
    ) -> None:
        self.adapter, self.processor, self.methods = adapter_with(model, processor), processor, dict(methods)
        self.frames, self._needs = frames, frozenset[Need]()
        for method in self.methods.values():
            if method is not None:
                self.adapter.check(method)
                self._needs |= method.needs & ENCODER_NEEDS
        self._videos, self._prompts, self._model = _Latest(), _Latest(), threading.Lock()

    @torch.no_grad()
    def ask(self, path: str | Path, question: str, method: str, retention: float) -> tuple[Answer, Video]:
        """Return the answer to a question about a video, and the video.

        Raises
        ------
        PromptError
            If the question is empty or too long.
        VidsieveError
            If the model answers others for too long.
        UnknownNameError, VideoError, BudgetError, RetentionError
        """
        if not isinstance(question, str) or not question.strip():
            raise PromptError("the question is empty: ask something")
        if len(question) > MOST_LETTERS:
            raise PromptError(f"the question has {len(question):,} letters: ask in at most {MOST_LETTERS:,}")
        question = question.encode("utf-8", "replace").decode()  # JSON can hold half of a surrogate pair
        if not isinstance(method, str) or method not in self.methods:
            raise UnknownNameError("method", str(method)[:100], self.methods)
        compressor = self.methods[method]
        if compressor is not None:
            compressor = compressor.with_retention(retention)
        path = Path(path).resolve()
        changed = path.stat().st_mtime_ns if os.path.isfile(path) else 0
        clock, device = Clock(), self.adapter.device

        def read() -> Video:
            with clock.part("read video"):
                return read_video(path, frames=self.frames)

        video = self._videos.get((path, changed), read)

        front = None if compressor is None else compressor.front

        def encode() -> Encoded:
            with clock.part("preprocess"):
                inputs = chat(self.processor, video, question)
            with clock.part("encode", device):
                return self.adapter.encode(on_device(inputs, device), needs=self._needs, front=front)

        if not self._model.acquire(timeout=PATIENCE):
            raise VidsieveError("the model is answering others: ask again in a minute")
        try:
            encoded = self._prompts.get((path, changed, question, front), encode)
            return reply(self.adapter, self.processor, encoded, compressor, clock=clock), video
        finally:
            self._model.release()

    def forget(self, path: Path) -> None:
        """Drop what is kept of a video."""
        self._videos.forget(path)
        self._prompts.forget(path)


def build(desk: Desk, model: str) -> Any:
    """Return the page (gradio.Blocks) for a model of that name, not started."""
    import gradio as gr

    warn_untested("gradio", gr.__version__)

    def ask(video: Any, question: Any, method: Any, retention: Any) -> tuple[str, Any, str]:
        if not video:
            raise gr.Error("Choose a video first.", print_exception=False)
        if isinstance(video, dict):  # as it was sent, with other names in older releases
            video = video.get("video", video)["path"]
        try:
            reply, frames = desk.ask(video, question or "", method, retention)
            return shown(reply, frames, toy_warning(frames, question, desk.processor) if toy else "")
        except VidsieveError as error:
            text = str(error).replace(video, Path(video).name)  # without the folder of uploads
            raise gr.Error(text, print_exception=False) from None

    names, toy = list(desk.methods), is_testbed(model)
    about = f"Answers of **{model}** from a part of a video's tokens."
    if toy:
        about += (
            "\n\nThis model is a toy: it knows only the scenes and questions that `vidsieve testbed render` writes."
        )
    with gr.Blocks(title=f"vidsieve: {model}", analytics_enabled=False) as page:
        gr.Markdown(f"# vidsieve\n{about}")
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="Video", sources=["upload"], height=240)
                question = gr.Textbox(
                    label="Question", placeholder="what colour is the old mark ?" if toy else "What happens?"
                )
                method = gr.Dropdown(names, value=names[0], label="Method")
                retention = gr.Slider(
                    0.02, 1.0, value=0.25, step=0.01, label="Retention: fraction of video tokens kept"
                )
                button = gr.Button("Ask", variant="primary")
            with gr.Column():
                answer = gr.Textbox(label="Answer", interactive=False)
                spent = gr.Markdown()
        picture = gr.Plot(label="Kept tokens", show_label=False, elem_id="kept")
        gr.HTML(STYLE)
        inputs, outputs = [video, question, method, retention], [answer, picture, spent]
        events = [button.click, question.submit, retention.release, method.input]
        gr.on(events, ask, inputs, outputs, api_name="ask", preprocess=False, concurrency_limit=READING)
        page.unload(lambda: None)  # last: gradio's clients keep a heartbeat open for it, by which visitors are known
    return page


def shown(answer: Answer, video: Video, warning: str = "") -> tuple[str, Any, str]:
    """Return an answer as the page shows it: text, picture, and a table of times below the warning, if any."""
    figure, (before, after) = None, answer.prompt_tokens
    lines = [f"**Note**: {warning}."] if warning else []
    lines += [f"**{answer.method}**: prompt of {before:,} tokens, the LLM read {after:,}"]
    if answer.traces:
        trace = answer.traces[0]
        lines.append(
            f"{trace.kept:,} of {trace.total:,} video tokens kept ({percent(trace.real_retention)}){trace.inside}"
        )
        rows = {answer.method.partition(" (")[0]: trace.indices}
        figure = kept_figure(video.pixels, trace.grid, rows, "Kept tokens, highlighted", columns=6)
    if "encode" not in answer.ms:
        lines.append("the prompt was encoded before")
    parts = [(part, answer.ms[part]) for part in PARTS if part in answer.ms]
    parts.append(("total", sum(ms for _, ms in parts)))
    table = ["| part | ms |", "|---|--:|", *(f"| {part} | {ms:,.0f} |" for part, ms in parts)]
    return answer.text, figure, "\n\n".join(lines) + "\n\n" + "\n".join(table)
