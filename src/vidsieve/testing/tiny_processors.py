"""Processors that write the ids of the tiny models: every family's own class, a tokenizer of few words."""

from __future__ import annotations

from typing import Any

from vidsieve.testing.tiny_models import END, IMAGE, START, USER, VIDEO

CHAT = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% for p in m['content'] %}{% if p['type'] == 'video' %}VIDEO "
    "{% else %}{{ p['text'] }} {% endif %}{% endfor %}<|im_end|> {% endfor %}<|im_start|> assistant"
)


def processor_for(family: str) -> Any:
    """Return a processor of the family's own class that writes the ids of the tiny models."""
    import transformers as t
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {
        "<pad>": 0,
        "<unk>": 1,
        "<|vision_start|>": 118,
        "<|vision_end|>": 119,
        "<|video_pad|>": VIDEO,
        "<|image_pad|>": IMAGE,
        "<|im_start|>": START,
        "<|im_end|>": END,
        "user": USER,
        "assistant": 110,
    }
    said = ["what", "colour", "is", "the", "home", "?", "red", "blue", "green", "seconds>", "Frame1:", "Frame2:"]
    words |= {word: 10 + number for number, word in enumerate(said)}
    words |= {f"w{i}": i for i in range(128) if i not in words.values()}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    special = [word for word in words if word.startswith("<|")]
    named = {
        "start_image_token": "<|vision_start|>",
        "end_image_token": "<|vision_end|>",
        "context_image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        **{"extra_special_tokens": named} if family == "internvl" else {"additional_special_tokens": special},
    )
    fixed = {"size": {"height": 56, "width": 56}}
    if family.startswith("llava"):
        return t.LlavaOnevisionProcessor(
            image_processor=t.LlavaOnevisionImageProcessor(**fixed),
            tokenizer=tokenizer,
            video_processor=t.LlavaOnevisionVideoProcessor(**fixed),
            num_image_tokens=49,
            vision_feature_select_strategy="full",
            video_token="<|video_pad|>",
            image_token="<|image_pad|>",
            chat_template=CHAT.replace("VIDEO", "<|video_pad|>"),
        )
    if family == "internvl":
        small = {"size": {"height": 32, "width": 32}}
        return t.InternVLProcessor(
            image_processor=t.GotOcr2ImageProcessor(**small),
            tokenizer=tokenizer,
            video_processor=t.InternVLVideoProcessor(**small),
            image_seq_length=16,
            chat_template=CHAT.replace("VIDEO", "<|video_pad|>"),
        )
    look = {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 16 * 32 * 32},
        "cap_pixels_per_frame": False,
    }
    kind, video = {
        "qwen2_5_vl": (t.Qwen2_5_VLProcessor, t.Qwen2VLVideoProcessor),
        "qwen3_vl": (t.Qwen3VLProcessor, t.Qwen3VLVideoProcessor),
    }[family]
    still = {k: v for k, v in look.items() if k != "cap_pixels_per_frame"}
    if family == "qwen3_vl":  # as its checkpoints have it; vLLM takes videos' from images
        still |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = t.Qwen2VLImageProcessor(**still)
    return kind(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=video(**look),
        chat_template=CHAT.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"),
    )
