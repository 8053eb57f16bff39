"""A stream of hours: memory and time that stay flat, equal answers offline, and what eviction is worth.

A scene of the testbed is spread over `--frames` frames at one a second (`vidsieve.testbed.long`): its 16 frames appear
in four clips, minutes and hours apart. `vidsieve.Stream` reads it once under several ways to evict, with equal memory;
the frames are encoded once for all of them. A reader chooses the tokens that the LLM gets, at most 576, because the
shipped model was not trained on more; positions are counted over these. At every tenth of the stream two questions are
asked and timed, and resident memory is read. At the end all questions about the scene are asked: of the stream, of the
stream after `save` and `load`, and of a model that reads the held frames from the generator again and keeps the same
tokens (`answer`, without a stream).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from vidsieve import Stream, __version__
from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.answering import answer
from vidsieve.cli.shared import quiet
from vidsieve.compressors.base import Compressor
from vidsieve.evaluation.conditions import method_for
from vidsieve.evaluation.stats import clustered_mean, paired_difference
from vidsieve.evaluation.table import finite
from vidsieve.io.machine import machine, write_result
from vidsieve.loading import load_model
from vidsieve.retention import Tokens
from vidsieve.testbed.long import LongScene
from vidsieve.testbed.questions import Question
from vidsieve.types import Selection, VideoTokens
from vidsieve.video.reading import Video

EVICTORS = ("score", "random", "uniform", "recent")
CELLS, BATCH, READ = 36, 8, 576
_PAGE = os.sysconf("SC_PAGE_SIZE")


class SharedStream(Stream):
    """A stream that takes the features of frames from another one that has just encoded the same frames."""

    done: dict[float, list[VideoFeatures]]

    def _encoded(self, frames: Sequence[np.ndarray], times: Sequence[Sequence[float]]) -> list[VideoFeatures]:
        first = times[0][0]
        if first not in self.done:
            self.done.clear()
            self.done[first] = super()._encoded(frames, times)
        return self.done[first]


@dataclass(frozen=True)
class Given(Compressor):
    """Keeps the tokens that it is told; for the model that knows no stream."""

    name = "given"
    paper = "-"
    trained = False
    indices: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        return Selection(self.indices)


def resident() -> int:
    """Return the bytes of memory that this process has resident."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * _PAGE


def evictor(name: str) -> Any:
    """Return what evicts: a baseline's name, or a method."""
    return name if name in ("random", "uniform", "recent") else method_for(name)


