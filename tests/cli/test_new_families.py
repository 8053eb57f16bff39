"""Families with recurrent layers or experts through the command line, from a folder as the hub has them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast
from typer.testing import CliRunner

from vidsieve.adapters.template import Template
from vidsieve.answering import chat
from vidsieve.cli import app
from vidsieve.testing.tiny_models import QWEN_VISION, mrope, processor_for, random_model, text_config
from vidsieve.video.reading import Video
from workbench.families import qwen3_5, qwen3_vl_moe, tiny

MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
GEMMA_MARKS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
GEMMA_CHAT = (
    "<bos>{% for m in messages %}<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'video' %}\n\n<|video|>\n\n{% else %}{{ p['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n<|channel>thought\n<channel|>{% endif %}"
)
KINDS = {
    "qwen3_5": ("Qwen3_5", qwen3_5.VISION, qwen3_5.TEXT, 4),
    "qwen3_vl_moe": ("Qwen3VLMoe", qwen3_vl_moe.VISION, qwen3_vl_moe.EXPERTS | mrope([4, 2, 2]), 4),
}


def byte_level(marks):
    """Return a byte-level tokenizer with these special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<pad>", *marks], initial_alphabet=alphabet))
    return core


def save_qwen(family, folder):
    """Save a tiny model and its processor, with a byte-level tokenizer as Qwen's are."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(MARKS), pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=MARKS
    )
    ids = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(MARKS), strict=True))
    name, vision, text, layers = KINDS[family]
    model = random_model(
        name,
        0,
        0.08,
        vision_config=QWEN_VISION | vision,
        text_config=text_config(layers, head_dim=16, vocab_size=len(tokenizer)) | text,
        video_token_id=ids["<|video_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model.save_pretrained(folder)
    parts = processor_for("qwen3_vl")
    type(parts)(parts.image_processor, tokenizer, parts.video_processor, CHAT).save_pretrained(folder)


def save_gemma(family, folder):
    """Save a tiny model and its own processor, markers and roles as Gemma 4 has them."""
    marks = ["<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|video|>", *GEMMA_MARKS.values()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(marks),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<turn|>",
        extra_special_tokens=GEMMA_MARKS,
    )
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    config = tiny(family).model(0, 4).config
    config.image_token_id, config.boi_token_id, config.eoi_token_id, config.audio_token_id = (
        ids[GEMMA_MARKS[name]] for name in ("image_token", "boi_token", "eoi_token", "audio_token")
    )
    config.video_token_id = ids["<|video|>"]
    config.text_config.vocab_size = config.text_config.vocab_size_per_layer_input = len(tokenizer)
    config.vision_config.position_embedding_size = config.vision_config.mm_posemb_size = 64
    name = "Gemma4" if family == "gemma4" else "Gemma4Unified"
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(folder)
    size = {"patch_size": 4, "pooling_kernel_size": 2}
    getattr(transformers, f"{name}Processor")(
        feature_extractor=getattr(transformers, f"{name}AudioFeatureExtractor")(),
        image_processor=getattr(transformers, f"{name}ImageProcessor")(**size),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, f"{name}VideoProcessor")(**size),
        chat_template=GEMMA_CHAT,
    ).save_pretrained(folder)


@pytest.mark.parametrize("family", KINDS)
def test_ask_and_eval(family, tmp_path):
    save_qwen(family, tmp_path / "model")
    run = CliRunner()
    assert run.invoke(app, ["testbed", "render", str(tmp_path / "scenes"), "--scenes", "1"]).exit_code == 0
    video, model = str(tmp_path / "scenes/scene-0000.mp4"), str(tmp_path / "model")
    asked = ["ask", video, "what colour is the home?", "--model", model, "--max-new-tokens", "4"]
    for method in ("divprune", "evs"):
        result = run.invoke(
            app, [*asked, "--method", method, "--retention", "0.25", "--json", str(tmp_path / "a.json")]
        )
        assert result.exit_code == 0, result.output
        assert "of 128 video tokens (25 %)" in result.output
    questions = str(tmp_path / "scenes/questions.jsonl")
    table = ["eval", "questions", questions, "--model", model, "--methods", "divprune", "--retention", "0.25"]
    result = run.invoke(
        app, [*table, "--questions", "4", "--out", str(tmp_path / "run"), "--json", str(tmp_path / "eval.json")]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert {row["method"] for row in rows} >= {"divprune"}


@pytest.mark.parametrize("family", ["gemma4", "gemma4_unified"])
def test_the_question_is_found_behind_the_frames_of_gemma_4(family, tmp_path):
    save_gemma(family, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor).__module__.endswith(f"processing_{family}")
    video = Video(np.zeros((3, 48, 64, 3), np.uint8), np.arange(3.0), (), 3.0, 1.0, 3, (48, 64))
    ids = chat(processor, video, "What changes at 00:02?\n(A) red (B) blue")["input_ids"][0]
    columns = (ids == processor.video_token_id).nonzero().flatten()
    question = Template.of(processor).question_mask(ids, [columns])
    assert processor.decode(ids[question]) == "Whatchangesat00:02?(A)red(B)blue"  # blanks are tokens of their own here


@pytest.mark.parametrize("family", ["gemma4", "gemma4_unified"])
def test_ask_and_eval_on_gemma_4(family, tmp_path):
    save_gemma(family, tmp_path / "model")
    run = CliRunner()
    assert run.invoke(app, ["testbed", "render", str(tmp_path / "scenes"), "--scenes", "1"]).exit_code == 0
    video, model, found = str(tmp_path / "scenes/scene-0000.mp4"), str(tmp_path / "model"), tmp_path / "found.json"
    asked = ["ask", video, "what colour is the home?", "--model", model, "--max-new-tokens", "4", "--json", str(found)]
    for method in ("random", "divprune", "visionzip"):
        result = run.invoke(app, [*asked, "--method", method, "--retention", "0.25"])
        if method == "visionzip" and family == "gemma4_unified":
            assert result.exit_code == 1 and "it has no vision tower" in str(result.exception)
            continue
        assert result.exit_code == 0, result.output
        assert "256 of 1024 video tokens (25 %)" in result.output
        answer = json.loads(found.read_text())
        assert answer["prompt_tokens_before"] - answer["prompt_tokens_after"] == 768
        assert [(one["grid"], len(one["indices"])) for one in answer["videos"]] == [([16, 8, 8], 256)]
    table = ["eval", "questions", str(tmp_path / "scenes/questions.jsonl"), "--model", model, "--retention", "0.25"]
    out = ["--questions", "4", "--out", str(tmp_path / "run"), "--json", str(found)]
    result = run.invoke(app, [*table, "--methods", "random,divprune", *out])
    assert result.exit_code == 0, result.output
    report = json.loads(found.read_text())
    rows = {row["method"]: row for row in report["rows"]}
    assert rows.keys() >= {"full", "random", "divprune"} and report["refused"] == []
    for method, kept in (("full", 1024), ("random", 256), ("divprune", 256)):
        before, after = rows[method]["prompt_tokens"]
        assert rows[method]["kept"] == kept and before - after == 1024 - kept
