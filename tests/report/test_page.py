"""A report: one file, every text escaped, nothing fetched, and what it says is what was measured."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vidsieve.cli.output import write_report
from vidsieve.errors import OutputError
from vidsieve.evaluation.accuracy import accuracy_table
from vidsieve.evaluation.table import Table
from vidsieve.evaluation.tasks.timing import comparison_table, timing_table
from vidsieve.report import charts
from vidsieve.report.page import FramesOf, Kept, Section, page, write_page
from vidsieve.report.pictures import kept_figure, lit_frames, overlay_video
from vidsieve.report.sections import answer_sections, comparison_sections, result_sections, training_sections
from vidsieve.types import TokenGrid
from vidsieve.video.reading import read_video

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'too'"
GRID = TokenGrid(2, 2, 3)


class Parsed(HTMLParser):
    """Elements of a page with their attributes, and all its text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._inside = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text += data


def video(frames=4):
    pixels = np.random.default_rng(0).integers(0, 255, (frames, 20, 30, 3), dtype=np.uint8)
    return SimpleNamespace(pixels=pixels, timestamps=np.arange(frames) / 2)


def frames_of(**more):
    methods = [Kept("one", [0, 1, 7], np.arange(12.0)), Kept(more.get("name", "two"), [5])]
    return FramesOf.of(video().pixels, [0.0, 0.5, 1.0, 1.5], GRID, methods)


def test_every_text_is_escaped():
    sections = [
        Section(NASTY, NASTY, Table("", (NASTY, "b"), [(NASTY, NASTY)]), alt=NASTY),
        Section("frames", frames=frames_of(name=NASTY)),
    ]
    made = Parsed(page(NASTY, sections, lead=NASTY, command=NASTY, about={NASTY: NASTY}))
    tags = [tag for tag, _ in made.elements]
    assert tags.count("script") == 2, "the data and the page's own"
    assert not any("onerror" in attributes for _, attributes in made.elements)
    assert made.text.count(NASTY) >= 7


def test_the_script_is_given_what_was_kept():
    text = page("t", [Section("frames", frames=frames_of(name=NASTY))])
    data = json.loads(re.search(r'<script type="application/json" id="data1">(.*?)</script>', text, re.DOTALL).group(1))
    assert data["grid"] == [2, 2, 3] and [one["kept"] for one in data["methods"]] == [[0, 1, 7], [5]]
    assert data["methods"][0]["scores"] == [round(255 * n / 11) for n in range(12)]
    assert data["methods"][1] == {"name": NASTY, "kept": [5], "scores": None}
    found = Parsed(text)
    images = [attributes for tag, attributes in found.elements if tag == "img"]
    assert len(images) == 4 and all(i["src"].startswith("data:image/jpeg;base64,") and i["alt"] for i in images)
    assert frames_of().counts == (("one", (2, 1)), ("two", (1, 0)))


def test_nothing_is_fetched_and_the_same_gives_the_same():
    def sections():
        figure = charts.against({"a$b": [(0.1, 50, 3), (0.25, 60, 2)]}, x="kept", y="%", level=("all", 70), log=True)
        return [Section("chart", figure=figure, alt="a line"), Section("frames", frames=frames_of())]

    text = page("t", sections())
    assert text == page("t", sections())
    outside = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, outside
    assert not re.search(r"<(link|iframe|object)\b|@import|url\((?!#)", text)
    assert 'role="img" aria-label="a line"' in text and "#000000" not in text


def test_a_line_of_points_has_its_errors_and_bars_add_up():
    figure = charts.against({"a": [(2, 50, 3), (1, 40, 2)], "b": [(1, 30, 0)]}, x="x", y="y")
    lines = {line.get_label(): line for line in figure.axes[0].containers}
    low = lines["a"][2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in low] == [[38, 42], [47, 53]]
    bars = charts.stacks({"m": {"p": 1.0, "q": 2.0}}, x="ms").axes[0].patches
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0, 1), (1, 2)]


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    write_page(tmp_path / "new" / "r.html", "t", [Section("a", "b")])
    assert (tmp_path / "new" / "r.html").read_text().endswith("</html>")
    with pytest.raises(OutputError):
        write_page(tmp_path / "new" / "r.html" / "x.html", "t", [])


