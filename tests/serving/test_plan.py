"""Predictions of serving: tokens as real processors make them, operations as torch counts them, caches as they are."""

from __future__ import annotations

import json
from functools import partial
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
from vidsieve.serving.plan import Gpu, encoded_video, plan, read_gpu, read_model
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from vidsieve.types import TokenGrid
from vidsieve.video.reading import Video

SIZE = (360, 640)
SLOW_READING = Gpu("toy", 1e9, 1e-9, 80, 1.0, 1.0, width=4)
"""Times are bytes that are read."""
SLOW_PRODUCTS = Gpu("toy", 1e-12, 1e9, 80, 1.0, 1.0)
"""Times are operations."""


def row(model, gpu, retention=1.0, **load):
    return SimpleNamespace(**plan(model, gpu, [retention], **load)["rows"][0])


@pytest.fixture
def tiny(tmp_path):
    """Return a tiny model, its adapter, and the folder of its configuration."""

    def make(family):
        network = FAMILIES[family]()
        network.config.save_pretrained(tmp_path)
        return network, adapter_for(network), str(tmp_path)

    return make


# -- tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "internvl", "smolvlm"])
def test_grids_and_newlines_are_those_of_the_adapter(tiny, family):
    _, adapter, folder = tiny(family)
    encoded = adapter.encode(inputs_for(family, [[default_grid(family, 5)]]))
    grid, newlines, _, _ = encoded_video(read_model(folder), 5, SIZE)
    video = encoded.videos[0].features
    assert (grid, newlines) == (video.grid, len(video.tail)) and read_model(folder).family == family


@pytest.mark.parametrize("size", [(360, 640), (64, 48), (1080, 1920), (300, 200)])
@pytest.mark.parametrize(
    ("name", "kind", "limits", "frames"),
    [
        ("qwen2.5-vl-0.1b", "Qwen2VLVideoProcessor", {"shortest_edge": 3136, "longest_edge": 12845056}, 3),
        ("qwen3-vl-0.1b", "Qwen3VLVideoProcessor", {"shortest_edge": 4096, "longest_edge": 25165824}, 4),
    ],
)
def test_frames_are_scaled_as_by_the_real_processors(name, kind, limits, frames, size):
    import transformers

    processor = getattr(transformers, kind)(size=limits)
    pixels = np.zeros((frames, *size, 3), np.uint8)
    outputs = processor([pixels], do_sample_frames=False, return_tensors="pt")
    grid, _, _, _ = encoded_video(read_model(name), frames, size)
    assert [[grid.frames, 2 * grid.height, 2 * grid.width]] == outputs["video_grid_thw"].tolist()
    assert grid.num_tokens * 4 == len(outputs["pixel_values_videos"])


@pytest.mark.parametrize(("name", "markers"), [("llava-onevision-0.1b", 0), ("qwen2.5-vl-0.1b", 2)])
def test_prompts_are_as_long_as_the_models_read_them(name, markers):
    import transformers

    family, config = BLUEPRINTS[name]
    kind = {
        "llava_onevision": transformers.LlavaOnevisionVideoProcessor,
        "qwen2_5_vl": partial(transformers.Qwen2VLVideoProcessor, min_pixels=3136, max_pixels=12845056),
    }[family]
    video = Video(np.zeros((6, 90, 160, 3), np.uint8), np.arange(6.0), (), 6.0, 1.0, 6, (90, 160))
    ids = RandomModel(name, family, SimpleNamespace(config=config()), kind()).inputs(video, 20)["input_ids"]
    text = 28 + markers  # words, the template, and tokens around the video
    assert row(name, read_gpu("H100"), frames=6, size=(90, 160), prompt_tokens=text).llm_tokens == ids.shape[1]


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "internvl", "smolvlm"])
def test_a_pruned_prompt_is_as_long_as_a_method_makes_it(tiny, family):
    network, _, folder = tiny(family)
    inputs = inputs_for(family, [[default_grid(family, 4)]])
    grid, newlines, _, _ = encoded_video(read_model(folder), 4, SIZE)
    whole = vidsieve.prune(network, inputs, vidsieve.load("uniform", retention=1.0))["input_ids"].shape[1]
    for retention in (1.0, 0.5):  # a half leaves no row without a token
        pruned = vidsieve.prune(network, inputs, vidsieve.load("uniform", retention=retention))
        text = whole - grid.num_tokens - newlines
        predicted = row(folder, read_gpu("H100"), retention, frames=4, prompt_tokens=text)
        assert predicted.llm_tokens == pruned["input_ids"].shape[1]
        assert predicted.video_tokens == int(retention * grid.num_tokens)


