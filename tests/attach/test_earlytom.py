"""EarlyTom: what it merges and keeps, the faults of its release, and what really runs inside the vision encoder."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers.vision_utils import get_vision_window_index

import vidsieve
from vidsieve import registry
from vidsieve.adapters import adapter_for
from vidsieve.adapters.families.frames import FrameAdapter
from vidsieve.adapters.probe import attention_modules, listening, received
from vidsieve.compressors.earlytom import (
    EarlyTom,
    FrameMerging,
    Part,
    adjusted,
    best_of_runs,
    between,
    likeness,
    limited,
    merged,
    merges,
    official_counts,
    segmented,
    selected,
    spans_of,
)
from vidsieve.compressors.front import EncoderView
from vidsieve.errors import BudgetError, StageError, UnsupportedCallError
from vidsieve.evaluation.conditions import check_prefill, named_methods
from vidsieve.selection import kept_tokens
from vidsieve.testing import make_video
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from vidsieve.types import EncoderOutputs, Stage, TokenGrid, Tokens, VideoTokens
from workbench.families import absent, tiny

MERGING = ("llava_onevision", "llava_video")
PACKED = ("qwen2_5_vl", "qwen3_vl")
DEPTH = 6


def table(frames, **pairs):
    """Return cosines (F, F) of `frames` frames, 0 but for ``_ij=value``."""
    alike = torch.eye(frames)
    for pair, value in pairs.items():
        i, j = int(pair[1]), int(pair[2])
        alike[i, j] = alike[j, i] = value
    return alike


# -- segments and merging -----------------------------------------------------------------------------------


def test_likeness_is_the_mean_cosine_of_places():
    frames = torch.randn(5, 70, 8, generator=torch.Generator().manual_seed(0))
    wanted = F.cosine_similarity(frames[:, None], frames[None], dim=-1).mean(-1)
    assert torch.allclose(likeness(frames), wanted, atol=1e-6)
    assert not likeness(torch.zeros(3, 4, 8)).isnan().any()


def test_a_segment_is_like_its_first_frame_and_has_fewer_frames_than_the_window():
    assert segmented(torch.ones(9, 9), 0.6, 4, 0.9) == [(0, 2), (3, 5), (6, 8)]
    # 0.9 · 0.6 + 0.1 · 1 = 0.64, then 0.9 · 0.6 + 0.1 · 0.64 = 0.604, then 0.6004
    alike = table(4, _01=0.6, _02=0.6, _03=0.6)
    assert segmented(alike, 0.602, 8, 0.9) == [(0, 2), (3, 3)]
    assert segmented(alike, 0.641, 8, 0.9) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_a_slow_change_cuts_against_the_first_frame_and_not_against_the_one_before():
    angles = torch.arange(8) * 0.3
    frames = torch.stack([angles.cos(), angles.sin()], -1)[:, None]
    alike = likeness(frames)
    assert segmented(alike, 0.6, 100, 1.0) == [(0, 3), (4, 7)]
    assert segmented(alike, 0.6, 100, 1.0, adjacent=True) == [(0, 7)]
    assert EarlyTom(adjacent=True, window=100, newest=1.0).segments(alike) == [(0, 7)]


def test_numbers_of_segments_give_them_back():
    spans = [(0, 2), (3, 3), (4, 7)]
    numbers = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    assert spans_of(numbers) == spans
    assert between(spans).tolist() == [False, True, False, False, False, True, True, False]


@pytest.mark.parametrize("frames", [4, 5, 6, 7])
def test_official_loses_the_last_frame_between_first_and_last(frames):
    alike, spans = torch.eye(frames), [(0, frames - 1)]
    lost = frames - 2
    assert [part.frames for part in merges(alike, spans, True)] == [(i,) for i in range(frames) if i != lost]
    # A first and a last frame that have nothing in common: nothing is above their cosine but what is above 0.
    assert [part.frames for part in merges(alike, spans, False, threshold=0.5)] == [(i,) for i in range(frames)]
    assert len(merges(torch.eye(3), [(0, 2)], True)) == 3, "a single frame between stays in the release, too"


def test_official_gives_the_last_frame_of_a_last_pair_no_weight():
    rows = torch.randn(4, 3, 2)
    alike = table(4, _12=0.9, _03=0.1)
    official, ours = (merges(alike, [(0, 3)], release) for release in (True, False))
    assert [part.frames for part in official] == [part.frames for part in ours] == [(0,), (1, 2), (3,)]
    assert torch.equal(merged(rows, official)[1], rows[1])
    assert torch.allclose(merged(rows, ours)[1], (rows[1] + rows[2]) / 2)


def test_a_pair_weighs_its_frames_by_its_own_cosine_and_the_next():
    alike = table(6, _12=0.8, _23=0.4, _34=0.2, _05=0.3)
    parts = merges(alike, [(0, 5)], False)
    assert [part.frames for part in parts] == [(0,), (1, 2), (3,), (4,), (5,)]
    assert parts[1].weights == pytest.approx((2 / 3, 1 / 3))
    # A pair that is less like than the next waits for it.
    alike = table(6, _12=0.4, _23=0.8, _34=0.5, _05=0.3)
    parts = merges(alike, [(0, 5)], False)
    assert [part.frames for part in parts] == [(0,), (1,), (2, 3), (4,), (5,)]
    assert parts[2].weights == pytest.approx((8 / 13, 5 / 13))


def test_weights_lie_between_0_and_1_whatever_the_cosines():
    alike = table(6, _12=-0.1, _23=-0.5, _34=-0.2, _05=-1.0)
    parts = merges(alike, [(0, 5)], False)
    assert [part.frames for part in parts] == [(0,), (1, 2), (3, 4), (5,)]
    assert all(0 <= weight <= 1 for part in parts for weight in part.weights)


def test_a_picture_that_does_not_change_is_merged_in_pairs():
    frames = torch.randn(1, 50, 16).expand(7, -1, -1)
    parts = merges(likeness(frames), [(0, 6)], False)
    assert [part.frames for part in parts] == [(0,), (1, 2), (3, 4), (5,), (6,)]
    assert torch.allclose(merged(frames, parts), frames[:5], atol=1e-6)


def test_the_mean_form_and_a_preset_bound():
    rows = torch.randn(5, 3, 2)
    parts = merges(torch.eye(5), [(0, 4)], True, mean=True)
    assert [part.frames for part in parts] == [(0,), (1, 2, 3), (4,)]
    assert torch.allclose(merged(rows, parts)[1], rows[1:4].mean(0))
    alike = table(4, _12=0.5)
    assert len(merges(alike, [(0, 3)], False, threshold=0.6)) == 4
    assert len(merges(alike, [(0, 3)], False, threshold=0.4)) == 3


def test_where_frames_are_needed_the_pairs_least_alike_stay_apart():
    parts = [Part((0,)), Part((1, 2), (0.5, 0.5), 0.7), Part((3, 4), (0.5, 0.5), 0.9), Part((5,))]
    assert [part.frames for part in limited(parts, 2)] == [(0,), (1, 2), (3, 4), (5,)]
    assert [part.frames for part in limited(parts, 1)] == [(0,), (1,), (2,), (3, 4), (5,)]
    assert [part.frames for part in limited(parts, 0)] == [(i,) for i in range(6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_dtype_and_its_input(dtype):
    rows = torch.randn(4, 3, 2).to(dtype)
    before = rows.clone()
    made = merged(rows, [Part((0,)), Part((1, 2), (0.25, 0.75)), Part((3,))])
    assert made.dtype == dtype and torch.equal(rows, before)
    assert torch.equal(made[[0, 2]], rows[[0, 3]])
    assert torch.allclose(made[1].float(), 0.25 * rows[1].float() + 0.75 * rows[2].float(), atol=1e-2)


# -- selecting tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 13])
def test_the_best_of_each_run(count):
    scores = torch.randint(0, 4, (3, 13), generator=torch.Generator().manual_seed(count)).float()
    sizes = [13 // count + (run < 13 % count) for run in range(count)]
    for row, found in zip(scores.tolist(), best_of_runs(scores, count).tolist(), strict=True):
        start = 0
        for size, place in zip(sizes, found, strict=True):
            assert place == start + row[start : start + size].index(max(row[start : start + size]))
            start += size


def grouped_video(frames, size, numbers, whole=None, attention=None):
    """Return a video of the groups that `numbers` give."""
    grid = TokenGrid(frames, 1, size)
    video = make_video(grid)
    if attention is None:
        attention = torch.rand(grid.num_tokens, generator=torch.Generator().manual_seed(3))
    return replace(
        video,
        encoder=EncoderOutputs(attention, None, torch.tensor(numbers)),
        whole=None if whole is None else TokenGrid(whole, 1, size),
    )


def test_official_rounds_in_each_frame_and_ours_keeps_its_budget():
    """The release's case of 12 of 16 frames of 49 tokens at 0.2, 163 tokens for 156.8."""
    video = grouped_video(12, 49, [0] * 5 + [1] * 2 + [2] + [3] * 4, whole=16)
    assert EarlyTom(0.2, "official", inner=False).compress(video).num_kept == 163
    ours = EarlyTom(0.2, inner=False).compress(video).indices
    assert len(ours) == kept_tokens(0.2, 16 * 49) == 156
    assert set(torch.bincount(ours // 49).tolist()) == {13}


def test_r_counts_from_what_is_left():
    assert adjusted(0.2, 12, 16) == 0.2 / 0.75
    assert adjusted(0.5, 9, 20) == 1.0
    middle = torch.tensor([False, True])
    assert official_counts(middle, 10, 0.25).tolist() == [3, 2], "rounded up; half to even"
    assert official_counts(middle, 10, 0.01).tolist() == [1, 1]


def test_equal_attention_takes_the_lower_place():
    video = grouped_video(4, 6, [0] * 4, attention=torch.ones(24))
    found = EarlyTom(0.5, inner=False).compress(video).indices.reshape(4, 3) % 6
    assert found.tolist() == [[0, 1, 2], [0, 2, 4], [0, 2, 4], [0, 1, 2]]


def test_tokens_of_every_frame_against_the_definition():
    attention = torch.rand(7, 9, generator=torch.Generator().manual_seed(1))
    middle = torch.tensor([False, True, True, False, False, False, True])
    counts = torch.tensor([2, 3, 2, 0, 9, 1, 0])
    wanted = []
    for t, (row, count) in enumerate(zip(attention.tolist(), counts.tolist(), strict=True)):
        places = sorted(range(9), key=lambda n: -row[n])[:count]
        if middle[t]:
            places = [max(run, key=row.__getitem__) for run in ([0, 1, 2], [3, 4, 5], [6, 7, 8])] if count == 3 else []
            if count == 2:
                places = [max(range(5), key=row.__getitem__), max(range(5, 9), key=row.__getitem__)]
        wanted += [t * 9 + n for n in sorted(places)]
    assert selected(attention.flatten(), TokenGrid(7, 3, 3), middle, counts).tolist() == wanted


def test_without_an_encoder_groups_come_from_tokens():
    video = make_video(TokenGrid(9, 4, 4))
    method = EarlyTom(0.3, inner=False, threshold=0.9)
    spans = method.segments(likeness(video.embeds.reshape(9, 16, -1)))
    numbers = [number for number, (first, last) in enumerate(spans) for _ in range(first, last + 1)]
    assert 1 < len(spans) < 9
    given = replace(video, encoder=replace(video.encoder, segments=torch.tensor(numbers)))
    other = replace(video, encoder=replace(video.encoder, segments=torch.zeros(9, dtype=torch.int64)))
    kept = method.compress(video).indices
    assert torch.equal(kept, method.compress(given).indices)
    assert not torch.equal(kept, method.compress(other).indices)


# -- configuration ------------------------------------------------------------------------------------------


def test_layers_scale_with_the_encoder_and_leave_its_last_block():
    method = EarlyTom()
    assert method.merging_layers(26) == (6, 21, 23)
    assert method.merging_layers(13) == (3, 10, 11)
    assert method.merging_layers(2) == (0,) and method.merging_layers(1) == ()
    assert EarlyTom(layers=(0, 4)).merging_layers(6) == (0, 4)
    with pytest.raises(BudgetError, match=r"after block 5 of an encoder of 6: choose from 0 to 4"):
        EarlyTom(layers=(1, 5)).merging_layers(6)
    for wrong in ((), (2, 1), (-1,), (1.5,), (True,)):
        with pytest.raises(BudgetError, match="rising whole numbers from 0"):
            EarlyTom(layers=wrong)


def test_nothing_runs_before_it_and_all_tokens_are_all_frames():
    with pytest.raises(StageError, match="earlytom"):
        vidsieve.Pipeline(vidsieve.Reuse(), vidsieve.load("earlytom"), 0.5)
    with pytest.raises(StageError, match="merges frames inside the encoder itself"):
        EarlyTom(ahead=vidsieve.Reuse())
    assert EarlyTom(1.0).front is None and EarlyTom(1.0).idle
    assert EarlyTom(0.5).front == EarlyTom(0.5).front != EarlyTom(0.4).front
    assert EarlyTom(0.5).describe() == "earlytom (variant ours, retention 0.5)"


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("retention", [0.05, 0.3, 0.69, 0.9, Tokens(1), Tokens(60)])
def test_frames_are_left_for_the_whole_budget(inner, retention):
    method = EarlyTom(retention, inner=inner, layers=(0,))
    hidden = torch.randn(1, 25, 8).expand(10, -1, -1)
    view = EncoderView(0, 2, hidden, 10, 9, 28, torch.rand(10, 25))
    made = FrameMerging(method).step(view)
    outer = method.outer(28) if inner else method
    needed = kept_tokens(outer.retention, 90)
    assert len(made.frames) == max(math.ceil(needed / 9), 8)  # at most: segments of 7 and 3 frames, two pairs
    assert made.attention.shape == (len(made.frames), 25) and len(made.segments) == len(made.frames)
    official = FrameMerging(replace(method, variant="official")).step(view)
    assert len(official.frames) < 10


# -- inside a model -----------------------------------------------------------------------------------------


VISION = {
    "depth": DEPTH,
    "num_hidden_layers": DEPTH,
    "fullatt_block_indexes": [1, 4],
    "deepstack_visual_indexes": [0, 2],
    "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
}
"""Of encoders of six blocks; each takes those that it has."""


def deep(family):
    """Return a tiny model with an encoder of six blocks."""
    model = FAMILIES[family]() if family in FAMILIES else tiny(family).model(0, tiny(family).layers)
    raw = model.config.to_dict()
    raw["vision_config"] |= {name: value for name, value in VISION.items() if raw["vision_config"].get(name)}
    torch.manual_seed(0)
    made = type(model)(type(model.config).from_dict(raw)).eval()
    made.generation_config = model.generation_config
    if family in FAMILIES:
        made.vidsieve_template = model.vidsieve_template
    if family == "llava_video":
        made.config.vidsieve_layout = "grid"
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0, 0.12) if weight.ndim > 1 else None
    return made


def given(family, frames=12, batch=1, noise=0.02):
    """Return a model, and inputs of videos in which most neighbouring frames are alike."""
    model = deep(family)
    if family in FAMILIES:
        inputs = inputs_for(family, [[default_grid(family, frames)]] * batch)
    else:
        inputs = tiny(family).inputs([[frames]] * batch, [5] * batch, "left")
    name = adapter_for(model).video_keys[0]
    pixels = inputs[name]
    still = pixels.reshape(batch, frames, -1)[:, ([0] * 5 + [5] + [6] * frames)[:frames]].reshape(pixels.shape)
    inputs[name] = still + noise * torch.randn(still.shape, generator=torch.Generator().manual_seed(0))
    return model, inputs


def counted(adapter, inputs):
    """Return a list that fills with the frames that every block runs on, and the hooks."""
    rows = []
    blocks = adapter.encoder_blocks(inputs)
    assert len(blocks) == DEPTH
    return rows, [b.register_forward_pre_hook(lambda module, args: rows.append(len(args[0]))) for b in blocks]


@pytest.mark.parametrize("family", MERGING)
@pytest.mark.parametrize("variant", ["ours", "official"])
def test_later_blocks_run_on_merged_frames(family, variant):
    """The encoder cut at its merging blocks by hand gives the same tokens, attention and groups."""
    model, inputs = given(family)
    adapter = adapter_for(model)
    method = EarlyTom(0.3, variant, inner=False, layers=(0, 3), threshold=0.5)
    rows, hooks = counted(adapter, inputs)
    with torch.no_grad():
        encoded = adapter.encode(inputs, None, method.needs, method.front)
        for hook in hooks:
            hook.remove()
        video = encoded.videos[0].features
        tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
        hidden, frames, seen = tower.embeddings(inputs["pixel_values_videos"][0]), torch.arange(12), []
        for number, block in enumerate(tower.encoder.layers):
            seen.append(len(hidden))
            if number == 3:
                query, key = (
                    getattr(block.self_attn, name)(block.layer_norm1(hidden)).unflatten(-1, (2, 16)).transpose(1, 2)
                    for name in ("q_proj", "k_proj")
                )
                attention = (query @ key.mT / 4).softmax(-1).mean((1, 2))
            hidden = block(hidden, None)
            if number in method.layers:
                alike = likeness(hidden)
                parts = merges(alike, method.segments(alike), variant == "official")
                hidden, frames = merged(hidden, parts), frames[[part.frames[0] for part in parts]]
                spans = method.segments(likeness(hidden))
        attention = merged(attention, parts)
        features = model.model.multi_modal_projector(hidden)
        tokens = adapter.pool_signals([features], inputs)
    assert rows == seen and seen[0] == 12 and seen[1] == seen[3] < 12 and seen[4] == seen[5] < seen[3]
    assert torch.equal(video.frames, frames) and video.grid.frames == len(frames) and video.whole.frames == 12
    assert torch.allclose(video.embeds, tokens, atol=1e-5)
    assert torch.allclose(
        video.encoder.attention, adapter.pool_signals([attention[..., None]], inputs)[:, 0], atol=1e-6
    )
    assert spans_of(video.encoder.segments) == spans


def shown(adapter, inputs, frames):
    """Return what every block gets beside the hidden states where a video has so many frames, and its own inputs."""
    given, first = [], []
    blocks = adapter.encoder_blocks(inputs)
    hooks = [
        block.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
        for block in blocks
    ]
    hooks.append(blocks[0].register_forward_pre_hook(lambda module, args: first.append(args[0])))
    features = adapter.video_features(adapter.frames_of(inputs, 0, torch.arange(frames)))
    for hook in hooks:
        hook.remove()
    return given, first[0], features[0]


@pytest.mark.parametrize("family", PACKED)
def test_later_blocks_of_a_packed_encoder_run_on_merged_frames(family):
    """Its blocks called by hand, with what they get beside the frames in a video that has so few."""
    model, inputs = given(family)
    adapter, merge = adapter_for(model), 2
    method = EarlyTom(0.3, inner=False, layers=(0, 3), threshold=0.5, merge_threshold=0.3)
    rows, hooks = counted(adapter, inputs)
    with torch.no_grad():
        encoded = adapter.encode(inputs, None, method.needs, method.front)
        for hook in hooks:
            hook.remove()
        video = encoded.videos[0].features
        blocks, seen, frames, deep_ = adapter.encoder_blocks(inputs), [], torch.arange(12), []
        beside, hidden, whole = shown(adapter, inputs, 12)
        size = len(hidden) // 12
        for number, block in enumerate(blocks):
            seen.append(len(hidden))
            hidden = block(hidden, **beside[number])
            if number in method.layers:
                framed = hidden.unflatten(0, (len(frames), size))
                alike = likeness(framed)
                parts = merges(alike, method.segments(alike), False, threshold=0.3)
                framed, frames = merged(framed, parts), frames[[part.frames[0] for part in parts]]
                spans, hidden = method.segments(likeness(framed)), framed.flatten(0, 1)
                beside = shown(adapter, inputs, len(frames))[0]
            if family == "qwen3_vl" and number in VISION["deepstack_visual_indexes"]:
                merger = adapter.projectors[1 + len(deep_)]
                deep_.append((frames, merger(hidden).unflatten(0, (len(frames), -1))))
        tokens = adapter.projectors[0](hidden).unflatten(0, (len(frames), -1))
    assert rows == seen and seen[0] == 12 * size and seen[1] == seen[3] < seen[0] and seen[5] == seen[4] < seen[3]
    assert torch.equal(video.frames, frames) and video.whole.frames == 12
    if family == "qwen2_5_vl":
        order = get_vision_window_index(
            torch.tensor([[1, *inputs["video_grid_thw"][0, 1:]]]),
            spatial_merge_size=merge,
            window_size=model.config.vision_config.window_size,
            patch_size=model.config.vision_config.patch_size,
        )[0]
        assert order.tolist() != sorted(order.tolist())
        tokens = tokens[:, order.argsort()]
    assert torch.allclose(video.embeds, tokens.flatten(0, 1), atol=1e-5)
    assert not torch.allclose(video.embeds, whole.at_frames(frames).embeds, atol=1e-3)
    assert len(video.deep) == len(deep_) == (2 if family == "qwen3_vl" else 0)
    for found, (left, wanted) in zip(video.deep, deep_, strict=True):
        places = torch.searchsorted(left, frames)
        assert torch.allclose(found, wanted[places].flatten(0, 1), atol=1e-5)
    assert spans_of(video.encoder.segments) == spans
    assert len(video.encoder.attention) == video.grid.num_tokens


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("block", [2, 4])
def test_attention_in_a_packed_encoder_is_the_mean_over_the_queries_of_a_frame(family, block):
    """Of block 2 in windows in Qwen2.5-VL, where queries of other windows give none."""
    model, inputs = given(family, frames=7, noise=1.0)
    adapter = adapter_for(model)
    method = EarlyTom(0.3, inner=False, layers=(block,), threshold=1.0)
    module = adapter.encoder_blocks(inputs)[block].attn
    with torch.no_grad():
        encoded = adapter.encode(inputs, None, method.needs, method.front)
        with listening(model.config.vision_config, module) as notes:
            adapter.video_features(inputs)
    windows = [(q[0].float() @ k[0].float().mT * scale).softmax(-1).mean(0).sum(0) for q, k, scale, _ in notes]
    assert len(windows) == 7 if (family, block) != ("qwen2_5_vl", 2) else len(windows) > 7
    patches = torch.cat(windows).reshape(7, -1)
    patches = patches / patches.shape[1]
    assert torch.allclose(patches.sum(1), torch.ones(7), atol=1e-5)
    wanted = adapter.pool_signals([patches[..., None]], inputs)[:, 0]
    assert torch.allclose(encoded.videos[0].features.encoder.attention, wanted, atol=1e-6)


@pytest.mark.parametrize("family", [*MERGING, *PACKED])
def test_a_threshold_that_never_merges_equals_selecting_alone(family):
    model, inputs = given(family, noise=1.0)
    adapter = adapter_for(model)
    method = EarlyTom(0.3, inner=False, layers=(1, 3), threshold=1.0)
    with torch.no_grad():
        encoded = adapter.encode(inputs, None, method.needs, method.front)
        whole = adapter.encode(inputs)
        (selection,), _ = adapter.select(encoded, method, torch.Generator().manual_seed(0))
    video, plain = encoded.videos[0].features, whole.videos[0].features
    assert torch.equal(video.frames, torch.arange(12)) and video.grid == plain.grid
    assert torch.allclose(video.embeds, plain.embeds, atol=1e-5)
    signals = EncoderOutputs(video.encoder.attention, None, torch.arange(12))
    alone = VideoTokens(plain.embeds, plain.grid, torch.arange(plain.grid.num_tokens)[None], None, signals)
    assert torch.equal(method.compress(alone).indices, selection.indices)


def alone(adapter, inputs, frames):
    """Return the arguments of a call that has some frames of the one video alone."""
    if isinstance(adapter, FrameAdapter):
        return adapter.images_of(inputs, frames)
    return adapter.frames_of(inputs, 0, frames)


def called(adapter, blocks, inputs):
    """Return the arguments of every block in a call."""
    calls = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for block in blocks
    ]
    adapter.video_features(inputs)
    for hook in hooks:
        hook.remove()
    return calls


