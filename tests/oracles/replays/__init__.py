"""Recorded inputs and outputs of official implementations, and whether ours gives the same.

A folder holds one ``<method>.npz`` per method. The module of that name here knows how to read it and yields
one `Case` per recorded case; a file without such a module is listed as not covered.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from vidsieve.compressors import _clustering

FEATURE_TOLERANCE = 1e-4
Archive = Mapping[str, Any]
Status = Literal["pass", "fail", "no such method yet"]


@dataclass(frozen=True)
class Case:
    """One recorded case: what was compared, the largest difference (0 for equal indices), and the verdict."""

    method: str
    case: str
    compared: str
    difference: float
    status: Status
    note: str = ""


def judged(
    method: str, case: str, compared: dict[str, float], note: str = "", tolerance: float = FEATURE_TOLERANCE
) -> Case:
    """Return the verdict on named differences: each within `tolerance` (indices: 0 or infinity)."""
    worst = max(compared.values())
    return Case(method, case, ", ".join(compared), worst, "pass" if worst <= tolerance else "fail", note)


def same_indices(ours: Any, theirs: Any) -> float:
    """Return 0 if two index arrays are equal, else infinity."""
    a, b = np.asarray(ours).ravel(), np.asarray(theirs).ravel()
    return 0.0 if a.shape == b.shape and bool((a == b).all()) else float("inf")


def gap(ours: Any, theirs: Any) -> float:
    """Return the largest absolute difference of two arrays; infinity if their shapes differ or one is not finite."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        return float("inf")
    difference = float(np.abs(a - b).max()) if a.size else 0.0
    return difference if np.isfinite(difference) else float("inf")


def noise_pieces(archive: Archive, case: str) -> list[Tensor]:
    """Return the recorded noise, one row a piece."""
    shapes = json.loads(str(archive[f"{case}/noise_shapes"]))
    tape = torch.from_numpy(archive[f"{case}/noise"]).float()
    parts = torch.split(tape, [rows * width for rows, width in shapes])
    return [row for part, (rows, _) in zip(parts, shapes, strict=True) for row in part.reshape(rows, -1)]


@contextmanager
def noisy(pieces: Iterable[Tensor]) -> Iterator[None]:
    """Add a millionth of recorded noise, piece by piece, to densities of clusters, as releases do."""
    density, tape = _clustering.density, iter(pieces)
    with patch.object(_clustering, "density", lambda rows, count: density(rows, count) + next(tape) * 1e-6):
        yield


def with_newlines(kept: Tensor, tokens: Tensor, newline: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return indices and tokens in raster order with a newline (D,) behind every row of `width` that keeps a token."""
    lines = torch.unique(kept // width)
    places = torch.cat([kept + kept // width, lines * (width + 1) + width])
    order = places.argsort()
    return places[order], torch.cat([tokens, newline.expand(len(lines), -1)])[order]


def groups(archive: Archive, depth: int) -> dict[str, list[str]]:
    """Return the keys of an archive by their first `depth` parts."""
    found: dict[str, list[str]] = {}
    for key in archive:
        found.setdefault("/".join(key.split("/")[:depth]), []).append(key)
    return found


def run_file(path: Path) -> Iterator[Case]:
    """Yield every case of one archive of plain arrays."""
    with np.load(path, allow_pickle=False) as opened:
        archive = {key: opened[key] for key in opened.files}
    method = path.stem
    if importlib.util.find_spec(f"{__name__}.{method}") is None:
        for case in groups(archive, 2 if any("/" in k for k in archive) else 1):
            yield Case(method, case, "-", float("nan"), "no such method yet")
        return
    yield from importlib.import_module(f"{__name__}.{method}").cases(archive)
