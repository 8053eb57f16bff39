"""What answers depend on beside rows and videos, and how a video is read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vidsieve.compressors.base import Compressor
from vidsieve.errors import VidsieveError
from vidsieve.evaluation.conditions import known_fields, method_for
from vidsieve.evaluation.tasks.questions import frames_of
from vidsieve.serving.batching.rows import BatchRow
from vidsieve.types import Tokens
from vidsieve.video.reading import Video

Frames = Video | str
"""A decoded video, or why there is none."""
_PIECE = 2**20


@dataclass(frozen=True)
class BatchSettings:
    """What answers depend on beside rows and videos.

    Parameters
    ----------
    model, layout, device : as `load_model`
    method, policy, earliest : as `vidsieve ask`; ``"full"`` keeps all tokens
    retention : float or Tokens
    frames : int
        Taken evenly, or with `fps` at most so many.
    fps : float, optional
    max_new_tokens : int
    batch : int
        Prompts in one call of the LLM.
    seed : int
    """

    model: str = "testbed"
    method: str = "divprune"
    policy: str | None = None
    retention: float | Tokens = 0.25
    earliest: bool = False
    frames: int = 16
    fps: float | None = None
    max_new_tokens: int = 64
    batch: int = 1
    seed: int = 0
    layout: str | None = None
    device: str = "cpu"

    def compressor(self) -> Compressor | None:
        """Return the method; None where all tokens are kept.

        Raises
        ------
        UnknownNameError, PolicyError
        """
        if self.method == "full":
            return None
        moved = known_fields(self.method, earliest=self.earliest)
        return method_for(self.method, self.model, self.policy, retention=self.retention, **moved)

    def described(self) -> dict[str, Any]:
        """Return the settings as values for JSON, and what tells the files of a model in a folder from others'."""
        from vidsieve.evaluation.conditions import policy_digest
        from vidsieve.evaluation.experiment import versions

        method, kept = self.compressor(), self.retention
        named = {
            "method": "full" if method is None else method.describe(),
            "retention": f"{kept:g}" if isinstance(kept, float) else f"{kept.count}t",
            "policy": "" if method is None else policy_digest(method),
            "model_digest": files_digest(self.model),
        }
        return asdict(self) | named | {"versions": versions()}

    def read(self, row: BatchRow) -> Frames:
        """Return the frames of a row's video, or why it has none."""
        if row.fault:
            return row.fault
        try:
            return frames_of(row.video, self.frames, self.fps)
        except (VidsieveError, ValueError, OSError) as error:
            return reason(error)


def files_digest(model: str) -> str:
    """Return a hash of the names, sizes, beginnings and ends of a model's files; of a hub id its revision."""
    if model == "testbed":
        return ""
    folder = Path(model)
    if not os.path.isdir(folder):
        from transformers import AutoConfig

        try:
            return str(getattr(AutoConfig.from_pretrained(model), "_commit_hash", None) or "")
        except (OSError, ValueError, KeyError):
            return ""  # loading it will tell
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.iterdir() if os.path.isfile(path)):
        size = path.stat().st_size
        with path.open("rb") as file:
            found.update(f"{path.name} {size}".encode() + file.read(_PIECE))
            file.seek(max(0, size - _PIECE))
            found.update(file.read(_PIECE))
    return found.hexdigest()


def reason(error: Exception) -> str:
    """Return the first words of an error."""
    return " ".join(str(error).split())[:500] or type(error).__name__
