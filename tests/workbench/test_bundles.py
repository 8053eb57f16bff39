"""Result bundles: sound ones pass, and everything that can be wrong with one is told."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from vidsieve.errors import EvaluationError
from workbench.papers.bundles import bundled, faults, read_bundle
from workbench.papers.paper_tables import PAPER_TABLES
from workbench.papers.published import published, tables

ABOUT = {
    "testbed": False,
    "command": "python -m workbench reproduce",
    "settings": {"llava-video": {"questions": 3}},
    "missing": [],
    "versions": {"vidsieve": "1", "torch": "2", "transformers": "5"},
    "machine": {},
}
TABLE = "score:table2"


def made():
    """Return a bundle in which the relative figure of two rows can be worked out."""
    at = ("llava-video", "full", "1"), ("llava-video", "score", "0.25")
    cells = {
        (*at[0], "videomme"): {"measured": 60.0, "stderr": 1.0},
        (*at[0], "average"): {"measured": 60.0},
        (*at[1], "average"): {"measured": 54.0},
        (*at[1], "relative"): {"measured": 90.0},
    }
    return bundled(TABLE, cells, **ABOUT)


@pytest.mark.parametrize("table", list(tables()))
def test_every_published_table_makes_a_sound_bundle_before_anything_is_measured(table):
    bundle = bundled(table, {}, **ABOUT)
    assert faults(bundle) == [] and len(bundle["cells"]) == len(published(table))
    assert table in PAPER_TABLES, "and there is a way to run it"


def test_a_bundle_has_published_and_measured_side_by_side():
    cells = {(c["row"], c["retention"], c["column"]): c for c in made()["cells"]}
    assert cells["full", "1", "videomme"]["published"] == "60.7" and cells["full", "1", "videomme"]["measured"] == 60.0
    assert cells["score", "0.25", "relative"]["measured"] == 90.0
    assert cells["full", "1", "average"]["published"] is None, "what the paper does not print stands behind"
    assert faults(made()) == []


def _cell(bundle, row, column):
    return next(c for c in bundle["cells"] if (c["row"], c["column"]) == (row, column))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b.pop("versions"), "versions is missing"),
        (lambda b: b.update(format=2), "it has format 2, this version reads 1"),
        (lambda b: b.update(table="score:table7"), "unknown table 'score:table7'"),
        (lambda b: _cell(b, "full", "videomme").update(published="63.0"), "has 63.0 as published; it is 60.7"),
        (lambda b: _cell(b, "full", "videomme").update(measured="high"), "measured is 'high', no number"),
        (lambda b: _cell(b, "full", "videomme").update(stderr=-1), "stderr is -1"),
        (lambda b: _cell(b, "full", "videomme").pop("note"), "a cell has other fields"),
        (lambda b: b["cells"].pop(0), "videomme:short is there 0 times"),
        (lambda b: b["cells"].append(dict(b["cells"][0])), "videomme:short is there 2 times"),
        (lambda b: b["versions"].pop("torch"), "versions do not tell torch"),
        (lambda b: b["settings"].clear(), "settings say nothing of llava-video"),
        (lambda b: _cell(b, "score", "average").update(measured=55.0), "relative is 90.0, the averages say 91.7"),
    ],
)
def test_what_is_wrong_with_a_bundle_is_told(tmp_path, change, said):
    bundle = copy.deepcopy(made())
    change(bundle)
    path = tmp_path / "b.json"
    path.write_text(json.dumps(bundle))
    with pytest.raises(EvaluationError, match="no sound result bundle") as error:
        read_bundle(path)
    assert said in str(error.value)


def test_files_that_are_no_bundles_are_refused(tmp_path):
    path = tmp_path / "b.json"
    path.write_text("[")
    with pytest.raises(EvaluationError, match="is no result bundle"):
        read_bundle(path)
    assert faults([1]) == ["it is no table of fields"]


def test_the_bundles_that_come_with_the_documents_are_sound():
    files = sorted(Path("docs/results").glob("*.json"))
    assert files
    for path in files:
        assert read_bundle(path)["cells"]
