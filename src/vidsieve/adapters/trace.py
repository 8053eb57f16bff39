"""Records of what a session kept of each video."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidsieve.compressors.inside import layers_in_words
from vidsieve.io.texts import percent
from vidsieve.types import Selection, TokenGrid


@dataclass(frozen=True)
class VideoTrace:
    """One video of one call.

    `per_frame` counts kept tokens of each frame, `indices` are the kept raster indices of the whole grid,
    `select_ms` is the time spent selecting, device synchronised.
    """

    row: int
    grid: TokenGrid
    method: str
    variant: str
    nominal: str
    kept: int
    per_frame: tuple[int, ...]
    indices: tuple[int, ...]
    merged: bool
    select_ms: float
    held: float | None = None
    """For methods inside the LLM: mean over layers of the fraction of tokens that a layer sees."""
    layers: tuple[int, ...] = ()
    """For methods inside the LLM: the layers from which on there are fewer tokens."""
    attention_layers: tuple[int, ...] = ()
    """For methods inside the LLM: the layers whose attention was read."""
    decoded: float | None = None
    """For methods that act while decoding: mean over steps of the share of the kept tokens that later layers read."""
    newlines: int = 0
    """Tokens outside the grid that stay; budgets do not count them."""
    encoded: int | None = None
    """For methods before the vision encoder: the number of frames that went through it."""
    frames_left: int | None = None
    """For methods inside the vision encoder: the number of frames that came out of it."""

    @classmethod
    def of(
        cls,
        row: int,
        grid: TokenGrid,
        kept: Selection,
        select_ms: float,
        *,
        method: str,
        variant: str,
        nominal: str,
        encoded: int | None = None,
        frames: Tensor | None = None,
        whole: TokenGrid | None = None,
    ) -> VideoTrace:
        """Return the record of one selection; the last three are as in `VideoFeatures`."""
        indices = kept.indices.cpu()
        if frames is not None and whole is not None:
            indices, grid = frames[indices // grid.per_frame] * grid.per_frame + indices % grid.per_frame, whole
        if grid.places is not None:
            indices = torch.tensor(grid.places)[indices]
        per_frame = torch.bincount(indices // grid.whole.per_frame, minlength=grid.frames)
        return cls(
            row,
            grid,
            method,
            variant,
            nominal,
            kept.num_kept,
            tuple(per_frame.tolist()),
            tuple(indices.tolist()),
            kept.embeds is not None,
            select_ms,
            encoded=encoded,
            frames_left=None if frames is None else len(frames),
        )

    @property
    def total(self) -> int:
        """N, tokens on the video's grid."""
        return self.grid.num_tokens

    @property
    def real_retention(self) -> float:
        """K / N."""
        return self.kept / self.total

    @property
    def layer_retention(self) -> float:
        """The fraction of tokens that layers see on average: K / N for methods before the LLM."""
        return self.real_retention if self.held is None else self.held

    @property
    def before(self) -> str:
        """Summary of what acted before or inside the vision encoder; empty without it."""
        frames = self.grid.frames
        encoded = "" if self.encoded is None else f"; encoded {self.encoded} of {frames} frames"
        return encoded if self.frames_left is None else f"; {self.frames_left} of {frames} frames left the encoder"

    @property
    def inside(self) -> str:
        """Summary of the part inside the LLM; empty without one."""
        held = "" if self.held is None else f", {percent(self.held)} on average over layers"
        if self.decoded is not None:
            held = f", {percent(self.decoded)} of them read while decoding"
        by = f", by attention in {layers_in_words(self.attention_layers)}" if self.attention_layers else ""
        held += f" (fewer from layer {', '.join(map(str, self.layers))} on{by})" if held and self.layers else ""
        return held

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain values for JSON."""
        return {
            "row": self.row,
            "grid": [self.grid.frames, self.grid.height, self.grid.width],
            "method": self.method,
            "variant": self.variant,
            "nominal_retention": self.nominal,
            "real_retention": self.real_retention,
            "kept": self.kept,
            "total": self.total,
            "per_frame": list(self.per_frame),
            "indices": list(self.indices),
            "merged": self.merged,
            "select_ms": self.select_ms,
            "layer_retention": self.layer_retention,
            "newlines": self.newlines,
            "stage_layers": list(self.layers),
            "attention_layers": list(self.attention_layers),
            "decode_share": self.decoded,
            "encoded_frames": self.encoded,
            "frames_left": self.frames_left,
        }


@dataclass
class Trace:
    """The videos that a session pruned, newest last; the last 1,000 are kept.

    `positions` names the position convention, `prompt_tokens` are (before, after) of the last pruned call.
    """

    positions: str
    videos: deque[VideoTrace] = field(default_factory=lambda: deque(maxlen=1000))
    notes: list[str] = field(default_factory=list)
    prompt_tokens: tuple[int, int] | None = None

    def revise(self, before: list[VideoTrace], now: list[VideoTrace]) -> None:
        """Put new records in the places of those of the same videos, at the end where there are none."""
        if before is now:
            return
        known = {id(old): new for old, new in zip(before, now, strict=False)}
        for place, video in enumerate(self.videos):
            self.videos[place] = known.pop(id(video), video)
        self.videos.extend(now if not before else ())

    def __iter__(self) -> Iterator[VideoTrace]:
        return iter(self.videos)

    def __len__(self) -> int:
        return len(self.videos)

    def __str__(self) -> str:
        lines = []
        for video in self.videos:
            verb = "merged into" if video.merged else "kept"
            ends = f", and {video.newlines} newline{'s' * (video.newlines > 1)}" if video.newlines else ""
            lines.append(
                f"{video.method} ({video.variant}): {verb} {video.kept} of {video.total} video tokens "
                f"({percent(video.real_retention)}{video.inside}, grid {video.grid}){ends} in "
                f"{video.select_ms:.1f} ms; per frame {' '.join(map(str, video.per_frame))}{video.before}; "
                f"positions {self.positions}"
            )
        if not lines:
            lines = ["nothing pruned yet"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])
