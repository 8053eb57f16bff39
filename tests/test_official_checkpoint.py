"""The release's CaCoVID checkpoint, read from made-up files of its form and from its recorded weights."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.compressors import cacovid_official as module
from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.cacovid import CaCoVIDPolicy, official_selection
from vidsieve.compressors.cacovid_official import QWEN2_7B, read_official
from vidsieve.errors import PolicyError
from vidsieve.testing import make_video
from vidsieve.testing.checks import WIDTH
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from vidsieve.types import Prompt, TokenGrid, VideoTokens

GRID = TokenGrid(4, 3, 3)
HEADS, KV_HEADS, INNER, THETA, EPS = 4, 2, 48, 1e6, 1e-5
TEXT = {
    "model_type": "qwen2",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rope_theta": THETA,
    "rms_norm_eps": EPS,
}
SHAPE = BlockShape(WIDTH, HEADS, KV_HEADS, WIDTH // HEADS, INNER, EPS, THETA)
RELEASE = "compression_policy."
ORACLE = Path(__file__).parent / "oracles" / "cacovid.npz"


def policy_of(shape: BlockShape) -> CaCoVIDPolicy:
    with torch.device("meta"):
        return CaCoVIDPolicy.of_shape(shape, "llava_onevision", variant="official")


def made_up(shape: BlockShape = SHAPE) -> dict[str, torch.Tensor]:
    """Return random official weights, without prefix; norms away from 1 and biases away from 0."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(name, tuple(value.shape)) for name, value in policy_of(shape).state_dict().items()]
    shapes.append(("mode_selection.8.bias", (3,)))
    noise = {
        name: torch.randn(size, generator=draw) * (size[1] ** -0.5 if len(size) > 1 else 0.3) for name, size in shapes
    }
    return {name: value + ("norm" in name) for name, value in noise.items()}


def rest_of_the_model() -> dict[str, torch.Tensor]:
    return {
        "language_model.model.layers.0.self_attn.q_proj.weight": torch.randn(WIDTH, WIDTH),
        "language_model.lm_head.weight": torch.randn(100, WIDTH),
        "image_newline": torch.randn(WIDTH),
    }


def write(folder, weights, *, prefix=RELEASE, text=TEXT, others=True, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    tensors = {prefix + key: value for key, value in weights.items()}
    save_file(tensors | (rest_of_the_model() if others else {}), folder / name)
    if text is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "llava_onevision", "text_config": text}))
    return folder


