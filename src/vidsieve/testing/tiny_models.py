"""Tiny random models of every supported family, built from configurations: no download, milliseconds to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidsieve.types import TokenGrid

VIDEO, IMAGE, START, END, USER = 120, 121, 122, 123, 124
VOCABULARY = 128
TEMPLATE = {"turn_start": START, "turn_end": END, "user": USER, "ignore": [VIDEO, IMAGE]}


def _text(layers: int, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | changes


def llava_onevision(seed: int = 0, layers: int = 3) -> Any:
    """Return a random LLaVA-OneVision, `layers` layers of width 64, frames of 56 px in 4×4 patches."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 8,
            "vision_use_head": False,
        },
        text_config=_text(layers, model_type="qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[56, 56]],
    )
    return _made(LlavaOnevisionForConditionalGeneration, config, seed)


def llava_video(seed: int = 0, layers: int = 3) -> Any:
    """Return a random LLaVA-Video: as LLaVA-OneVision, its layout stated, 3×3 tokens a frame and a newline per row."""
    model = llava_onevision(seed, layers)
    model.config.vidsieve_layout = "grid"
    return model


def qwen2_5_vl(seed: int = 0, layers: int = 3) -> Any:
    """Return a random Qwen2.5-VL, `layers` layers of width 64 with M-RoPE sections (2, 3, 3)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        text_config=_text(
            layers, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        ),
        video_token_id=VIDEO,
        image_token_id=IMAGE,
        vision_start_token_id=118,
        vision_end_token_id=119,
    )
    return _made(Qwen2_5_VLForConditionalGeneration, config, seed)


def qwen3_vl(seed: int = 0, layers: int = 3) -> Any:
    """Return a random Qwen3-VL, `layers` layers of width 64, interleaved M-RoPE, deepstack features in two layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = _text(
        layers,
        head_dim=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    )
    config = Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config=text,
        video_token_id=VIDEO,
        image_token_id=IMAGE,
        vision_start_token_id=118,
        vision_end_token_id=119,
    )
    return _made(Qwen3VLForConditionalGeneration, config, seed)


def internvl(seed: int = 0, layers: int = 3) -> Any:
    """Return a random InternVL, `layers` layers of width 64, frames of 32 px in 4×4 tokens."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [4, 4],
        },
        text_config=_text(layers, model_type="qwen2"),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return _made(InternVLForConditionalGeneration, config, seed)


def smolvlm(seed: int = 0, layers: int = 3) -> Any:
    """Return a random SmolVLM, `layers` layers of width 64, frames of 32 px in 4×4 tokens."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
        text_config=_text(layers, model_type="llama"),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return _made(SmolVLMForConditionalGeneration, config, seed)


