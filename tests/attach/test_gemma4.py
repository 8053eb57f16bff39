"""Gemma 4: positions, what stays around frames, images beside videos, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import StaticCache

import vidsieve
from vidsieve import registry
from vidsieve.adapters import adapter_for
from vidsieve.adapters.transformers_api import cache_kwargs, new_cache
from vidsieve.errors import NeedError, PromptError, UnsupportedCallError
from vidsieve.testing.calls import CALLS, Case, prefill
from vidsieve.testing.equivalence import TOLERANCE, check_family
from vidsieve.testing.tiny_models import VIDEO
from vidsieve.training.controls import teacher_scores
from vidsieve.training.recipes import new_cacovid
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.settings import CaCoVIDConfig
from vidsieve.types import ENCODER_NEEDS, TokenGrid
from workbench.families import tiny
from workbench.families._gemma import AUDIO, BEGIN, END

pytestmark = pytest.mark.families("gemma4", "gemma4_unified")
RANDOM = vidsieve.load("random", retention=0.3)


@pytest.fixture(params=["gemma4", "gemma4_unified"])
def kind(request):
    return tiny(request.param)


@pytest.mark.parametrize("positions", ["installed", "compact"])
def test_images_beside_videos_equal_the_shortened_prompt_at_either_positions(kind, positions):
    model = kind.model(0, kind.layers)
    inputs = kind.inputs([[3, 2], [2]], [3, 9], "left", image=True)
    case = Case(adapter_for(model, positions=positions), inputs, RANDOM)
    for name in ("prefill logits", "8 greedy tokens", "second turn"):
        difference, equal = CALLS[name](case)
        assert difference <= TOLERANCE and equal is not False, name


def test_markers_and_times_stay_and_positions_are_the_whole_prompt_s(kind):
    inputs = kind.inputs([[3]], [5], "left")
    pruned = vidsieve.prune(kind.model(0, kind.layers), inputs, vidsieve.load("uniform", retention=0.1))
    ids, kept = inputs["input_ids"][0], pruned["input_ids"][0]
    assert (kept == VIDEO).sum() == 2
    assert torch.equal(kept[kept != VIDEO], ids[ids != VIDEO])
    assert (kept == BEGIN).sum() == (kept == END).sum() == 3
    assert torch.equal(ids[pruned["position_ids"][0]], kept)
    assert torch.equal(pruned["mm_token_type_ids"][0], 2 * (kept == VIDEO).long())


def test_audio_beside_a_video_is_refused_by_name(kind):
    model, inputs = kind.model(0, kind.layers), kind.inputs([[2]], [5], "left")
    ids = inputs["input_ids"].clone()
    ids[0, -4] = AUDIO
    for more in ({"input_ids": ids}, {"input_features": torch.zeros(1, 4, 8)}):
        with pytest.raises(UnsupportedCallError, match="audio and videos in one call are not supported for gemma4"):
            vidsieve.prune(model, inputs | more, RANDOM)


@pytest.mark.parametrize("name", ["mm_token_type_ids", "video_position_ids", "num_frames_per_video"])
def test_arguments_that_are_missing_are_named(kind, name):
    inputs = kind.inputs([[2]], [5], "left")
    del inputs[name]
    with pytest.raises(PromptError, match=f"{name}"):
        vidsieve.prune(kind.model(0, kind.layers), inputs, RANDOM)


def test_logits_are_capped_as_the_model_s_are(kind):
    model, inputs, seen = kind.model(0, kind.layers), kind.inputs([[2]], [5], "left"), []
    adapter = adapter_for(model)
    adapter.language_model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    with torch.no_grad():
        wanted = model(**inputs).logits
        assert torch.allclose(adapter.logits(seen[0]), wanted, atol=1e-5)
        assert not torch.allclose(model.lm_head(seen[0]), wanted, atol=1e-3)


def turned(states, angles):
    """Turn half of each head's numbers by the column of a patch, the other by its row."""
    cosine, sine = (part[:, :, None] for part in angles)
    halves = []
    for part in zip(*(x.chunk(2, -1) for x in (states, cosine, sine)), strict=True):
        first, second = part[0].chunk(2, -1)
        halves.append(part[0] * part[1] + torch.cat([-second, first], -1) * part[2])
    return torch.cat(halves, -1)


