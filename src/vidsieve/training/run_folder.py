"""The folder of a training run: metrics line by line, the checkpoint, and the check of a resumed run's settings.

Everything but a line of metrics is written to a temporary file and renamed, so that a run killed at any moment leaves a
complete checkpoint. Metrics may be ahead of it; resuming cuts them back. The checkpoint before the last one is kept, to
take its place where that is damaged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import field

from vidsieve.errors import OutputError, TrainingError
from vidsieve.io.bounded import lines, opened, parsed, read_json_lines
from vidsieve.io.checkpoints import load_state, read_header, save_state
from vidsieve.io.files import METRICS, locked, refuse_foreign, refuse_other_run, writing
from vidsieve.io.limits import limits
from vidsieve.policies import Policy
from vidsieve.training.heldout import Best

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
POLICY, BEST = "policy", "best"

FREE = frozenset({"steps", "max_minutes", "log_every", "save_every", "eval_every", "workers", "rollout_tokens"})
"""Settings that a resumed run may change; the record lists the changes."""


class RunFolder:
    """The files of a run in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoint, self.metrics = path, path / CHECKPOINT, path / METRICS
        self.previous, self._lock = path / PREVIOUS, ExitStack()

    def begin(self, resume: bool, warn: Callable[[str], None] = lambda text: None) -> bool:
        """Lock the folder and make it ready; return True if a run is resumed.

        Half-written files of a killed process are deleted. In the place of a damaged checkpoint comes the one before.

        Parameters
        ----------
        warn : callable
            Called with the text about a damaged checkpoint.

        Raises
        ------
        OutputError
            If it cannot be written, another process is writing it, or it holds a run of another command, a run and
            `resume` is not set, or none and it is.
        TrainingError
            If no checkpoint is readable.
        """
        refuse_other_run(self.path, METRICS)
        checkpoints = self.checkpoint, self.previous
        refuse_foreign(self.metrics, begun=any(map(os.path.exists, checkpoints)))
        # A run that was killed before its first checkpoint has done nothing yet: it begins, resumed or not.
        if resume and not any(map(os.path.exists, (*checkpoints, self.metrics))):
            raise OutputError(f"{self.path} holds no run to resume: leave --resume out to begin one")
        self._lock.enter_context(locked(self.metrics))
        there = any(map(os.path.exists, checkpoints))
        if there and not resume:
            raise OutputError(f"{self.path} holds a run already: continue it with --resume, or choose another folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.path / POLICY, self.path / BEST):
                for half in folder.glob(".*.part"):
                    half.unlink()
            if not there:
                self.metrics.write_text("", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write into {self.path}: {error.strerror or error}") from None
        if there:
            self._restore(warn)
        return there

    def _restore(self, warn: Callable[[str], None]) -> None:
        """Put the checkpoint before in the place of one that is damaged or gone."""
        try:
            read_header(self.checkpoint)
        except TrainingError as damaged:
            try:
                step = read_header(self.previous)["step"]
            except TrainingError:
                raise damaged from None
            os.replace(self.previous, self.checkpoint)
            warn(f"{self.checkpoint} was damaged: the checkpoint before it, of step {step}, has taken its place")

    def close(self) -> None:
        """Unlock the folder."""
        self._lock.close()

    def discard(self) -> None:
        """Delete a run that could not begin, and the folder if nothing else is in it."""
        for path in (self.checkpoint, self.previous, self.metrics):
            path.unlink(missing_ok=True)
        self.close()
        with suppress(OSError):  # not empty: it was there before
            self.path.rmdir()

    def _remedy(self) -> str:
        if os.path.exists(self.checkpoint):
            return f"the last good checkpoint is {self.checkpoint}: free disk space and continue with --resume"
        return "nothing was saved: free disk space and begin again"

    def save(self, policy: Policy, optimizer: torch.optim.Optimizer, header: Mapping[str, Any]) -> None:
        """Write the checkpoint; raise OutputError if it cannot be written, then the last one stays."""
        try:
            save_state(self.checkpoint, {"policy": policy}, optimizer, header, keep=self.previous)
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
        if unknown := sorted(header["config"].keys() - ours.keys()):
            raise TrainingError(
                f"{self.path} holds a run of another method, with settings that this one has not: "
                f"{', '.join(unknown[:5])}; name another folder"
            )
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
        """Add a line of metrics, on the disk when this returns; raise OutputError if it cannot be written."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.metrics}: {error.strerror or error}; {self._remedy()}") from None

    def cut(self, step: int) -> None:
        """Drop metrics that were logged after `step`, so that no step appears twice, and a last line that breaks off.

        Raises
        ------
        TrainingError
            If another line is damaged.
        """
        kept: list[bytes] = []
        if os.path.exists(self.metrics):
            with opened(self.metrics, TrainingError) as file:
                for number, line, _ in lines(file, limits.row):
                    if not line.endswith(b"\n"):
                        break
                    try:
                        if parsed(line)["step"] <= step:
                            kept.append(line)
                    except (ValueError, KeyError, TypeError):
                        raise TrainingError(
                            f"line {number} of {self.metrics} is damaged: remove that line, and its figures are missing"
                        ) from None
        with writing(self.metrics) as temporary:
            temporary.write_bytes(b"".join(kept))


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