def _made(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # The library's small start makes every answer nearly the same; spread the logits.
                parameter.data.normal_(0, 0.12)
        # Words only: a random model would say placeholders too, which no conversation can go on from.
        model.get_output_embeddings().weight.data[100:] = 0
    model.config.vidsieve_template = TEMPLATE
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


FAMILIES = {
    "llava_onevision": llava_onevision,
    "llava_video": llava_video,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
}


def inputs_for(
    family: str,
    videos: list[list[TokenGrid]],
    *,
    words: list[int] | None = None,
    seed: int = 1,
    pad: str = "left",
    image: bool = False,
) -> dict[str, Tensor]:
    """Return processor-like inputs: one list of video grids per prompt, random pixels and words.

    InternVL and SmolVLM read all frames of a prompt as one video, unless `prune` is told otherwise.

    Parameters
    ----------
    videos : per prompt, the grids of its videos; LLaVA grids are 4×4, as the processor counts, and of as many frames
    words : per prompt, words after its last video (different numbers make a ragged batch)
    pad : {"left", "right"}
    image : put a still image behind each prompt's first video
    """
    draw = torch.Generator().manual_seed(seed)
    words = words or [5] * len(videos)
    rows = []
    for grids, count in zip(videos, words, strict=True):
        ids = [START, USER]
        for number, grid in enumerate(grids):
            ids += _placeholders(family, grid)
            ids += torch.randint(10, 100, (2,), generator=draw).tolist()
            if image and number == 0:
                ids += [118, *[IMAGE] * _IMAGE_TOKENS[family], 119]
        ids += [*torch.randint(10, 100, (count,), generator=draw).tolist(), END, START, 110]
        rows.append(ids)
    length = max(map(len, rows))
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        where = slice(length - len(row), None) if pad == "left" else slice(0, len(row))
        input_ids[number, where], mask[number, where] = torch.tensor(row), 1
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    return inputs if not any(videos) else inputs | _pixels(family, videos, input_ids, draw, image)


_LLAVA = ("llava_onevision", "llava_video")
_IMAGE_TOKENS = {**dict.fromkeys(_LLAVA, 7 * 7 + 7 * 8), "qwen2_5_vl": 8, "qwen3_vl": 8, "internvl": 16, "smolvlm": 16}


def _pixels(
    family: str, videos: list[list[TokenGrid]], ids: Tensor, draw: torch.Generator, image: bool
) -> dict[str, Tensor]:
    """Return the pixels of a batch and what the family's processor says of them."""
    flat, prompts = [grid for grids in videos for grid in grids], len(videos)
    if family in _LLAVA:
        made = {"pixel_values_videos": torch.randn(len(flat), flat[0].frames, 3, 56, 56, generator=draw)}
        if image:
            made["pixel_values"] = torch.randn(prompts, 2, 3, 56, 56, generator=draw)
            made["image_sizes"] = torch.tensor([[56, 56]] * prompts)
        return made
    if family in ("internvl", "smolvlm"):
        counts = [sum(g.frames for g in grids) + image for grids in videos]
        frames = [torch.randn(count, 3, 32, 32, generator=draw) for count in counts]
        if family == "internvl":
            return {"pixel_values": torch.cat(frames)}
        black = torch.zeros(prompts, max(counts), 3, 32, 32)  # padding
        for line, some in zip(black, frames, strict=True):
            line[: len(some)] = some
        return {"pixel_values": black}
    grids = torch.tensor([[g.frames, 2 * g.height, 2 * g.width] for g in flat])
    made = {
        "pixel_values_videos": torch.randn(int(grids.prod(1).sum()), 96, generator=draw),
        "video_grid_thw": grids,
        "mm_token_type_ids": 2 * (ids == VIDEO).long() + (ids == IMAGE).long(),
    }
    if family == "qwen2_5_vl":
        made["second_per_grid_ts"] = torch.full((len(flat),), 1.0)
    if image:
        made["image_grid_thw"] = torch.tensor([[1, 4, 8]] * prompts)
        made["pixel_values"] = torch.randn(32 * prompts, 96, generator=draw)
    return made


def _placeholders(family: str, grid: TokenGrid) -> list[int]:
    """Return what stands for one video in a prompt, as the family's processor writes it."""
    if family in _LLAVA:
        return [VIDEO] * (grid.num_tokens + 1)  # and one newline at the end
    if family == "qwen2_5_vl":
        return [118, *[VIDEO] * grid.num_tokens, 119]
    kind = VIDEO if family == "qwen3_vl" else IMAGE
    # A time stamp before every frame.
    return [i for frame in range(grid.frames) for i in (100 + frame, 118, *[kind] * grid.per_frame, 119)]


def placeholder(family: str) -> int:
    """Return the id that stands for a video's token."""
    return IMAGE if family in ("internvl", "smolvlm") else VIDEO


def default_grid(family: str, frames: int = 3) -> TokenGrid:
    """Return the grid of a video as this family's tiny processor counts it: a wide 2×4 for Qwen, else 4×4."""
    return TokenGrid(frames, 2, 4) if family.startswith("qwen") else TokenGrid(frames, 4, 4)