# -- operations, parameters, caches ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_encoders_operations_are_those_that_torch_counts(tiny, family):
    network, adapter, folder = tiny(family)
    vision, qwen = network.config.vision_config, family.startswith("qwen")
    frames, size = (4, SIZE) if qwen else (default_grid(family).frames, SIZE)
    if qwen:
        unit = vision.patch_size * vision.spatial_merge_size
        size = (9 * unit, 17 * unit)  # windows of 2×2, some cut
    grid, _, _, ours = encoded_video(read_model(folder), frames, size)
    network.set_attn_implementation("eager")
    inputs = inputs_for(family, [[grid if qwen else default_grid(family)]])
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        adapter.video_features(inputs)
    rel = 0.05 if family == "qwen2_5_vl" else 0.005  # cut windows count as whole ones
    assert ours == pytest.approx(counted.get_total_flops(), rel=rel)


@pytest.mark.parametrize("family", [*FAMILIES, "testbed"])
def test_parameters_are_counted_without_weights(tiny, testbed, family):
    network, adapter, model = (testbed[0], adapter_for(testbed[0]), family) if family == "testbed" else tiny(family)
    language, head = adapter.language_model, network.get_output_embeddings().weight
    words = language.get_input_embeddings().weight
    numbers = plan(model, SLOW_READING, [1.0], answer_tokens=1, batch=1, frames=4)
    (predicted,), every = numbers["rows"], sum(p.numel() for p in network.parameters())
    assert numbers["parameters"] == every
    layers = sum(p.numel() for p in language.parameters()) - words.numel() + head.numel()
    assert predicted["prefill_s"] == pytest.approx(4 * layers)
    assert predicted["encoder_s"] == pytest.approx(4 * (every - layers - (0 if head is words else words.numel())))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_a_cache_is_as_large_as_a_real_one(tiny, family):
    network, adapter, folder = tiny(family)
    grid, _, _, _ = encoded_video(read_model(folder), 2, SIZE)
    inputs = inputs_for(family, [[grid]])
    pruned = vidsieve.prune(network, inputs, vidsieve.load("uniform", retention=0.25))
    with torch.no_grad():
        cache = output_cache(network(**pruned))
    real, tokens = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), pruned["input_ids"].shape[1]
    text = tokens - row(folder, SLOW_READING, 0.25, frames=2, prompt_tokens=0).llm_tokens
    load = {"frames": 2, "prompt_tokens": text, "answer_tokens": 1, "batch": 1}
    assert row(folder, SLOW_READING, 0.25, **load).kv_bytes == real
    assert row(folder, SLOW_PRODUCTS, 0.25, **load).kv_bytes == real / 2
    network.set_attn_implementation("eager")
    step = torch.randn(1, 1, network.config.get_text_config().hidden_size)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        hidden = adapter.language_model(inputs_embeds=step, **cache_kwargs(network, cache)).last_hidden_state
        network.get_output_embeddings()(hidden)
    assert row(folder, SLOW_PRODUCTS, 0.25, **load).decode_s == pytest.approx(counted.get_total_flops(), rel=0.005)


# -- times ----------------------------------------------------------------------------------------------------


def test_parts_are_rooflines_and_add_up():
    gpu = Gpu("toy", 0.5, 10, 40, 0.5, 1.0, width=4)
    assert gpu.seconds(5e11, 1e9) == 2.0 and gpu.seconds(1e9, 2e10) == 2.0
    name, load = "llava-onevision-0.5b", {"frames": 4, "answer_tokens": 11, "batch": 4}
    adapter, predicted = read_model(name), row(name, gpu, 0.25, **load)
    text, language = adapter.model.config.get_text_config(), adapter.language_model
    assert predicted.prefill_flops == prefill_flops(text, predicted.llm_tokens) and predicted.video_tokens == 196
    assert predicted.prefill_s == predicted.prefill_flops / 0.25e12
    assert predicted.encoder_s == predicted.encoder_flops / 0.25e12
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * 64 * 4
    assert predicted.kv_bytes == token * (predicted.llm_tokens + 10)
    llm = sum(p.numel() for p in language.parameters())  # its words are as large as its head
    assert predicted.decode_s == (4 * llm + 4 * token * (predicted.llm_tokens + 5)) / 1e10 and predicted.batch == 4
    first = predicted.encoder_s + predicted.prefill_s
    assert predicted.latency_s == pytest.approx(first + 10 * predicted.decode_s)
    assert predicted.per_hour == pytest.approx(3600 / (first + 10 * predicted.decode_s / 4))
    free = 0.9 * 40e9 - 4 * sum(p.numel() for p in adapter.model.parameters())
    assert predicted.concurrent == free // predicted.kv_bytes


