"""Groups of rows answered by workers of Ray Data, each with the model; Ray is imported when it is asked for.

What travels are places in the input and answers: workers read the input and the videos themselves, from paths that
mean the same everywhere, and each decodes ahead of its own model.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vidsieve.io.versions import warn_untested
from vidsieve.serving.batching.ahead import settle
from vidsieve.serving.batching.model import Answerer
from vidsieve.serving.batching.rows import BatchError, BatchRow, Rows, Settled, line_of, read_group
from vidsieve.serving.batching.settings import BatchSettings

PIECE, PIECES = 32, 1024
"""Rows in a piece of work, within which a worker decodes ahead, unless that makes more than so many pieces."""
RETRIES = 3
"""How often a piece of work is given to a worker again after one died over it; Ray would never give up."""
STORE = 300 * 2**20
"""Bytes of Ray's object store on a machine of its own; nothing but places and answers goes through it."""


@dataclass(frozen=True)
class Cluster:
    """Which Ray cluster, by its address (None: one of its own on this machine), and how many workers with a model."""

    address: str | None = None
    workers: int = 1


class Worker:
    """A model on a worker; called with places of groups, it yields what becomes of each group's rows."""

    def __init__(self, settings: BatchSettings, path: str, root: str, readers: int, threads: int) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(threads)  # as where the run was begun: sums in another order are other sums
        self.settings, self.path, self.root, self.readers = settings, Path(path), Path(root), readers
        self.answer = Answerer(settings)

    def __call__(self, places: Mapping[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """Yield one row a group: its number, and the outcomes as JSON."""
        for group, outcomes in settle(self._rows(places), self.answer, self.settings.read, self.readers):
            yield {"group": [group], "outcomes": [line_of(outcomes).decode()]}

    def _rows(self, places: Mapping[str, Any]) -> Iterator[tuple[int, BatchRow]]:
        for group, start, line in zip(places["group"], places["start"], places["line"], strict=True):
            for row in read_group(self.path, self.root, self.settings.batch, int(start), int(line)):
                yield int(group), row


def on_cluster(cluster: Cluster, rows: Rows, groups: Iterable[int], settings: BatchSettings, readers: int) -> Settled:
    """Yield what becomes of the rows of some groups, in the order in which workers are through with them.

    Raises
    ------
    BatchError
        If Ray Data is not installed, cannot be reached, has no room for the workers, or one of them failed.
    """
    import torch

    ray, data, arrow = imported()
    own = not ray.is_initialized()
    if own:
        _start(ray, cluster)
    try:
        on_gpu = settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
        _check_room(ray, cluster, "GPU" if on_gpu else "CPU")
        places = data.from_arrow(_tables(arrow, rows, groups, cluster.workers))
        places.context.enable_progress_bars = False
        places.context.target_max_block_size = 1  # what is answered leaves its worker at once
        with warnings.catch_warnings():  # retries have no other place before Ray 2.64
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            answered = places.map_batches(
                Worker,
                batch_size=None,
                concurrency=cluster.workers,
                num_cpus=1,
                num_gpus=1 if on_gpu else 0,
                max_task_retries=RETRIES,
                fn_constructor_args=(
                    settings,
                    str(rows.path.resolve()),
                    str(rows.root),
                    readers,
                    torch.get_num_threads(),
                ),
            )
        for found in answered.iter_rows():
            yield int(found["group"]), [(bool(well), row) for well, row in json.loads(found["outcomes"])]
    except ray.exceptions.RayError as error:
        raise BatchError(f"a worker of Ray failed: {_cause(error)}; what was answered is in the journal") from None
    finally:
        if own:
            ray.shutdown()


def imported() -> tuple[Any, Any, Any]:
    """Return ray, ray.data and pyarrow.

    Raises
    ------
    BatchError
    """
    try:
        ray = import_module("ray")
        warn_untested("ray", ray.__version__)
        return ray, import_module("ray.data"), import_module("pyarrow")
    except ImportError:
        raise BatchError("--ray needs Ray Data: pip install 'vidsieve[ray]'") from None


def _start(ray: Any, cluster: Cluster) -> None:
    quietly = {"log_to_driver": False, "logging_level": logging.ERROR}
    room = {} if cluster.address else {"include_dashboard": False, "object_store_memory": STORE}
    try:
        ray.init(address=cluster.address or "local", **room, **quietly)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BatchError(f"cannot reach Ray at {cluster.address or 'this machine'}: {error}") from None
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is told once, by us


def _check_room(ray: Any, cluster: Cluster, kind: str) -> None:
    """Refuse more workers than the cluster has room for: Ray would wait for ever.

    Raises
    ------
    BatchError
    """
    there = int(ray.cluster_resources().get(kind, 0))
    if there < cluster.workers:
        raise BatchError(f"{cluster.workers} workers need a {kind} each, and Ray has {there}: give a smaller --workers")


def _tables(arrow: Any, rows: Rows, groups: Iterable[int], workers: int) -> list[Any]:
    """Return the places of groups, cut into pieces that a worker takes in one go; each worker gets some of them."""
    wanted, tables = list(groups), []
    each = max(min(-(-PIECE // rows.size), len(wanted) // (4 * workers)), -(-len(wanted) // PIECES))
    for first in range(0, len(wanted), each):
        part = wanted[first : first + each]
        places = [rows.place(group) for group in part]
        starts, lines = zip(*places, strict=True)
        tables.append(arrow.table({"group": part, "start": list(starts), "line": list(lines)}))
    return tables


def _cause(error: BaseException) -> str:
    """Return in words what a worker raised."""
    inner = error
    while (deeper := getattr(inner, "cause", None)) is not None:
        inner = deeper
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(inner).__name__
