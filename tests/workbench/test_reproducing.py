"""From results to the cells of a paper's table."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import typer

from vidsieve.cli.main import app
from vidsieve.cli.train import parsed
from vidsieve.errors import PolicyError
from vidsieve.loading import shipped_policy
from vidsieve.training.settings import CONFIGS, config_of
from workbench.papers.paper_tables import PAPER_TABLES
from workbench.papers.published import published
from workbench.papers.reproducing import accuracy_cells, folder_of, method_of, rows_of, time_cells, training_cells
from workbench.testbed.ablations import TABLES


def _row(method, retention, figure, by=None, policy=""):
    return {
        "method": method,
        "policy": policy,
        "retention": retention,
        "figure": figure,
        "stderr": 0.01,
        "by": by or {},
    }


def test_averages_and_shares_are_of_the_papers_benchmarks():
    short = {"duration": {"short": {"accuracy": 0.7, "stderr": 0.02}}}
    results = {
        "mlvu": {"rows": [_row("full", "1", 0.6), _row("cacovid", "0.1", 0.5, policy="mine")]},
        "videomme": {"rows": [_row("full", "1", 0.8, short), _row("cacovid", "0.1", 0.6, policy="mine")]},
    }
    cells = accuracy_cells("m", results, ("mlvu", "videomme"))
    assert cells["m", "full", "1", "videomme:short"] == {"measured": 70.0, "stderr": 2.0}
    assert cells["m", "mine", "0.1", "average"]["measured"] == pytest.approx(55)
    assert cells["m", "mine", "0.1", "relative"]["measured"] == pytest.approx(100 * 55 / 70)
    fewer = accuracy_cells("m", results, ("mlvu", "lvbench"))
    assert not any(where[3] in ("average", "relative") for where in fewer), "no average of a part of the benchmarks"


def test_rows_and_retentions_are_the_published_ones():
    rows = dict(rows_of("cacovid:table1", "qwen2.5-vl"))
    assert rows["divprune"] == [0.25, 0.2, 0.15, 0.1] and 0.1 not in rows["framefusion"] and "full" not in rows
    assert all(rows_of(name, model) for name, table in PAPER_TABLES.items() for model in table.protocols)


def test_scores_tables_have_the_parts_before_the_llm_alone():
    assert method_of(PAPER_TABLES["score:table1"], "qwen2.5-vl", "holitom", {}).inner is False
    assert method_of(PAPER_TABLES["cacovid:table1"], "qwen2.5-vl", "prunevid", {}).inner is True


def test_a_policy_is_named_for_a_row_or_for_a_model_and_a_row():
    table, mine = PAPER_TABLES["cacovid:table1"], str(shipped_policy("cacovid"))
    assert method_of(table, "qwen2.5-vl", "cacovid", {"qwen2.5-vl:cacovid": mine}).name == "cacovid"
    with pytest.raises(PolicyError, match=r"made by `vidsieve train cacovid RUN"):
        method_of(table, "llava-onevision", "cacovid", {"qwen2.5-vl:cacovid": mine})
    with pytest.raises(PolicyError, match="no policy is there"):
        method_of(table, "llava-onevision", "cacovid", {"cacovid": "nowhere/at/all"})
    ways = [
        method_of(PAPER_TABLES["cacovid:table5"], "llava-onevision", row, {row: mine}).allocation
        for row in ("FrameAvg", "FrameAda", "FrameAda+ST")
    ]
    assert ways == ["frame_avg", "frame_ada", "frame_ada_st"]


def test_the_commands_that_make_missing_policies_train_what_their_row_says():
    group = typer.main.get_command(app).commands["train"]
    made = {}
    for name, table in PAPER_TABLES.items():
        for row, own in table.trained.items():
            words, config = own.options.split(), CONFIGS[own.method]
            context = group.commands[own.method].make_context("train", ["RUN", "--data", own.data, *words])
            given = {n: value for n, value in context.params.items() if value is not None and n in fields_of(config)}
            given |= parsed(config, [value for word, value in pairwise(words) if word == "--set"])
            made[name, row] = config_of(own.method, "paper", given)
    replayed = {
        row: (c.iterations, c.dynamic_ratio) for (name, row), c in made.items() if name.startswith("cacovid:table4")
    }
    assert replayed == {"none": (1, False), "ISF": (1, False), "ISF, ER": (5, False), "ISF, ER, DSR": (5, True)}
    stages = [(c.pseudo_steps, c.steps) for (name, _), c in made.items() if name == "score:table4"]
    assert stages == [(1250, 1250), (1250, 8375)]


def fields_of(config):
    return {item.name for item in dataclasses.fields(config)}


def test_every_training_of_the_papers_has_its_counterpart_on_the_testbed():
    labels = {(table.name, condition.label) for table in TABLES for condition in table.conditions}
    for name, table in PAPER_TABLES.items():
        assert set(table.trained) in (set(), {c.row for c in published(name)} - {"full"})
        assert all((own.ablation, own.label) in labels for own in table.trained.values())


def test_trainings_stand_beside_the_retention_nearest_to_theirs():
    table = PAPER_TABLES["score:table5"]
    rows = [{"label": own.label, "0.1": {"seeds": [0.5 + n, 0.7 + n]}} for n, own in enumerate(table.trained.values())]
    cells = training_cells("m", table, [{"name": "residual", "rows": rows}], {r: ["0.4", "0.1"] for r in table.trained})
    cell = cells["m", "without residual", "0.1", "testbed dense, 10 %"]
    assert cell["measured"] == pytest.approx(60) and cell["stderr"] == pytest.approx(10)
    assert len(cells) == 2


def test_scores_prefill_has_the_compressors_time_in_it():
    ms = {"select": {"mean": 3.0, "sd": 0.5}, "prefill": {"mean": 40.0, "sd": 2.0}}
    row = {"method": "score", "policy": "score", "retention": "0.1", "ms": ms, "visual": (90, 9), "prompt": (100, 19)}
    score = time_cells("m", {"rows": [row]}, ("compressor ms", "prefill ms", "tokens"))
    assert score["m", "score", "0.1", "prefill ms"]["measured"] == 43.0 and len(score) == 3
    cacovid = time_cells("m", {"rows": [row]}, ("compression ms", "prefill ms"))
    assert cacovid["m", "score", "0.1", "prefill ms"]["measured"] == 40.0


def test_benchmarks_are_found_by_their_names(tmp_path):
    (tmp_path / "mlvu").mkdir()
    assert folder_of(tmp_path, "mlvu-test") == tmp_path / "mlvu" == folder_of(tmp_path, "mlvu")
    assert folder_of(tmp_path, "lvbench") is None is folder_of(None, "mlvu")
