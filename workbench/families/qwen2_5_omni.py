"""The thinker of a tiny Qwen2.5-Omni."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, QWEN_VISION, VIDEO, mrope, random_model, text_config
from workbench.families import Tiny
from workbench.families._omni import AUDIO, AUDIO_END, IDS, MELS, omni_inputs
from workbench.families._qwen import HEIGHT, WIDTH

AUDIO_TOWER = {"num_mel_bins": MELS, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
AUDIO_TOWER |= {"d_model": 16, "output_dim": 64, "max_source_positions": 200, "n_window": 50}
PLACEHOLDERS = {"video_token_index": VIDEO, "image_token_index": IMAGE, "audio_token_index": AUDIO}


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random thinker, `layers` layers of width 64 with M-RoPE sections (2, 3, 3), 25 positions a second."""
    vision = {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    return random_model(
        "Qwen2_5OmniThinker",
        seed,
        vision_config=QWEN_VISION | vision,
        text_config=text_config(layers, **mrope([2, 3, 3])),
        audio_config=AUDIO_TOWER,
        vision_start_token_id=118,
        vision_end_token_id=119,
        audio_end_token_id=AUDIO_END,
        **IDS,
        **PLACEHOLDERS,
    )


def length(mels: Tensor) -> Tensor:
    """Return the number of tokens of sounds with so many mel frames."""
    return ((mels - 1) // 2 - 1) // 2 + 1


def layout(frames: int, sound: int, seconds: float) -> list[str]:
    """Return two seconds of frames, then two of sound, and so on."""
    size = HEIGHT * WIDTH
    shown = [int(frame * seconds * 25) // 50 for frame in range(frames) for _ in range(size)]
    heard = [token // 50 for token in range(sound)]
    chunks = range(max(*shown, *heard) + 1)
    return [kind for chunk in chunks for kind in "v" * shown.count(chunk) + "a" * heard.count(chunk)]


TINY = Tiny(model, omni_inputs(length, layout, 1.0))
SOUNDING = Tiny(model, omni_inputs(length, layout, 1.0, sound=True))