def test_reports_of_answers_and_comparisons():
    trace = {"grid": [2, 2, 3], "indices": [1, 2], "kept": 2}
    said = {
        "answer": NASTY,
        "method": "m",
        "prompt_tokens_before": 20,
        "prompt_tokens_after": 10,
        "videos": [trace],
        "ms": {"select": 2.0, "prefill": 3.5},
    }
    made = Parsed(page("q", answer_sections(video(), NASTY, said, np.ones(12), ("select", "prefill", "generate"))))
    assert "20 → 10 tokens" in made.text and made.text.count(NASTY) == 2 and "5.5" in made.text
    spread = {"mean": 9.0, "p50": 9.0}
    row = {
        "name": "full",
        "key": "full",
        "method": "full",
        "layer_retention": 1.0,
        "real_retention": 1.0,
        "answer": "red",
        "same": True,
        "indices": None,
        "scores": None,
        "ms": {"select": spread, "prefill": spread, "total": spread},
    }
    other = row | {"name": "m", "key": "m", "indices": [3], "same": False, "answer": NASTY}
    refused = {"name": "n", "method": "n", "variant": "ours", "retention": "0.1", "reason": NASTY}
    result = {"frames": 4, "tokens": 12, "repeats": 1, "grid": [2, 2, 3]}
    table = comparison_table(result | {"rows": [row, other], "refused": [refused]})
    made = Parsed(page("c", comparison_sections(video(), "?", table, {"m": torch.arange(12.0)})))
    assert made.text.count(NASTY) == 2 and sum(tag == "option" for tag, _ in made.elements) == 2


def evaluated(**more):
    base = {"variant": "ours", "part": "", "policy": "", "stderr": 0.01, "vs_full": None, "vs_random": None}
    rows = [
        base | {"method": "full", "variant": "-", "retention": "1", "accuracy": 0.9, "layer_retention": 1.0},
        base | {"method": "m", "retention": "0.25", "accuracy": 0.8, "layer_retention": 0.25},
        base | {"method": "m", "retention": "0.1", "accuracy": 0.7, "layer_retention": 0.1},
    ]
    by = {"kind": {"colour": {"accuracy": 0.5, "stderr": 0.1}, "count": {"accuracy": 0.4, "stderr": float("nan")}}}
    rows = [row | {"real_retention": row["layer_retention"], "frames": 16, "by": by} for row in rows]
    refused = [base | {"method": "f", "retention": "0.1", "frames": 16, "reason": NASTY}]
    about = {"benchmark": "B", "figure": "a mean", "questions": 9, "videos": 3}
    return {**about, "rows": rows, "refused": refused, "failed": []} | more


def test_reports_of_evaluations():
    failed = [{"video": "v", "questions": 2, "reason": NASTY}]
    sections = result_sections(accuracy_table(evaluated(failed=failed)))
    titles = [section.title for section in sections]
    assert titles == [
        "Accuracy",
        "Accuracy against retention, 16 frames",
        "Accuracy by kind",
    ]
    cells = {tuple(row[:2]): row for row in sections[0].table.cells}
    assert cells["m", "0.1"][4] == "70.0 ± 1.0" and cells["f", "0.1"][2] == "–"
    assert sections[2].table.cells[0][1:] == ["50.0 ± 10.0", "40.0"]
    assert Parsed(page("e", sections)).text.count(NASTY) == 2


