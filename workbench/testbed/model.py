"""How the testbed's models are built: transformers' own LLaVA-OneVision classes at a few million parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.adapters.template import Template
from vidsieve.io.files import writing
from vidsieve.testbed.model import WORD_ID
from vidsieve.testbed.vocabulary import SPECIAL, TALK_WORDS, VOCABULARY
from vidsieve.testbed.world import SIDE

PATCH = 12
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<video> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}"
    "<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
TALK_ID = {word: i for i, word in enumerate((*VOCABULARY, *TALK_WORDS))}
"""Word ids of the model of `workbench.testbed.talking`."""


def build_tokenizer(words: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return the testbed's tokenizer: one id per word, words split at blanks."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[2:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(words: Sequence[str] = VOCABULARY) -> LlavaOnevisionProcessor:
    """Return the testbed's processor, as `AutoProcessor` would load it."""
    images = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**images, image_grid_pinpoints=[[SIDE, SIDE]]),
        tokenizer=build_tokenizer(words),
        video_processor=LlavaOnevisionVideoProcessor(**images),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_config(
    layers: int = 6, width: int = 128, vision_width: int = 64, vision_layers: int = 3
) -> LlavaOnevisionConfig:
    """Return the model's configuration."""
    vision = SiglipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=3 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_theta=1e4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=WORD_ID["<|im_end|>"],
        pad_token_id=0,
    )
    return LlavaOnevisionConfig(
        vision_config=vision.to_dict() | {"model_type": "siglip_vision_model"},
        text_config=text.to_dict() | {"model_type": "qwen2"},
        image_token_index=WORD_ID["<image>"],
        video_token_index=WORD_ID["<video>"],
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        image_grid_pinpoints=[[SIDE, SIDE]],
    )


def build_model(seed: int = 0, **sizes: int) -> LlavaOnevisionForConditionalGeneration:
    """Return the untrained model in evaluation mode, float32, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(build_config(**sizes))
    model.generation_config.eos_token_id = WORD_ID["<|im_end|>"]
    model.generation_config.pad_token_id = WORD_ID["<pad>"]
    model.vidsieve_template = Template.of(build_processor())
    return model.eval()


def repeated_features(features: VideoFeatures, times: int) -> BaseModelOutputWithPooling:
    """Return the features of one video for `times` prompts, as `mm_encoder_outputs`."""
    tokens = torch.cat([features.embeds, features.tail])
    return BaseModelOutputWithPooling(pooler_output=tokens.expand(times, -1, -1))


def save_model(model: Any, folder: Path, record: dict[str, Any], words: Sequence[str] = VOCABULARY) -> None:
    """Write the model (weights as float16), processor and record for transformers' Auto classes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    model.to(torch.float32)
    build_processor(words).save_pretrained(folder)
    with writing(folder / "testbed.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