@pytest.mark.parametrize("name", list(BLUEPRINTS))
def test_keeping_less_never_costs_more(name):
    rows = plan(name, read_gpu("L40S"), [1.0, 0.9, 0.5, 0.25, 0.1, 0.02], frames=16)["rows"]
    for key in ("video_tokens", "llm_tokens", "prefill_flops", "kv_bytes", "prefill_s", "latency_s"):
        assert [r[key] for r in rows] == sorted((r[key] for r in rows), reverse=True), key
    for key in ("concurrent", "per_hour"):
        assert [r[key] for r in rows] == sorted(r[key] for r in rows), key
    assert len({(r["encoder_flops"], r["encoder_s"]) for r in rows}) == 1, "the encoder gets no cheaper"


def test_layouts_have_their_grids():
    video, plain = read_model("llava-onevision-7b", layout="grid"), read_model("llava-onevision-7b")
    assert read_model("llava-video-7b").family == video.family == "llava_video"
    assert encoded_video(video, 32, SIZE)[:2] == (TokenGrid(32, 13, 13), 32 * 13)
    assert encoded_video(plain, 32, SIZE)[:2] == (TokenGrid(32, 14, 14), 1)


def test_gpus_of_the_table_and_others():
    assert read_gpu("h100") == Gpu("H100", 989.4, 3350, 80)
    assert read_gpu("2250,8000,180") == Gpu("2250,8000,180", 2250, 8000, 180)


# -- mistakes -------------------------------------------------------------------------------------------------


def test_mistakes_are_told(tmp_path):
    with pytest.raises(errors.UnknownNameError, match=r"unknown GPU 'A100'. Did you mean .*'A100-80GB'.*2250,8000,180"):
        read_gpu("a100")
    with pytest.raises(errors.UnknownNameError, match=r"unknown GPU '1,-1,1'.*all positive, as 2250,8000,180"):
        read_gpu("1,-1,1")
    with pytest.raises(errors.UnknownNameError, match=r"unknown model 'qwen2.5-vl-7'. Did you mean 'qwen2.5-vl-7b'"):
        read_model("qwen2.5-vl-7")
    with pytest.raises(
        errors.ModelError, match=r"cannot read .* as a model for videos: .*Give a folder with a config.json"
    ):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.ModelError, match="as a model for videos"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(errors.ModelError, match=r"Unrecognized configuration class .*BertConfig"):
        read_model(str(tmp_path))
    with pytest.raises(errors.UnsupportedCallError, match="layout"):
        read_model("qwen2.5-vl-3b", layout="grid")
    name = "qwen2.5-vl-7b"
    with pytest.raises(errors.ModelError, match=r"weights take 16.6 GB of the 14.4 GB that can be used; choose a GPU"):
        plan(name, Gpu("small", 100, 100, 16), [1.0])
    with pytest.raises(errors.ModelError, match=r"cannot take 32 frames of this size: .*aspect ratio"):
        plan(name, read_gpu("H100"), [1.0], size=(10, 4000))
    with pytest.raises(errors.RetentionError, match="got 0"):
        plan(name, read_gpu("H100"), [0])


def test_a_folder_with_a_configuration_is_enough(tmp_path):
    BLUEPRINTS["qwen2.5-vl-3b"][1]().save_pretrained(tmp_path)
    gpu = read_gpu("H100")
    assert plan(str(tmp_path), gpu, [0.5])["rows"] == plan("qwen2.5-vl-3b", gpu, [0.5])["rows"]


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
    assert "989.4 TFLOP/s in bfloat16 without sparsity" in out and "0.131 │ 0.0712 │ 0.0599" in out
    result = json.loads((tmp_path / "p.json").read_text())
    assert [r["video_tokens"] for r in result["rows"]] == [4784, 1196, 478] and result["load"]["batch"] == 8
    assert all(line in out for line in result["assumptions"])


def test_the_command_says_where_nothing_fits(told):
    out = told("--gpu", "L4", "--frames", 512, "--size", "1080x1920", "--retention", "1,0.1", "--price", 1)
    assert "concurrent │ 0 │ " in out and "latency, ms │ – │ " in out and "made for 131,072" in out
    assert "per hour │ 0 │ " in out and "price of 1000 │ – │ " in out


def test_the_commands_mistakes_are_told(told):
    assert "--size must be height x width in pixels" in told("--size", "360", fails=errors.EvaluationError)
    assert "'H200'" in told("--gpu", "H20", fails=errors.UnknownNameError)
    assert "(0, 1]" in told("--retention", "1.5", fails=errors.RetentionError)
