"""Parts that commands share: running a task, loading a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from vidsieve.cli.output import command_line, err, out, print_table, write_json, write_report
from vidsieve.errors import EvaluationError

if TYPE_CHECKING:
    from vidsieve.evaluation.conditions import Condition
    from vidsieve.evaluation.experiment import Task
    from vidsieve.evaluation.table import Table


@contextmanager
def stoppable(kept: Path | None) -> Iterator[None]:
    """On Ctrl-C, print where the results so far are kept, and end the command with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        results = f"the results so far are in {kept}: the same command resumes"
        err.print(f"stopped; {results if kept is not None else 'nothing is kept without --out'}", soft_wrap=True)
        raise typer.Exit(130) from None


def run_task(
    task: Task,
    conditions: Sequence[Condition],
    units: str,
    *,
    folder: Path | None = None,
    share: tuple[int, int] = (0, 1),
    report: Path | None = None,
    lead: str = "",
    json: Path | None = None,
) -> Table:
    """Measure a task behind a progress bar, print its table, write its page and its JSON, and return it.

    The command ends here while other shards are unfinished.

    Parameters
    ----------
    units : str
        Name of the units, for the bar.
    lead : str
        First line of the page.

    Raises
    ------
    EvaluationError
        At the end, if every method was refused, whatever became of `random` beside them.
    """
    from vidsieve.cli.progress import Bar
    from vidsieve.evaluation.experiment import run

    with stoppable(folder), Bar(units, len(task.units())) as advance:
        table = run(task, conditions, folder, share=share, command=command_line(), progress=advance)
    if table is None:
        out.print(f"shard finished; the table is written to {folder} once all shards are done")
        raise typer.Exit
    print_table(table)
    if folder is not None:
        out.print(f"written: {folder}")
    if report is not None:
        from vidsieve.report.runs import run_page
        from vidsieve.report.sections import result_sections

        with_answers = None if "benchmark" not in table.result else folder
        sections = result_sections(table) if with_answers is None else run_page(with_answers)[1]
        write_report(report, table.title, lambda: sections, lead)
    write_json(json, table.to_json())
    asked = {one.method.title for one in conditions if one.method is not None}
    measured = {row["method"] for row in table.result["rows"]}
    if asked and not (asked - {"random"} or asked) & measured:
        raise EvaluationError("no method could run: the reasons are below the table")
    return table


def load_model(
    name: str, layout: str | None = None, dtype: Any = None, device: str = "auto", positions: str | None = None
) -> tuple[Any, Any]:
    """Return `loading.load_model` of the arguments, and say on stderr that it takes its time."""
    from vidsieve import loading

    loading.check_model(name)
    if not err.is_terminal and not loading.is_testbed(name):
        err.print(f"loading {name}", markup=False, highlight=False, soft_wrap=True)
    with err.status(f"loading {escape(name)}"):  # nothing where there is no terminal
        return loading.load_model(name, layout, dtype, device, positions)


def set_threads(count: int) -> None:
    """Limit torch's CPU threads."""
    if count:
        import torch

        torch.set_num_threads(count)


def quiet() -> None:
    """Keep transformers' progress bars and notes out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
