"""Models of published sizes with random weights: what takes time is there, and nothing has to be downloaded.

Answers of such a model mean nothing; times, memory and tokens do. Frames go through the family's own video processor
from transformers with its published settings; the text around them is random words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.template import Template
from vidsieve.answering import timed
from vidsieve.errors import UnknownNameError
from vidsieve.video.reading import Video

_WORDS = (1000, 100_000)
Text = tuple[int, int, int, int, int]
"""Width, width of the MLP, layers, heads, and heads of keys and values of an LLM."""
Tower = tuple[int, int, int, int]
"""Width, width of the MLP, layers and heads of a vision encoder."""


def _text(text: Text, **more: Any) -> dict[str, Any]:
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
    common = {"max_position_embeddings": 131072, "vocab_size": 152064, "tie_word_embeddings": False}
    return {**dict(zip(names, text, strict=True)), **common, **more}


def _tower(tower: Tower, **more: Any) -> dict[str, Any]:
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    return {**dict(zip(names, tower, strict=True)), **more}


def _qwen_tower(tower: Tower, text: Text, **more: Any) -> dict[str, Any]:
    hidden, inner, depth, heads = tower
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "depth": depth, "num_heads": heads}
    return {**sizes, "out_hidden_size": text[0], "spatial_merge_size": 2, "temporal_patch_size": 2, **more}


def _rope(theta: float, sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, **more}}


def _llava(text: Text, tower: Tower) -> dict[str, Any]:
    vision = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "vision_use_head": False}
    return {
        "vision_config": _tower(tower, **vision),
        "text_config": _text(text, model_type="qwen2", rope_theta=1e6),
        "image_token_index": 151646,
        "video_token_index": 151647,
        "vision_feature_select_strategy": "full",
    }


_QWEN_IDS = {
    "video_token_id": 151656,
    "image_token_id": 151655,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def _qwen(text: Text, tower: Tower) -> dict[str, Any]:
    third, depth = text[0] // text[3] // 16, tower[2]
    whole = [(i + 1) * depth // 4 - 1 for i in range(4)]
    vision = {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": whole, "tokens_per_second": 2}
    return {
        "vision_config": _qwen_tower(tower, text, **vision),
        "text_config": _text(text, **_rope(1e6, [2 * third, 3 * third, 3 * third])),
        **_QWEN_IDS,
    }


_DEEP = {27: [8, 16, 24], 24: [5, 11, 17], 8: [1, 3, 5]}
"""Blocks of Qwen3-VL's towers, by depth, whose features go into the LLM's first layers."""


def _qwen3(text: Text, tower: Tower) -> dict[str, Any]:
    vision = {"patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": _DEEP[tower[2]]}
    rope = _rope(5e6, [24, 20, 20], mrope_interleaved=True)
    return {
        "vision_config": _qwen_tower(tower, text, **vision),
        "text_config": _text(text, head_dim=128, **rope) | {"vocab_size": 151936},
        **_QWEN_IDS,
    }


def _internvl(text: Text, tower: Tower) -> dict[str, Any]:
    return {
        "vision_config": _tower(tower, image_size=[448, 448], patch_size=[14, 14]),
        "text_config": _text(text, model_type="qwen2", rope_theta=1e6),
        "image_token_id": 151667,
        "image_seq_length": 256,
        "tie_word_embeddings": False,
    }


def _smolvlm(text: Text, tower: Tower) -> dict[str, Any]:
    return {
        "vision_config": _tower(tower, image_size=384, patch_size=14),
        "text_config": _text(text, model_type="llama") | {"vocab_size": 49280},
        "image_token_id": 49190,
        "scale_factor": 3,
    }


_FAMILIES: dict[str, Callable[[Text, Tower], dict[str, Any]]] = {
    "llava_onevision": _llava,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen3,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
}
_SIGLIP, _EYES, _VIT = (1152, 4304, 26, 16), (1280, 3420, 32, 16), (1024, 4096, 24, 16)
_SMALL, _SMALL_TOWER, _7B = (512, 1408, 8, 8, 2), (384, 1536, 6, 6), (3584, 18944, 28, 28, 4)
_SIZES: dict[str, tuple[str, Text, Tower]] = {
    "llava-onevision-0.1b": ("llava_onevision", _SMALL, _SMALL_TOWER),
    "llava-onevision-0.5b": ("llava_onevision", (896, 4864, 24, 14, 2), _SIGLIP),
    "llava-onevision-7b": ("llava_onevision", _7B, _SIGLIP),
    "llava-video-7b": ("llava_onevision", _7B, _SIGLIP),
    "qwen2.5-vl-0.1b": ("qwen2_5_vl", _SMALL, (320, 856, 8, 4)),
    "qwen2.5-vl-3b": ("qwen2_5_vl", (2048, 11008, 36, 16, 2), _EYES),
    "qwen2.5-vl-7b": ("qwen2_5_vl", _7B, _EYES),
    "qwen3-vl-0.1b": ("qwen3_vl", _SMALL, (320, 856, 8, 4)),
    "qwen3-vl-4b": ("qwen3_vl", (2560, 9728, 36, 32, 8), _VIT),
    "qwen3-vl-8b": ("qwen3_vl", (4096, 12288, 36, 32, 8), (1152, 4304, 27, 16)),
    "internvl3-0.1b": ("internvl", _SMALL, _SMALL_TOWER),
    "internvl3-2b": ("internvl", (1536, 8960, 28, 12, 2), _VIT),
    "internvl3-8b": ("internvl", _7B, _VIT),
    "smolvlm2-0.1b": ("smolvlm", (512, 1408, 8, 8, 8), _SMALL_TOWER),
    "smolvlm2-2.2b": ("smolvlm", (2048, 8192, 24, 32, 32), (1152, 4304, 27, 16)),
}
"""Family, LLM and vision encoder by name; those ending in 0.1b are no published models."""


def _configuration(name: str) -> Any:
    """Return the configuration of a model."""
    from transformers import AutoConfig

    family, text, tower = _SIZES[name]
    config = AutoConfig.for_model(family, **_FAMILIES[family](text, tower))
    if name.startswith("llava-video"):
        config.vidsieve_layout = "grid"
    return config


BLUEPRINTS: dict[str, tuple[str, Callable[[], Any]]] = {
    name: (size[0], partial(_configuration, name)) for name, size in _SIZES.items()
}
"""Family and configuration by name."""


PIXELS = {"qwen2_5_vl": (3136, 12_845_056), "qwen3_vl": (4096, 25_165_824)}
"""Fewest and most pixels that the published processors scale one frame to (Qwen2.5-VL), or all together (Qwen3-VL)."""


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
        inputs = dict(self.frames_to_pixels([video.pixels], do_sample_frames=False, return_tensors="pt"))
        if self.family == "internvl":  # its frames are images
            inputs = {"pixel_values": inputs["pixel_values_videos"][0]}
        config, known = self.model.config, self.model.config.get_text_config().vocab_size
        most = min(_WORDS[1], known - 1000)  # below what stands for pixels
        question = torch.randint(_WORDS[0], most, (words,), generator=draw).tolist()
        holder = self._placeholders(inputs)
        (start, user), (end,) = _turn(config)
        assistant = 11 if known < _WORDS[1] else 77091
        ids = torch.tensor([[start, user, 198, *holder, *question, end, 198, start, assistant, 198]])
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.family == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([2 / timed(video).sampled_fps])
        if self.family in ("qwen2_5_vl", "qwen3_vl"):
            inputs["mm_token_type_ids"] = 2 * (ids == config.video_token_id).long()
        return inputs

    def _placeholders(self, inputs: Mapping[str, Tensor]) -> list[int]:
        config = self.model.config
        if self.family in ("internvl", "smolvlm"):
            frames, each = inputs["pixel_values"].shape[-4], 256 if self.family == "internvl" else 81
            return [int(config.image_token_id)] * (frames * each)
        token = int(config.video_token_id)
        if self.family == "qwen3_vl":  # every frame stands behind its time
            frames, height, width = inputs["video_grid_thw"][0].tolist()
            return [*[27, 15, 13, 20, 6486, 29, 151652, *[token] * (height * width // 4), 151653] * frames]
        if self.family == "qwen2_5_vl":
            frames, height, width = inputs["video_grid_thw"][0].tolist()
            return [151652, *[token] * (frames * height * width // 4), 151653]
        return [token] * (inputs["pixel_values_videos"].shape[1] * 14 * 14 + 1)


def _turn(config: Any) -> tuple[tuple[int, int], tuple[int]]:
    """Return the ids that open and close the user's turn in `RandomModel.inputs`."""
    return ((9, 872), (10,)) if config.get_text_config().vocab_size < _WORDS[1] else ((151644, 872), (151645,))


