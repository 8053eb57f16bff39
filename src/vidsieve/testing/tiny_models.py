"""Tiny random models of every supported family, built from configurations: no download, milliseconds to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidsieve.types import TokenGrid

VIDEO, IMAGE, START, END, USER = 120, 121, 122, 123, 124
VOCABULARY = 128
TEMPLATE = {"turn_start": START, "turn_end": END, "user": USER, "ignore": [VIDEO, IMAGE]}


def _text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    } | changes  # fmt: skip


def llava_onevision(seed: int = 0) -> Any:
    """Return a random LLaVA-OneVision, 3 layers of width 64, frames of 56 px in 4×4 patches."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 8, "vision_use_head": False,
        },
        text_config=_text(model_type="qwen2"), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[56, 56]],
    )  # fmt: skip
    return _made(LlavaOnevisionForConditionalGeneration, config, seed)


def qwen2_5_vl(seed: int = 0) -> Any:
    """Return a random Qwen2.5-VL, 3 layers of width 64 with M-RoPE sections (2, 3, 3)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [1], "tokens_per_second": 2,
        },
        text_config=_text(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}),
        video_token_id=VIDEO, image_token_id=IMAGE, vision_start_token_id=118, vision_end_token_id=119,
    )  # fmt: skip
    return _made(Qwen2_5_VLForConditionalGeneration, config, seed)


def _made(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # The library's small start makes every answer nearly the same; spread the logits.
                parameter.data.normal_(0, 0.12)
    model.config.vidsieve_template = TEMPLATE
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


FAMILIES = {"llava_onevision": llava_onevision, "qwen2_5_vl": qwen2_5_vl}


def inputs_for(
    family: str, videos: list[list[TokenGrid]], *, words: list[int] | None = None, seed: int = 1, pad: str = "left"
) -> dict[str, Tensor]:
    """Return processor-like inputs: one list of video grids per prompt, random pixels and words.

    Parameters
    ----------
    videos : per prompt, the grids of its videos; LLaVA-OneVision grids are 4×4 and have the same frames
    words : per prompt, words after its last video (different numbers make a ragged batch)
    pad : {"left", "right"}
    """
    draw = torch.Generator().manual_seed(seed)
    words = words or [5] * len(videos)
    rows = []
    for grids, count in zip(videos, words, strict=True):
        ids = [START, USER]
        for grid in grids:
            tail = 1 if family == "llava_onevision" else 0
            around = ([], []) if family == "llava_onevision" else ([118], [119])
            ids += [*around[0], *[VIDEO] * (grid.num_tokens + tail), *around[1]]
            ids += torch.randint(10, 100, (2,), generator=draw).tolist()
        ids += [*torch.randint(10, 100, (count,), generator=draw).tolist(), END, START, 110]
        rows.append(ids)
    length = max(map(len, rows))
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        where = slice(length - len(row), None) if pad == "left" else slice(0, len(row))
        input_ids[number, where], mask[number, where] = torch.tensor(row), 1
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    flat = [grid for grids in videos for grid in grids]
    if not flat:
        return inputs
    if family == "llava_onevision":
        pixels = torch.randn(len(flat), flat[0].frames, 3, 56, 56, generator=draw)
        return inputs | {"pixel_values_videos": pixels}
    thw = torch.tensor([[g.frames, 2 * g.height, 2 * g.width] for g in flat])
    pixels = torch.randn(int(thw.prod(1).sum()), 3 * 2 * 4 * 4, generator=draw)
    return inputs | {
        "pixel_values_videos": pixels, "video_grid_thw": thw, "mm_token_type_ids": 2 * (input_ids == VIDEO).long(),
        "second_per_grid_ts": torch.full((len(flat),), 1.0),
    }  # fmt: skip


def default_grid(family: str, frames: int = 3) -> TokenGrid:
    """Return the grid of a video of this family's tiny model: 4×4 for LLaVA-OneVision, a wide 2×4 for Qwen."""
    return TokenGrid(frames, 4, 4) if family == "llava_onevision" else TokenGrid(frames, 2, 4)
