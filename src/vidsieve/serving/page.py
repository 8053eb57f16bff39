"""The page of `vidsieve ui`: a video, a question, a slider; what is kept, said and spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vidsieve.answering import PARTS
from vidsieve.errors import VidsieveError
from vidsieve.io.versions import warn_untested
from vidsieve.report.pictures import kept_figure
from vidsieve.serving.desk import Desk, Reply


def build(desk: Desk, title: str, examples: list[list[str]]) -> Any:
    """Return the page (gradio.Blocks), not started.

    Parameters
    ----------
    desk : Desk
        What answers.
    title : str
        The model's name.
    examples : list of [path, question]
        Videos to pick.
    """
    import gradio as gr

    warn_untested("gradio", gr.__version__)

    def ask(video: str | None, question: str, method: str, retention: float) -> tuple[str, Any, str]:
        if not video:
            raise gr.Error("Choose a video first.", print_exception=False)
        try:
            return shown(desk.ask(video, question or "", method, retention))
        except VidsieveError as error:
            said = str(error).replace(video, Path(video).name)  # where the page keeps uploads says nothing
            raise gr.Error(said, print_exception=False) from None

    names = list(desk.methods)
    with gr.Blocks(title=f"vidsieve: {title}", analytics_enabled=False) as page:
        gr.Markdown(f"# vidsieve\nWhat **{title}** answers from a part of a video's tokens.")
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="Video", sources=["upload"], height=320)
                question = gr.Textbox(label="Question", placeholder="What happens?")
                method = gr.Dropdown(names, value=names[0], label="Method")
                retention = gr.Slider(0.02, 1.0, value=0.25, step=0.01, label="Part of the video's tokens that is kept")
                button = gr.Button("Ask", variant="primary")
                if examples:
                    gr.Examples(examples, [video, question])
            with gr.Column():
                answer = gr.Textbox(label="Answer", interactive=False)
                spent = gr.Markdown()
                picture = gr.Plot(label="Kept tokens are lit")
        inputs, outputs = [video, question, method, retention], [answer, picture, spent]
        button.click(ask, inputs, outputs, api_name="ask")
        question.submit(ask, inputs, outputs, api_name=False)
        # What is encoded stays: another retention or method selects anew, and asks the LLM.
        retention.release(ask, inputs, outputs, api_name=False)
        method.input(ask, inputs, outputs, api_name=False)
    return page


def shown(reply: Reply) -> tuple[str, Any, str]:
    """Return an answer as the page has it: text, picture, and a table of what it took."""
    made = reply.answer
    before, after = made.prompt_tokens
    lines = [f"**{made.method}**: prompt of {before:,} tokens, the LLM read {after:,}"]
    figure = None
    if made.traces:
        trace = made.traces[0]
        lines.append(f"{trace.kept:,} of {trace.total:,} video tokens kept ({trace.real_retention:.1%}){trace.inside}")
        figure = kept_figure(reply.video.pixels, trace.grid, {made.method: trace.indices}, columns=6)
    lines.append("video encoded before, features reused" if reply.reused else "video decoded and encoded")
    parts = [(part, made.ms[part]) for part in PARTS if part in made.ms]
    parts.append(("in all", sum(ms for _, ms in parts)))
    table = ["| part | ms |", "|---|--:|", *(f"| {part} | {ms:.0f} |" for part, ms in parts)]
    return made.text, figure, "\n\n".join(lines) + "\n\n" + "\n".join(table)