def test_encoder_signals_are_the_tower_s_own_pooled_by_place_without_padding():
    kind = tiny("gemma4")
    model, inputs = kind.model(0, 4), kind.inputs([[2], [1]], [3, 9], "left")
    places = inputs["video_position_ids"]
    smaller = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
    places[2] = -1
    places[2, :16] = smaller[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        videos = adapter_for(model).features(inputs, ENCODER_NEEDS)
    assert [video.grid for video in videos] == [TokenGrid(2, 2, 4), TokenGrid(1, 2, 2)]
    assert model.config.vision_config._attn_implementation == "sdpa"

    model.set_attn_implementation("eager")
    block, seen = model.model.vision_tower.encoder.layers[-1].self_attn, {}
    block.register_forward_hook(lambda module, args, kwargs, out: seen.update(kwargs, out=out[1]), with_kwargs=True)
    with torch.no_grad():
        adapter_for(model).features(inputs)
        keys = block.k_norm(block.k_proj(seen["hidden_states"]).unflatten(-1, (-1, block.head_dim)))
        keys = turned(keys, seen["position_embeddings"]).mean(2)  # (F, patches, d)
    for video, frames in zip(videos, ([0, 1], [2]), strict=True):
        attention, wanted = [], []
        for frame in frames:
            where = places[frame].tolist()
            real = [number for number, (column, _) in enumerate(where) if column >= 0]
            got = seen["out"][frame].mean(0)[real].mean(0)  # padding asks too in the tower, and nobody reads it
            for row in range(video.grid.height):
                for column in range(video.grid.width):
                    mine = [n for n in real if (where[n][0] // 2, where[n][1] // 2) == (column, row)]
                    assert len(mine) == 4
                    attention.append(got[mine].mean())
                    wanted.append(keys[frame, mine].mean(0))
        assert torch.allclose(video.encoder.attention, torch.stack(attention), atol=1e-6)
        assert torch.allclose(video.encoder.keys, torch.stack(wanted), atol=1e-5)


@pytest.mark.parametrize("method", ["visionzip", "fastvid"])
def test_methods_that_read_the_encoder_equal_the_shortened_prompt(method):
    kind = tiny("gemma4")
    case = Case(
        adapter_for(kind.model(0, 4)), kind.inputs([[3, 2], [2]], [3, 9], "left"), vidsieve.load(method, retention=0.4)
    )
    for name in ("prefill logits", "8 greedy tokens"):
        difference, equal = CALLS[name](case)
        assert difference <= TOLERANCE and equal is not False, name


def test_a_model_without_a_tower_gives_no_encoder_signals():
    with pytest.raises(NeedError, match=r"visionzip needs .*the gemma4_unified adapter does not give"):
        vidsieve.attach(tiny("gemma4_unified").model(0, 4), vidsieve.load("visionzip", retention=0.5))


STATIC = {"cache_implementation": "static", "disable_compile": True}


def first_logits(model, inputs, **options):
    wanted = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **wanted, **options).logits[0]


def test_a_cache_of_fixed_length_is_refused_where_the_stock_model_answers_otherwise_on_it():
    unified = tiny("gemma4_unified")
    model, inputs = unified.model(0, 4), unified.inputs([[3]], [5], "left")
    grown = first_logits(model, inputs)
    assert (first_logits(model, inputs, **STATIC) - grown).abs().max() > 0.1
    fixed = StaticCache(model.config.get_text_config(), max_cache_len=64)
    with vidsieve.attach(model, RANDOM):
        for options in (STATIC, {"cache_implementation": "offloaded_static"}, cache_kwargs(model, fixed)):
            with pytest.raises(UnsupportedCallError, match=r"frames of gemma4_unified otherwise .* leave cache_impl"):
                first_logits(model, inputs, **options)
    assert "leave cache_implementation out" in check_family(model, inputs, calls=["static cache"])[0].error


def test_other_caches_are_served(kind):
    """Those that grow; a fixed one for a plain forward and the turns after it; and for text alone."""
    model, inputs = kind.model(0, 4), kind.inputs([[3]], [5], "left")
    with vidsieve.attach(model, RANDOM), torch.no_grad():
        wanted = first_logits(model, inputs)
        assert torch.equal(first_logits(model, inputs, cache_implementation="dynamic"), wanted)
        assert torch.equal(first_logits(model, inputs, **cache_kwargs(model, new_cache(model))), wanted)
        longer = {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([[40, 41]])], 1)}
        answers = []
        for cache in (new_cache(model), StaticCache(model.config.get_text_config(), max_cache_len=64)):
            given = cache_kwargs(model, cache)
            assert torch.allclose(model(**inputs, **given).logits[:, -1], wanted, atol=TOLERANCE)
            answers.append(first_logits(model, longer, **given))
        assert torch.allclose(*answers, atol=TOLERANCE)
        text = {"input_ids": torch.arange(40, 50)[None]}
        assert torch.allclose(first_logits(model, text, **STATIC), first_logits(model, text), atol=TOLERANCE)


