"""Prompts from the families' own processors: each video fits, and is told the grid that it has."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer

from vidsieve.adapters.pruning import adapter_for
from vidsieve.answering import answer, chat
from vidsieve.errors import StreamError
from vidsieve.loading import load
from vidsieve.streaming import Stream
from vidsieve.testing.calls import Case, prefill
from vidsieve.testing.equivalence import TOLERANCE
from vidsieve.testing.tiny_models import IMAGE, VIDEO, processor_for
from vidsieve.types import TokenGrid
from vidsieve.video.reading import Video
from workbench.families import tiny

PATCHES = {
    "do_sample_frames": False,
    "patch_size": 4,
    "merge_size": 2,
    "do_resize": False,
    "size": {"shortest_edge": 64, "longest_edge": 2**14},
}
PAIRS = ("Qwen2VLVideoProcessor", PATCHES | {"temporal_patch_size": 2, "cap_pixels_per_frame": False})
POOLED = {"do_sample_frames": False, "do_resize": False, "patch_size": 4, "pooling_kernel_size": 2}
SQUARE = {"size": {"height": 48, "width": 48}, "do_center_crop": False}
STILL = tuple(i for i in range(32) if i not in (16, 17, 20, 21) and i < 24)
"""Of four frames of 2×4 tokens: the third one's left half, and the whole fourth, do not change; one token stays."""
MADE = {
    "video_llama_3": ("VideoLlama3", ("VideoLlama3VideoProcessor", PATCHES), {}, TokenGrid(4, 2, 4, (*STILL, 24))),
    "exaone4_5": ("Exaone4_5_", PAIRS, {}, TokenGrid(2, 2, 4)),
    "hyperclovax_vision_v2": ("HyperCLOVAXVisionV2", PAIRS, {}, TokenGrid(2, 2, 4)),
    "llava_next_video": (
        "LlavaNextVideo",
        ("LlavaNextVideoVideoProcessor", SQUARE),
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        TokenGrid(4, 3, 3),
    ),
    "perception_lm": ("PerceptionLM", ("PerceptionLMVideoProcessor", SQUARE), {"patch_size": 8}, TokenGrid(4, 3, 3)),
    "glm4v": ("Glm4v", ("Glm4vVideoProcessor", PATCHES), {}, TokenGrid(2, 2, 4)),
    "glm46v": ("Glm46V", ("Glm46VVideoProcessor", PATCHES), {}, TokenGrid(2, 2, 4)),
    "cosmos3_edge": (
        "Cosmos3Edge",
        ("Cosmos3EdgeVideoProcessor", PATCHES | {"return_metadata": True}),
        {},
        TokenGrid(4, 2, 4),
    ),
    "cohere_compass": ("CohereCompass", ("CohereCompassVideoProcessor", PAIRS[1]), {}, TokenGrid(2, 2, 4)),
    "gemma4": ("Gemma4", ("Gemma4VideoProcessor", POOLED), {}, TokenGrid(4, 2, 4)),
    "gemma4_unified": ("Gemma4Unified", ("Gemma4UnifiedVideoProcessor", POOLED), {}, TokenGrid(4, 2, 4)),
    "video_llava": ("VideoLlava", ("VideoLlavaVideoProcessor", SQUARE), {"patch_size": 8}, TokenGrid(4, 1, 37)),
}
GLM = {
    "<|vision_start|>": "<|begin_of_image|>",
    "<|vision_end|>": "<|end_of_image|>",
    "w116": "<|begin_of_video|>",
    "w117": "<|end_of_video|>",
}
COHERE = {f"<|{name.lower()}|>": f"<|{name}|>" for name in ("VISION_START", "VISION_END", "VIDEO_PAD", "IMAGE_PAD")}
GEMMA = {
    "<|vision_start|>": "<|image>",
    "<|vision_end|>": "<image|>",
    "<|video_pad|>": "<|video|>",
    "<|image_pad|>": "<|image|>",
    "<|im_start|>": "<|turn>",
    "<|im_end|>": "<turn|>",
    "w117": "<|audio|>",
    "w115": "<|audio>",
    "w116": "<audio|>",
}
GEMMA_MARKS = {"boi": "<|image>", "eoi": "<image|>", "audio": "<|audio|>", "boa": "<|audio>", "eoa": "<audio|>"}
WORDS = {"gemma4": GEMMA, "gemma4_unified": GEMMA, "glm4v": GLM, "glm46v": GLM, "cohere_compass": COHERE}
"""What families call the tokens of the tiny tokenizer, where that is not as Qwen does."""
TEXT = "<|im_start|> user <|vision_start|><|video_pad|><|vision_end|> what colour <|im_end|> <|im_start|> assistant"