def latest(adapter, inputs):
    """Return the last block but one that the projector reads: in all families one with attention to a whole frame."""
    return len(adapter.encoder_blocks(inputs)) - 2


EVERY = [
    adapter.family
    for adapter in map(registry.families.get, registry.families)
    if Stage.ENCODER in adapter.fronts and not absent(adapter.family)
]


@pytest.mark.parametrize("family", EVERY)
def test_blocks_of_every_family_run_on_what_is_left(family):
    """Blocks called by hand, with what they get beside the frames in a video of those that are left.

    What the last one gives then goes the way of the stock model, in its place.
    """
    model, inputs = given(family)
    adapter = adapter_for(model)
    last = latest(adapter, inputs)
    method = EarlyTom(0.3, inner=False, layers=(0, last), threshold=0.5, merge_threshold=0.3)
    with torch.no_grad():
        video = adapter.encode(inputs, None, method.needs, method.front).videos[0].features
        if family == "gemma4":  # without the padding that the processor makes
            real = (inputs["video_position_ids"][0] >= 0).all(-1)
            assert not real.all()
            inputs |= {name: inputs[name][:, real] for name in adapter.video_keys[:2]}
        blocks, frames = adapter.encoder_blocks(inputs), torch.arange(12)
        calls = called(adapter, blocks, alone(adapter, inputs, frames))
        hidden = calls[0][0][0]
        for number, block in enumerate(blocks):
            (_, *rest), kwargs = calls[number]
            with listening(model.config.vision_config, attention_modules(blocks[last])[0]) as notes:
                hidden = block(hidden, *rest, **kwargs)
            if number in method.layers:
                framed = hidden.reshape(len(frames), -1, hidden.shape[-1])
                alike = likeness(framed)
                parts = merges(alike, method.segments(alike), False, threshold=0.3)
                hidden = merged(framed, parts).reshape(-1, *hidden.shape[1:])
                frames = frames[[part.frames[0] for part in parts]]
                calls = called(adapter, blocks, alone(adapter, inputs, frames))
            if number == last:  # each call is of frames, or of the pictures of one
                rows = torch.cat([received(*note, cls_token=adapter.cls_token)[0].flatten() for note in notes])
                rows = merged(rows.reshape(len(framed), -1), parts)
        with blocks[-1].register_forward_hook(lambda module, args, output: hidden, prepend=True):
            (wanted,) = adapter.video_features(alone(adapter, inputs, frames))
        attention = adapter.pool_signals([rows[..., None]], alone(adapter, inputs, frames))[:, 0]
    assert len(frames) < 10 and torch.equal(video.frames, frames) and video.whole.frames == 12
    assert torch.allclose(video.embeds, wanted.embeds, atol=1e-5)
    found = video.encoder.attention
    assert torch.allclose(found / found.sum(), attention / attention.sum(), atol=1e-6)