def watched(streams: dict[str, SharedStream], scene: LongScene, asked: Sequence[Question]) -> list[dict[str, Any]]:
    """Push the whole scene into the streams, and return memory and times at every tenth of it."""
    rows, frames = [], scene.read()
    tenth = max(1, scene.frames // 10)
    begun = time.process_time()
    for first in range(0, scene.frames, BATCH):
        pixels = np.stack(list(islice(frames, min(BATCH, scene.frames - first))))
        times = np.arange(first, first + len(pixels), dtype=np.float64)
        for stream in streams.values():
            stream.push(pixels, times)
        if (first + len(pixels)) // tenth > first // tenth:
            spent = []
            for question in asked[:2]:
                start = time.process_time()
                streams["score"].ask(question.text, max_new_tokens=2)
                spent.append(1e3 * (time.process_time() - start))
            memory = streams["score"].ask(asked[0].text, max_new_tokens=1).memory
            rows.append(
                {
                    "frames": first + len(pixels),
                    "frames_held": memory.frames_held,
                    "tokens": memory.tokens,
                    "resident_bytes": resident(),
                    "ask_ms": float(np.mean(spent)),
                    "push_ms_a_frame": 1e3 * (time.process_time() - begun) / (first + len(pixels)),
                }
            )
            print(rows[-1], flush=True)
    return rows


def offline(
    model: Any, processor: Any, stream: SharedStream, scene: LongScene, question: str, reader: Compressor
) -> str:
    """Return the answer of a model that reads the held frames again, and keeps what the stream's reader kept."""
    state = stream._state
    assert state is not None
    held = torch.unique(state.memory.frames)
    wanted, pixels = set(held.tolist()), []
    for number, frame in enumerate(scene.read()):
        if number in wanted:
            pixels.append(frame)
    video = Video(
        np.stack(pixels), held.double().numpy(), (), float(scene.frames), 1.0, scene.frames, pixels[0].shape[:2]
    )
    places = torch.searchsorted(held, state.memory.frames) * CELLS + state.memory.places
    encoded, _ = stream._prompt(state, question)
    tokens = stream.adapter.video_tokens(encoded, 0, reader.needs)
    kept = reader.compress(tokens, generator=Generator().manual_seed(0)).indices
    chosen = Given(retention=Tokens(len(kept)), indices=places[kept])
    return answer(model, processor, video, question, chosen, max_new_tokens=2).text


def measured(model: Any, processor: Any, scene: LongScene, memory: int, reader: Compressor) -> dict[str, Any]:
    """Return what one stream gives: rows over time, marks of every way to evict, and whether answers are equal."""
    asked = scene.questions()
    shared: dict[float, list[VideoFeatures]] = {}
    streams = {}
    for name in EVICTORS:
        streams[name] = SharedStream(model, processor, evictor(name), memory, reader=reader)
        streams[name].done = shared
    rows = watched(streams, scene, asked)
    said = {name: [stream.ask(q.text, max_new_tokens=2).text for q in asked] for name, stream in streams.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stream.safetensors")
        streams["score"].save(path)
        loaded = Stream.load(path, model, processor, evictor("score"), reader=reader)
        again = [loaded.ask(q.text, max_new_tokens=2).text for q in asked]
    checked = asked[:4]
    fresh = [offline(model, processor, streams["score"], scene, q.text, reader) for q in checked]
    ages = [scene.frames - 1 - max(token // CELLS for token in q.targets) for q in asked]
    return {
        "index": scene.index,
        "clips_at": scene.times[::4].tolist(),
        "rows": rows,
        "ages": ages,
        "marks": {
            name: [text == q.answer for text, q in zip(texts, asked, strict=True)] for name, texts in said.items()
        },
        "loaded_equal": again == said["score"],
        "offline_equal": fresh == said["score"][: len(checked)],
        "offline_checked": len(checked),
        "trace": str(streams["score"].ask(asked[0].text, max_new_tokens=2).memory),
    }


def summary(records: Sequence[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Return the result of all streams."""
    clusters = [r["index"] for r in records for _ in r["ages"]]
    marks = {name: [float(m) for r in records for m in r["marks"][name]] for name in EVICTORS}
    old = [age >= 3600 for r in records for age in r["ages"]]
    rows = []
    for name, values in marks.items():
        mean, gap = clustered_mean(values, clusters), paired_difference(marks["score"], values, clusters)
        row: dict[str, Any] = {"evicts": name, "accuracy": mean.mean, "stderr": mean.stderr, "questions": len(values)}
        if any(old):
            row["about_more_than_an_hour_ago"] = float(np.mean([v for v, o in zip(values, old, strict=True) if o]))
        if name != "score":
            row["score_minus_this"] = {"diff": gap.mean, "interval": list(gap.interval)}
        rows.append(row)
    over = records[0]["rows"][1:]  # the memory is full from then on
    bytes_, ask = [row["resident_bytes"] for row in over], [row["ask_ms"] for row in over]
    return {
        "vidsieve": __version__,
        "machine": machine(),
        "frames": given.frames,
        "memory": given.memory,
        "read": READ,
        "streams": len(records),
        "resident_growth": max(bytes_) / min(bytes_) - 1,
        "ask_ms_min_max": [min(ask), max(ask)],
        "loaded_equal": all(r["loaded_equal"] for r in records),
        "offline_equal": all(r["offline_equal"] for r in records),
        "offline_checked": sum(r["offline_checked"] for r in records),
        "eviction": rows,
        "records": list(records),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the journal: the same command goes on")
    parser.add_argument("--frames", type=int, default=21_600, help="six hours at one frame a second")
    parser.add_argument("--memory", type=int, default=2048)
    parser.add_argument("--streams", type=int, default=3)
    parser.add_argument("--seed", type=int, default=9731)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/streaming.json"))
    given = parser.parse_args()
    quiet()
    model, processor = load_model("testbed", positions="compact")
    reader = method_for("sieve").with_retention(Tokens(READ))
    assert isinstance(reader, Compressor)
    given.folder.mkdir(parents=True, exist_ok=True)
    journal = given.folder / f"{given.frames}-{given.memory}-{given.seed}.jsonl"
    records = [json.loads(line) for line in journal.read_text("utf-8").splitlines()] if journal.exists() else []
    for index in range(len(records), given.streams):
        record = measured(model, processor, LongScene("dense", given.seed, index, given.frames), given.memory, reader)
        records.append(record)
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print({name: np.mean(marks).round(3) for name, marks in record["marks"].items()}, flush=True)
    write_result(given.json, finite(summary(records[: given.streams], given)))


if __name__ == "__main__":
    main()