def renamed(tokenizer, words):
    """Return a tokenizer some of whose words have other names; all of these are special."""
    core = tokenizer.backend_tokenizer.to_str()
    for old, new in words.items():
        core = core.replace(f'"{old}"', f'"{new}"')
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core),
        additional_special_tokens=list(words.values()),
        pad_token="<pad>",
        unk_token="<unk>",
    )


def own_processor(family, **changes):
    """Return a processor of the family's own classes."""
    name, (kind, settings), further, _ = MADE[family]
    words = WORDS.get(family, {})
    tokenizer = renamed(processor_for("qwen2_5_vl").tokenizer, words)
    tokenizer.video_token, tokenizer.video_token_id = words.get("<|video_pad|>", "<|video_pad|>"), VIDEO
    tokenizer.image_token, tokenizer.image_token_id = words.get("<|image_pad|>", "<|image_pad|>"), IMAGE
    if name.startswith("Gemma4"):
        for mark, token in GEMMA_MARKS.items():
            setattr(tokenizer, f"{mark}_token", token)
        further = {"feature_extractor": getattr(transformers, f"{name}AudioFeatureExtractor")()}
    processor = getattr(transformers, f"{name}Processor")(
        video_processor=getattr(transformers, kind)(**settings | changes),
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        **further,
    )
    text = TEXT
    if name.startswith("Gemma4"):  # its processor writes the markers
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    for old, new in words.items():
        text = text.replace(old, new.replace("_of_image", "_of_video"))
    processor.chat_template = text
    return processor


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # transformers' own reading of tensors by NumPy
@pytest.mark.parametrize("family", ["exaone4_5", "glm4v", "glm46v", "cosmos3_edge", "cohere_compass"])
def test_a_limit_of_a_frame_is_one_however_long_the_video_is(family):
    processor = own_processor(family, do_resize=True)
    kind = tiny(family)
    adapter = adapter_for(kind.model(0, kind.layers))
    adapter.limit_frames(processor, 24)
    for count in (4, 16):
        frames = np.zeros((count, 96, 128, 3), dtype=np.uint8)
        inputs = chat(processor, Video(frames, np.arange(count), (), count, 1.0, count, (96, 128)), "what colour")
        for _, height, width in inputs["video_grid_thw"].tolist():
            assert 12 <= height * width // 4 <= 24


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # transformers' own reading of tensors by NumPy
@pytest.mark.parametrize("family", MADE)
def test_a_prompt_of_the_familys_own_processor_is_pruned_right(family):
    processor, grid = own_processor(family), MADE[family][-1]
    frames = np.random.default_rng(0).integers(0, 255, (4, 16, 32, 3), dtype=np.uint8)
    frames[2, :, :16] = frames[1, :, :16]
    frames[3] = frames[2]
    inputs = chat(processor, Video(frames, np.arange(4.0), (), 4.0, 1.0, 4, (16, 32)), "what colour")
    tiny_family = tiny(family)
    case = Case(adapter_for(tiny_family.model(0, tiny_family.layers)), inputs, load("random", retention=0.5))
    assert case.adapter.encode(inputs).videos[0].features.grid == grid
    assert prefill(case)[0] <= TOLERANCE


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # transformers' own reading of tensors by NumPy
@pytest.mark.parametrize("family", MADE)
def test_a_stream_is_the_prompt_of_the_familys_own_processor_or_refused(family):
    processor, kind = own_processor(family), tiny(family)
    model = kind.model(0, kind.layers)
    if family in ("video_llama_3", "gemma4_unified"):
        with pytest.raises(StreamError, match="does not say that frames are encoded one by one"):
            Stream(model, processor, "recent")
        return
    frames = np.random.default_rng(0).integers(0, 255, (6, 16, 32, 3), dtype=np.uint8)
    stream = Stream(model, processor, "recent", 6 * 37)
    for number in range(6):  # one by one: the template above has a single video
        stream.push(frames[number : number + 1], number)
    expected = answer(
        model, processor, Video(frames, np.arange(6.0), (), 6.0, 1.0, 6, (16, 32)), "what colour", max_new_tokens=4
    )
    got = stream.ask("what colour", max_new_tokens=4)
    assert got.text == expected.text and got.prompt_tokens == expected.prompt_tokens