@pytest.mark.families("lfm3_vl")
def test_a_block_without_attention_is_refused_with_those_that_have_some():
    model, inputs = given("lfm3_vl")
    method = EarlyTom(0.3, inner=False, layers=(0, 3))
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match=r"attention of block 3 .* after one of \[2, 4\]"):
        adapter_for(model).encode(inputs, None, method.needs, method.front)


def hooks_of(model):
    """Return the hooks of every module; transformers' own stay after its first call."""
    return [[*module._forward_pre_hooks.values(), *module._forward_hooks.values()] for module in model.modules()]


@pytest.mark.parametrize("family", [*MERGING, *PACKED])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("retention", [0.1, 0.35, 0.8, 0.95, Tokens(7), Tokens(50)])
def test_a_session_keeps_its_budget_of_all_frames_and_leaves_nothing_behind(family, inner, retention):
    model, inputs = given(family, batch=2)
    settings = {"inner": inner, **({"layer": 2 if family == "qwen3_vl" else 1} if inner else {})}
    method = vidsieve.load("earlytom", retention=retention, layers=(0, 2, 3), threshold=0.5, **settings)
    attention = model.config.vision_config._attn_implementation
    with torch.no_grad():
        before = model(**inputs).logits
        hooks = hooks_of(model)
        with vidsieve.attach(model, method) as session:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert hooks_of(model) == hooks and attention == model.config.vision_config._attn_implementation
        assert torch.equal(model(**inputs).logits, before)
    assert len(list(session.trace)) == 2
    for trace in session.trace:
        budget = kept_tokens(retention, trace.total)
        assert trace.grid.frames == 12 and trace.frames_left <= 12
        if retention in (0.1, Tokens(7)):
            assert trace.frames_left < 12
        if inner:
            share = retention.count / trace.total if isinstance(retention, Tokens) else retention
            assert share - 2 / trace.total <= trace.layer_retention <= share
        else:
            assert trace.kept == budget
    assert "frames left the encoder" in str(session.trace)


