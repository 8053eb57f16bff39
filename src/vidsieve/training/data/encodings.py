"""A folder of encoded videos: what a frozen vision tower made of a video once is read back in later epochs and runs.

One safetensors file a video, and a manifest that names the model. Everything is there again as if it had just been
encoded, to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures, on_device
from vidsieve.adapters.fingerprint import digest, lasting, weights_digest
from vidsieve.errors import OutputError, TrainingError, VideoError
from vidsieve.io.files import writing
from vidsieve.training.data.wording import Wording, is_pixels, worded
from vidsieve.types import TokenGrid
from vidsieve.video.reading import Video

MANIFEST = "manifest.json"
FORMAT = 1
_HEADER = "vidsieve"
_PENDING = "vidsieve_pending"
_NAMES = {
    "format": "format",
    "family": "model family",
    "config": "model's configuration",
    "weights": "model's vision weights",
    "frames": "number of frames",
    "dtype": "dtype",
}

Source = tuple[tuple[Path, int], ...]
"""What a video is made of: files, and how many frames each is shown; one pair for a video file."""


@dataclass(frozen=True)
class EncodingPlan:
    """What a cache will take: videos in all, how many are not there yet, bytes of each of these, bytes free."""

    folder: Path
    videos: int
    missing: int
    bytes_each: int
    free: int

    def __str__(self) -> str:
        if not self.missing:
            return f"{self.folder} has all {self.videos} videos encoded"
        return (
            f"{self.folder} has {self.videos - self.missing} of {self.videos} videos encoded; the others take about "
            f"{_size(self.missing * self.bytes_each)} ({_size(self.bytes_each)} each), {_size(self.free)} are free"
        )


@dataclass(frozen=True)
class _Pending:
    """A video whose features are still to be made: where they go, and how prompts about it read."""

    path: Path
    wording: Wording


class EncodingCache:
    """Encoded videos in a folder, made when they are first asked for.

    A video is known by its files' paths, sizes and times of change, the number of frames and the processor's settings.
    A file that cannot be read is made again.

    Parameters
    ----------
    folder : Path
    adapter, processor : of the frozen model
    frames : int
        Most frames taken from a video.

    Raises
    ------
    TrainingError
        If the folder was made with another model, number of frames or dtype, or its manifest is unreadable.
    OutputError
        If the folder cannot be written.
    """

    def __init__(self, folder: Path, adapter: Adapter, processor: Any, frames: int) -> None:
        self.folder, self.adapter, self.processor, self.frames = Path(folder), adapter, processor, frames
        manifest = {
            "format": FORMAT,
            "family": adapter.family,
            **_fingerprint(adapter),
            "frames": frames,
            "dtype": str(adapter.model.dtype),
        }
        self._stamp = digest(manifest)
        self._settings = digest(_settings(processor))
        path = self.folder / MANIFEST
        if os.path.exists(path):
            self._compare(path, manifest)
            return
        with writing(path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def _compare(self, path: Path, ours: dict[str, Any]) -> None:
        advice = "give another folder, or remove this one"
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            theirs.keys()
        except (OSError, ValueError, AttributeError) as error:
            raise TrainingError(f"{path} is no readable manifest of encoded videos ({error}): {advice}") from None
        changed = [key for key in ours if theirs.get(key) != ours[key]]
        if "dtype" in changed and "weights" in changed:
            changed.remove("weights")  # another dtype rounds them
        if changed:
            said = [
                f"another {_NAMES[key]}"
                + ("" if key in ("config", "weights") else f" ({theirs.get(key)}, here {ours[key]})")
                for key in changed
            ]
            raise TrainingError(f"the videos in {self.folder} were encoded with {' and '.join(said)}: {advice}")

    # -- before a run ---------------------------------------------------------------------------------------

    def plan(self, videos: Iterable[tuple[Source, Callable[[], Video]]]) -> EncodingPlan:
        """Encode the first video that is missing, and return what all of them will take.

        Raises
        ------
        OutputError
            If they do not fit on the disk; then nothing is written.
        """
        there, missing = array("Q"), array("Q")
        first: tuple[Path, dict[str, Tensor], dict[str, str]] | None = None
        for source, read in videos:
            path = self._path(source)
            name = int(path.stem[:16], 16)
            if os.path.exists(path):
                there.append(name)
                continue
            missing.append(name)
            if first is None:
                try:
                    inputs = self.inputs(source, read, "?")
                except VideoError:  # a broken one takes no room; the next one tells what one takes
                    missing.pop()
                    continue
                first = path, *self._packed(self._encode(inputs), inputs[_PENDING].wording)
        count = len(np.unique(np.frombuffer(missing, np.uint64)))
        total = count + len(np.unique(np.frombuffer(there, np.uint64)))
        each = sum(tensor.nbytes for tensor in first[1].values()) if first is not None else 0
        plan = EncodingPlan(self.folder, total, count, each, shutil.disk_usage(self.folder).free)
        if count * each > plan.free:
            raise OutputError(f"the encoded videos do not fit: {plan}. Free some space, give another folder, or none")
        if first is not None:
            self._save(*first)
        return plan

    # -- prompts --------------------------------------------------------------------------------------------

    def inputs(self, source: Source, read: Callable[[], Video], question: str) -> dict[str, Any]:
        """Return the inputs of one question about one video; `read` is called where it is not encoded yet.

        The model is not run, so that any thread may call this; what it returns goes through `finished` before use.

        Raises
        ------
        VideoError
            If the video is missing or cannot be read.
        UnsupportedCallError
            If the processor's prompts cannot be made without the video.
        """
        path = self._path(source)
        stored = self._load(path)
        if stored is None:
            made, wording = worded(self.processor, read(), question)
            return made | {_PENDING: _Pending(path, wording)}
        video, wording = stored
        return wording.inputs(self.processor, question) | {"mm_encoder_outputs": self._ready(video)}

    def finished(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs with the video's features in place of its pixels, encoded and stored where they were not.

        Raises
        ------
        OutputError
            If they cannot be stored.
        """
        pending = inputs.get(_PENDING)
        if pending is None:
            return dict(inputs)
        stored = self._load(pending.path)  # another question about it may have come before
        video = stored[0] if stored is not None else self._encode(inputs)
        if stored is None:
            self._save(pending.path, *self._packed(video, pending.wording))
        rest = {name: value for name, value in inputs.items() if not is_pixels(name) and name != _PENDING}
        return rest | {"mm_encoder_outputs": self._ready(video)}

    @torch.no_grad()
    def _encode(self, inputs: Mapping[str, Any]) -> VideoFeatures:
        (video,) = self.adapter.video_features(on_device(inputs, self.adapter.device))
        return video

    def _ready(self, video: VideoFeatures) -> dict[str, Any]:
        device = self.adapter.device
        deep = tuple(layer.to(device) for layer in video.deep)
        there = VideoFeatures(
            video.embeds.to(device), video.grid, video.tail.to(device), deep, None, video.per_row, video.surplus
        )
        return self.adapter.ready_features(there)

    # -- files ----------------------------------------------------------------------------------------------

    def _path(self, source: Source) -> Path:
        """Return the file of a video's features."""
        parts: list[Any] = []
        for file, times in source:
            try:
                found = file.resolve(strict=True)
                status = found.stat()
            except OSError as error:
                raise VideoError(f"{file} cannot be read ({error.strerror}): fetch it again") from None
            parts.append([str(found), status.st_size, status.st_mtime_ns, times])
        return self.folder / f"{digest([parts, self.frames, self._settings])}.safetensors"

    def _packed(self, video: VideoFeatures, wording: Wording) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return a video's features and wording as tensors, and the header of their file."""
        text = zlib.compress(json.dumps([wording.start, wording.head]).encode())
        tensors = {
            "embeds": video.embeds,
            "tail": video.tail,
            "text": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }
        tensors |= {f"deep.{number:03}": layer for number, layer in enumerate(video.deep)}
        tensors |= {f"kind.{name}": value for name, value in wording.kinds.items()}
        tensors |= {f"extra.{name}": value for name, value in wording.extras.items()}
        grid = [video.grid.frames, video.grid.height, video.grid.width]
        header = {"stamp": self._stamp, "grid": grid, "per_row": video.per_row, "surplus": video.surplus}
        # Copies: slices of one tensor share memory, which would be stored as a whole for each.
        whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        return whole, {_HEADER: json.dumps(header)}

    def _save(self, path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        with writing(path) as temporary:
            save_file(tensors, temporary, metadata=header)

    def _load(self, path: Path) -> tuple[VideoFeatures, Wording] | None:
        """Return a stored video, its tensors mapped from the file; None where it must be made again."""
        if not os.path.exists(path):
            return None
        try:
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()[_HEADER])
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            start, head = json.loads(zlib.decompress(tensors["text"].numpy().tobytes()))
            grid = TokenGrid(*header["grid"])
            if header["stamp"] != self._stamp or len(tensors["embeds"]) != grid.num_tokens:
                return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, zlib.error):
            return None

        def named(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        video = VideoFeatures(
            tensors["embeds"],
            grid,
            tensors["tail"],
            tuple(named("deep.").values()),
            None,
            header["per_row"],
            header["surplus"],
        )
        return video, Wording(start, head, named("kind."), named("extra."))


def _fingerprint(adapter: Adapter) -> dict[str, str]:
    """Return what tells one model from another: its configuration, and some values of every weight outside the LLM."""
    model = adapter.model
    llm = {id(weight) for weight in adapter.language_model.parameters()}
    head = model.get_output_embeddings()
    llm |= {id(weight) for weight in head.parameters()} if head is not None else set()
    outside = ((name, weight) for name, weight in model.named_parameters() if id(weight) not in llm)
    return {"config": digest(lasting(model.config.to_dict())), "weights": weights_digest(outside)}


def _settings(processor: Any) -> list[Any]:
    """Return what a processor's pixels and prompts depend on."""
    parts = [getattr(processor, name, None) for name in ("video_processor", "image_processor")]
    made = [lasting(part.to_dict()) for part in parts if part is not None]
    return [type(processor).__name__, getattr(processor, "chat_template", None), *made]


def _size(count: int) -> str:
    """Return bytes in words."""
    number, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
