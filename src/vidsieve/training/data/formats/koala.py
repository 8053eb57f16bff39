"""Koala-36M: captions of clips that were cut out of public videos.

A CSV with ``videoID, url, timestamp, caption`` and scores of quality, which are not read. The file of a clip is
``<videoID>.mp4``, ``.mkv`` or ``.webm``, in the folder of videos or in a folder just inside it.

References
----------
Koala-36M (arXiv 2410.08260), data set Koala-36M/Koala-36M-v1; columns as public readers of its CSVs use them, the files
themselves were not at hand.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from vidsieve.training.data.layouts import Layout, Name, Rows, Text, checked

ENDINGS = (".mp4", ".mkv", ".webm")


class _Clip(msgspec.Struct):
    video_id: Name = msgspec.field(name="videoID")
    caption: Text


def _matches(record: dict[str, Any]) -> bool:
    return {"videoID", "timestamp", "caption"} <= record.keys()


def _rows(record: Any, folder: Path, file: Path) -> Rows:
    clip = checked(record, _Clip)
    video = str(_file_of(folder, clip.video_id.strip()))
    return [{"video": video, "caption": clip.caption.strip(), "source": "Koala-36M"}], {}


def _file_of(folder: Path, name: str) -> Path:
    """Return the file of a clip; where it should be if there is none."""
    places = (place / f"{name}{ending}" for place in (folder, *_inside(folder)) for ending in ENDINGS)
    return next((place for place in places if os.path.isfile(place)), folder / f"{name}.mp4")


@lru_cache(8)
def _inside(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if os.path.isdir(path))) if os.path.isdir(folder) else ()


LAYOUT = Layout("koala-36m", "Koala-36M", _matches, _rows)