def test_all_tokens_are_the_stock_model():
    model, inputs = given("llava_onevision")
    with torch.no_grad():
        before = model(**inputs).logits
        with vidsieve.attach(model, vidsieve.load("earlytom", retention=1.0)):
            assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_videos_run(frames):
    model, inputs = (
        FAMILIES["llava_onevision"](),
        inputs_for("llava_onevision", [[default_grid("llava_onevision", frames)]]),
    )
    for variant in ("ours", "official"):
        method = vidsieve.load("earlytom", retention=0.3, variant=variant, inner=False)
        with torch.no_grad(), vidsieve.attach(model, method) as session:
            model(**inputs)
        (trace,) = session.trace
        assert trace.frames_left == frames and (variant == "official" or trace.kept == kept_tokens(0.3, trace.total))


def test_a_projector_that_reads_several_blocks_is_refused_and_an_earlier_one_is_read():
    model, inputs = given("llava_onevision")
    adapter = adapter_for(model)
    front = EarlyTom(0.3, layers=(0, 2), threshold=0.5).front
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="reads several blocks"):
        adapter.encode(inputs | {"vision_feature_layer": [-2, -1]}, front=front)
    with torch.no_grad():
        encoded = adapter.encode(inputs | {"vision_feature_layer": -2}, front=front)
    assert encoded.videos[0].features.grid.frames < 12


