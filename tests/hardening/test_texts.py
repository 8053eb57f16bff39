"""Texts of strangers' files: they neither command a terminal nor break a page, a picture or a table."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import typer
from rich.table import Table as RichTable

from vidsieve.cli.output import PlainConsole
from vidsieve.evaluation.table import Table
from vidsieve.io.texts import json_line, percent, printable
from vidsieve.report import charts
from vidsieve.report.page import Section, write_page
from vidsieve.report.pictures import contact_sheet, kept_figure, save
from vidsieve.training.data.merging import merge_files
from vidsieve.types import TokenGrid

ATTACKS = {
    "colour": "a\x1b[31mb",
    "title of the window": "\x1b]0;owned\x07",
    "clear the screen": "\x1b[2J\x1b[H",
    "eight-bit escape": "\x9b31mred",
    "carriage return": "safe.mp4\rerased",
    "backspaces": "no\x08\x08yes",
    "NUL": "a\x00b",
    "right-to-left override": "video\u202e4pm.exe",
    "isolate": "\u2066hidden\u2069",
    "half a surrogate pair": "a\ud800b",
    "name of a file that is not UTF-8": "\udcff\udcfe.mp4",
    "noncharacter": "\uffff",
}


def shows_nothing_hidden(text: str) -> bool:
    return printable(text) == text and text.encode().decode() == text


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_a_text_cannot_command_the_terminal(text):
    screen = io.StringIO()
    console = PlainConsole(file=screen, width=80)
    cells = RichTable(text, title=text)
    cells.add_row(text)
    for thing in (text, cells, f"[bold]{text}"):
        console.print(thing)
    assert shows_nothing_hidden(screen.getvalue())


@pytest.mark.parametrize("text", [*ATTACKS.values(), "é 好"], ids=[*ATTACKS, "letters"])
def test_a_line_of_json_can_be_written_and_read(text):
    line = json_line({text: [text]})
    assert json.loads(line.encode()) == {text: [text]} and line.count("\n") == 1


def test_rows_in_a_folder_whose_name_is_not_utf8_can_be_merged(tmp_path):
    folder = tmp_path / "\udcff"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"x")
    (folder / "rows.jsonl").write_text('{"video": "a.mp4", "caption": "é"}\n')
    merge_files([(folder / "rows.jsonl", None)], tmp_path / "out.jsonl", only="captions")
    assert json.loads((tmp_path / "out.jsonl").read_text())["video"] == "\udcff/a.mp4"


def test_colours_of_the_command_itself_stay():
    screen = io.StringIO()
    PlainConsole(file=screen, force_terminal=True, width=40).print("[bold red]error:[/] \x1b[32mgreen")
    assert "\x1b[1;31merror:" in screen.getvalue() and "\x1b[32m" not in screen.getvalue()


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_a_page_of_such_texts_is_valid_utf8_without_control_characters(tmp_path, text):
    lines = {text: [(1.0, 2.0, 0.5)], "other": [(1.0, 2.0, 0.5), (2.0, 3.0, 0.0)]}
    figures = (
        charts.against(lines, x="x", y="y", level=(text, 1.0)),
        charts.cloud(lines, x="x", y="y"),
        charts.stacks({text: {text: 1.0}}, x="x"),
    )
    table = Table(text, (text, "b"), [(text, 1)], notes=(text,))
    sections = [Section(text, text, table), *(Section(text, figure=figure, alt=text) for figure in figures)]
    write_page(tmp_path / "page.html", text, sections, lead=text, command=text, about={text: text})
    assert shows_nothing_hidden((tmp_path / "page.html").read_bytes().decode())


@pytest.mark.parametrize("text", [*ATTACKS.values(), r"$5 \frac{ and $6", r"\$$"], ids=[*ATTACKS, "formula", "dollars"])
def test_a_picture_is_drawn_whatever_names_say(tmp_path, text):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    for ending in ("png", "svg"):
        save(kept_figure(frames, TokenGrid(2, 2, 2), {text: [0, 3]}, text), tmp_path / f"kept.{ending}")
        save(charts.against({text: [(1, 1, 0)], "b": [(1, 2, 0)]}, x="x", y="y"), tmp_path / f"line.{ending}")
    contact_sheet(tmp_path / "sheet.png", [(frames, text)])
    assert printable((tmp_path / "kept.svg").read_text()) == (tmp_path / "kept.svg").read_text()


def test_a_cell_does_not_end_early_in_markdown():
    assert r"| a\|b | 1 |" in Table("t", ("name", "n"), [("a|b", 1)]).to_markdown()


def test_a_name_cannot_forge_a_line_of_its_own():
    run = [
        sys.executable,
        "-c",
        "from vidsieve.cli import main; main()",
        "ask",
        "a\x1b[2J\nerror: all is lost\udcff.mp4",
        "x",
    ]
    done = subprocess.run(run, capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"\x1b" not in done.stderr
    assert done.stderr.decode().startswith("error: a\ufffd[2J error: all is lost\ufffd.mp4 does not exist")


def test_an_unexpected_error_is_one_line_and_its_traceback_is_shown_on_request(monkeypatch, capsys):
    from vidsieve.cli import main
    from vidsieve.io import faults

    app = typer.Typer()

    @app.command()
    def broken() -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(sys, "argv", ["vidsieve"])
    for debug in (False, True):
        monkeypatch.setattr(faults, "debug", debug)
        with pytest.raises(RuntimeError if debug else SystemExit):
            main(app)
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("error: unexpected RuntimeError: first (") and "--debug" in text


def test_percentages_have_three_digits_and_no_zeros_behind_them():
    assert [percent(share) for share in (1, 0.25, 57 / 576, 0.00432)] == ["100 %", "25 %", "9.9 %", "0.432 %"]
