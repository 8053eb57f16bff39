"""Pseudo-videos: captioned images, each held for some frames, their captions joined.

Between repeats of an image nothing changes, between images everything does, so a policy soon sees what a change is
worth (SCORE §4.4, stage one of its curriculum: 2–4 images, 3–6 frames each).
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

from vidsieve.errors import TrainingError
from vidsieve.io.files import beside, writing
from vidsieve.io.texts import json_line
from vidsieve.training.data.layouts import IMAGE_BYTES, confined_records, path_from
from vidsieve.training.data.reading import image_fault
from vidsieve.video.reading import open_image

Bounds = tuple[int, int]


@dataclass(frozen=True)
class Captioned:
    """An image that can be opened, and its caption."""

    image: Path
    caption: str


@dataclass(frozen=True)
class PseudoVideo:
    """Images with the number of frames that each stays."""

    parts: tuple[tuple[Captioned, int], ...]

    @property
    def caption(self) -> str:
        """The captions in order, a blank between two."""
        return " ".join(part.caption for part, _ in self.parts)

    @property
    def frames(self) -> list[tuple[Path, int]]:
        """(path, frames that it stays), as `read_frames` takes it."""
        return [(part.image, times) for part, times in self.parts]


@dataclass(frozen=True)
class LeftOut:
    """A row that was not used: its record (the line in JSON lines), the image where it names one, and why."""

    record: int
    image: str
    reason: str


@dataclass(frozen=True)
class Pseudo:
    """Pseudo-videos of a file, the number of images that they were drawn from, and the rows left out."""

    videos: tuple[PseudoVideo, ...]
    images: int
    left_out: tuple[LeftOut, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return counts, frames and rows left out as plain values."""
        frames = [sum(times for _, times in video.parts) for video in self.videos]
        return {
            "videos": len(self.videos),
            "images": self.images,
            "frames": {"min": min(frames), "mean": sum(frames) / len(frames), "max": max(frames)},
            "skipped": dict(Counter(row.reason for row in self.left_out)),
            "left_out": [asdict(row) for row in self.left_out],
        }


def pseudo_file(
    source: Path | Sequence[Path],
    target: Path,
    *,
    root: Path | None = None,
    count: int | None = None,
    images: Bounds = (2, 4),
    frames: Bounds = (3, 6),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Pseudo:
    """Write a file of pseudo-videos, ``{"frames": [[path, times], …], "caption": …}`` a line, paths from `target`.

    Parameters
    ----------
    source : Path or sequence of Path
        LLaVA-OneVision-Data, as JSON or Parquet, or JSON lines of ``{"image": path, "caption": …}``. Images inside a
        Parquet file are written to a folder beside `target`, ``out.images`` of ``out.jsonl``. All files are drawn
        from together.
    root : Path, optional
        The folder that paths in `source` start from; default: that of the file.
    count : int, optional
        Videos; default: so many that each image comes about once, images // 3 for 2–4 images a video.
    images, frames : (least, most)
        Images of a video, and frames that an image stays; each number is drawn evenly.
    seed : int
        The same seed, rows and settings give the same file.
    progress : callable, optional
        Called with the number of records looked at.

    Raises
    ------
    TrainingError
        If the file is unreadable, a number is out of range, or fewer images than a video needs can be used.
    OutputError
        If `target` cannot be written.
    """
    for name, (least, most) in (("images", images), ("frames", frames)):
        if not 1 <= least <= most:
            raise TrainingError(f"{name} must be from 1 up, the least first; got {least} to {most}")
    if count is not None and count < 1:
        raise TrainingError(f"count must be at least 1, got {count}")
    files = [source] if isinstance(source, Path) else [*source]
    usable: list[Captioned] = []
    left_out: list[LeftOut] = []
    for file in files:
        some, others = read_captioned(file, root, beside(target, "images"), progress)
        usable += some
        left_out += others
    different = len({row.image for row in usable})
    if different < images[1]:
        counted = Counter(r.reason for r in left_out)
        reasons = "; ".join(f"{n} × {reason}" for reason, n in counted.most_common(3))
        if len(counted) > 3:
            reasons += f"; {counted.total() - sum(n for _, n in counted.most_common(3))} for other reasons"
        raise TrainingError(
            f"{', '.join(map(str, files[:3]))} has {different} usable images, and a video needs up to {images[1]}"
            f"{f' ({reasons})' if reasons else ''}: add captioned images, or ask for fewer by --images"
            + (
                ". Do their paths start from that folder? --image-root names another"
                if any("missing image" in reason for reason in counted)
                else ""
            )
        )
    wanted = max(1, 2 * len(usable) // sum(images)) if count is None else count
    draw = _videos(usable, images, frames, random.Random(seed))
    videos = tuple(next(draw) for _ in range(wanted))
    with writing(target) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for video in videos:
            frames_of = [[path_from(str(path), target), times] for path, times in video.frames]
            row = {"frames": frames_of, "caption": video.caption}
            lines.write(json_line(row))
    return Pseudo(videos, len(usable), tuple(left_out))


def read_captioned(
    path: Path, root: Path | None = None, images: Path | None = None, progress: Callable[[int], None] | None = None
) -> tuple[list[Captioned], list[LeftOut]]:
    """Return the rows of a file of captioned images that can be used, and those that cannot.

    Each image is opened once, and looked at no further than its format checks itself: a JPEG that is cut short in the
    middle is found when it is read for training. Images that are inside the file are written to the folder `images`.

    Raises
    ------
    TrainingError
        If the file is unreadable.
    OutputError
        If images cannot be written.
    """
    usable: list[Captioned] = []
    left_out: list[LeftOut] = []
    fault_of = cache(image_fault)
    for done, record in enumerate(confined_records(path, root), 1):
        left_out += [LeftOut(record.number, "", reason) for reason in Counter(record.left_out).elements()]
        if record.fault:
            left_out.append(LeftOut(record.number, "", record.fault))
        for row in record.rows:
            name, data = row.get("image", ""), row.get(IMAGE_BYTES, b"")
            image = Path(name) if data else Path(name).resolve()
            fault = (image_fault(data) if data else fault_of(image)) if name or data else "no image, but a video"
            if fault:
                left_out.append(LeftOut(record.number, name, fault))
                continue
            if data:
                image = _written(data, images or beside(path, "images"))
            usable.append(Captioned(image, " ".join(row["caption"].split())))
        if progress is not None and done % 50 == 0:
            progress(done)
    return usable, left_out


def _written(data: bytes, folder: Path) -> Path:
    """Write an image that was inside a file, named by its contents, and return its path."""
    with open_image(BytesIO(data)) as opened:
        ending = (opened.format or "png").lower()
    place = folder / f"{blake2b(data, digest_size=12).hexdigest()}.{ending}"
    if not os.path.exists(place):
        with writing(place) as temporary:
            temporary.write_bytes(data)
    return place


def _videos(
    usable: Sequence[Captioned], images: Bounds, frames: Bounds, chance: random.Random
) -> Iterator[PseudoVideo]:
    """Yield videos without end: rows in a random order until none is left, then in another one."""
    deck: deque[Captioned] = deque()
    while True:
        parts: list[tuple[Captioned, int]] = []
        for _ in range(chance.randint(*images)):
            there = {part.image for part, _ in parts}
            while (place := next((n for n, row in enumerate(deck) if row.image not in there), None)) is None:
                deck.extend(chance.sample(usable, len(usable)))
            parts.append((deck[place], chance.randint(*frames)))
            del deck[place]
        yield PseudoVideo(tuple(parts))
