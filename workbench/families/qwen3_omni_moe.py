"""The thinker of a tiny Qwen3-Omni."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, QWEN_VISION, VIDEO, mrope, random_model, text_config
from workbench.families import Tiny
from workbench.families._omni import AUDIO, IDS, omni_inputs
from workbench.families._qwen import HEIGHT, WIDTH
from workbench.families.qwen2_5_omni import AUDIO_TOWER
from workbench.families.qwen3_vl_moe import EXPERTS, VISION


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random thinker, `layers` layers of width 64, interleaved M-RoPE, deepstack features in two layers."""
    return random_model(
        "Qwen3OmniMoeThinker",
        seed,
        vision_config=QWEN_VISION | VISION,
        text_config=text_config(layers, head_dim=16, **mrope([4, 2, 2], mrope_interleaved=True)) | EXPERTS,
        audio_config=AUDIO_TOWER | {"downsample_hidden_size": 8, "n_window_infer": 200},
        position_id_per_seconds=13,
        vision_start_token_id=118,
        vision_end_token_id=119,
        video_token_id=VIDEO,
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        **IDS,
    )


def length(mels: Tensor) -> Tensor:
    """Return the number of tokens of sounds with so many mel frames: 13 a second, and of what is left over."""
    rest = (mels % 100 - 1) // 2 + 1
    return ((rest - 1) // 2 + 1 - 1) // 2 + 1 + mels // 100 * 13


def layout(frames: int, sound: int, seconds: float) -> list[str]:
    """Return every token in the order of its time, frames before sounds."""
    shown = [(frame * seconds * 13, "a") for frame in range(frames) for _ in range(HEIGHT * WIDTH)]
    order = sorted([*shown, *((token, "b") for token in range(sound))])
    return ["v" if kind == "a" else "a" for _, kind in order]


TINY = Tiny(model, omni_inputs(length, layout, 0.75))
SOUNDING = Tiny(model, omni_inputs(length, layout, 0.75, sound=True))