def test_all_methods_of_the_testbed_are_those_that_it_can_run():
    methods = named_methods(["all"], "testbed", prefill=True)
    check_prefill(methods)
    assert "holitom" in methods and "earlytom" in methods and not methods["earlytom"].inner


def test_images_outside_a_video_are_encoded_whole_beside_merged_frames():
    model, inputs = given("internvl")
    adapter = adapter_for(model)
    method = EarlyTom(0.3, inner=False, layers=(0, 2), threshold=0.5)
    with torch.no_grad():
        encoded = adapter.encode(inputs, [(2, 9)], method.needs, method.front)
        stock = adapter.encode(inputs, [(2, 9)])
        never = replace(method, threshold=1.0)
        unmerged = adapter.encode(inputs, [(2, 9)], never.needs, never.front).videos[0].features
    assert torch.allclose(unmerged.embeds, stock.videos[0].features.embeds, atol=1e-5)
    (image,), (span,) = encoded.images, encoded.videos
    assert torch.equal(image.columns, stock.images[0].columns)
    assert torch.allclose(image.embeds, stock.images[0].embeds, atol=1e-5)
    assert span.features.whole.frames == 9 and span.features.grid.frames < 9
    columns = torch.cat([span.columns, span.surplus_columns]).sort().values
    assert torch.equal(columns, stock.videos[0].columns)
