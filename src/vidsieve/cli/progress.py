"""Progress of long work: a bar, and for training a live table in a terminal, or a line for each log elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vidsieve.cli.output import err

SHOWN = (
    ("reward", "reward"),
    ("right", "right"),
    ("ce", "cross-entropy"),
    ("dead_groups", "dead groups"),
    ("kept", "kept"),
    ("entropy", "entropy, bits"),
    ("loss", "loss"),
    ("rollouts_per_second", "rollouts a second"),
    ("eval_accuracy", "held-out accuracy"),
    ("eval_ce_excess", "held-out cross-entropy above all tokens'"),
)
"""Metrics in the table, with their labels."""


def seconds_left(spent: float, done: int, left: int, limit: float = float("inf")) -> float:
    """Return the seconds that `left` steps take at the pace of `done` steps in `spent` seconds; at most `limit`."""
    return min(limit, spent / done * left)


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def line(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """Return the metrics of a step as one line."""
    shown = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items() if name != "minutes")
    return f"{step}/{steps}  {metrics.get('minutes', 0):.1f} min  {shown}"


class Progress:
    """The progress of a training run on a console, shown while entered.

    Parameters
    ----------
    console : Console
    max_minutes : float
        Time limit of the run; 0 = none.
    """

    def __init__(self, console: Console, max_minutes: float = 0.0) -> None:
        self.console, self.max_minutes = console, max_minutes
        self.figures: dict[str, float] = {}
        self.step = self.steps = self.first = 0
        self.started = time.perf_counter()
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.console.quiet:
            self._live = Live(console=self.console, get_renderable=self.table, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def tick(self, step: int, steps: int, figures: Mapping[str, float]) -> None:
        """Record the metrics of a step for the table."""
        if not self.first:  # the first step's time includes loading and compiling
            self.first, self.started = step, time.perf_counter()
        self.step, self.steps = step, steps
        self.figures |= figures

    def report(self, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Print a line of metrics, or show them in the table."""
        self.step, self.steps = step, steps
        self.figures |= metrics
        if self._live is None:
            self.console.print(line(step, steps, metrics), highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """Return the table of the latest metrics."""
        table = Table.grid(padding=(0, 2))
        table.add_row("step", f"{self.step}/{self.steps}" if self.steps else "first")
        for name, label in SHOWN:
            if name in self.figures:
                table.add_row(label, f"{self.figures[name]:.3g}")
        done = self.step - self.first
        if done > 0:
            spent = time.perf_counter() - self.started
            limit = 60 * (self.max_minutes - self.figures.get("minutes", 0.0)) if self.max_minutes else float("inf")
            table.add_row("time left", clock(max(0.0, seconds_left(spent, done, self.steps - self.step, limit))))
        return table


MINUTE = 60.0
"""Seconds between two lines of a `Bar` where there is no terminal."""


class Bar:
    """A bar on stderr, or a line a minute where that is no terminal, while entered.

    Entering returns a function of (done, total) that updates it.
    """

    def __init__(self, what: str, total: int | None = 1) -> None:
        # Imported here so that commands without a bar start faster.
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.what, self.total = what, total
        self.bar = RichProgress(
            TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err, transient=True
        )
        self.task = self.bar.add_task(what, total=total)
        self.began = self.said = time.monotonic()
        self.first: int | None = None

    def __enter__(self) -> Callable[..., None]:
        if not err.is_terminal:
            return self._line
        self.bar.start()
        return lambda done, total=None: self.bar.update(self.task, completed=done, total=total)

    def _line(self, done: int, total: int | None = None) -> None:
        """Print how far the work is, if the last line is a minute old."""
        self.total, now = total if total is not None else self.total, time.monotonic()
        if self.first is None:  # a resumed run begins with what is done
            self.first, self.began = done, now
        if now - self.said < MINUTE:
            return
        self.said, fresh = now, done - self.first
        left = ""
        if self.total is not None and fresh > 0:
            left = f", {clock(seconds_left(now - self.began, fresh, self.total - done))} left"
        of = f" of {self.total:,}" if self.total is not None else ""
        err.print(f"{self.what}: {done:,}{of}{left}", highlight=False, soft_wrap=True)

    def __exit__(self, *error: object) -> None:
        if err.is_terminal:
            self.bar.stop()
