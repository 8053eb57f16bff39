"""Answer the groups of a batch on workers of Ray Data, each with the model; needs the extra `ray`.

Only numbers of groups and answers travel: workers read the input and the videos themselves, from absolute paths that
mean the same on every machine. Ray's own `RAY_ADDRESS` names a cluster; without it Ray starts on this machine.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidsieve.io.limits import Limits, limits
from vidsieve.io.texts import json_line
from vidsieve.io.versions import warn_untested
from vidsieve.serving.batch_groups import Answerer, BatchError, BatchSettings, Outcomes, Rows, answer_groups

TASK_ROWS, MAX_TASKS = 32, 1024
"""Rows that a worker takes at once, while this makes no more tasks than that."""
RETRIES = 3
"""Repeats of a task whose worker died; without a limit Ray repeats it for ever."""


class RayWorker:
    """A model on a worker; a call yields the outcomes of each group as JSON."""

    def __init__(
        self,
        settings: BatchSettings,
        path: Path,
        root: Path,
        confined: bool,
        digest: str,
        readers: int,
        threads: int,
        bounds: Limits,
    ) -> None:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(threads)  # as in the process that began the run: the order of sums depends on it
        vars(limits).update(vars(bounds))
        self.rows, self.settings, self.readers = Rows(path, root, settings.batch, confined), settings, readers
        if self.rows.digest != digest:
            raise BatchError(f"{path} differs from the file of the same name where the run was started")
        self.answerer = Answerer(settings)

    def __call__(self, task: Mapping[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """Answer the groups of a task."""
        groups = (int(group) for group in task["data"])
        for group, outcomes in answer_groups(self.rows, groups, self.settings, self.readers, self.answerer):
            yield {"group": [group], "outcomes": [json_line(outcomes)]}


def answer_on_ray(rows: Rows, groups: Iterable[int], settings: BatchSettings, readers: int, workers: int) -> Outcomes:
    """Yield the outcomes of groups as workers finish them.

    Raises
    ------
    BatchError
        If Ray Data is not installed, cannot be reached, has no room for the workers, or one of them failed.
    """
    ray, data = import_ray()
    started = not ray.is_initialized()
    try:
        if started:
            _start(ray)
        gpu = settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
        kind = "GPU" if gpu else "CPU"
        room = int(ray.cluster_resources().get(kind, 0))
        if room < workers:  # Ray would wait for ever
            raise BatchError(f"{workers} workers need a {kind} each, and Ray has {room}: give a smaller --ray")
        numbers = np.fromiter(groups, np.int64)
        tasks = min(MAX_TASKS, len(numbers), max(4 * workers, len(numbers) * rows.size // TASK_ROWS))
        dataset = data.from_numpy(np.array_split(numbers, tasks))
        dataset.context.enable_progress_bars = False
        dataset.context.target_max_block_size = 1  # a group's outcomes leave the worker at once
        source = (rows.path.resolve(), rows.root, rows.confined, rows.digest)
        arguments = (settings, *source, readers, torch.get_num_threads(), limits)
        with warnings.catch_warnings():  # before Ray 2.64 there is no other argument for retries
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            answered = dataset.map_batches(
                RayWorker,
                batch_size=None,
                concurrency=workers,
                num_cpus=1,
                num_gpus=int(gpu),
                max_task_retries=RETRIES,
                fn_constructor_args=arguments,
            )
        for row in answered.iter_rows():
            yield int(row["group"]), json.loads(row["outcomes"])
    except ray.exceptions.RayError as error:
        raise BatchError(f"a worker of Ray failed: {_cause(error)}; what was answered is in the journal") from None
    finally:
        if started:
            ray.shutdown()


def import_ray() -> tuple[Any, Any]:
    """Return ray and ray.data.

    Raises
    ------
    BatchError
    """
    try:
        ray, data = import_module("ray"), import_module("ray.data")
    except ImportError:
        raise BatchError("--ray needs Ray Data: pip install 'vidsieve[ray]'") from None
    warn_untested("ray", ray.__version__)
    return ray, data


def _start(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS")
    options = {} if address else {"include_dashboard": False, "object_store_memory": 300 * 2**20}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BatchError(f"cannot reach Ray at {address or 'this machine'}: {error}") from None
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are reported once, by us


def _cause(error: BaseException) -> str:
    """Return the last line of what a worker raised."""
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
