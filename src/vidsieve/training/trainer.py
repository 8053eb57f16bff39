"""The loop around an algorithm's train_step: prompts, gradients, steps, metrics, checkpoints."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from vidsieve._version import __version__
from vidsieve.errors import TrainingError, VidsieveError
from vidsieve.io.stopping import StopFlag, stop_on_signal
from vidsieve.policies import Policy
from vidsieve.training import watch
from vidsieve.training.heldout import Best, HeldOut, Maps
from vidsieve.training.processes import Processes
from vidsieve.training.runs import BEST, CHECKPOINT, POLICY, RunFolder, read_metrics
from vidsieve.training.settings import TrainConfig
from vidsieve.types import VideoTokens

Sample = TypeVar("Sample")
Report = Callable[[int, int, dict[str, float]], None]


@dataclass
class StepResult:
    """What one prompt contributes: a loss to differentiate, or None where it teaches nothing, and figures to log.

    `broken` says which reward is not finite in every rollout, where that is why there is no loss.
    """

    loss: Tensor | None
    metrics: dict[str, float] = field(default_factory=dict)
    broken: str = ""


class Trainer(ABC, Generic[Sample]):
    """Base of the training algorithms; a subclass writes `train_step`, `make_optimizer` and its `learning_rate`.

    Gradients are added up prompt by prompt, and over processes, before a step: memory holds one prompt at a time
    (with `iterations`, the prompts of a step), whatever `prompts_per_step` is. Several processes share the prompts of a
    step; each prompt's draws are seeded by its number, so that who takes it changes nothing but the order of sums.

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
        Called in the main process with (step, steps, metrics) whenever metrics are logged.
    origin : dict, optional
        What else a resumed run must have in common with the first: model, data, variant.
    processes : Processes, optional
        Default: this one alone.
    held_out : HeldOut, optional
        What the policy is evaluated on; the best one is kept in ``folder/best``.
    warn : callable, optional
        Called in the main process with the text of an early warning, once for each kind.
    tick : callable, optional
        Called in the main process with (step, steps, figures) after every step.
    """

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        data: Callable[[int], Sample],
        folder: Path,
        report: Report | None = None,
        origin: dict[str, str] | None = None,
        processes: Processes | None = None,
        held_out: HeldOut | None = None,
        warn: Callable[[str], None] | None = None,
        tick: Report | None = None,
    ) -> None:
        self.policy, self.config, self.data, self.folder = policy, config, data, Path(folder)
        self.run = RunFolder(self.folder)
        self.report, self.tick = report or _silent, tick or _silent
        self.warn = warn or (lambda text: None)
        self.origin, self.processes, self.held_out = origin or {}, processes or Processes(), held_out
        self.optimizer = self.make_optimizer()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.generator = torch.Generator()
        self.step = 0
        self.minutes = 0.0
        self.best = Best()
        self.changes: list[dict[str, Any]] = []
        self.warnings: dict[str, dict[str, Any]] = {}
        self._lines: list[dict[str, float]] = []
        self._window: list[dict[str, float]] = []

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser over the policy's trainable parameters."""

    @property
    def iterations(self) -> int:
        """How often in a row the optimiser goes over the same prompts before the next ones come."""
        return 1

    @property
    def rollouts(self) -> int:
        """Answers of the frozen LLM that a prompt costs in one iteration."""
        return 1

    @property
    def own_rate(self) -> bool:
        """Whether the policy itself chooses how many tokens are kept in training."""
        return False

    def run_policy(self, video: VideoTokens) -> Any:
        """Return what the policy makes of a video, in the run's precision."""
        if self.config.precision == "fp32":
            return self.policy(video)
        with torch.autocast(video.embeds.device.type, torch.bfloat16):
            return self.policy(video)

    def prepare(self, sample: Sample) -> Any:
        """Return what `train_step` gets in every iteration over a sample; the sample itself unless said otherwise."""
        return sample

    @abstractmethod
    def train_step(self, sample: Any) -> StepResult:
        """Return loss and figures of one prompt: sample, run, reward, advantage, loss."""

    def learning_rate(self, step: int) -> float:
        """Return the factor on every learning rate at `step`; constant unless a subclass says otherwise."""
        return 1.0

    def fit(self, resume: bool = False, force: bool = False) -> Policy:
        """Run the remaining steps and return the policy, saved in ``folder/policy``.

        Ctrl-C (or SIGTERM) in any process ends the run in all of them after the current step, with a checkpoint; in a
        run of one process a second one ends it at once.

        Parameters
        ----------
        resume : bool
            Go on with the run in the folder, bit for bit as if it had not stopped.
        force : bool
            Go on even where settings or circumstances have changed; the record says what.

        Raises
        ------
        TrainingError
            If a loss or a parameter stops being finite, no reward of a step is, or settings have changed; the last good
            checkpoint stays.
        OutputError
            If the folder cannot be written, holds another run and `resume` is not set, or holds none and it is.
        KeyboardInterrupt
            After Ctrl-C; the text says where the checkpoint is.
        """
        self.processes.check_share(self.config.prompts_per_step)
        if self.processes.together(lambda: self.run.begin(resume)):
            self._load(force)
        else:
            self._save()
        # torchrun passes a signal on to processes that may have had it already: there none of them ends at once.
        with stop_on_signal(patient=self.processes.count > 1) as flag:
            return self._fit(flag)

    def _fit(self, flag: StopFlag) -> Policy:
        self.policy.train()
        maps = Maps(self.held_out, self.policy) if self.held_out is not None else None
        started = time.perf_counter() - 60 * self.minutes
        last_log, since = time.perf_counter(), 0
        while self.step < self.config.steps:
            factor = self.learning_rate(self.step)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self._window.append(self._first() if self.step == 0 else self._optimise())
            self.step, since = self.step + 1, since + 1
            self.minutes = (time.perf_counter() - started) / 60
            late = 0 < self.config.max_minutes <= self.minutes
            late, stop = self.processes.any(late, flag.stop)
            done = late or self.step == self.config.steps
            if self.processes.main:
                self.tick(self.step, self.config.steps, self._window[-1])
            save = self.step % self.config.save_every == 0 or done or stop
            if save and maps is not None:
                self._window[-1]["map_stability"] = maps.stability()
            evaluate = self.held_out is not None and (done or self._every(self.config.eval_every))
            if self._every(self.config.log_every) or done or evaluate:
                pace = since * self.config.prompts_per_step / (time.perf_counter() - last_log)
                clock = {
                    "prompts_per_second": pace,
                    "rollouts_per_second": pace * self.rollouts * self.iterations,
                    "minutes": self.minutes,
                }
                figures = self.held_out.measure(self.policy, self.processes) if self.held_out and evaluate else {}
                self._log(_mean(self._window) | clock | figures)
                if figures and self.best.improved_by(figures, self.step):
                    self._save_policy(BEST)
                self._window, last_log, since = [], time.perf_counter(), 0
            if save:
                self._save()
            if done:
                break
            if stop:
                raise KeyboardInterrupt(
                    f"interrupted after step {self.step} of {self.config.steps}; --resume goes on from there"
                )
        self.policy.eval()
        self._save_policy(POLICY)
        return self.policy

    def _every(self, steps: int) -> bool:
        return steps > 0 and self.step % steps == 0

    def _save_policy(self, name: str) -> None:
        self.policy.config = replace(self.policy.config, training=self.processes.together(self.record))
        self.processes.together(lambda: self.policy.save_pretrained(self.folder / name))

    def record(self) -> dict[str, Any]:
        """Return what a reader of the policy needs to know of its training."""
        last = read_metrics(self.folder)[-1:]
        return {
            "trainer": type(self).__name__,
            "steps": self.step,
            "minutes": round(self.minutes, 2),
            "prompts": self.step * self.config.prompts_per_step,
            "settings": asdict(self.config),
            "last_metrics": last[0] if last else {},
            "best": self.best.as_dict(),
            "warnings": self.warnings,
            "changes": self.changes,
            **self.circumstances(),
        }

    def circumstances(self) -> dict[str, Any]:
        """Return what the last bits of a run depend on beside its settings: they decide in which order sums go."""
        return {
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "torch": str(torch.__version__),
            "device": next(self.policy.parameters()).device.type,
        }

    # -- one step -------------------------------------------------------------------------------------------

    def _first(self) -> dict[str, float]:
        """Run step 1; a run that cannot even do that leaves no folder behind that would be taken for a run."""
        try:
            return self._optimise()
        except Exception:
            if self.processes.main:
                self.run.discard()
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
        figures: list[dict[str, float]] = []
        broken: list[str] = []
        error: VidsieveError | None = None
        try:
            for number in self.processes.share(numbers):
                prompt = held[number] if number in held else self.prepare(self.data(number))
                if self.iterations > 1:
                    held[number] = prompt
                figures.append(self._add_gradient(number, prompt, iteration, broken))
        except VidsieveError as met:
            error = met
        if not any(self.processes.any(error is not None or len(broken) < len(figures))):
            error = TrainingError(
                f"no reward of step {self.step + 1} is finite: stopped; {self._saved()}. {'; '.join(broken[:3])}: look "
                "at the sample, and at the frozen model's dtype (float16 overflows where bfloat16 does not)"
            )
        self.processes.agree(error)
        self.processes.sum_gradients(self.policy.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.grad_clip)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(f"the gradient of step {self.step + 1} is not finite: stopped; {self._saved()}")
        self.optimizer.step()
        return _mean(self.processes.in_order(figures)) | {"gradient_norm": float(norm)}

    def _add_gradient(self, number: int, prompt: Any, iteration: int, broken: list[str]) -> dict[str, float]:
        """Add one prompt's share to the gradients; return its figures, and note in `broken` why there is none."""
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

    def _log(self, metrics: dict[str, float]) -> None:
        line = {"step": self.step} | {key: round(value, 6) for key, value in metrics.items()}
        self.processes.together(lambda: self.run.append(line))
        if self.processes.main:
            self.report(self.step, self.config.steps, metrics)
            self._lines.append(line)
            for name, text in watch.findings(self._lines, self.config.steps, self.own_rate).items():
                if name not in self.warnings:
                    self.warnings[name] = {"step": self.step, "text": text}
                    self.warn(f"{name}: {text}")

    # -- checkpoints ----------------------------------------------------------------------------------------

    def _save(self) -> None:
        header = {
            "step": self.step,
            "minutes": self.minutes,
            "config": asdict(self.config),
            "version": __version__,
            "origin": self.origin | self.circumstances(),
            "window": self._window,
            "changes": self.changes,
            "best": self.best.as_dict(),
            "warnings": self.warnings,
        }
        self.processes.together(lambda: self.run.save(self.policy, self.optimizer, header))

    def _load(self, force: bool) -> None:
        ours = asdict(self.config) | self.origin | self.circumstances()
        defaults = {f.name: f.default for f in fields(self.config)}
        header, changed = self.run.load(self.policy, self.optimizer, ours, defaults, force)
        self.step, self.minutes, self._window = int(header["step"]), float(header["minutes"]), header.get("window", [])
        self.changes = list(header.get("changes", []))
        self.best, self.warnings = Best(**header.get("best", {})), dict(header.get("warnings", {}))
        self.processes.together(lambda: self.run.cut(self.step))
        self._lines = read_metrics(self.folder)
        if changed:
            self.changes.append({"step": self.step, "changed": changed})


def _silent(step: int, steps: int, metrics: dict[str, float]) -> None:
    """Report nothing."""


def draw_seed(seed: int, number: int, iteration: int) -> int:
    """Return the seed of one prompt's draws: the same in whichever process, and after whichever pause, it is taken."""
    return int(np.random.SeedSequence([seed, number, iteration]).generate_state(1, np.uint64)[0] >> 1)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over the rows that have it."""
    keys: Iterator[str] = iter(dict.fromkeys(key for row in rows for key in row))
    return {key: sum(row[key] for row in rows if key in row) / sum(key in row for row in rows) for key in keys}
