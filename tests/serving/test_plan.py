"""Predictions of serving: tokens as real processors make them, operations as torch counts them, caches as they are."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import vidsieve
from vidsieve import errors
from vidsieve.adapters import adapter_for
from vidsieve.adapters.transformers_api import cache_kwargs, output_cache
from vidsieve.cli.plan import plan as command
from vidsieve.evaluation.blueprints import BLUEPRINTS, RandomModel
from vidsieve.evaluation.flops import prefill_flops
from vidsieve.serving.plan import (
    GPUS,
    ClipTokens,
    Gpu,
    Load,
    clip_tokens,
    encoder_flops,
    kv_bytes,
    model_of,
    plan,
    read_gpu,
    read_model,
    step_flops,
)
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from vidsieve.types import TokenGrid
from vidsieve.video.reading import Video

H100 = GPUS["H100"]


def row(model, gpu, load, retention):
    return SimpleNamespace(**plan(model, gpu, load, [retention])["rows"][0])


def tiny(family):
    network = FAMILIES[family]()
    return network, adapter_for(network), model_of(family, network.config)


def seen(family, vision, grid):
    """Return a clip of a grid, as the encoder of a tiny model reads it."""
    if family.startswith("qwen"):
        merge = vision.spatial_merge_size
        patches = (grid.frames, grid.height * merge, grid.width * merge)
    else:
        side = {"internvl": 8, "smolvlm": 8}.get(family, 7)
        patches = (grid.frames, side, side)
    return ClipTokens(patches, grid, 0, 0)


# -- tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "internvl", "smolvlm"])
def test_grids_and_newlines_are_those_of_the_adapter(family):
    _, adapter, model = tiny(family)
    encoded = adapter.encode(inputs_for(family, [[default_grid(family, 5)]]))
    clip, video = clip_tokens(model, 5), encoded.videos[0].features
    assert (clip.grid, clip.newlines) == (video.grid, len(video.tail)) and model.family == family
    assert clip.patches == seen(family, None, clip.grid).patches


@pytest.mark.parametrize("size", [(360, 640), (64, 48), (1080, 1920), (300, 200)])
@pytest.mark.parametrize(
    ("name", "kind", "limits", "frames"),
    [
        ("qwen2.5-vl-0.1b", "Qwen2VLVideoProcessor", {}, 3),
        ("qwen3-vl-0.1b", "Qwen3VLVideoProcessor", {"shortest_edge": 4096, "longest_edge": 25165824}, 4),
    ],
)
def test_frames_are_scaled_as_by_the_real_processors(name, kind, limits, frames, size):
    import transformers

    processor = getattr(transformers, kind)(**({"size": limits} if limits else {}))
    pixels = np.zeros((frames, *size, 3), np.uint8)
    made = processor([pixels], do_sample_frames=False, return_tensors="pt")
    clip = clip_tokens(read_model(name), frames, size)
    assert [list(clip.patches)] == made["video_grid_thw"].tolist()
    assert clip.grid.num_tokens * 4 == len(made["pixel_values_videos"])


@pytest.mark.parametrize("name", ["llava-onevision-0.1b", "qwen2.5-vl-0.1b"])
def test_prompts_are_as_long_as_the_models_read_them(name):
    import transformers

    family, config = BLUEPRINTS[name]
    kind = {"qwen2_5_vl": transformers.Qwen2VLVideoProcessor}.get(family, transformers.LlavaOnevisionVideoProcessor)
    video = Video(np.zeros((6, 90, 160, 3), np.uint8), np.arange(6.0), (), 6.0, 1.0, 6, (90, 160))
    ids = RandomModel(name, family, SimpleNamespace(config=config()), kind()).inputs(video, 20)["input_ids"]
    found = row(read_model(name), H100, Load(frames=6, size=(90, 160), prompt_tokens=28), 1.0)  # words and template
    assert found.llm_tokens == ids.shape[1]


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "internvl", "smolvlm"])
def test_a_pruned_prompt_is_as_long_as_a_method_makes_it(family):
    network, _, model = tiny(family)
    inputs, clip = inputs_for(family, [[default_grid(family, 4)]]), clip_tokens(model, 4)
    whole = vidsieve.prune(network, inputs, vidsieve.load("uniform", retention=1.0))["input_ids"].shape[1]
    load = Load(frames=4, prompt_tokens=whole - clip.grid.num_tokens - clip.newlines - clip.markers)
    for retention in (1.0, 0.5):  # a half leaves no row without a token
        pruned = vidsieve.prune(network, inputs, vidsieve.load("uniform", retention=retention))
        found = row(model, H100, load, retention)
        assert found.llm_tokens == pruned["input_ids"].shape[1]
        assert found.video_tokens == int(retention * clip.grid.num_tokens)


# -- operations, parameters, caches ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_encoders_operations_are_those_that_torch_counts(family):
    network, adapter, model = tiny(family)
    grid = TokenGrid(2, 3, 5) if family.startswith("qwen") else default_grid(family)  # windows of 2×2, some cut
    network.set_attn_implementation("eager")
    inputs = inputs_for(family, [[grid]])
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        adapter.video_features(inputs)
    if family == "llava_video":
        grid = TokenGrid(grid.frames, 3, 3)
    ours = encoder_flops(model, seen(family, network.config.vision_config, grid))
    assert ours == pytest.approx(counted.get_total_flops(), rel=0.005)  # rotary angles are products to torch


@pytest.mark.parametrize("family", list(FAMILIES))
def test_parameters_are_counted_without_weights(family):
    network, adapter, model = tiny(family)
    language, head = adapter.language_model, network.get_output_embeddings()
    words = language.get_input_embeddings().weight.numel()
    assert model.parameters == sum(p.numel() for p in network.parameters())
    assert model.decoder == sum(p.numel() for p in language.layers.parameters()) + head.weight.numel() + 64  # the norm
    assert model.encoder == model.parameters - model.decoder - words


def test_tied_words_are_counted_once(testbed):
    network, _ = testbed
    model, language = read_model("testbed"), network.model.language_model
    assert model.parameters == sum(p.numel() for p in network.parameters())
    assert model.decoder == sum(p.numel() for p in language.parameters())
    assert model.encoder == model.parameters - model.decoder


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_a_cache_is_as_large_as_a_real_one(family):
    network, adapter, model = tiny(family)
    inputs = inputs_for(family, [[default_grid(family)]])
    pruned = vidsieve.prune(network, inputs, vidsieve.load("uniform", retention=0.25))
    with torch.no_grad():
        cache = output_cache(network(**pruned))
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    tokens = pruned["input_ids"].shape[1]
    assert kv_bytes(model.text, tokens, 4) == real == 2 * kv_bytes(model.text, tokens, 2)
    network.set_attn_implementation("eager")
    step = torch.randn(1, 1, model.text.hidden_size)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        hidden = adapter.language_model(inputs_embeds=step, **cache_kwargs(network, cache)).last_hidden_state
        network.get_output_embeddings()(hidden)
    assert step_flops(model.text, tokens) == pytest.approx(counted.get_total_flops(), rel=0.005)


# -- times ----------------------------------------------------------------------------------------------------


def test_parts_are_rooflines_and_add_up():
    gpu = Gpu("toy", 0.5, 10, 40, 0.5, 1.0, width=4)
    assert gpu.seconds(5e11, 1e9) == 2.0 and gpu.seconds(1e9, 2e10) == 2.0
    model, load = read_model("llava-onevision-0.5b"), Load(frames=4, answer_tokens=11, batch=4)
    found = row(model, gpu, load, 0.25)
    assert found.prefill_flops == prefill_flops(model.text, found.llm_tokens) and found.video_tokens == 196
    assert found.prefill_s == found.prefill_flops / 0.25e12 and found.encoder_s == found.encoder_flops / 0.25e12
    read = model.decoder * 4 + 4 * kv_bytes(model.text, found.llm_tokens + 5, 4)
    assert found.decode_s == read / 1e10 and found.batch == 4
    first = found.encoder_s + found.prefill_s
    assert found.latency_s == pytest.approx(first + 10 * found.decode_s)
    assert found.per_hour == pytest.approx(3600 / (first + 10 * found.decode_s / 4))
    assert found.concurrent == (0.9 * 40e9 - 4 * model.parameters) // found.kv_bytes
    assert found.kv_bytes == kv_bytes(model.text, found.llm_tokens + 10, 4)


@pytest.mark.parametrize("name", list(BLUEPRINTS))
def test_keeping_less_never_costs_more(name):
    made = plan(read_model(name), GPUS["L40S"], Load(frames=16), [1.0, 0.9, 0.5, 0.25, 0.1, 0.02])["rows"]
    for key in ("video_tokens", "llm_tokens", "prefill_flops", "kv_bytes", "prefill_s", "latency_s"):
        assert [r[key] for r in made] == sorted((r[key] for r in made), reverse=True), key
    for key in ("concurrent", "per_hour"):
        assert [r[key] for r in made] == sorted(r[key] for r in made), key
    assert len({(r["encoder_flops"], r["encoder_s"]) for r in made}) == 1, "the encoder gets no cheaper"


def test_layouts_have_their_grids():
    video, plain = read_model("llava-onevision-7b", layout="grid"), read_model("llava-onevision-7b")
    assert read_model("llava-video-7b").family == video.family == "llava_video"
    assert clip_tokens(video, 32).grid == TokenGrid(32, 13, 13) and clip_tokens(plain, 32).grid == TokenGrid(32, 14, 14)
    assert clip_tokens(video, 32).newlines == 32 * 13 and clip_tokens(plain, 32).newlines == 1


def test_gpus_of_the_table_and_others():
    assert read_gpu("h100") == H100
    assert read_gpu("2250,8000,180") == Gpu("2250,8000,180", 2250, 8000, 180)


# -- mistakes -------------------------------------------------------------------------------------------------


def test_mistakes_are_told(tmp_path):
    with pytest.raises(errors.UnknownNameError, match=r"unknown GPU 'A100'. Did you mean .*'A100-80GB'.*2250,8000,180"):
        read_gpu("a100")
    with pytest.raises(errors.EvaluationError, match="must be positive, got 1,-1,1"):
        read_gpu("1,-1,1")
    with pytest.raises(errors.UnknownNameError, match=r"unknown model 'qwen2.5-vl-7'. Did you mean 'qwen2.5-vl-7b'"):
        read_model("qwen2.5-vl-7")
    with pytest.raises(errors.ModelError, match=r"cannot read the configuration of .*Give a folder with a config.json"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.ModelError, match="cannot read the configuration of"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(errors.UnsupportedModelError, match="is a 'bert', which vidsieve does not support"):
        read_model(str(tmp_path))
    with pytest.raises(errors.UnsupportedCallError, match="layout"):
        read_model("qwen2.5-vl-3b", layout="grid")
    model = read_model("qwen2.5-vl-7b")
    with pytest.raises(errors.ModelError, match=r"weights take 16.6 GB of the 14.4 GB that can be used; choose a GPU"):
        plan(model, Gpu("small", 100, 100, 16), Load(), [1.0])
    with pytest.raises(errors.ModelError, match=r"cannot take 32 frames of this size: .*aspect ratio"):
        plan(model, H100, Load(size=(10, 4000)), [1.0])
    with pytest.raises(errors.RetentionError, match="got 0"):
        plan(model, H100, Load(), [0])


def test_a_folder_with_a_configuration_is_enough(tmp_path):
    BLUEPRINTS["qwen2.5-vl-3b"][1]().save_pretrained(tmp_path)
    assert read_model(str(tmp_path)).parameters == read_model("qwen2.5-vl-3b").parameters


# -- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def told():
    app, runner = typer.Typer(), CliRunner()
    app.command()(command)

    def run(*arguments, fails=None):
        done = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
        if fails is not None:
            assert isinstance(done.exception, fails), done.exception
            return str(done.exception)
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    return run


def test_the_command_prints_a_column_for_each_retention(told, tmp_path):
    out = told("--frames", 32, "--retention", "1,0.25,0.1", "--price", 2, "--json", tmp_path / "p.json")
    for word in ("qwen2.5-vl-7b on H100", "100 %", "25 %", "10 %", "4,784 │ 1,196 │ 478", "predicted"):
        assert word in out
    assert "989.4 TFLOP/s in bfloat16 without sparsity" in out and "0.131 │ 0.071 │ 0.060" in out
    result = json.loads((tmp_path / "p.json").read_text())
    assert [r["video_tokens"] for r in result["rows"]] == [4784, 1196, 478] and result["load"]["batch"] == 8
    assert all(line in out for line in result["assumptions"])


def test_the_command_says_where_nothing_fits(told):
    out = told("--gpu", "L4", "--frames", 512, "--size", "1080x1920", "--retention", "1,0.1", "--price", 1)
    assert "requests that fit in memory │ 0 │ " in out and "one request, s │ – │ " in out and "made for 131,072" in out
    assert "requests an hour │ 0 │ " in out and "price of 1,000 requests │ – │ " in out


def test_the_commands_mistakes_are_told(told):
    assert "--size must be height x width in pixels" in told("--size", "360", fails=errors.EvaluationError)
    assert "'H200'" in told("--gpu", "H20", fails=errors.UnknownNameError)
    assert "(0, 1]" in told("--retention", "1.5", fails=errors.RetentionError)
