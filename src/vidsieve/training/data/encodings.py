"""A folder of encoded videos: outputs of a frozen vision tower, read back in later epochs and runs.

One safetensors file a video, and a manifest that names the model. Everything is there again as if it had just been
encoded, to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from rich.filesize import decimal
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures, on_device
from vidsieve.adapters.fingerprint import digest, lasting, weights_digest
from vidsieve.errors import OutputError, TrainingError, VideoError
from vidsieve.io.bounded import LONGEST_FILE, parsed, read_json
from vidsieve.io.files import writing
from vidsieve.io.journal import differences
from vidsieve.io.tensors import load_tensors, save_tensors
from vidsieve.training.data.wording import Wording, is_pixels, worded
from vidsieve.types import TokenGrid
from vidsieve.video.reading import Video

MANIFEST = "manifest.json"
FORMAT = 1
_PENDING = "vidsieve_pending"

Source = tuple[tuple[Path, int], ...]
"""Files of a video, and the number of frames that each is shown; one pair for a video file."""


@dataclass(frozen=True)
class EncodingPlan:
    """Room that a cache will take: videos in all, videos not there yet, bytes of each of these, bytes free."""

    folder: Path
    videos: int
    missing: int
    bytes_each: int
    free: int

    def __str__(self) -> str:
        if not self.missing:
            return f"{self.folder} has all {self.videos} videos encoded"
        needed, each, free = (decimal(n) for n in (self.missing * self.bytes_each, self.bytes_each, self.free))
        return (
            f"{self.folder} has {self.videos - self.missing} of {self.videos} videos encoded; the others take about "
            f"{needed} ({each} each), {free} are free"
        )


class _Header(msgspec.Struct):
    stamp: str
    grid: tuple[int, int, int]
    per_row: bool
    surplus: Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class _Pending:
    """A video that is not encoded yet: the file of its features, and the wording of prompts about it."""

    path: Path
    wording: Wording


class EncodingCache:
    """Encoded videos in a folder, encoded on first use.

    A video is known by its files' paths, sizes and times of change, the number of frames and the processor's settings.
    A file that cannot be read, or is damaged, is replaced.

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

    def _compare(self, path: Path, manifest: dict[str, Any]) -> None:
        advice = "give another folder, or remove this one"
        changed = differences(read_json(path, TrainingError, advice, dict), manifest)
        if changed:
            raise TrainingError(f"the videos in {self.folder} were encoded with other settings ({changed}): {advice}")

    # -- before a run ---------------------------------------------------------------------------------------

    def plan(self, videos: Iterable[tuple[Source, Callable[[], Video]]]) -> EncodingPlan:
        """Encode the first video that is missing, and return the room that all of them will take.

        Raises
        ------
        OutputError
            If they do not fit on the disk; then nothing is written.
        """
        videos_of: dict[bool, set[str]] = {True: set(), False: set()}  # by whether their files are there
        first: tuple[Path, dict[str, Tensor], dict[str, Any]] | None = None
        for source, read in videos:
            path = self._path(source)
            stored = os.path.exists(path)
            if not stored and first is None:
                try:
                    inputs = self.inputs(source, read, "?")
                except VideoError:  # a broken one takes no room; the next one shows the size
                    continue
                first = path, *self._packed(self._encode(inputs), inputs[_PENDING].wording)
            videos_of[stored].add(path.stem)
        count, total = len(videos_of[False]), len(videos_of[False]) + len(videos_of[True])
        each = sum(tensor.nbytes for tensor in first[1].values()) if first is not None else 0
        plan = EncodingPlan(self.folder, total, count, each, shutil.disk_usage(self.folder).free)
        if count * each > plan.free:
            raise OutputError(f"the encoded videos do not fit: {plan}. Free some space, give another folder, or none")
        if first is not None:
            save_tensors(*first)
        return plan

    # -- prompts --------------------------------------------------------------------------------------------

    def inputs(self, source: Source, read: Callable[[], Video], question: str) -> dict[str, Any]:
        """Return the inputs of one question about one video; `read` is called where it is not encoded yet.

        The model is not run, so that any thread may call this; the inputs go through `finished` before use.

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
            inputs, wording = worded(self.processor, read(), question)
            return inputs | {_PENDING: _Pending(path, wording)}
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
            save_tensors(pending.path, *self._packed(video, pending.wording))
        return without_video(inputs) | {"mm_encoder_outputs": self._ready(video)}

    @torch.no_grad()
    def _encode(self, inputs: Mapping[str, Any]) -> VideoFeatures:
        (video,) = self.adapter.video_features(on_device(inputs, self.adapter.device))
        return video

    def _ready(self, video: VideoFeatures) -> dict[str, Any]:
        device = self.adapter.device
        deep = tuple(layer.to(device) for layer in video.deep)
        embeds, tail = video.embeds.to(device), video.tail.to(device)
        on = VideoFeatures(embeds, video.grid, tail, deep, None, video.per_row, video.surplus)
        return self.adapter.ready_features(on)

    # -- files ----------------------------------------------------------------------------------------------

    def _path(self, source: Source) -> Path:
        """Return the file of a video's features."""
        parts: list[Any] = []
        for file, times in source:
            try:
                resolved = file.resolve(strict=True)
                status = resolved.stat()
            except OSError as error:
                raise VideoError(f"{file} cannot be read ({error.strerror}): fetch it again") from None
            parts.append([str(resolved), status.st_size, status.st_mtime_ns, times])
        return self.folder / f"{digest([parts, self.frames, self._settings])}.safetensors"

    def _packed(self, video: VideoFeatures, wording: Wording) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
        return tensors, header

    def _load(self, path: Path) -> tuple[VideoFeatures, Wording] | None:
        """Return a stored video, its tensors mapped from the file; None where it must be encoded again."""
        if not os.path.exists(path):
            return None
        try:
            header, tensors, _ = load_tensors(path)
            known = msgspec.convert(header, _Header)
            text = zlib.decompressobj().decompress(tensors["text"].numpy().tobytes(), LONGEST_FILE)
            start, head = msgspec.convert(parsed(text), tuple[str, str])
            grid = TokenGrid(*known.grid)
            if known.stamp != self._stamp or tensors["embeds"].shape != (grid.num_tokens, self.adapter.hidden_size):
                return None
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
            return None

        def named(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        video = VideoFeatures(
            tensors["embeds"],
            grid,
            tensors["tail"],
            tuple(named("deep.").values()),
            None,
            known.per_row,
            known.surplus,
        )
        return video, Wording(start, head, named("kind."), named("extra."))


def without_video(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs without the video's pixels or features."""
    video = (_PENDING, "mm_encoder_outputs")
    return {name: value for name, value in inputs.items() if not is_pixels(name) and name not in video}


def _fingerprint(adapter: Adapter) -> dict[str, str]:
    """Return digests of a model's configuration, and of some values of every weight outside the LLM."""
    model = adapter.model
    llm = {id(weight) for weight in adapter.language_model.parameters()}
    head = model.get_output_embeddings()
    llm |= {id(weight) for weight in head.parameters()} if head is not None else set()
    outside = ((name, weight) for name, weight in model.named_parameters() if id(weight) not in llm)
    return {"config": digest(lasting(model.config.to_dict())), "weights": weights_digest(outside)}


def _settings(processor: Any) -> list[Any]:
    """Return the settings that a processor's pixels and prompts depend on."""
    parts = [getattr(processor, name, None) for name in ("video_processor", "image_processor")]
    settings = [lasting(part.to_dict()) for part in parts if part is not None]
    return [type(processor).__name__, getattr(processor, "chat_template", None), *settings]
