"""Models of published sizes with random weights: what takes time is there, and nothing has to be downloaded.

Answers of such a model mean nothing; times, memory and tokens do. Frames go through the family's own video processor
from transformers with its published settings; the text around them is random words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidsieve.data.video import Video
from vidsieve.errors import UnknownNameError

_WORDS = (1000, 100_000)
_QWEN = {"vocab_size": 152064, "tie_word_embeddings": False}


def _text(width: int, inner: int, layers: int, heads: int, shared: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": shared, "max_position_embeddings": 131072, **_QWEN, **more,
    }  # fmt: skip


def _llava(width: int, inner: int, layers: int, heads: int, shared: int, tower: tuple[int, int, int, int]) -> Any:
    from transformers import LlavaOnevisionConfig

    hidden, mlp, depth, eyes = tower
    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": hidden, "intermediate_size": mlp,
            "num_hidden_layers": depth, "num_attention_heads": eyes, "image_size": 384, "patch_size": 14,
            "vision_use_head": False,
        },
        text_config=_text(width, inner, layers, heads, shared, model_type="qwen2", rope_theta=1e6),
        image_token_index=151646, video_token_index=151647, vision_feature_select_strategy="full",
    )  # fmt: skip


def _qwen(width: int, inner: int, layers: int, heads: int, shared: int, tower: tuple[int, int, int, int]) -> Any:
    from transformers import Qwen2_5_VLConfig

    hidden, mlp, depth, eyes = tower
    third = width // heads // 16
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": depth, "hidden_size": hidden, "intermediate_size": mlp, "num_heads": eyes,
            "out_hidden_size": width, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": [(i + 1) * depth // 4 - 1 for i in range(4)],
            "tokens_per_second": 2,
        },
        text_config=_text(
            width, inner, layers, heads, shared,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * third, 3 * third, 3 * third],
            },
        ),
        video_token_id=151656, image_token_id=151655, vision_start_token_id=151652, vision_end_token_id=151653,
    )  # fmt: skip


_SIGLIP, _EYES = (1152, 4304, 26, 16), (1280, 3420, 32, 16)
BLUEPRINTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llava-onevision-0.1b": ("llava_onevision", lambda: _llava(512, 1408, 8, 8, 2, (384, 1536, 6, 6))),
    "llava-onevision-0.5b": ("llava_onevision", lambda: _llava(896, 4864, 24, 14, 2, _SIGLIP)),
    "llava-onevision-7b": ("llava_onevision", lambda: _llava(3584, 18944, 28, 28, 4, _SIGLIP)),
    "qwen2.5-vl-0.1b": ("qwen2_5_vl", lambda: _qwen(512, 1408, 8, 8, 2, (320, 856, 8, 4))),
    "qwen2.5-vl-3b": ("qwen2_5_vl", lambda: _qwen(2048, 11008, 36, 16, 2, _EYES)),
    "qwen2.5-vl-7b": ("qwen2_5_vl", lambda: _qwen(3584, 18944, 28, 28, 4, _EYES)),
}
"""Family and configuration by name; those ending in 0.1b are no published models."""


@dataclass(frozen=True)
class RandomModel:
    """A model with random weights, and what makes its prompts.

    Parameters
    ----------
    name, family : str
    model : the model, in evaluation mode
    frames_to_pixels : the family's video processor
    """

    name: str
    family: str
    model: Any
    frames_to_pixels: Any

    def inputs(self, video: Video, words: int, seed: int = 0) -> dict[str, Tensor]:
        """Return the inputs of one prompt about a video with so many random words behind it."""
        draw = torch.Generator().manual_seed(seed)
        made = dict(self.frames_to_pixels([video.pixels], do_sample_frames=False, return_tensors="pt"))
        asked = torch.randint(*_WORDS, (words,), generator=draw).tolist()
        holder, config = self._placeholders(made), self.model.config
        ids = torch.tensor([[151644, 872, 198, *holder, *asked, 151645, 198, 151644, 77091, 198]])
        made |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.family == "qwen2_5_vl":
            rate = len(video.pixels) / video.duration if video.duration else 1.0
            made["second_per_grid_ts"] = torch.tensor([2 / rate])
            made["mm_token_type_ids"] = 2 * (ids == config.video_token_id).long()
        return made

    def _placeholders(self, made: Mapping[str, Tensor]) -> list[int]:
        token = int(self.model.config.video_token_id)
        if self.family == "qwen2_5_vl":
            frames, height, width = made["video_grid_thw"][0].tolist()
            return [151652, *[token] * (frames * height * width // 4), 151653]
        return [token] * (made["pixel_values_videos"].shape[1] * 14 * 14 + 1)


def random_model(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> RandomModel:
    """Return a model of a blueprint with random weights, made where it is to run.

    Raises
    ------
    UnknownNameError
    """
    from transformers import AutoModelForImageTextToText, LlavaOnevisionVideoProcessor, Qwen2VLVideoProcessor

    if name not in BLUEPRINTS:
        raise UnknownNameError("model size", name, BLUEPRINTS)
    family, config = BLUEPRINTS[name]
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config(), dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    kind = {"llava_onevision": LlavaOnevisionVideoProcessor, "qwen2_5_vl": Qwen2VLVideoProcessor}[family]
    return RandomModel(name, family, model.eval(), kind())
