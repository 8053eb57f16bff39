"""Models of published sizes, on the meta device: no memory, real names and shapes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaOnevisionConfig, Qwen2_5_VLConfig

import vidsieve
from vidsieve.adapters import Template, adapter_for
from vidsieve.adapters.decoder_layer import block_shape
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.errors import BudgetError, PolicyMismatchError
from vidsieve.selection import least_retention


def _qwen(hidden, layers, heads, kv, inner, tied):
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "intermediate_size": inner,
            "vocab_size": 151936,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=tied,
    )


def _llava():
    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152000,
        },
    )


SIZES = {
    "Qwen2.5-VL-3B": (lambda: _qwen(2048, 36, 16, 2, 11008, True), 3.75, "qwen2_5_vl", ("installed",)),
    "Qwen2.5-VL-7B": (lambda: _qwen(3584, 28, 28, 4, 18944, False), 8.29, "qwen2_5_vl", ("installed",)),
    "LLaVA-OneVision-7B": (_llava, 8.03, "llava_onevision", ("installed", "grid")),
}


@pytest.mark.parametrize("name", SIZES)
def test_policies_and_methods_fit_models_of_published_sizes(name):
    make, billions, family, layouts = SIZES[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(make())
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.005)
        adapter = adapter_for(model, Template(((1, 2),), ((3,),)))
        shape = block_shape(model.config.get_text_config(), adapter.decoder_layers[0])
        policy = CaCoVIDPolicy.of_shape(shape, family, variant="paper")
    layer = {k: tuple(v.shape) for k, v in adapter.decoder_layers[0].state_dict().items()}
    ours = {k: tuple(v.shape) for k, v in policy.layers[0].state_dict().items()}
    assert ours == layer
    assert adapter.family == family and adapter.hidden_size == shape.hidden_size
    adapter.check(vidsieve.registry.compressors.get("cacovid")(policy=policy, retention=0.25))
    depth = len(adapter.decoder_layers)
    adapter.check(vidsieve.load("fastv", retention=0.25))
    with pytest.raises(BudgetError, match=f"below {least_retention(2 * 10**6 + depth - 2, depth * 10**6):g};"):
        adapter.check(vidsieve.load("fastv", retention=0.05))
    with pytest.raises(PolicyMismatchError):
        adapter.check(vidsieve.registry.compressors.get("score").untrained(1024))
    for layout in layouts:
        assert adapter_for(model, layout=layout).layout == layout
