"""What the vLLM plug-in decides without vLLM: settings, requests, and that it selects what `vidsieve.prune` does."""

from __future__ import annotations

import json
import tempfile
from types import SimpleNamespace

import pytest
import torch

import vidsieve
from vidsieve.adapters import Template, adapter_for
from vidsieve.answering import chat, chat_text
from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.errors import (
    BudgetError,
    NeedError,
    PolicyError,
    PromptError,
    RetentionError,
    StageError,
    UnknownNameError,
)
from vidsieve.serving.vllm.failures import Failures, SelectionFailure, report_key, video_key
from vidsieve.serving.vllm.shared import (
    COUNT,
    PROMPT,
    REPORT_KEY,
    Selector,
    VllmSettings,
    digest,
    kept_count,
    request_of,
    settings_of,
    weightless_adapter,
)
from vidsieve.testing.tiny_models import FAMILIES, processor_for
from vidsieve.types import TokenGrid, Tokens
from vidsieve.video.reading import Video
from workbench.families import tiny

CLASSES = {
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}


def small(family):
    """Return a tiny model and its processor, which Qwen3-VL-MoE and Qwen3.5 share with Qwen3-VL."""
    if family in FAMILIES:
        return FAMILIES[family](), processor_for(family)
    return tiny(family).model(0, tiny(family).layers), processor_for("qwen3_vl")


def config(**settings):
    return SimpleNamespace(vidsieve=settings)


def test_settings_come_from_the_models_configuration():
    assert settings_of(SimpleNamespace()) is None and settings_of(config()) is None
    found = settings_of(config(method="divprune", retention=0.1, seed=3))
    assert (
        found.method.name == "divprune"
        and found.method.retention == 0.1
        and found.seed == 3
        and not found.reads_question
    )
    assert settings_of(config(method="uniform", retention="64t")).method.retention == Tokens(64)
    assert settings_of(config(method="cacovid", policy="testbed")).reads_question
    assert settings_of(config(method="score", policy="testbed")).method.retention == 0.25
    assert found.on_error == "fail" and settings_of(config(method="divprune", on_error="uniform")).on_error == "uniform"


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"retention": 0.1}, UnknownNameError, "method is missing"),
        ({"method": "divprune", "retantion": 0.1}, UnknownNameError, "Did you mean 'retention'"),
        ({"method": "divprune", "on_error": "unifrom"}, UnknownNameError, "unknown on_error.*Did you mean 'uniform'"),
        ({"method": "divprun"}, UnknownNameError, "Did you mean 'divprune'"),
        ({"method": "divprune", "retention": 0}, RetentionError, r"number in \(0, 1\]"),
        ({"method": "fastv"}, StageError, "acts inside LLM layers: vLLM runs methods that act before"),
        ({"method": "visionzip"}, NeedError, "vLLM returns nothing from inside its vision encoder"),
        ({"method": "score"}, PolicyError, "needs a trained policy"),
    ],
)
def test_what_vllm_cannot_run_is_told_before_a_model_is_loaded(settings, error, said):
    with pytest.raises(error, match=said):
        settings_of(config(**settings))


def test_no_method_that_decides_on_the_way_how_much_it_keeps(monkeypatch):
    from vidsieve.compressors.uniform import Uniform

    monkeypatch.setattr(Uniform, "adaptive_budget", True, raising=False)
    with pytest.raises(BudgetError, match="vLLM must know beforehand"):
        settings_of(config(method="uniform"))


@pytest.mark.parametrize(("value", "wanted"), [(1, 1.0), (0.25, 0.25), ("0.5", 0.5), ("512t", Tokens(512))])
def test_retentions_from_json(value, wanted):
    settings = settings_of(config(method="divprune", retention=value))
    assert settings.method.retention == wanted
    assert request_of({"vidsieve": {"retention": value}}, settings).retention == wanted


@pytest.mark.parametrize("value", [0, 1.1, -1, "x", "t", "0t", None, True, float("nan"), [0.1]])
def test_what_is_no_retention(value):
    with pytest.raises(RetentionError, match=r"number in \(0, 1\]"):
        settings_of(config(method="divprune", retention=value))


def test_a_request_asks_beside_its_prompt():
    blind, reads = settings_of(config(method="divprune")), settings_of(config(method="cacovid", policy="testbed"))
    assert request_of({}, None).retention is None and request_of({"fps": 2}, blind).question is None
    assert request_of({"vidsieve": {"question": "what ?"}}, blind).question is None, (
        "the same tokens for every question"
    )
    assert request_of({"vidsieve": {"question": "what ?"}}, reads).question == "what ?"
    asked = request_of({"vidsieve": {"retention": 0.1}}, blind)
    assert [kept_count(blind, asked, n) for n in (576, 5, 9)] == [57, 1, 1]
    assert kept_count(blind, request_of({}, blind), 576) == 144 and kept_count(None, request_of({}, None), 576) == 576
    assert request_of({"vidsieve": {"retention": 1.0}}, reads).question is None, "nothing is dropped, nothing to read"
    for wrong, settings, said in [
        ({"vidsieve": {"question": "?"}}, None, "does not prune"),
        ({"vidsieve": "x"}, blind, "must be an object"),
        ({"vidsieve": {"quest": "?"}}, blind, "Did you mean 'question'"),
        ({}, reads, "cacovid reads the question"),
        ({"vidseive": {"retention": 0.1}}, blind, "Did you mean 'vidsieve'"),
        ({"vidsieve": {"question": " "}}, reads, "not empty"),
        ({"vidsieve": {"retention": 2}}, blind, r"number in \(0, 1\]"),
    ]:
        with pytest.raises((PromptError, UnknownNameError, RetentionError), match=said):
            request_of(wrong, settings)


