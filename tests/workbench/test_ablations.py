"""The ablation tables: runs shared and resumed, differences with their errors, words for differences that are none."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from vidsieve.errors import UnknownNameError
from vidsieve.evaluation import experiment
from vidsieve.training.settings import SETTINGS, config_of
from workbench.testbed import ablating
from workbench.testbed.ablating import (
    AblationTask,
    ablation_table,
    chosen_tables,
    difference,
    perform,
    runs_of,
    tabulated,
)
from workbench.testbed.ablations import TABLES, AblationCondition, AblationTable

TINY = {"steps": 1, "prompts_per_step": 1, "token_rollouts": 4, "frame_rollouts": 0, "log_every": 1}


def test_every_condition_is_one_that_can_be_trained():
    for table in TABLES:
        labels = [condition.label for condition in table.conditions]
        assert len(set(labels)) == len(labels) > 1
        for condition in table.conditions:
            config_of(table.method, condition.variant, condition.settings)
    assert len({table.name for table in TABLES}) == len(TABLES)


def test_tables_share_runs_and_a_first_look_at_all_comes_before_the_second_seed():
    runs = runs_of(TABLES, 3, 24)
    assert len({run.result for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    single = sum(len(table.conditions) for table in TABLES)
    assert len([run for run in runs if run.seed == 0]) < single, "the base is run once"
    limited = [table for table in TABLES if table.seeds == 1][:1]
    assert limited and len(runs_of(limited, 5, 24)) == len(limited[0].conditions)
    (claimed,) = [table for table in TABLES if table.name == "pull"]
    assert len(runs_of([claimed], 5, 24)) == 5 * len(claimed.conditions)


def test_a_run_is_performed_once_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    table = AblationTable("t", "cacovid", "", (AblationCondition("a", TINY, probes=True),), probes=True)
    (run,) = runs_of([table], 1, 24)
    result = perform(run, tmp_path)
    assert result["clusters"].keys() == {"", "dense-b"} and len(result["clusters"]["dense-b"]) == 24
    assert "cacovid[dense-b]/0.05" in result["marks"] and {len(marks) for marks in result["marks"].values()} == {24}
    assert {"cacovid/0.1", "cacovid[other question]/0.05"} <= result["marks"].keys()
    (tmp_path / run.result).unlink()
    shutil.rmtree(tmp_path / run.folder / "policy")
    assert perform(run, tmp_path)["marks"] == result["marks"]
    monkeypatch.setattr(ablating, "train_policy", lambda *a, **k: pytest.fail("trained again"))
    assert perform(run, tmp_path) == json.loads((tmp_path / run.result).read_text())
    (fewer,) = runs_of([table], 1, 12)
    assert fewer.folder == run.folder and fewer.result != run.result
    assert {len(marks) for marks in perform(fewer, tmp_path)["marks"].values()} == {12}


def test_a_task_has_the_tables_of_its_trainings(tmp_path, monkeypatch):
    """With trainings that are stood in for: the table is that of the same results put together by hand."""
    conditions = (AblationCondition("a", {"seed": 1}), AblationCondition("b", {"seed": 2}))
    table = AblationTable("t", "cacovid", "why", conditions)
    task = AblationTask([table], 2, 8, tmp_path)
    results = {}
    for number, name in enumerate(task.units()):
        marks = "".join("01"[(place + number) % 3 == 0] for place in range(8))
        both = {"cacovid/0.1": marks, "cacovid/0.05": marks[::-1]}
        results[name] = {"marks": both, "clusters": {"": [0, 0, 1, 1, 2, 2, 3, 3]}, "minutes": 1.0}
    monkeypatch.setattr(AblationTask, "_results", iter(results.values()))
    shown = experiment.run(task, [])
    assert shown.result["tables"] == [tabulated(table, 2, 8, results)]
    assert shown.title == "t (cacovid, 2 seeds, 8 questions)" and [row[0] for row in shown.rows] == ["a", "b"]


def test_no_training_is_two_runs():
    """Else two processes would train in one folder at once."""
    folders = [run.folder for run in runs_of(TABLES, 3, 480)]
    assert len(folders) == len(set(folders))


def test_a_difference_has_the_errors_of_seeds_and_of_scenes():
    """Simulated: gaps with a known spread over seeds and over scenes; 95 % of intervals hold the truth."""
    draw = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), 10)
    held = 0
    for _ in range(300):
        seeds, scenes = draw.normal(0, 0.03, 5), draw.normal(0, 0.05, 30)
        chance = 0.6 + 0.1 + seeds[:, None] + scenes[clusters][None]
        ours = draw.random((5, 300)) < chance
        base = draw.random((5, 300)) < 0.6
        gap = difference(ours, base, clusters.tolist())
        held += gap.interval[0] <= 0.1 <= gap.interval[1]
    assert 0.9 <= held / 300 <= 0.99
    one = difference(ours[:1], base[:1], clusters.tolist())
    assert one.mean == pytest.approx(float(ours[0].mean() - base[0].mean())) and np.isnan(one.stderr)


def test_tables_name_differences_that_are_none():
    table = AblationTable(
        "t", "cacovid", "why", (AblationCondition("a", {"seed": 1}), AblationCondition("b", {"seed": 2}))
    )
    clusters = [i // 4 for i in range(80)]
    right = {"cacovid/0.1": "1" * 80, "cacovid/0.05": "10" * 40}
    wrong = {"cacovid/0.1": "0" * 80, "cacovid/0.05": "01" * 40}
    results = {}
    for run in runs_of([table], 2, 80):
        marks = right if run.condition.label == "a" else wrong
        results[run.result] = {"marks": marks, "clusters": {"": clusters}, "minutes": 1.0}
    made = tabulated(table, 2, 80, results)
    assert made["rows"][1]["0.1"]["difference"] == -1 and made["rows"][0]["0.1"]["difference"] is None
    text = ablation_table(made).to_markdown()
    assert "| a | 1.000 | – | 0.500 | – | 1.0 |" in text
    assert "| b | 0.000 | -1.000 ± 0.000 | 0.500 | no difference (+0.000 ± 0.000) | 1.0 |" in text


def test_a_transfer_table_compares_each_place_with_its_own_first_row():
    conditions = (AblationCondition("a", {"seed": 1}), AblationCondition("b", {"seed": 2}))
    table = AblationTable("t", "cacovid", "why", conditions, transfer=True)
    results = {}
    for run in runs_of([table], 1, 80):
        first = run.condition.label == "a"
        here, there = "1" * 80, "1" * 80 if first else "10" * 40
        marks = {
            f"cacovid{at}/{keep:g}": here if at == "" else there for at in ("", "[dense-b]") for keep in (0.1, 0.05)
        }
        scenes = [i // 4 for i in range(80)]
        results[run.result] = {"marks": marks, "clusters": {"": scenes, "dense-b": scenes}, "minutes": 1.0}
    rows = tabulated(table, 1, 80, results)["rows"]
    assert [row["label"] for row in rows] == ["a", "a — in dense-b", "b", "b — in dense-b"]
    assert [row["0.1"]["difference"] for row in rows] == [None, None, 0.0, -0.5]


def test_one_seed_gives_no_verdict_and_defaults_are_part_of_a_run(monkeypatch):
    table = AblationTable(
        "t", "cacovid", "why", (AblationCondition("a", {"seed": 1}), AblationCondition("b", {"seed": 2}))
    )
    results = {}
    for run in runs_of([table], 1, 80):
        marks = "01"[run.condition.label == "a"] * 80
        results[run.result] = {
            "marks": {"cacovid/0.1": marks, "cacovid/0.05": marks},
            "clusters": {"": [i // 4 for i in range(80)]},
            "minutes": 1.0,
        }
    kept = json.loads(json.dumps(tabulated(table, 1, 80, results), allow_nan=False))  # as a page reads it
    assert "| b | 0.000 | -1.000 (one seed) |" in ablation_table(kept).to_markdown()
    before = runs_of([table], 1, 80)[0].folder
    monkeypatch.setitem(SETTINGS, ("cacovid", "ours"), SETTINGS["cacovid", "ours"] | {"head_lr": 0.5})
    assert runs_of([table], 1, 80)[0].folder != before


def test_unknown_tables_are_named():
    assert chosen_tables([]) == list(TABLES)
    with pytest.raises(UnknownNameError, match="sampling"):
        chosen_tables(["samplin"])


def test_no_two_conditions_of_a_table_are_the_same_run():
    for table in TABLES:
        assert len(runs_of([table], 1, 24)) == len(table.conditions), table.name