def test_reports_of_training(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": 1 / n, "reward": None}) + "\n" for n in (1, 2)))
    sections = training_sections(path)
    assert [section.title for section in sections] == ["The last step", "Loss"]
    assert sections[1].alt == "loss over 2 measurements, from 1 to 0.5"
    with pytest.raises(OutputError, match="no report"):
        training_sections(tmp_path / "none" / "metrics.jsonl")


def test_reports_of_the_pipeline():
    spread = {"mean": 2.0, "p50": 2.0, "p95": 3.0}
    row = {
        "method": "full",
        "variant": "-",
        "part": "",
        "policy": "",
        "retention": "1",
        "visual": [9, 9],
        "prompt": [12, 12],
        "flops": {"paper": 1e12, "counted": 3e12},
        "peak_MiB": 5.0,
        "break_even": None,
        "times_faster": {"prefill": 1.0, "total": 1.0},
        "ms": {"prefill": spread, "total": spread},
    }
    other = row | {
        "method": "m",
        "variant": "ours",
        "retention": "0.1",
        "flops": {"paper": 1e11, "counted": 1e12},
        "break_even": 16,
    }
    result = {
        "rows": [row, other],
        "refused": [],
        "model": "x",
        "device": "cpu",
        "dtype": "float32",
        "attention": "sdpa",
        "lengths": [16],
        "repeats": 3,
        "new_tokens": 8,
    }
    times, chart, work = result_sections(timing_table(result))
    assert (times.table.rows[0][-2], times.table.rows[1][-2]) == ("–", 16) and chart.figure is not None
    assert work.table.rows[1][6] == "3.00×"


def test_masks_of_methods_are_rows_of_frames():
    figure = kept_figure(np.full((2, 8, 12, 3), 200, np.uint8), TokenGrid(2, 2, 3), {"one$": [0, 7]}, columns=2)
    lit = [axis.images[0].get_array() for axis in figure.axes]
    assert len(lit) == 4 and (lit[0] == 200).all(), "all tokens first"
    assert (lit[2][:4, :4] == 200).all() and (lit[2][4:] < 60).all() and (lit[2][:4, 4:] < 60).all()
    assert (lit[3][:4, 4:8] == 200).all() and (lit[3][:, :4] < 60).all()


def test_frames_that_are_not_shown_are_not_lit(monkeypatch):
    """Of a long video in high resolution all lit frames in float32 would take gigabytes."""
    grid, frames = TokenGrid(8, 1, 1), np.arange(1, 17, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    whole = lit_frames(frames, grid, [0, 3, 7])
    assert (lit_frames(frames, grid, [0, 3, 7], [15, 0, 5]) == whole[[15, 0, 5]]).all()
    asked = []

    def noted(*arguments):
        asked.append(arguments[3])
        return lit_frames(*arguments)

    monkeypatch.setattr("vidsieve.report.pictures.lit_frames", noted)
    kept_figure(frames, grid, {"one": [0]}, columns=3)
    assert [len(shown) for shown in asked] == [3, 3]


def test_an_overlay_shows_kept_tokens_lit_for_as_long_as_the_video(tmp_path):
    frames = np.full((4, 48, 48, 3), 180, np.uint8)
    path = tmp_path / "o.mp4"
    overlay_video(path, frames, 2.0, TokenGrid(2, 2, 2), {"a": [0, 5], "b": [3]})
    video = read_video(path, frames=4)
    assert video.duration == pytest.approx(2.0, abs=0.1) and video.pixels.shape == (4, 312, 576, 3)
    shown = video.pixels[:, 24:].astype(int)
    lit = shown[:, 72::144, 72::144].mean(-1) > 120  # the middle of every token, both methods side by side
    assert lit[0].tolist() == lit[1].tolist() == [[True, False, False, False], [False, False, False, True]]
    assert lit[2].tolist() == lit[3].tolist() == [[False, True, False, False], [False] * 4]
    once = path.read_bytes()
    overlay_video(path, frames, 2.0, TokenGrid(2, 2, 2), {"a": [0, 5], "b": [3]})
    assert path.read_bytes() == once


def test_the_charts_of_a_report_are_written_as_pictures(tmp_path):
    figure = charts.against({"a": [(0.1, 50, 3), (0.25, 60, 2)]}, x="kept", y="%")
    write_report(None, "t", lambda: [Section("A line, drawn", figure=figure), Section("none")], figures=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-line-drawn.png", "a-line-drawn.svg"]
    assert "<svg" in (tmp_path / "a-line-drawn.svg").read_text()


def luminance(colour):
    """Return WCAG's relative luminance of "#rrggbb" or "#rgb"."""
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = (int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4))
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_and_charts_stand_out_from_the_page(scheme):
    """WCAG 2.2 AA: 4.5:1 for text, 3:1 for what charts, the viewer's strips and the focus ring draw."""
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#777", "#fff") == pytest.approx(
        4.48, abs=0.01
    )
    text = page("t", [Section("frames", frames=frames_of())])
    colours = {name: pair.split(", ") for name, pair in re.findall(r"--(\w+): light-dark\((.*?)\)", text)}
    ink, paper, soft, mark = (colours[name][scheme] for name in ("ink", "paper", "soft", "mark"))
    for background in (paper, soft):
        assert contrast(ink, background) >= 4.5 and contrast(mark, background) >= 4.5
    drawn = set(re.findall(r'"(#[0-9a-f]{6})"', text[text.rindex("<script>") :]))
    assert len(drawn) == 2
    for colour in (*charts.COLOURS, *drawn):
        assert contrast(colour, paper) >= 3, (colour, contrast(colour, paper))


def test_every_control_has_a_name_and_every_scrolling_part_a_focus():
    sections = [Section("t", "", Table("", ("a", "b"), [(1, 2)])), Section("frames", frames=frames_of())]
    text = page("t", sections)
    for control in re.findall(r"<(?:input|select)\b", text):
        assert re.search(rf"<label[^>]*>[^<]*{control}", text)
    found = Parsed(text)
    assert [a for tag, a in found.elements if tag == "a" and a.get("href") == "#main"], "past the header by keyboard"
    scrolling = [a for _, a in found.elements if a.get("class") == "wide"]
    assert scrolling and all(a.get("tabindex") == "0" and a.get("role") == "region" for a in scrolling)
    assert ":focus-visible { outline: 3px" in text


def test_a_table_without_names_of_columns_has_no_row_of_heads():
    assert "<thead>" not in Table("", ("", ""), [("a", 1)]).to_html()
    assert "<thead>" in Table("", ("", "b"), [("a", 1)]).to_html()
