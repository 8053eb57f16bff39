"""Signals of the vision encoder: the tower's own attention and keys, in the order of the LLM's tokens."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.adapters.probe import received
from vidsieve.errors import NeedError
from vidsieve.testing.equivalence import CONFIGURATIONS, cell, configuration
from vidsieve.testing.tiny_models import FAMILIES
from vidsieve.types import ENCODER_NEEDS
from workbench.families import tiny


def zipper(**fields):
    return vidsieve.load("visionzip", **({"retention": 0.4, "contextual": 0.4} | fields))


@pytest.mark.parametrize("call", ["prefill logits", "8 greedy tokens", "forward with labels"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_visionzip_equals_the_masked_reference(family, name, call):
    result = cell(family, name, call, "sdpa", zipper())
    assert result.passed, result


def last_block(family, model, inputs):
    """Return weights (F, H, P, P) and keys (F, H, P, d) of the last block, by hand from the input that it gets."""
    seen = {}
    adapter = adapter_for(model)
    _, module = adapter.probe_point(inputs)
    hook = module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs, x=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        adapter.encode(inputs)
        hook.remove()
        x, heads = seen["x"], module.num_heads
        if family.startswith("qwen"):
            turned = []
            cosine, sine = seen["position_embeddings"]
            for states in module.qkv(x).reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)[:2]:  # (H, S, d)
                first, second = states.chunk(2, -1)
                turned.append(states * cosine + torch.cat([-second, first], -1) * sine)
            q, k = (
                torch.stack([states[:, a:b] for a, b in pairwise(seen["cu_seqlens"].tolist())]) for states in turned
            )
        else:
            q, k = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (module.q_proj, module.k_proj))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1), k


@pytest.mark.parametrize("family", FAMILIES)
def test_signals_are_the_towers_own_pooled_as_the_features_are(family):
    """Attention by hand from the block's input; where a token's patches lie, from the geometry of each family."""
    model, inputs = FAMILIES[family](), configuration(family, "batch 1")
    with torch.no_grad():
        span = adapter_for(model).encode(inputs, needs=ENCODER_NEEDS).videos[0]
    weights, keys = last_block(family, model, inputs)
    if family == "internvl":
        received, keys = weights[:, :, 0, 1:].mean(1), keys[:, :, 1:]
    else:
        received = weights.mean((1, 2))  # (F, P)
    values = torch.cat([received[..., None], keys.mean(1)], -1)  # (F, P, 1 + d)
    if family.startswith("qwen"):
        flat = values.flatten(0, 1).unflatten(0, (-1, 4)).mean(1)
        if family == "qwen2_5_vl":
            # Windows of 2×2 tokens: a frame of 2×4 is seen as its left half, then its right half.
            order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7]) + 8 * torch.arange(span.features.grid.frames)[:, None]
            placed = torch.empty_like(flat)
            placed[order.flatten()] = flat
            flat = placed
    else:
        square = values.transpose(1, 2)
        if family == "llava_onevision":
            square = torch.nn.functional.interpolate(square.unflatten(-1, (7, 7)), size=(4, 4), mode="bilinear")
        elif family == "llava_video":
            square = torch.nn.functional.avg_pool2d(square.unflatten(-1, (7, 7)), 2)
        else:
            square = torch.nn.functional.avg_pool2d(square.unflatten(-1, (8, 8)), 2)
        flat = square.flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(span.features.encoder.attention, flat[:, 0], atol=1e-6)
    assert torch.allclose(span.features.encoder.keys.float(), flat[:, 1:], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_not_changed_by_listening(family):
    model, inputs = FAMILIES[family](), configuration(family, "batch 1")
    adapter, before = adapter_for(model), copy.deepcopy(model.config.to_dict())
    with torch.no_grad():
        plain, noted, again = (
            adapter.encode(inputs, needs=needs) for needs in (frozenset(), ENCODER_NEEDS, frozenset())
        )
    for other in (noted, again):
        assert torch.equal(plain.videos[0].features.embeds, other.videos[0].features.embeds)
    assert plain.videos[0].features.encoder is None
    assert model.config.to_dict() == before and model.config.vision_config._attn_implementation == "sdpa"


def test_ready_features_carry_no_signals():
    model, inputs = FAMILIES["smolvlm"](), configuration("smolvlm", "batch 1")
    with torch.no_grad():
        ready = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": ready}}
    with pytest.raises(NeedError, match="need the video's pixels"):
        vidsieve.prune(model, rest, zipper())


@pytest.mark.parametrize("family", ["video_llama_3", "gemma4_unified"])
def test_families_without_signals_say_so(family):
    kind = tiny(family)
    with pytest.raises(NeedError, match=f"the {family} adapter gives no signals of the vision encoder"):
        adapter_for(kind.model(0, kind.layers)).encode(kind.inputs([[3]], [5], "left"), None, ENCODER_NEEDS)


def test_queries_some_at_a_time_are_all_queries(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, 9, 8, generator=draw) for _ in range(2))
    real = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    whole = received(query, key, 0.5, real, cls_token=False)[0]
    monkeypatch.setattr("vidsieve.adapters.probe._QUERIES", 4)
    assert torch.allclose(received(query, key, 0.5, real, cls_token=False)[0], whole, atol=1e-6)
    assert torch.allclose(whole.sum(1), torch.ones(2)) and not whole[1, 6:].any()


@pytest.mark.parametrize("cls_token", [False, True])
def test_heads_that_share_keys_receive_as_if_each_had_its_own(cls_token):
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, generator=draw), torch.randn(2, 2, 5, 8, generator=draw)
    for shared, own in zip(
        *(received(query, keys, 0.5, cls_token=cls_token) for keys in (key, key.repeat_interleave(2, 1))), strict=True
    ):
        assert torch.allclose(shared, own)
