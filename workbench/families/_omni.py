"""What the tiny thinkers of Qwen's Omni models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import USER, VIDEO, rows_to_batch
from workbench.families import Batch
from workbench.families._qwen import HEIGHT, WIDTH

AUDIO, AUDIO_START, AUDIO_END = 117, 116, 115
MELS = 16
IDS = {"audio_start_token_id": AUDIO_START, "user_token_id": USER}

Layout = Callable[[int, int, float], list[str]]
"""``layout(frames, sound, seconds)`` returns the order of a video's tokens and its sound's: "v" and "a"."""


def omni_inputs(
    length: Callable[[Tensor], Tensor], layout: Layout, seconds: float, sound: bool = False
) -> Callable[[Batch, list[int], str], dict[str, Any]]:
    """Return the function that makes inputs; with `sound`, every video has one of its own length.

    Parameters
    ----------
    length : tokens of sounds with these numbers of mel frames
    layout : order of the tokens of a video with a sound
    seconds : between two frames
    sound : bool
    """

    def inputs(batch: Batch, words: list[int], pad: str = "left") -> dict[str, Any]:
        draw = torch.Generator().manual_seed(1)
        flat = [frames for videos in batch for frames in videos]
        # A second has 100 frames of mel features; the sound ends somewhat before the video, or after it.
        mels = torch.tensor([int(100 * seconds * frames) + 10 * (-1) ** i for i, frames in enumerate(flat)])
        tokens = iter(length(mels).tolist())

        def placeholders(frames: int) -> list[int]:
            if not sound:
                return [118, *[VIDEO] * (frames * HEIGHT * WIDTH), 119]
            order = layout(frames, next(tokens), seconds)
            return [118, AUDIO_START, *[VIDEO if kind == "v" else AUDIO for kind in order], AUDIO_END, 119]

        ids = rows_to_batch([[placeholders(frames) for frames in videos] for videos in batch], words, pad, draw)
        grids = torch.tensor([[frames, 2 * HEIGHT, 2 * WIDTH] for frames in flat])
        given: dict[str, Any] = ids | {
            "pixel_values_videos": torch.randn(int(grids.prod(1).sum()), 96, generator=draw),
            "video_grid_thw": grids,
            "video_second_per_grid": torch.full((len(flat),), seconds),
        }
        if not sound:
            return given
        return given | {
            "input_features": torch.randn(len(flat), MELS, int(mels.max()), generator=draw),
            "feature_attention_mask": (torch.arange(int(mels.max())) < mels[:, None]).long(),
            "use_audio_in_video": True,
        }

    return inputs
