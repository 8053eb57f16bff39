"""Families with recurrent layers or experts through the command line, from a folder as the hub has them."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from vidsieve.cli import app
from vidsieve.testing.tiny_models import QWEN_VISION, mrope, processor_for, random_model, text_config
from workbench.families import qwen3_5, qwen3_vl_moe

MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
KINDS = {
    "qwen3_5": ("Qwen3_5", qwen3_5.VISION, qwen3_5.TEXT, 4),
    "qwen3_vl_moe": ("Qwen3VLMoe", qwen3_vl_moe.VISION, qwen3_vl_moe.EXPERTS | mrope([4, 2, 2]), 4),
}


def saved(family, folder):
    """Save a tiny model and its processor, with a byte-level tokenizer as Qwen's are."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<pad>", *MARKS], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=MARKS
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


@pytest.mark.parametrize("family", KINDS)
def test_ask_and_eval(family, tmp_path):
    saved(family, tmp_path / "model")
    run = CliRunner()
    assert run.invoke(app, ["testbed", "render", str(tmp_path / "scenes"), "--scenes", "1"]).exit_code == 0
    video, model = str(tmp_path / "scenes/scene-0000.mp4"), str(tmp_path / "model")
    asked = ["ask", video, "what colour is the home?", "--model", model, "--max-new-tokens", "4"]
    for method in ("divprune", "evs"):
        result = run.invoke(
            app, [*asked, "--method", method, "--retention", "0.25", "--json", str(tmp_path / "a.json")]
        )
        assert result.exit_code == 0, result.output
        assert "of 128 video tokens (25.0%)" in result.output
    questions = str(tmp_path / "scenes/questions.jsonl")
    table = ["eval", "questions", questions, "--model", model, "--methods", "divprune", "--retention", "0.25"]
    result = run.invoke(
        app, [*table, "--questions", "4", "--out", str(tmp_path / "run"), "--json", str(tmp_path / "eval.json")]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert {row["method"] for row in rows} >= {"divprune"}