def write_shards(folder, weights):
    """Write the policy into the second and third of three shards, with an index, as transformers does."""
    write(folder, {}, name="model-00001-of-00003.safetensors")
    tensors = {RELEASE + key: value for key, value in weights.items()}
    names = sorted(tensors)
    parts = {
        "model-00002-of-00003.safetensors": names[: len(names) // 2],
        "model-00003-of-00003.safetensors": names[len(names) // 2 :],
    }
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    index = {name: file for file, inside in parts.items() for name in inside}
    index |= dict.fromkeys(rest_of_the_model(), "model-00001-of-00003.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def straight(w, video, *, causal=True):
    """Token and frame logits by plain sums: one decoder layer with a mask, then the two heads."""
    x, head_dim = video.prompt.embeds.double(), WIDTH // HEADS
    w = {name: tensor.double() for name, tensor in w.items()}
    length = x.shape[0]

    def norm(y, name):
        return y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * w[name]

    def turned(y):
        """Rotate each pair (i, i + half) by position · θ^(−2i / head_dim), as complex numbers."""
        half = head_dim // 2
        angle = torch.arange(length).double()[:, None] * THETA ** (-2 * torch.arange(half).double() / head_dim)
        pair = torch.complex(y[:, :half], y[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pair.real, pair.imag], -1)

    y = norm(x, "layers.0.input_layernorm.weight")
    q, k, v = (y @ w[f"layers.0.self_attn.{p}_proj.weight"].T + w[f"layers.0.self_attn.{p}_proj.bias"] for p in "qkv")
    future = torch.ones(length, length).triu(1).bool()
    mixed = []
    for head in range(HEADS):
        own, shared = (slice(h * head_dim, (h + 1) * head_dim) for h in (head, head // (HEADS // KV_HEADS)))
        scores = turned(q[:, own]) @ turned(k[:, shared]).T / math.sqrt(head_dim)
        scores = scores.masked_fill(future, -math.inf) if causal else scores
        mixed.append(scores.softmax(-1) @ v[:, shared])
    x = x + torch.cat(mixed, -1) @ w["layers.0.self_attn.o_proj.weight"].T
    y = norm(x, "layers.0.post_attention_layernorm.weight")
    gate, up, down = (w[f"layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
    x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T

    def head(y, name):
        for i in (0, 2, 4, 6, 8):
            y = (F.silu(y) if i else y) @ w[f"{name}.{i}.weight"].T + w[f"{name}.{i}.bias"]
        return y

    tokens = x[video.prompt.video_mask]
    frames = tokens.reshape(video.grid.frames, video.grid.per_frame, WIDTH).mean(1)
    return [head(norm(t, "layernorm.weight"), f"{n}_compress") for t, n in ((tokens, "token"), (frames, "frame"))]


def test_names_and_shapes_of_the_7b_model_are_those_of_our_policy():
    ours = {name: tuple(tensor.shape) for name, tensor in policy_of(QWEN2_7B).state_dict().items()}
    for name, sizes in {
        "layers.0.self_attn.q_proj.weight": (3584, 3584),
        "layers.0.self_attn.k_proj.bias": (512,),
        "layers.0.mlp.down_proj.weight": (3584, 18944),
        "token_compress.0.weight": (1792, 3584),
        "frame_compress.8.weight": (2, 224),
    }.items():
        assert ours[name] == sizes
    layer = sum(math.prod(sizes) for name, sizes in ours.items() if name.startswith("layers"))
    assert layer == 233_057_792, "as many parameters as a layer of Qwen2-7B"


def test_the_recorded_official_network(tmp_path):
    """The release's own module at width 64: its names, its shapes, and the logits it gave."""
    oracle = dict(np.load(ORACLE, allow_pickle=False))
    hidden, heads, kv_heads, inner = map(int, oracle["policy/cfg"])
    start = "policy/w/"
    weights = {key.removeprefix(start): torch.from_numpy(oracle[key]) for key in oracle if key.startswith(start)}
    expected = policy_of(BlockShape(hidden, heads, kv_heads, hidden // heads, inner)).state_dict().keys()
    assert expected == {name for name in weights if not name.startswith("mode_selection")}
    text = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_theta": float(oracle["policy/rope_theta"]),
        "rms_norm_eps": float(oracle["policy/rms_eps"]),
    }
    policy = read_official(write(tmp_path, weights, text=text))
    for case in ("p0", "p1"):
        embeds, mask = (torch.from_numpy(oracle[f"policy/{case}/{key}"]) for key in ("inputs_embeds", "video_mask"))
        mask, positions = mask.bool(), torch.arange(len(embeds))[None]
        grid = TokenGrid(*map(int, oracle[f"policy/{case}/thw"]))
        video = VideoTokens(embeds[mask], grid, positions[:, mask], Prompt(embeds, positions, mask, ~mask))
        with torch.no_grad():
            tokens, frames = policy(video)
        for got, name in ((tokens, "token_logits"), (frames, "frame_logits")):
            assert np.abs(got.numpy() - oracle[f"policy/{case}/released/{name}"]).max() < 1e-4
        assert np.abs(tokens.numpy() - oracle[f"policy/{case}/bidirectional/token_logits"]).max() > 1e-3


@pytest.mark.parametrize("make", [write, write_shards], ids=["one file", "shards"])
def test_from_checkpoint_to_selection(tmp_path, make):
    weights, video = made_up(), make_video(GRID)
    folder = make(tmp_path / "release", weights)
    read_official(folder).save_pretrained(tmp_path / "policy")
    method = vidsieve.load("cacovid", tmp_path / "policy", variant="official", retention=0.25)
    tokens, frames = straight(weights, video)
    chosen = method.compress(video)
    assert torch.allclose(chosen.scores.double(), tokens[:, 1] - tokens[:, 0], atol=1e-5)
    assert torch.allclose(chosen.frame_scores.double(), frames[:, 1] - frames[:, 0], atol=1e-5)
    both = straight(weights, video, causal=False)[0]
    assert float((tokens - both).abs().max()) > 1e-2, "the mask matters here"
    wanted = official_selection(chosen.scores, chosen.frame_scores, GRID, 0.25, 0.5, 1.5 * 0.25)[0]
    assert torch.equal(chosen.indices, wanted) and chosen.num_kept == 9
    assert vidsieve.load(tmp_path / "policy").variant == "official", "a folder alone is served as the release serves it"
    config = method.policy.config
    assert (config.type, config.family, config.hidden_size) == ("cacovid", "llava_onevision", WIDTH)
    assert config.network["causal"] and config.training["prefix"] == RELEASE


def test_on_a_tiny_llava_onevision(tmp_path):
    """The model's own `config.json` tells the block, and the policy fits the model."""
    model = FAMILIES["llava_onevision"]()
    adapter = adapter_for(model)
    shape = adapter.layer_state(0).shape
    model.config.save_pretrained(tmp_path)
    policy = read_official(write(tmp_path, made_up(shape), text=None))
    assert BlockShape(**policy.config.network["shape"]) == shape
    policy.save_pretrained(tmp_path / "policy")
    method = vidsieve.load("cacovid", tmp_path / "policy", variant="official", retention=0.25)
    inputs = inputs_for("llava_onevision", [[default_grid("llava_onevision")]])
    with vidsieve.attach(model, method) as session:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    (trace,) = session.trace
    assert (trace.variant, trace.kept) == ("official", int(0.25 * trace.total))


def test_other_tensors_are_not_read(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, made_up())
    (tmp_path / "model-00001-of-00003.safetensors").unlink()  # holds nothing of the policy
    read_official(folder)
    got = []

    def watched(*args):
        file = safe_open(*args)
        return SimpleNamespace(keys=file.keys, get_tensor=lambda name: got.append(name) or file.get_tensor(name))

    monkeypatch.setattr(module, "safe_open", watched)
    read_official(write(tmp_path / "single", made_up()))
    assert sorted(got) == sorted(RELEASE + name for name in policy_of(SHAPE).state_dict())


def test_bfloat16_is_widened(tmp_path):
    weights = {name: value.bfloat16() for name, value in made_up().items()}
    policy = read_official(write(tmp_path, weights))
    assert not policy.training
    for name, value in policy.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, weights[name].float()), name
    policy.save_pretrained(tmp_path / "policy")
    again = CaCoVIDPolicy.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        assert torch.equal(policy(make_video(GRID))[0], again(make_video(GRID))[0])


@pytest.mark.parametrize("prefix", ["", RELEASE, "module.model.compression_policy."])
def test_any_prefix(tmp_path, prefix):
    policy = read_official(write(tmp_path, made_up(), prefix=prefix, others=bool(prefix), name="policy.safetensors"))
    assert torch.equal(policy.layernorm.weight, made_up()["layernorm.weight"])
    assert policy.config.training["prefix"] == prefix


def test_a_whole_file_goes_before_an_index(tmp_path):
    """As transformers reads a folder that holds both."""
    folder = write(write_shards(tmp_path, made_up()), {name: value + 1 for name, value in made_up().items()})
    assert torch.equal(read_official(folder).layernorm.weight, made_up()["layernorm.weight"] + 1)


def test_one_policy_is_needed(tmp_path):
    with pytest.raises(PolicyError, match="holds 0 CaCoVID policies"):
        read_official(write(tmp_path / "none", {"my_token_compress.0.weight": torch.ones(2, 2)}, prefix=""))
    both = made_up() | {"a." + name: value for name, value in made_up().items()}
    with pytest.raises(PolicyError, match="holds 2 CaCoVID policies"):
        read_official(write(tmp_path / "two", both))


def test_a_checkpoint_without_configuration(tmp_path, monkeypatch):
    folder = write(tmp_path, made_up(), text=None)
    with pytest.raises(PolicyError, match=r"has width 32, not 3584: put its model's config\.json there"):
        read_official(folder)
    monkeypatch.setattr(module, "QWEN2_7B", SHAPE)  # as if this were the width of the release
    assert BlockShape(**read_official(folder).config.network["shape"]) == SHAPE


NEW = {key: value for key, value in TEXT.items() if key != "rope_theta"}


def test_configurations_of_both_transformers_generations(tmp_path):
    """Version 4 leaves out values that equal its defaults, version 5 keeps positions in a table of their own."""
    for text, wanted in [
        ({k: v for k, v in TEXT.items() if k != "rms_norm_eps"}, (1e-6, THETA)),
        (NEW | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, (EPS, 500.0)),
        (TEXT | {"rope_scaling": None, "head_dim": None}, (EPS, THETA)),
    ]:
        shape = read_official(write(tmp_path, made_up(), text=text)).config.network["shape"]
        assert (shape["rms_norm_eps"], shape["rope_theta"]) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NEW, "rope_theta None"),
        (TEXT | {"num_attention_heads": "4"}, "num_attention_heads"),
        (TEXT | {"num_key_value_heads": 2.5}, "num_key_value_heads"),
        (TEXT | {"num_key_value_heads": 0}, r">= 1.*num_key_value_heads"),
        (TEXT | {"num_key_value_heads": 3}, "4 query heads cannot share 3 key heads"),
        (TEXT | {"num_key_value_heads": 1}, r"size mismatch for layers\.0\.self_attn\.k_proj\.weight"),
        (TEXT | {"hidden_size": 64}, "width 64 for 32"),
        (TEXT | {"rope_scaling": {"type": "yarn"}}, "rotary positions of type 'yarn'"),
        (TEXT | {"rope_scaling": "linear"}, "rope_scaling"),
        (["qwen2"], "Expected `object"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, text, message):
    with pytest.raises(PolicyError, match=message):
        read_official(write(tmp_path, made_up(), text=text))


def test_damaged_configurations(tmp_path):
    folder = write(tmp_path, made_up())
    for content in (b"{", b"[]", b"\xff"):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(
            PolicyError, match=r"config\.json (is damaged|cannot be used) .*fetch the model's config\.json again"
        ):
            read_official(folder)


def test_names_shapes_and_types_are_checked(tmp_path):
    good = made_up()
    lacking = {k: v for k, v in good.items() if not k.startswith("frame_compress")}
    for weights, message in [
        (lacking, r"lacks a shard.*\s.*Missing key.*frame_compress\.0\.weight"),
        (good | {"layers.1.mlp.up_proj.weight": torch.zeros(1)}, r"Unexpected key.*layers\.1\.mlp\.up_proj\.weight"),
        (good | {"layernorm.weight": torch.ones(8)}, r"size mismatch for layernorm\.weight"),
        (good | {"token_compress.0.weight": torch.zeros(0)}, "width 32 for 0"),
        (
            good | {"layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)},
            r"up_proj\.weight as torch.int8",
        ),
        (good | {"layernorm.weight": torch.full((WIDTH,), math.nan)}, "not all finite"),
        ({}, "holds 0 CaCoVID policies"),
    ]:
        with pytest.raises(PolicyError, match=message):
            read_official(write(tmp_path, weights))


def test_files_that_are_missing_or_corrupt(tmp_path):
    with pytest.raises(PolicyError, match=r"nowhere holds no \.safetensors file$"):
        read_official(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(1))
    with pytest.raises(PolicyError, match=r"no \.safetensors file; pytorch_model\.bin will not be loaded"):
        read_official(tmp_path)
    folder = write_shards(tmp_path / "shards", made_up())
    last = folder / "model-00003-of-00003.safetensors"
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(PolicyError, match="not readable safetensors"):
        read_official(folder)
    last.unlink()
    with pytest.raises(PolicyError, match="holds 0 CaCoVID policies"):
        read_official(folder)
