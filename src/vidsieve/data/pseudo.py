"""Pseudo-videos: captioned images, each held for some frames, their captions joined.

Between repeats of an image nothing changes, between images everything does, so a policy soon sees what a change is
worth (SCORE §4.4, stage one of its curriculum: 2–4 images, 3–6 frames each).
"""

from __future__ import annotations

import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vidsieve.errors import TrainingError
from vidsieve.files import relative, writing

Bounds = tuple[int, int]


@dataclass(frozen=True)
class Captioned:
    """An image that can be opened, and what it shows in words."""

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
    """A row that was not used: its line from 1, the image where it names one, and why."""

    line: int
    image: str
    reason: str


@dataclass(frozen=True)
class Pseudo:
    """What was made: the videos, how many images there were to draw from, and the rows left out."""

    videos: tuple[PseudoVideo, ...]
    images: int
    left_out: tuple[LeftOut, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return counts, frames and what was left out as plain values."""
        frames = [sum(times for _, times in video.parts) for video in self.videos]
        return {
            "videos": len(self.videos), "images": self.images,
            "frames": {"min": min(frames), "mean": sum(frames) / len(frames), "max": max(frames)},
            "skipped": dict(Counter(row.reason for row in self.left_out)), "left_out": [vars(r) for r in self.left_out],
        }  # fmt: skip


def pseudo_file(
    source: Path, target: Path, *, count: int | None = None, images: Bounds = (2, 4), frames: Bounds = (3, 6),
    seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> Pseudo:  # fmt: skip
    """Write a file of pseudo-videos, ``{"frames": [[path, times], …], "caption": …}`` a line, paths from `target`.

    Parameters
    ----------
    source : Path
        JSON lines of ``{"image": path, "caption": …}``, paths from the file.
    count : int, optional
        Videos; default: so many that each image comes about once, images // 3 for 2–4 images a video.
    images, frames : (least, most)
        Images of a video, and frames that an image stays; each number is drawn evenly.
    seed : int
        The same seed, rows and settings give the same file.
    progress : callable, optional
        Called with (rows looked at, rows in all).

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
    usable, left_out = read_captioned(source, progress)
    different = len({row.image for row in usable})
    if different < images[1]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in left_out).items())
        raise TrainingError(
            f"{source} has {different} usable images, and a video needs up to {images[1]}"
            f"{f' ({reasons})' if reasons else ''}: add captioned images, or lower images"
        )
    wanted = max(1, 2 * len(usable) // sum(images)) if count is None else count
    draw = _videos(usable, images, frames, random.Random(seed))
    videos = tuple(next(draw) for _ in range(wanted))
    where = {row.image: relative(row.image, target) for row in usable}
    with writing(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        for video in videos:
            row = {"frames": [[where[path], times] for path, times in video.frames], "caption": video.caption}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return Pseudo(videos, len(usable), tuple(left_out))


def read_captioned(
    path: Path, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Captioned], list[LeftOut]]:
    """Return the rows of a file of captioned images that can be used, and those that cannot.

    Each image is opened once, and looked at no further than its format checks itself: a JPEG that is cut short in the
    middle is found when it is read for training.

    Raises
    ------
    TrainingError
        If the file is unreadable.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    usable: list[Captioned] = []
    left_out: list[LeftOut] = []
    seen: dict[Path, str] = {}  # what is wrong with an image, by path
    for done, (number, line) in enumerate(filled, 1):
        name, caption, wrong = _row(line)
        if not wrong:
            image = (path.parent / name).resolve()
            if image not in seen:
                seen[image] = _fault(image)
            wrong = seen[image]
        if wrong:
            left_out.append(LeftOut(number, name, wrong))
        else:
            usable.append(Captioned(image, caption))
        if progress is not None and (done % 50 == 0 or done == len(filled)):
            progress(done, len(filled))
    return usable, left_out


def _row(line: str) -> tuple[str, str, str]:
    """Return a line's image, caption and what is wrong with it, an empty text each where there is none."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        return "", "", "not a JSON object"
    name, caption = row.get("image"), row.get("caption")
    if not isinstance(name, str) or not name:
        return "", "", "no image named"
    if not isinstance(caption, str):
        return name, "", "no caption"
    words = " ".join(caption.split())
    return name, words, "" if words else "empty caption"


def _fault(image: Path) -> str:
    """Return what is wrong with an image file, an empty text if nothing is."""
    if not image.is_file():
        return "missing image"
    try:
        with Image.open(image) as opened:
            opened.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "unreadable image"
    return ""


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
