"""The report of tasks beyond multiple choice."""

from __future__ import annotations

from vidsieve.report.page import Section, TableOf
from vidsieve.report.sections import Row, as_difference, as_figure, named
from workbench.testbed.open_ended import TASKS


def open_sections(result: Row) -> list[Section]:
    """Return the report of tasks beyond multiple choice, as `open_ended.evaluate_open` returns it."""
    lines, lost = [], []
    for row in result["rows"]:
        tasks = [row["tasks"][name] for name in TASKS]
        shown = (f"{as_figure(task['mean'], 100, 1)} ± {as_figure(task['stderr'], 100, 1)}" for task in tasks)
        lines.append((named(row), row["retention"], *shown))
        if row["method"] != "full":
            lost.append((named(row), row["retention"], *(as_difference(task["vs_full"]) for task in tasks)))
    text = f"World {result['world']}, {result['scenes']} scenes. Percent, errors clustered by scene."
    said = [Section("What it is", table=TableOf(("", ""), list(TASKS.items()), frozenset({1})))]
    columns = ("method", "kept", *TASKS)
    found = [Section("Tasks", text, TableOf(columns, lines)), *said]
    text = "Points, paired scene by scene with 95 % intervals; of “false” and “made up” more is worse."
    found.append(Section("What pruning costs", text, TableOf(columns, lost)))
    notes = [(named(row), row["retention"], row["reason"]) for row in result["refused"]]
    if notes:
        found.append(Section("Not possible", table=TableOf(("method", "retention", "why"), notes, frozenset({2}))))
    return found