@pytest.mark.parametrize("family", sorted(CLASSES))
@pytest.mark.parametrize("name", ["divprune", "vidcom2", "random", "evs", "cacovid"])
def test_the_same_tokens_as_under_transformers(family, name, tmp_path):
    """Indices, embeddings and positions, from the features alone: the shadow has no weights of its own."""
    model, processor = small(family)
    template = Template.of(processor)
    adapter = adapter_for(model, template)
    if name == "cacovid":
        shape = BlockShape.of_width(adapter.hidden_size)
        policy = CaCoVIDPolicy.of_shape(shape, adapter.family, variant="ours", seed=1, base_model="tiny")
        policy.save_pretrained(tmp_path)
        method = vidsieve.load("cacovid", tmp_path, retention=0.5)
    else:
        method = vidsieve.load(name, retention=0.5)
    rng = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 255, (6, 64, 96, 3), generator=rng, dtype=torch.uint8).numpy()
    video = Video(pixels, torch.arange(6).numpy(), (), 3.0, 2.0, 6, (64, 96))
    question = "what colour is the home ?"
    inputs = chat(processor, video, question)
    with torch.no_grad():
        encoded = adapter.encode(inputs)
        (wanted,), _ = adapter.select(encoded, method, torch.Generator().manual_seed(7))
    features = encoded.videos[0].features
    embed = model.get_input_embeddings()
    weightless = weightless_adapter(model.config, CLASSES[family], lambda ids: embed(ids), template)
    assert all(weight.is_meta for weight in weightless.model.parameters())
    assert weightless.model.get_input_embeddings().weight.is_meta, "ids go where the video is, on any device"
    selector = Selector(VllmSettings(method, seed=7), weightless)
    prompt = processor.tokenizer(chat_text(processor, question), return_tensors="pt")["input_ids"][0]
    placed = {key: inputs[key] for key in ("video_grid_thw", "second_per_grid_ts") if key in inputs}
    grid, settings = features.grid, VllmSettings(method)
    count = kept_count(settings, request_of({"vidsieve": {"question": "?"}}, settings), grid.num_tokens)
    whole, columns = inputs["input_ids"][0], encoded.videos[0].columns
    before = 3 if family.startswith("qwen3") else 0  # the first frame's time, in two words, and mark
    stands = whole[int(columns[0]) - before : int(columns[-1]) + 1 + bool(before) + len(features.tail)]
    prompts = prompt[None] if name == "cacovid" else torch.empty(1, 0, dtype=torch.int64)
    fields = {COUNT: torch.tensor([count]), PROMPT: prompts, REPORT_KEY: None}
    indices, kept, positions = selector(features.embeds, grid, fields, 0, stands, features.tail, placed)
    assert torch.equal(indices, wanted.indices) and digest(indices) == digest(wanted.indices)
    assert torch.equal(kept, features.embeds[indices] if wanted.embeds is None else wanted.embeds)
    positions = positions[:, stands == adapter.video_token_id][:, : grid.num_tokens]
    theirs = encoded.positions[adapter.position_rows, 0][:, columns]
    assert torch.equal(positions - positions[..., :1], theirs - theirs[..., :1])
    fields |= {COUNT: torch.tensor([grid.num_tokens]), PROMPT: torch.empty(1, 0, dtype=torch.int64)}
    everything, whole, _ = selector(features.embeds, grid, fields, 0, stands, features.tail, placed)
    assert torch.equal(whole, features.embeds) and len(everything) == grid.num_tokens


def test_a_question_without_a_word_is_told_before_a_policy_reads_it():
    processor, template = processor_for("qwen2_5_vl"), Template.of(processor_for("qwen2_5_vl"))

    def mask(question):
        ids = processor.tokenizer(f"<|im_start|> user {question} <|im_end|>", return_tensors="pt")["input_ids"][0]
        return template.question_mask(ids)

    assert mask("what").sum() == 1
    for question in ("", "<|im_end|> what", "<|video_pad|>"):
        with pytest.raises(PromptError, match="no word that the model knows"):
            mask(question)


