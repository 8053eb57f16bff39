"""Tiny random models and processors of every supported family: no download, milliseconds to run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.template import Template
from vidsieve.types import TokenGrid

VIDEO, IMAGE, START, END, USER = 120, 121, 122, 123, 124
VOCABULARY = 128


def text_config(layers: int, **changes: Any) -> dict[str, Any]:
    """Return the configuration of an LLM of width 64, with `changes`."""
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


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_IDS = {"video_token_id": VIDEO, "image_token_id": IMAGE, "vision_start_token_id": 118, "vision_end_token_id": 119}


def mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    """Return the part of an LLM's configuration that gives it M-RoPE."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections} | more}


def llava_onevision(seed: int = 0, layers: int = 3) -> Any:
    """Return a random LLaVA-OneVision, `layers` layers of width 64, frames of 56 px in 4×4 tokens."""
    vision = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 8, "vision_use_head": False}
    return random_model(
        "LlavaOnevision",
        seed,
        vision_config=VISION | vision,
        text_config=text_config(layers, model_type="qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[56, 56]],
    )


def llava_video(seed: int = 0, layers: int = 3) -> Any:
    """Return a random LLaVA-Video: LLaVA-OneVision with layout "grid", 3×3 tokens a frame and a newline per row."""
    model = llava_onevision(seed, layers)
    model.config.vidsieve_layout = "grid"
    return model


def qwen2_5_vl(seed: int = 0, layers: int = 3) -> Any:
    """Return a random Qwen2.5-VL, `layers` layers of width 64 with M-RoPE sections (2, 3, 3)."""
    vision = {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    text = text_config(layers, **mrope([2, 3, 3]))
    return random_model("Qwen2_5_VL", seed, vision_config=QWEN_VISION | vision, text_config=text, **QWEN_IDS)


def qwen3_vl(seed: int = 0, layers: int = 3) -> Any:
    """Return a random Qwen3-VL, `layers` layers of width 64, interleaved M-RoPE, deepstack features in two layers."""
    vision = {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = text_config(layers, head_dim=16, **mrope([4, 2, 2], mrope_interleaved=True))
    return random_model("Qwen3VL", seed, vision_config=QWEN_VISION | vision, text_config=text, **QWEN_IDS)


def internvl(seed: int = 0, layers: int = 3) -> Any:
    """Return a random InternVL, `layers` layers of width 64, frames of 32 px in 4×4 tokens."""
    return random_model(
        "InternVL",
        seed,
        vision_config=VISION | {"image_size": [32, 32], "patch_size": [4, 4]},
        text_config=text_config(layers, model_type="qwen2"),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def smolvlm(seed: int = 0, layers: int = 3) -> Any:
    """Return a random SmolVLM, `layers` layers of width 64, frames of 32 px in 4×4 tokens."""
    return random_model(
        "SmolVLM",
        seed,
        vision_config=VISION | {"image_size": 32, "patch_size": 4},
        text_config=text_config(layers, model_type="llama"),
        image_token_id=IMAGE,
        scale_factor=2,
    )


def random_model(name: str, seed: int, spread: float = 0.12, **fields: Any) -> Any:
    """Return a model of transformers' classes `name` in evaluation mode, its weights normal with deviation `spread`."""
    config = _class(f"{name}Config", f"{name}_Config")(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _class(f"{name}ForConditionalGeneration", name)(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # transformers' small initial weights make every answer nearly the same; spread the logits.
                parameter.data.normal_(0, spread)
        # Words only: a random model would generate placeholders too, and no conversation can continue after one.
        head = next(module for path, module in model.named_modules() if path.split(".")[-1] == "lm_head")
        head.weight.data[100:] = 0
    model.vidsieve_template = template()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


def _class(*names: str) -> Any:
    """Return the first class of transformers by one of these names."""
    import transformers

    return next(getattr(transformers, name) for name in names if hasattr(transformers, name))


FAMILIES = {
    function.__name__: function for function in (llava_onevision, llava_video, qwen2_5_vl, qwen3_vl, internvl, smolvlm)
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

    InternVL and SmolVLM read all frames of a prompt as one video, unless `prune` gets `videos`.

    Parameters
    ----------
    videos : per prompt, the grids of its videos; LLaVA grids are 4×4, with equal frame counts
    words : per prompt, words after its last video (different numbers make a ragged batch)
    pad : {"left", "right"}
    image : put a still image after each prompt's first video
    """
    draw = torch.Generator().manual_seed(seed)
    words = words or [5] * len(videos)
    still = [118, *[IMAGE] * _IMAGE_TOKENS[family], 119] if image else []
    parts = [[_placeholders(family, grid) for grid in grids] for grids in videos]
    inputs = rows_to_batch(parts, words, pad, draw, still)
    input_ids = inputs["input_ids"]
    return inputs if not any(videos) else inputs | _pixels(family, videos, input_ids, draw, image)


def rows_to_batch(
    videos: list[list[list[int]]], words: list[int], pad: str, draw: torch.Generator, still: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` (B, L) of prompts in the tiny models' template.

    Parameters
    ----------
    videos : per prompt and video, the ids that stand for it
    words : per prompt, words after its last video
    pad : {"left", "right"}
    still : ids of a still image after each prompt's first video
    """
    rows = []
    for parts, count in zip(videos, words, strict=True):
        ids = [START, USER]
        for number, part in enumerate(parts):
            ids += part
            ids += torch.randint(10, 100, (2,), generator=draw).tolist()
            if number == 0:
                ids += still
        ids += [*torch.randint(10, 100, (count,), generator=draw).tolist(), END, START, 110]
        rows.append(ids)
    length = max(map(len, rows))
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        where = slice(length - len(row), None) if pad == "left" else slice(0, len(row))
        input_ids[number, where], mask[number, where] = torch.tensor(row), 1
    return {"input_ids": input_ids, "attention_mask": mask}


_LLAVA = ("llava_onevision", "llava_video")
_IMAGE_TOKENS = {**dict.fromkeys(_LLAVA, 7 * 7 + 7 * 8), "qwen2_5_vl": 8, "qwen3_vl": 8, "internvl": 16, "smolvlm": 16}


def _pixels(
    family: str, videos: list[list[TokenGrid]], ids: Tensor, draw: torch.Generator, image: bool
) -> dict[str, Tensor]:
    """Return the pixels of a batch, and their sizes as the family's processor returns them."""
    flat, prompts = [grid for grids in videos for grid in grids], len(videos)
    if family in _LLAVA:
        pixels = {"pixel_values_videos": torch.randn(len(flat), flat[0].frames, 3, 56, 56, generator=draw)}
        if image:
            pixels["pixel_values"] = torch.randn(prompts, 2, 3, 56, 56, generator=draw)
            pixels["image_sizes"] = torch.tensor([[56, 56]] * prompts)
        return pixels
    if family in ("internvl", "smolvlm"):
        counts = [sum(g.frames for g in grids) + image for grids in videos]
        frames = [torch.randn(count, 3, 32, 32, generator=draw) for count in counts]
        if family == "internvl":
            return {"pixel_values": torch.cat(frames)}
        padded = torch.zeros(prompts, max(counts), 3, 32, 32)
        for row, part in zip(padded, frames, strict=True):
            row[: len(part)] = part
        return {"pixel_values": padded}
    grids = torch.tensor([[g.frames, 2 * g.height, 2 * g.width] for g in flat])
    pixels = {
        "pixel_values_videos": torch.randn(int(grids.prod(1).sum()), 96, generator=draw),
        "video_grid_thw": grids,
        "mm_token_type_ids": 2 * (ids == VIDEO).long() + (ids == IMAGE).long(),
    }
    if family == "qwen2_5_vl":
        pixels["second_per_grid_ts"] = torch.full((len(flat),), 1.0)
    if image:
        pixels["image_grid_thw"] = torch.tensor([[1, 4, 8]] * prompts)
        pixels["pixel_values"] = torch.randn(32 * prompts, 96, generator=draw)
    return pixels


def _placeholders(family: str, grid: TokenGrid) -> list[int]:
    """Return the ids of one video in a prompt, as the family's processor writes them."""
    if family in _LLAVA:
        return [VIDEO] * (grid.num_tokens + 1)  # one newline at the end
    if family == "qwen2_5_vl":
        return [118, *[VIDEO] * grid.num_tokens, 119]
    kind = VIDEO if family == "qwen3_vl" else IMAGE
    # A time stamp before every frame.
    return [i for frame in range(grid.frames) for i in (100 + frame, 118, *[kind] * grid.per_frame, 119)]


def placeholder(family: str) -> int:
    """Return the id of a video token's placeholder."""
    return IMAGE if family in ("internvl", "smolvlm") else VIDEO


def default_grid(family: str, frames: int = 3) -> TokenGrid:
    """Return the grid of a video as this family's tiny processor counts it: a wide 2×4 for Qwen, else 4×4."""
    return TokenGrid(frames, 2, 4) if family.startswith("qwen") else TokenGrid(frames, 4, 4)


CHAT = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% for p in m['content'] %}{% if p['type'] == 'video' %}VIDEO "
    "{% else %}{{ p['text'] }} {% endif %}{% endfor %}<|im_end|> {% endfor %}<|im_start|> assistant"
)
TEXT = ("what", "colour", "is", "the", "home", "?", "red", "blue", "green", "seconds>", "Frame1:", "Frame2:")
"""Words that the tiny tokenizers know, ids from 10."""


def processor_for(family: str) -> Any:
    """Return a processor of the family's own class that writes the ids of the tiny models."""
    import transformers as t

    size = {"size": {"height": 56, "width": 56}}
    if family.startswith("llava"):
        return t.LlavaOnevisionProcessor(
            image_processor=t.LlavaOnevisionImageProcessor(**size),
            tokenizer=_tokenizer(family),
            video_processor=t.LlavaOnevisionVideoProcessor(**size),
            num_image_tokens=49,
            vision_feature_select_strategy="full",
            video_token="<|video_pad|>",
            image_token="<|image_pad|>",
            chat_template=CHAT.replace("VIDEO", "<|video_pad|>"),
        )
    if family == "internvl":
        size = {"size": {"height": 32, "width": 32}}
        return t.InternVLProcessor(
            image_processor=t.GotOcr2ImageProcessor(**size),
            tokenizer=_tokenizer(family),
            video_processor=t.InternVLVideoProcessor(**size),
            image_seq_length=16,
            chat_template=CHAT.replace("VIDEO", "<|video_pad|>"),
        )
    sizes = {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 16 * 32 * 32},
    }
    kind, video_processor = {
        "qwen2_5_vl": (t.Qwen2_5_VLProcessor, t.Qwen2VLVideoProcessor),
        "qwen3_vl": (t.Qwen3VLProcessor, t.Qwen3VLVideoProcessor),
    }[family]
    # Qwen3-VL's checkpoints have these; vLLM takes those of videos from images.
    scaling = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "qwen3_vl" else {}
    return kind(
        image_processor=t.Qwen2VLImageProcessor(**sizes, **scaling),
        tokenizer=_tokenizer(family),
        video_processor=video_processor(**sizes, cap_pixels_per_frame=False),
        chat_template=CHAT.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"),
    )


@cache
def template() -> Template:
    """Return the chat template that the tiny processors and `inputs_for` write, for all families the same."""
    tokenizer = _tokenizer("qwen2_5_vl")
    tokenizer.chat_template = CHAT.replace("VIDEO", "<|video_pad|>")
    return Template.of(tokenizer)


def _tokenizer(family: str) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = {
        "<|vision_start|>": 118,
        "<|vision_end|>": 119,
        "<|video_pad|>": VIDEO,
        "<|image_pad|>": IMAGE,
        "<|im_start|>": START,
        "<|im_end|>": END,
    }
    words = {"<pad>": 0, "<unk>": 1, **special, "user": USER, "assistant": 110}
    words |= {word: 10 + number for number, word in enumerate(TEXT)}
    words |= {f"w{i}": i for i in range(VOCABULARY) if i not in words.values()}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    named = {
        "start_image_token": "<|vision_start|>",
        "end_image_token": "<|vision_end|>",
        "context_image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    extra: dict[str, Any] = {"additional_special_tokens": list(special)}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        **({"extra_special_tokens": named} if family == "internvl" else extra),
    )