def test_a_cache_of_fixed_length_is_served_where_frames_are_causal():
    unified = tiny("gemma4_unified")
    model, inputs = unified.model(0, 4), unified.inputs([[3]], [5], "left")
    model.config.text_config.use_bidirectional_attention = None
    assert CALLS["static cache"](Case(adapter_for(model), inputs, RANDOM))[0] <= TOLERANCE


INSIDE = {"fastv", "pyramiddrop", "sparsevlm", "framefusion", "prunevid", "holitom", "flashvid", "earlytom", "dycoke"}


def method(name, family):
    kind = registry.compressors.get(name)
    if not kind.trained:
        return vidsieve.load(name, retention=0.5)
    compressor = kind.untrained(64, retention=0.5)
    compressor.policy.config = replace(compressor.policy.config, family=family)
    return compressor


def test_every_method_runs_or_is_refused_before_the_model_does(kind):
    """Twelve layers, so that each method inside the LLM has its own."""
    model, inputs = kind.model(0, 12), kind.inputs([[3]], [5], "left")
    adapter, refused = adapter_for(model), {}
    for name in registry.compressors:
        compressor = method(name, adapter.family)
        try:
            session = vidsieve.attach(model, compressor)
        except NeedError as error:
            refused[name] = str(error)
            continue
        with session:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert session.trace.videos
    reads_tower = {name for name in registry.compressors if registry.compressors.get(name).needs & ENCODER_NEEDS}
    assert refused.keys() == (INSIDE if adapter.provides & ENCODER_NEEDS else INSIDE | reads_tower)
    for name, error in refused.items():
        assert f"the {adapter.family} adapter does not give" in error and "as divprune" in error
        if "inside an LLM layer" in error:
            assert ("inner=False" in error) == hasattr(method(name, adapter.family), "inner")
    assert "differ in the sizes of their heads" in refused["fastv"]


@pytest.mark.parametrize("name", ["prunevid", "holitom", "flashvid", "framefusion", "dycoke"])
def test_the_part_before_the_llm_of_a_method_inside_it_runs(name):
    kind = tiny("gemma4")
    case = Case(
        adapter_for(kind.model(0, 4)),
        kind.inputs([[5]], [5], "left"),
        vidsieve.load(name, retention=0.5, inner=False),
    )
    assert prefill(case)[0] <= TOLERANCE


def test_what_would_compute_a_layer_anew_is_refused_in_words(kind):
    """Policies that start from one, and teachers."""
    adapter = adapter_for(kind.model(0, 4))
    for layer in range(4):
        with pytest.raises(NeedError, match="policies and teachers do not know the layers of gemma4"):
            adapter.layer_state(layer)
    with pytest.raises(NeedError, match="train a policy that starts from no layer"):
        new_cacovid(adapter, CaCoVIDConfig(body="layer"), "paper", "")
    assert new_cacovid(adapter, CaCoVIDConfig(), "ours", "").body == "question"
    rollouts = Rollouts(adapter, kind.inputs([[2]], [5], "left"))
    with pytest.raises(NeedError, match="without a teacher"):
        teacher_scores(rollouts, "attention")
