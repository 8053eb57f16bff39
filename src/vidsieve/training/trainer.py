"""The loop around an algorithm's `train_step`: prompts, gradients, steps, metrics, evaluations, checkpoints."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from vidsieve._version import __version__
from vidsieve.adapters.adapter import Adapter
from vidsieve.errors import TrainingError
from vidsieve.io.stopping import StopFlag, stop_on_signal
from vidsieve.policies import Policy
from vidsieve.training.heldout import Best, HeldOut
from vidsieve.training.processes import Processes
from vidsieve.training.rollouts import Packing
from vidsieve.training.run_folder import BEST, CHECKPOINT, POLICY, RunFolder, read_metrics
from vidsieve.training.settings import TrainConfig
from vidsieve.training.warning_signs import warnings
from vidsieve.types import VideoTokens

Sample = TypeVar("Sample")
Report = Callable[[int, int, dict[str, float]], None]
"""Called with (step, steps, figures)."""


@dataclass(frozen=True)
class Events:
    """Functions that are called in the main process as a run goes on.

    Parameters
    ----------
    announce : callable
        With lines of text before training begins: the rows that are read, the size of the cache.
    tick, report : callable
        With (step, steps, figures) after every step, and whenever metrics are logged.
    warn : callable
        With the text of an early warning, once for each kind.
    """

    announce: Callable[[str], None] = lambda text: None
    tick: Report = lambda step, steps, figures: None
    report: Report = lambda step, steps, figures: None
    warn: Callable[[str], None] = lambda text: None


@dataclass
class StepResult:
    """The contribution of one prompt: a loss to differentiate, or None where it teaches nothing, and figures to log.

    `broken` names the reward that is not finite in any rollout, where that is why there is no loss.
    """

    loss: torch.Tensor | None
    metrics: dict[str, float] = field(default_factory=dict)
    broken: str = ""


class Trainer(ABC, Generic[Sample]):
    """Base of the training algorithms; a subclass writes `train_step` and `make_optimizer`.

    Gradients are added up prompt by prompt, and over processes, before a step: memory holds one prompt at a time
    (with `iterations`, the prompts of a step), whatever `prompts_per_step` is. Each prompt's draws are seeded by its
    number, so that the process that takes it changes nothing but the order of sums.

    Parameters
    ----------
    adapter : Adapter
        Of the frozen model.
    policy : Policy
    config : TrainConfig
    data : callable
        ``data(i)`` returns sample i, the same on every call, so that a resumed run sees what a straight one sees.
    folder : Path
        Folder of metrics, checkpoints and the trained policy.
    origin : dict, optional
        Model, data and variant, which a resumed run must have in common with the first.
    held_out : HeldOut, optional
        Prompts that the policy is evaluated on; the best one is kept in ``folder/best``.
    processes : Processes, optional
        Default: this one alone.
    events : Events, optional
    """

    def __init__(
        self,
        adapter: Adapter,
        policy: Policy,
        config: TrainConfig,
        data: Callable[[int], Sample],
        folder: Path,
        *,
        origin: dict[str, str] | None = None,
        held_out: HeldOut | None = None,
        processes: Processes | None = None,
        events: Events | None = None,
    ) -> None:
        self.adapter, self.policy, self.config, self.data = adapter, policy, config, data
        self.folder, self.run = Path(folder), RunFolder(Path(folder))
        self.origin, self.held_out = origin or {}, held_out
        self.processes, self.events = processes or Processes(), events or Events()
        self.packing = Packing(adapter.model, config.rollout_tokens)
        if held_out is not None:
            held_out.packing = self.packing
        self.optimizer = self.make_optimizer()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.generator = torch.Generator()
        self.step, self.minutes = 0, 0.0
        self.best = Best()
        self.changes: list[dict[str, Any]] = []
        self.warnings: dict[str, dict[str, Any]] = {}
        self._lines: list[dict[str, float]] = []
        self._window: list[dict[str, float]] = []

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser over the policy's trainable parameters."""

    @abstractmethod
    def train_step(self, sample: Any) -> StepResult:
        """Return loss and figures of one prompt: sample, run, reward, advantage, loss."""

    @property
    def iterations(self) -> int:
        """Optimiser updates on the same prompts within a step."""
        return 1

    @property
    def rollouts(self) -> int:
        """Answers of the frozen LLM that a prompt costs in one iteration."""
        return 1

    @property
    def distils(self) -> bool:
        """True in a step that learns from a teacher: all of objective "distil", and those of a warm-up."""
        return self.config.objective == "distil" or self.step < self.config.warmup_steps

    def prepare(self, sample: Sample) -> Any:
        """Return the argument of `train_step` in every iteration over a sample: the sample itself by default."""
        return sample

    def learning_rate(self, step: int) -> float:
        """Return the factor on every learning rate at `step`: a cosine from 1 to 0 by default."""
        return 0.5 + 0.5 * math.cos(math.pi * step / self.config.steps)

    @property
    def progress(self) -> float:
        """Share of the run that is done: 0 at its first step, 1 at its last."""
        return self.step / max(1, self.config.steps - 1)

    def check_data(self) -> None:
        """Raise TrainingError before a new run if its data cannot teach what the algorithm is to learn."""

    def run_policy(self, video: VideoTokens, *arguments: Any) -> Any:
        """Return the policy's output for a video, in the run's precision."""
        if self.config.precision == "fp32":
            return self.policy(video, *arguments)
        with torch.autocast(video.embeds.device.type, torch.bfloat16):
            return self.policy(video, *arguments)

    def fit(self, resume: bool = False, force: bool = False) -> Policy:
        """Run the remaining steps and return the policy, saved in ``folder/policy``.

        Ctrl-C (or SIGTERM) in any process ends the run in all of them after the current step, with a checkpoint; in a
        run of one process a second one ends it at once.

        Parameters
        ----------
        resume : bool
            Continue the run in the folder, bit for bit as if it had not stopped.
        force : bool
            Continue even if settings or circumstances have changed; the record lists the changes.

        Raises
        ------
        TrainingError
            If a loss or gradient is not finite, if no reward of a step is finite, if settings have changed, or if a
            resumed run has done more steps; the last good checkpoint stays.
        OutputError
            If the folder cannot be written, another process is writing it, it holds a run and `resume` is not set, or
            it holds none and it is.
        KeyboardInterrupt
            After Ctrl-C; the text names the last step.
        """
        self.processes.check_share(self.config.prompts_per_step)
        with closing(self.run):
            if self.processes.together(lambda: self.run.begin(resume, self.events.warn)):
                self._load(force)
            else:
                self.check_data()
                self._save()
            # torchrun passes a signal on to processes that may have had it already: there none of them ends at once.
            with stop_on_signal(patient=self.processes.count > 1) as flag:
                self._loop(flag)
            self.policy.eval()
            self._save_policy(POLICY)
        return self.policy

    def _loop(self, flag: StopFlag) -> None:
        c, done = self.config, self.step >= self.config.steps
        self.policy.train()
        if self.held_out is not None:
            self.held_out.stability(self.policy)  # the scores that the first checkpoint is compared with
        started = time.perf_counter() - 60 * self.minutes
        last_log, steps_since = time.perf_counter(), 0
        while not done:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * self.learning_rate(self.step)
            self._window.append(self._optimise())
            self.step, steps_since = self.step + 1, steps_since + 1
            self.minutes = (time.perf_counter() - started) / 60
            late, stop = self.processes.any(0 < c.max_minutes <= self.minutes, flag.stop)
            done = late or self.step == c.steps
            if self.processes.main:
                self.events.tick(self.step, c.steps, self._window[-1])
            save = done or stop or self.step % c.save_every == 0
            if save and self.held_out is not None:
                self._window[-1]["map_stability"] = self.held_out.stability(self.policy)
            evaluate = self.held_out is not None and (done or (c.eval_every > 0 and self.step % c.eval_every == 0))
            if done or evaluate or self.step % c.log_every == 0:
                pace = steps_since * c.prompts_per_step / (time.perf_counter() - last_log)
                self._log(pace, evaluate)
                last_log, steps_since = time.perf_counter(), 0
            if save:
                self._save()
            if stop and not done:
                raise KeyboardInterrupt(f"interrupted after step {self.step} of {c.steps}; --resume continues it")

    # -- one step -------------------------------------------------------------------------------------------

    def _optimise(self) -> dict[str, float]:
        """Take one step: every iteration over its prompts; return the mean figures."""
        first = self.step * self.config.prompts_per_step
        numbers = range(first, first + self.config.prompts_per_step)
        prompts: dict[int, Any] = {}
        try:
            rows = [self._update(numbers, prompts, iteration) for iteration in range(self.iterations)]
            return _mean(rows) | {"rollouts": float(self.rollouts * self.iterations)}
        except Exception:
            if self.step == 0 and self.processes.main:  # a run without a step is not to be mistaken for a resumable one
                self.run.discard()
            raise

    def _update(self, numbers: range, prompts: dict[int, Any], iteration: int) -> dict[str, float]:
        """Update the policy once; `prompts` keeps the prepared prompts for the iterations to come."""
        self.optimizer.zero_grad(set_to_none=True)
        rows: list[dict[str, float]] = []
        broken: list[str] = []
        with self.processes.agreeing():
            for number in self.processes.share(numbers):
                try:
                    prompt = prompts[number] if number in prompts else self.prepare(self.data(number))
                    if self.iterations > 1:
                        prompts[number] = prompt
                    rows.append(self._add_gradient(number, prompt, iteration, broken))
                except torch.OutOfMemoryError as error:
                    raise TrainingError(
                        f"sample {number} is too large for the GPU's memory: stopped; {self._saved()}. It comes again "
                        "when the run is resumed: take fewer --frames, or leave long videos out"
                    ) from error
        if not any(self.processes.any(len(broken) < len(rows))):
            raise TrainingError(
                f"no reward of step {self.step + 1} is finite: stopped; {self._saved()}. {'; '.join(broken[:3])}: look "
                "at the sample, and at the frozen model's dtype (float16 overflows where bfloat16 does not)"
            )
        self.processes.sum_gradients(self.policy.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.grad_clip)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(f"the gradient of step {self.step + 1} is not finite: stopped; {self._saved()}")
        self.optimizer.step()
        return _mean(self.processes.in_order(rows)) | {"gradient_norm": float(norm)}

    def _add_gradient(self, number: int, prompt: Any, iteration: int, broken: list[str]) -> dict[str, float]:
        """Add one prompt's part to the gradients; return its figures, and append to `broken` why there is none."""
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
        if result.broken:
            broken.append(f"{result.broken} in every rollout of sample {number}")
        return result.metrics

    # -- metrics and checkpoints ----------------------------------------------------------------------------

    def _log(self, pace: float, evaluate: bool) -> None:
        """Write a line: the mean figures since the last one, the pace in prompts a second, an evaluation."""
        metrics = _mean(self._window)
        metrics |= {
            "prompts_per_second": pace,
            "rollouts_per_second": pace * metrics.pop("rollouts"),
            "minutes": self.minutes,
        }
        figures = self.held_out.measure(self.policy, self.processes) if self.held_out and evaluate else {}
        self._window, metrics = [], metrics | figures
        line = {"step": self.step} | {key: round(value, 6) for key, value in metrics.items()}
        self.processes.together(lambda: self.run.append(line))
        if self.processes.main:
            self.events.report(self.step, self.config.steps, metrics)
            self._lines.append(line)
            for name, text in warnings(self._lines, self.config.steps, self.config.own_rate).items():
                if name not in self.warnings:
                    self.warnings[name] = {"step": self.step, "text": text}
                    self.events.warn(f"{name}: {text}")
        if figures and self.best.improved_by(figures, self.step):
            self._save_policy(BEST)

    def record(self) -> dict[str, Any]:
        """Return the training record that is saved with the policy."""
        last = read_metrics(self.folder)[-1:]
        return {
            "trainer": type(self).__name__,
            "steps": self.step,
            "minutes": round(self.minutes, 2),
            "prompts": self.step * self.config.prompts_per_step,
            "settings": asdict(self.config),
            "last_metrics": last[0] if last else {},
            "packing": self.packing.record(),
            **self._state(),
            **self.circumstances(),
        }

    def _state(self) -> dict[str, Any]:
        return {"best": self.best.as_dict(), "warnings": self.warnings, "changes": self.changes}

    def circumstances(self) -> dict[str, Any]:
        """Return the circumstances that change the order of sums, and so the last bits of a run."""
        return {
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "torch": str(torch.__version__),
            "device": next(self.policy.parameters()).device.type,
        }

    def _saved(self) -> str:
        return f"the last good checkpoint is {self.folder / CHECKPOINT}" if self.step else "nothing was saved"

    def _save_policy(self, name: str) -> None:
        self.policy.config = replace(self.policy.config, training=self.processes.together(self.record))
        self.processes.together(lambda: self.policy.save_pretrained(self.folder / name))

    def _save(self) -> None:
        header = {
            "step": self.step,
            "minutes": self.minutes,
            "config": asdict(self.config),
            "version": __version__,
            "origin": self.origin | self.circumstances(),
            "window": self._window,
            **self._state(),
        }
        self.processes.together(lambda: self.run.save(self.policy, self.optimizer, header))

    def _load(self, force: bool) -> None:
        ours = self.config.removed() | asdict(self.config) | self.origin | self.circumstances()
        defaults = {f.name: f.default for f in fields(self.config)}
        header, changed = self.run.load(self.policy, self.optimizer, ours, defaults, force)
        self.step, self.minutes, self._window = int(header["step"]), float(header["minutes"]), header.get("window", [])
        if self.step > self.config.steps:
            raise TrainingError(
                f"the run in {self.folder} has done {self.step} steps of {self.config.steps}: give more steps"
            )
        self.changes = list(header.get("changes", []))
        self.best, self.warnings = Best(**header.get("best", {})), dict(header.get("warnings", {}))
        self.processes.together(lambda: self.run.cut(self.step))
        self._lines = read_metrics(self.folder)
        if changed:
            self.changes.append({"step": self.step, "changed": changed})


def draw_seed(seed: int, number: int, iteration: int) -> int:
    """Return the seed of one prompt's draws: the same in whichever process, and after whichever pause, it is taken."""
    return int(np.random.SeedSequence([seed, number, iteration]).generate_state(1, np.uint64)[0] >> 1)


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over the rows that have it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: sum(row[key] for row in rows if key in row) / sum(key in row for row in rows) for key in keys}