@pytest.mark.parametrize("on_error", ["fail", "uniform"])
def test_a_method_that_fails_in_vllms_worker_does_not_end_it(on_error, monkeypatch, caplog, tmp_path):
    """It would end the server and every request in it: tokens are kept evenly, and the front end is told."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    failures = Failures()
    model = FAMILIES["qwen2_5_vl"]()
    settings = settings_of(config(method="divprune", retention=0.5, on_error=on_error))
    weightless = weightless_adapter(model.config, CLASSES["qwen2_5_vl"], model.get_input_embeddings())
    selector = Selector(settings, weightless)
    placed = {"video_grid_thw": torch.tensor([[2, 4, 4]])}

    def select(key):
        fields = {COUNT: torch.tensor([4]), PROMPT: torch.empty(1, 0, dtype=torch.int64), REPORT_KEY: key}
        return selector(torch.randn(8, 64), TokenGrid(2, 2, 2), fields, 0, inputs=placed)

    select(report_key("video")[None])
    assert not failures.known()

    def broken(*_, **__):
        raise ZeroDivisionError("a marked video")

    monkeypatch.setattr(type(settings.method), "compress", broken)
    with caplog.at_level("ERROR"):
        indices, kept, _ = select(report_key("video")[None])
    assert len(indices) == len(kept) == 4 and len(set(indices.tolist())) == 4
    assert "divprune failed: of these 8 tokens 4 are kept evenly instead" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    wanted = SelectionFailure("divprune", "ZeroDivisionError: a marked video", on_error)
    assert failures.known() == {video_key("video"): wanted}
    with pytest.raises(ZeroDivisionError):
        select(None)  # no report key


def test_the_command_is_vllms_own(cli, tmp_path):
    said = cli(
        "serve", "testbed", "--method", "score", "--retention", "0.1", "--print", "--port", "8011", "--dtype", "float32"
    )
    assert "vllm.entrypoints.openai.api_server" in said and said.endswith("--port 8011 --dtype float32")
    settings = json.loads(said.split("--hf-overrides ")[1].split("'")[1])
    assert settings == {"vidsieve": {"method": "score", "retention": 0.1, "seed": 0, "policy": "testbed"}}
    assert "--hf-overrides" not in cli("serve", "testbed", "--print")
    assert "acts inside LLM layers" in cli("serve", "testbed", "--method", "fastv", "--print", fails=True)
    assert "--policy x needs --method" in cli("serve", "testbed", "--policy", "x", "--print", fails=True)
    said = cli("serve", "testbed", "--method", "divprune:official", "--retention", "64t", "--print")
    settings = json.loads(said.split("--hf-overrides ")[1].split("'")[1])["vidsieve"]
    assert settings == {"method": "divprune", "variant": "official", "retention": "64t", "seed": 0}
    assert "--hf-overrides" not in cli("serve", "testbed", "--method", "full", "--print")
    said = cli("serve", "testbed", "--method", "divprune", "--on-error", "uniform", "--print")
    assert json.loads(said.split("--hf-overrides ")[1].split("'")[1])["vidsieve"]["on_error"] == "uniform"
    assert "unknown on_error 'x'" in cli(
        "serve", "testbed", "--method", "divprune", "--on-error", "x", "--print", fails=True
    )


def test_a_model_that_is_not_there_is_told_before_vllm_starts(cli, tmp_path):
    def served(model, fails=True):
        return cli("serve", model, "--print", fails=fails)

    assert "no folder ./nowhere" in served("./nowhere") and "no folder a/b/c" in served("a/b/c")
    assert "config.json is missing" in served(str(tmp_path))
    assert "--model OWNER/NAME" in served("OWNER/NAME", fails=False), "the hub is vLLM's own affair"


def test_options_of_vllms_that_would_undo_the_pruning(cli):
    def serve(*options, fails=False):
        return cli("serve", "testbed", *options, "--print", fails=fails)

    for given in (["--hf-overrides", '{"a": {"b": 1}}'], ['--hf_overrides={"a": {"b": 1}}']):
        said = serve("--method", "divprune", *given, "--port", "1")
        assert said.count("overrides") == 1 and said.endswith("--port 1")
        assert json.loads(said.split("--hf-overrides ")[1].split("'")[1])["a"] == {"b": 1}
    for options, told in [
        (["--method", "divprune", "--hf-overrides.a.b", "1"], "would undo the pruning"),
        (["--method", "divprune", "--hf-overrides", "x"], "must be a JSON object, got 'x'"),
        (["--method", "divprune", "--hf-overrides", '{"vidsieve": {}}'], "holds vidsieve"),
        (["--method", "divprune", "--video-pruning-rate", "0.5"], "vLLM's own pruning"),
        (["--method", "divprune", "--video_pruning_rate=0.5"], "vLLM's own pruning"),
        (["--method", "divprune", "--retention", "0.5,0.1"], "got '0.5,0.1'"),
        (["--retention", "0.5"], "--retention 0.5 needs --method"),
        (["--seed", "3"], "--seed 3 needs --method"),
        (["--on-error", "uniform"], "--on-error uniform needs --method"),
        (["--model", "other"], "the first argument here"),
        (["--methods", "divprune"], "give it as --method"),
        (["--method", "divprune", "--frames=8"], """'{"video": {"num_frames": N, "video_backend": "opencv"}}'"""),
    ]:
        assert told in serve(*options, fails=True), options
    assert "--video-pruning-rate 0.5" in serve("--video-pruning-rate", "0.5"), "without us it is vLLM's own affair"