def random_model(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> RandomModel:
    """Return a model of a blueprint with random weights, made where it is to run.

    Raises
    ------
    UnknownNameError
    """
    from transformers import AutoModelForImageTextToText

    if name not in BLUEPRINTS:
        raise UnknownNameError("model size", name, BLUEPRINTS)
    family, config = BLUEPRINTS[name]
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config(), dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    opening, closing = _turn(model.config)
    markers = {198, 151652, 151653, model.config.image_token_id, getattr(model.config, "video_token_id", 0)}
    model.vidsieve_template = Template((opening,), (closing,), frozenset(markers))
    return RandomModel(name, family, model.eval(), _video_processor(family))


def _edges(family: str) -> dict[str, int]:
    return dict(zip(("shortest_edge", "longest_edge"), PIXELS[family], strict=True))


def _video_processor(family: str) -> Any:
    """Return a family's own video processor with its published settings."""
    import transformers

    side = {"longest_edge": 384}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llava_onevision": ("LlavaOnevisionVideoProcessor", {}),
        "qwen2_5_vl": ("Qwen2VLVideoProcessor", {"size": _edges("qwen2_5_vl")}),
        "qwen3_vl": ("Qwen3VLVideoProcessor", {"size": _edges("qwen3_vl")}),
        "internvl": ("InternVLVideoProcessor", {"size": {"height": 448, "width": 448}}),
        "smolvlm": (
            "SmolVLMVideoProcessor",
            {
                "size": side,
                "max_image_size": side,
                "video_sampling": {"fps": 1, "max_frames": 64, "video_size": side},
            },
        ),
    }
    name, settings = kinds[family]
    return getattr(transformers, name)(**settings)
