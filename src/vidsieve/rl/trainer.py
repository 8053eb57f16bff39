"""The shell around an algorithm's train_step: seeds, steps, metrics, checkpoints, resume."""

from __future__ import annotations

import json
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from vidsieve._version import __version__
from vidsieve.checkpoints import load_state, read_header, save_state
from vidsieve.errors import OutputError, TrainingError
from vidsieve.files import writing
from vidsieve.policies import Policy
from vidsieve.rl.settings import TrainConfig

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"

Sample = TypeVar("Sample")


@dataclass
class StepResult:
    """What one prompt contributes: a loss to differentiate, or None where it teaches nothing, and figures to log.

    `broken` says which reward is not finite in every rollout, where that is why there is no loss.
    """

    loss: Tensor | None
    metrics: dict[str, float] = field(default_factory=dict)
    broken: str = ""


class Trainer(ABC, Generic[Sample]):
    """Base of the training algorithms; a subclass writes `train_step` and its `schedule`.

    Parameters
    ----------
    policy : Policy
    config : TrainConfig
    data : callable
        ``data(i)`` returns sample i; the same i gives the same sample on every call, so that a resumed run
        sees what a straight one sees.
    folder : Path
        Where metrics, checkpoints and the trained policy go.
    report : callable, optional
        Called with (step, steps, metrics) whenever metrics are logged.
    origin : dict, optional
        What else a resumed run must have in common with the first: model, data, variant.
    """

    def __init__(
        self, policy: Policy, config: TrainConfig, data: Callable[[int], Sample], folder: Path,
        report: Callable[[int, int, dict[str, float]], None] | None = None, origin: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.origin = origin or {}
        self._stop = False
        self.policy, self.config, self.data, self.folder = policy, config, data, Path(folder)
        self.report = report or (lambda step, steps, metrics: None)
        self.optimizer = self.make_optimizer()
        self.generator = torch.Generator()
        self.step = 0
        self.minutes = 0.0

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser over the policy's trainable parameters."""

    @property
    def iterations(self) -> int:
        """How often in a row the optimiser goes over the same prompts before the next ones come."""
        return 1

    def prepare(self, sample: Sample) -> Any:
        """Return what `train_step` gets in every iteration over a sample; the sample itself unless said otherwise."""
        return sample

    @abstractmethod
    def train_step(self, sample: Any) -> StepResult:
        """Return loss and figures of one prompt: sample, run, reward, advantage, loss."""

    def learning_rate(self, step: int) -> float:
        """Return the factor on every learning rate at `step`; constant unless a subclass says otherwise."""
        return 1.0

    def fit(self, resume: bool = False) -> Policy:
        """Run the remaining steps and return the policy, saved in ``folder/policy``.

        Ctrl-C ends the run after the current step, with a checkpoint; a second one ends it at once.

        Raises
        ------
        TrainingError
            If a loss or a parameter stops being finite, or no reward of a step is; the last good checkpoint stays.
        OutputError
            If the folder cannot be written, holds another run and `resume` is not set, or holds none and it is.
        KeyboardInterrupt
            After Ctrl-C; the text says where the checkpoint is.
        """
        self._open_folder(resume)
        with self._stoppable():
            return self._fit()

    def _fit(self) -> Policy:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.policy.train()
        window: list[dict[str, float]] = []
        started = time.perf_counter() - 60 * self.minutes
        last_log = time.perf_counter()
        while self.step < self.config.steps:
            factor = self.learning_rate(self.step)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            window.append(self._first() if self.step == 0 else self._optimise())
            self.step += 1
            self.minutes = (time.perf_counter() - started) / 60
            done = self.step == self.config.steps or 0 < self.config.max_minutes <= self.minutes
            if self.step % self.config.log_every == 0 or done:
                metrics = _mean(window)
                metrics["prompts_per_second"] = (
                    len(window) * self.config.prompts_per_step / (time.perf_counter() - last_log)
                )
                metrics["minutes"] = self.minutes
                self._log(metrics)
                window, last_log = [], time.perf_counter()
            if self.step % self.config.save_every == 0 or done or self._stop:
                for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
                self._save()
            if done:
                break
            if self._stop:
                raise KeyboardInterrupt(
                    f"interrupted after step {self.step} of {self.config.steps}; --resume goes on from there"
                )
        self.policy.eval()
        self.policy.config = replace(self.policy.config, training=self.record())
        self.policy.save_pretrained(self.folder / "policy")
        return self.policy

    def record(self) -> dict[str, Any]:
        """Return what a reader of the policy needs to know of its training."""
        last = read_metrics(self.folder)[-1:]
        return {
            "trainer": type(self).__name__, "steps": self.step, "minutes": round(self.minutes, 2),
            "prompts": self.step * self.config.prompts_per_step, "settings": asdict(self.config),
            "last_metrics": last[0] if last else {}, "torch": torch.__version__, "threads": torch.get_num_threads(),
        }  # fmt: skip

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        before = signal.getsignal(signal.SIGINT)
        # Signals can be caught in the main thread only; a job in the background ignores this one, and shall.
        if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
            yield
            return

        def stop(*_: object) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # -- one step -------------------------------------------------------------------------------------------

    def _first(self) -> dict[str, float]:
        """Run step 1; a run that cannot even do that leaves no folder behind that would be taken for a run."""
        try:
            return self._optimise()
        except Exception:
            for name in (CHECKPOINT, METRICS):
                (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # not empty: it was there before
                self.folder.rmdir()
            raise

    def _saved(self) -> str:
        return f"the last good checkpoint is {self.folder / CHECKPOINT}" if self.step else "nothing was saved"

    def _optimise(self) -> dict[str, float]:
        first = self.step * self.config.prompts_per_step
        numbers = range(first, first + self.config.prompts_per_step)
        held: dict[int, Any] = {}
        return _mean([self._iterate(numbers, held, iteration) for iteration in range(self.iterations)])

    def _iterate(self, numbers: range, held: dict[int, Any], iteration: int) -> dict[str, float]:
        """Take one step over prompts; `held` keeps them for the iterations to come."""
        self.optimizer.zero_grad(set_to_none=True)
        figures, broken = [], []
        for number in numbers:
            prompt = held[number] if number in held else self.prepare(self.data(number))
            if self.iterations > 1:
                held[number] = prompt
            self.generator.manual_seed(draw_seed(self.config.seed, number, iteration))
            result = self.train_step(prompt)
            if result.loss is not None:
                if not bool(torch.isfinite(result.loss)):
                    raise TrainingError(
                        f"the loss of step {self.step + 1} is {float(result.loss.detach())}: stopped; {self._saved()}. "
                        f"Lower the learning rate, or look at sample {number}"
                    )
                (result.loss / self.config.prompts_per_step).backward()  # type: ignore[no-untyped-call]
                result.metrics["loss"] = float(result.loss.detach())
            figures.append(result.metrics)
            broken += [f"{result.broken} in every rollout of sample {number}"] if result.broken else []
        if len(broken) == len(numbers):
            raise TrainingError(
                f"no reward of step {self.step + 1} is finite: stopped; {self._saved()}. {'; '.join(broken[:3])}: look "
                "at the sample, and at the frozen model's dtype (float16 overflows where bfloat16 does not)"
            )
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.grad_clip)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(f"the gradient of step {self.step + 1} is not finite: stopped; {self._saved()}")
        self.optimizer.step()
        return _mean(figures) | {"gradient_norm": float(norm)}

    def _log(self, metrics: dict[str, float]) -> None:
        line = {"step": self.step} | {key: round(value, 6) for key, value in metrics.items()}
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.report(self.step, self.config.steps, metrics)

    # -- checkpoints ----------------------------------------------------------------------------------------

    def _open_folder(self, resume: bool) -> None:
        checkpoint = self.folder / CHECKPOINT
        if checkpoint.exists():
            if not resume:
                raise OutputError(f"{self.folder} holds a run already: go on with --resume, or choose another folder")
            self._load(checkpoint)
            return
        if resume:
            raise OutputError(f"{self.folder} holds no run to go on with: leave --resume out to begin one")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / METRICS).write_text("", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write into {self.folder}: {error.strerror or error}") from None
        self._save()

    def _save(self) -> None:
        header = {
            "step": self.step, "minutes": self.minutes, "config": asdict(self.config), "version": __version__,
            "origin": self.origin,
        }  # fmt: skip
        save_state(self.folder / CHECKPOINT, {"policy": self.policy}, self.optimizer, header)

    def _load(self, path: Path) -> None:
        header = read_header(path)
        ours, theirs = asdict(self.config) | self.origin, header["config"] | header.get("origin", {})
        free = {"steps", "max_minutes", "log_every", "save_every", "rollout_tokens"}
        changed = [
            f"{k} was {theirs.get(k)!r}, is {v!r}" for k, v in ours.items() if k not in free and theirs.get(k) != v
        ]
        if changed:
            raise TrainingError(f"the run in {self.folder} was begun with other settings: {'; '.join(changed)}")
        header = load_state(path, {"policy": self.policy}, self.optimizer)
        self.step, self.minutes = int(header["step"]), float(header["minutes"])
        self._cut_metrics()

    def _cut_metrics(self) -> None:
        """Drop metrics that were logged after the checkpoint, so that no step appears twice."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.step]
        with writing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def draw_seed(seed: int, number: int, iteration: int) -> int:
    """Return the seed of one prompt's draws: the same in whichever process, and after whichever pause, it is taken."""
    return int(np.random.SeedSequence([seed, number, iteration]).generate_state(1, np.uint64)[0] >> 1)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over the rows that have it."""
    keys: Iterator[str] = iter(dict.fromkeys(key for row in rows for key in row))
    return {key: sum(row[key] for row in rows if key in row) / sum(key in row for row in rows) for key in keys}


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, one dict per logged step."""
    return [json.loads(line) for line in (Path(folder) / METRICS).read_text(encoding="utf-8").splitlines()]
