"""Metrics to TensorBoard and Weights & Biases, beside the run's own file of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vidsieve.errors import TrainingError, UnknownNameError

Write = Callable[[int, Mapping[str, float]], None]

TRACKERS = ("tensorboard", "wandb")
"""Each is an extra of the package, named as the module it needs."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed, before any work is done.

    Raises
    ------
    UnknownNameError
    TrainingError
        With the command that installs what is missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise UnknownNameError("tracker", name, TRACKERS)
        if find_spec(name) is None:
            raise TrainingError(f"{name} is not installed: pip install 'vidsieve[{name}]', or leave it out of --log-to")


@contextmanager
def tracking(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> Iterator[Write]:
    """Give a function that sends a step's metrics to the trackers; none is opened before there is something to send.

    TensorBoard's files are in ``folder/tensorboard``. A run of Weights & Biases is in the project ``vidsieve``, has
    the folder's name, and goes on when the folder's run does.

    Raises
    ------
    UnknownNameError, TrainingError
        As `check_trackers`.
    """
    check_trackers(names)
    opened: list[tuple[Write, Callable[[], None]]] = []

    def write(step: int, metrics: Mapping[str, float]) -> None:
        if not opened:
            makers = {"tensorboard": _tensorboard, "wandb": _wandb}
            opened.extend(makers[name](folder, config, step) for name in dict.fromkeys(names))
        for send, _ in opened:
            send(step, metrics)

    try:
        yield write
    finally:
        for _, close in opened:
            close()


def _tensorboard(folder: Path, config: Mapping[str, Any], first: int) -> tuple[Write, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    # What was logged from here on before a run was killed is not shown twice.
    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def send(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def _wandb(folder: Path, config: Mapping[str, Any], first: int) -> tuple[Write, Callable[[], None]]:
    import wandb

    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    run: Any = wandb.init(
        project="vidsieve", name=folder.name, id=name, resume="allow", dir=str(folder), config=dict(config)
    )

    def send(step: int, metrics: Mapping[str, float]) -> None:
        run.log(dict(metrics), step=step)

    return send, run.finish
