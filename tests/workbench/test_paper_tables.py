"""The papers' tables as they were copied: whole, and their own averages follow from their own cells."""

from __future__ import annotations

import pytest

from vidsieve.errors import UnknownNameError
from vidsieve.evaluation.protocols import PROTOCOLS
from workbench.papers.published import published, tables, value


def by_row(table):
    rows = {}
    for cell in published(table):
        rows.setdefault((cell.model, cell.row, cell.retention), {})[cell.column] = cell.number
    return rows


@pytest.mark.parametrize(
    ("table", "rows", "columns", "averaged"),
    [
        ("cacovid:table1", 49, 9, ("longvideobench", "mlvu", "mlvu-test", "videomme")),
        ("score:table1", 15, 8, ("lvbench", "mlvu", "videomme")),
        ("score:table4", 7, 4, ("lvbench", "mlvu", "videomme")),
    ],
)
def test_averages_follow_from_their_cells(table, rows, columns, averaged):
    found = by_row(table)
    assert len(found) == rows and all(len(cells) == columns for cells in found.values())
    off = {
        row: round(sum(cells[name] for name in averaged) / len(averaged) - cells["average"], 3)
        for row, cells in found.items()
    }
    # SCORE's HoliTom at 40 % is printed .6 lower than the mean of what is beside it, some others by .1 to .3.
    assert sum(abs(gap) <= 0.11 for gap in off.values()) >= 0.8 * len(off), off
    assert all(abs(gap) < 0.7 for gap in off.values()), off


def test_video_mme_is_the_mean_of_its_lengths():
    for table in ("cacovid:table1", "score:table1", "score:table2", "score:table5"):
        for row, cells in by_row(table).items():
            mean = sum(cells[f"videomme:{part}"] for part in ("short", "medium", "long")) / 3
            assert abs(mean - cells["videomme"]) < 1.5, (table, row, mean, cells["videomme"])


def test_every_table_is_there_and_a_wrong_name_is_told():
    assert sorted(tables()) == [f"{paper}:table{n}" for paper in ("cacovid", "score") for n in range(1, 6)]
    assert value("score:table3", "score", "0.1", "prefill ms") == "527 ± 110"
    assert value("cacovid:table2", "divprune", "0.1", "prefill ms") is None
    with pytest.raises(UnknownNameError, match="score:table3"):
        published("score:table33")


def test_protocols_have_the_retentions_of_their_tables():
    for name, table in (("cacovid:llava-onevision", "cacovid:table1"), ("score:qwen2.5-vl", "score:table1")):
        protocol, model = PROTOCOLS[name], name.partition(":")[2]
        kept = {cell.retention for cell in published(table) if cell.model == model} - {"1"}
        assert {f"{retention:g}" for retention in protocol.retentions} == kept
        assert set(protocol.benchmarks) <= {cell.column for cell in published(table)}
