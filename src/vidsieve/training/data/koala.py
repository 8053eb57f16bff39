"""Koala-36M: captions of clips that were cut out of public videos.

A CSV with ``videoID, url, timestamp, caption`` and scores of quality, of which nothing here is read. A clip is looked
for by its ``videoID``, as ``<videoID>.mp4``, ``.mkv`` or ``.webm``, in the folder of videos and in the folders just
inside it.

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

from vidsieve.training.data.layouts import Layout
from vidsieve.training.data.reading import MalformedError

ENDINGS = (".mp4", ".mkv", ".webm")


def _matches(record: Any) -> bool:
    return isinstance(record, dict) and {"videoID", "timestamp", "caption"} <= record.keys()


def _rows(record: Any, folder: Path, file: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    if not isinstance(record, dict):
        raise MalformedError(f"is {type(record).__name__}, not an object with fields")
    name, caption = record.get("videoID"), record.get("caption")
    if not isinstance(name, str) or not name.strip():
        raise MalformedError("videoID is empty")
    if not isinstance(caption, str) or not caption.strip():
        raise MalformedError("caption is empty")
    return [{"video": str(_clip(folder, name.strip())), "caption": caption.strip(), "source": "Koala-36M"}], {}


def _clip(folder: Path, name: str) -> Path:
    """Return the file of a clip; where it should be if there is none."""
    places = (place / f"{name}{ending}" for place in (folder, *_inside(folder)) for ending in ENDINGS)
    return next((place for place in places if os.path.isfile(place)), folder / f"{name}.mp4")


@lru_cache(8)
def _inside(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if os.path.isdir(path))) if os.path.isdir(folder) else ()


LAYOUT = Layout("koala-36m", "Koala-36M", _matches, _rows)
