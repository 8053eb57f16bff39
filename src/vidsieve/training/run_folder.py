"""The folder of a training run: metrics line by line, the checkpoint, and the check of a resumed run's settings.

Everything but a line of metrics is written to a temporary file and renamed, so that a run killed at any moment leaves a
complete checkpoint. Metrics may be ahead of it; resuming cuts them back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import field

from vidsieve.errors import OutputError, TrainingError
from vidsieve.io.bounded import Limits, lines, opened, parsed, read_json_lines
from vidsieve.io.checkpoints import load_state, read_header, save_state
from vidsieve.io.files import writing
from vidsieve.policies import Policy
from vidsieve.training.heldout import Best

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
POLICY, BEST = "policy", "best"

FREE = frozenset({"steps", "max_minutes", "log_every", "save_every", "eval_every", "workers", "rollout_tokens"})
"""Settings that a resumed run may change; the record lists the changes."""


class RunFolder:
    """The files of a run in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoint, self.metrics = path, path / CHECKPOINT, path / METRICS

    def begin(self, resume: bool) -> bool:
        """Make the folder ready and delete half-written files of a killed process; return True if a run is resumed.

        Raises
        ------
        OutputError
            If it cannot be written, holds a run and `resume` is not set, or holds none and it is.
        """
        there = os.path.exists(self.checkpoint)
        if there and not resume:
            raise OutputError(f"{self.path} holds a run already: continue it with --resume, or choose another folder")
        # A run that was killed before its first checkpoint has done nothing yet: it begins, resumed or not.
        if not there and resume and not os.path.exists(self.metrics):
            raise OutputError(f"{self.path} holds no run to resume: leave --resume out to begin one")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.path / POLICY, self.path / BEST):
                for half in folder.glob(".*.part"):
                    half.unlink()
            if not there:
                self.metrics.write_text("", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write into {self.path}: {error.strerror or error}") from None
        return there

    def discard(self) -> None:
        """Delete a run that could not begin, and the folder if nothing else is in it."""
        for path in (self.checkpoint, self.metrics):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: it was there before
            self.path.rmdir()

    def _remedy(self) -> str:
        if os.path.exists(self.checkpoint):
            return f"the last good checkpoint is {self.checkpoint}: free disk space and continue with --resume"
        return "nothing was saved: free disk space and begin again"

    def save(self, policy: Policy, optimizer: torch.optim.Optimizer, header: Mapping[str, Any]) -> None:
        """Write the checkpoint; raise OutputError if it cannot be written, then the one before stays."""
        try:
            save_state(self.checkpoint, {"policy": policy}, optimizer, header)
        except OutputError as error:
            raise OutputError(f"{error}; {self._remedy()}") from error

    def load(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        ours: Mapping[str, Any],
        defaults: Mapping[str, Any],
        force: bool = False,
    ) -> tuple[dict[str, Any], list[str]]:
        """Restore a run; return its header, and the changes since it was written, allowed or forced.

        Parameters
        ----------
        ours : mapping
            Settings and circumstances of the resumed run.
        defaults : mapping
            Values of settings that are newer than the run.
        force : bool
            Continue even with other settings.

        Raises
        ------
        TrainingError
            If the checkpoint is unreadable, of another network, or of other settings without `force`.
        """
        header = read_header(self.checkpoint)
        try:
            if not math.isfinite(msgspec.convert(header, _RunHeader).minutes):
                raise ValueError(f"minutes is {header['minutes']}")
        except ValueError as error:
            raise TrainingError(
                f"the header of {self.checkpoint} is damaged: {error!s:.300}; start again in another folder"
            ) from None
        theirs = {**defaults, **header["config"], **header.get("origin", {})}
        changed = {
            name: f"{name} was {theirs[name]!r}, is {value!r}"
            for name, value in ours.items()
            if name in theirs and theirs[name] != value
        }
        refused = [text for name, text in changed.items() if name not in FREE]
        if refused and not force:
            raise TrainingError(
                f"the run in {self.path} was begun with other settings: {'; '.join(refused)}. Use those again, or "
                "continue regardless with --force"
            )
        load_state(self.checkpoint, {"policy": policy}, optimizer)
        return header, list(changed.values())

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line of metrics; raise OutputError if it cannot be written."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.metrics}: {error.strerror or error}; {self._remedy()}") from None

    def cut(self, step: int) -> None:
        """Drop metrics that were logged after `step`, so that no step appears twice."""
        kept: list[bytes] = []
        if os.path.exists(self.metrics):
            with opened(self.metrics, TrainingError) as file:
                kept = [line.rstrip(b"\n") for _, line, _ in lines(file, Limits.row) if _step_of(line) <= step]
        with writing(self.metrics) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))


class _RunHeader(msgspec.Struct):
    """What is read of a checkpoint's header."""

    step: Annotated[int, msgspec.Meta(ge=0)]
    minutes: Annotated[float, msgspec.Meta(ge=0)]
    config: dict[str, Any]
    origin: dict[str, Any] = {}
    window: list[dict[str, float]] = []
    changes: list[dict[str, Any]] = []
    best: Best = field(default_factory=Best)
    warnings: dict[str, dict[str, Any]] = {}


def _step_of(line: bytes) -> float:
    try:
        return float(parsed(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return float("inf")


Figure = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | float | None


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, one dict per logged step.

    Raises
    ------
    TrainingError
        If the file cannot be read, or a line of it is damaged.
    """
    path, advice = Path(folder) / METRICS, "remove that line"
    rows = read_json_lines(path, TrainingError, advice)
    for number, row in enumerate(rows, 1):
        try:
            msgspec.convert(row, dict[str, Figure])
        except msgspec.ValidationError as error:
            raise TrainingError(f"entry {number} of {path} is damaged ({error!s:.300}): {advice}") from None
        if "step" not in row:
            raise TrainingError(f"entry {number} of {path} has no step: {advice}")
    return rows
