"""Families that encode a video piece by piece: which pieces are one video, and where their tokens lie."""

from __future__ import annotations

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.errors import NeedError, PromptError, UnsupportedCallError
from vidsieve.testing.tiny_models import IMAGE, VIDEO
from vidsieve.types import Need
from workbench.families import tiny
from workbench.families._minicpm import FRAME, FRAME_END, SLICE, SLICE_END, minicpm_inputs

METHOD = vidsieve.load("random", retention=0.3)
FAMILIES = ["minicpmv4_6", "minicpmv4_7", "minicpm_ocr"]


def small(family):
    kind = tiny(family)
    return kind.model(0, kind.layers), kind.inputs


def whole(model, inputs):
    """Return the largest difference of the logits of a prompt that keeps every token to the model's own."""
    adapter = adapter_for(model)
    with torch.no_grad():
        encoded = adapter.encode(inputs)
        plan = adapter.build(encoded, encoded.per_row(encoded.everything()))
        return float((model(**plan.inputs).logits - model(**inputs).logits).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_overviews_and_slices_are_a_grid_each_in_raster_order(family):
    model, inputs = small(family)
    batch = inputs([[2, 3]], [4], "left")
    adapter = adapter_for(model)
    with torch.no_grad():
        encoded = adapter.encode(batch)
        ready = model.model.get_video_features(batch["pixel_values_videos"], batch["target_sizes_videos"])
    overview, detail, second = encoded.videos
    shapes = [(v.features.grid.frames, v.features.grid.height, v.features.grid.width) for v in encoded.videos]
    assert shapes == [(2, 2, 4), (2, 6, 3), (3, 2, 4)]
    where = (batch["input_ids"][0] == VIDEO).nonzero().flatten()
    frame = 8 + 6 * 3
    assert torch.equal(overview.columns, where[[*range(8), *range(frame, frame + 8)]])
    assert torch.equal(second.columns, where[2 * frame :])
    corner = detail.columns.view(2, 6, 3)[1, 3:, 1]  # the fifth of six slices of the second frame, 3×1 tokens
    assert torch.equal(corner, where[frame + 8 + 4 * 3 :][:3])
    at = torch.full_like(batch["input_ids"][0], -1).index_put((where,), torch.arange(len(where)))
    for video in encoded.videos:
        assert torch.equal(video.features.embeds, torch.cat(ready.pooler_output)[at[video.columns]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mode_of_a_call_goes_before_the_configuration(family):
    model, _ = small(family)
    merged, mode = (4, "16x") if family == "minicpm_ocr" else (2, "4x")
    inputs = minicpm_inputs(merged, numbered=family != "minicpmv4_7")([[2]], [4], "left")
    assert whole(model, inputs | {"downsample_mode": mode}) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_stays_whole_beside_a_video(family):
    model, inputs = small(family)
    sizes = torch.tensor([[2, 4], [1, 2]]) * (2 if family == "minicpm_ocr" else 4)
    batch = inputs([[2]], [4], "left")
    ids, columns = batch["input_ids"], batch["input_ids"].shape[1]
    still = torch.tensor([[FRAME, *[IMAGE] * 8, FRAME_END, SLICE, *[IMAGE] * 2, SLICE_END]])
    batch |= {
        "input_ids": torch.cat([ids[:, :-4], still, ids[:, -4:]], 1),
        "attention_mask": torch.ones(1, columns + still.shape[1], dtype=torch.int64),
        "pixel_values": torch.randn(1, 3, 4, 4 * int(sizes.prod(1).sum()), generator=torch.Generator().manual_seed(2)),
        "target_sizes": sizes,
    }
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = adapter_for(model).kinds(batch["input_ids"])
    assert whole(model, batch) < 1e-5
    kept = adapter_for(model).prune(batch, METHOD).inputs["input_ids"][0]
    assert int((kept == IMAGE).sum()) == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_of_two_sizes_are_two_grids(family):
    """As the processor stacks frames: a composite of another size after each."""
    model, inputs = small(family)
    batch = inputs([[1, 4]], [4], "left")
    sizes = batch["target_sizes_videos"].clone()
    sizes[[8, 10]] = sizes[[8, 10]].flip(1)  # after one frame and its six slices, 2×4 tokens turn to 4×2
    batch["target_sizes_videos"] = sizes
    grids = [video.features.grid for video in adapter_for(model).encode(batch).videos]
    assert [(grid.frames, grid.height, grid.width) for grid in grids[2:]] == [(2, 2, 4), (2, 4, 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_located_is_refused(family):
    model, inputs = small(family)
    adapter, batch = adapter_for(model), inputs([[2]], [4], "left")
    with pytest.raises(UnsupportedCallError, match="2 sizes"):
        adapter.features(batch)
    with pytest.raises(PromptError, match="a video and no target_sizes_videos"):
        adapter.encode({name: value for name, value in batch.items() if name != "target_sizes_videos"})
    with pytest.raises(PromptError, match="side by side"):
        adapter.encode(batch | {"target_sizes_videos": batch["target_sizes_videos"].flip(0)})
    with pytest.raises(UnsupportedCallError, match="set in its video processor"):
        adapter.limit_frames(None, 8)
    with pytest.raises(NeedError, match="adapter does not give"):
        vidsieve.attach(model, vidsieve.load("visionzip", retention=0.5))


def test_markers_that_stay_keep_their_corner_of_the_canvas():
    model, inputs = small("minicpmv4_7")
    batch = inputs([[2], [1]], [4, 2], "left")
    wanted, _ = model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        target_sizes_videos=batch["target_sizes_videos"],
        attention_mask=batch["attention_mask"],
    )
    plan = adapter_for(model, positions="legacy").prune(batch, METHOD)
    for row, kept in enumerate(plan.kept_positions):
        positions = plan.inputs["position_ids"][1:, row, kept >= 0]
        assert torch.equal(positions, wanted[:, row, kept[kept >= 0]])
        assert int((plan.inputs["input_ids"][row] == SLICE).sum()) == 6 * (2 - row)


def shapes_of(model, batch):
    """Return the grid of each video of a batch, in order of its first token."""
    grids = [video.features.grid for video in adapter_for(model).encode(batch).videos]
    return [(grid.frames, grid.height, grid.width) for grid in grids]


@pytest.mark.families("kimi_k25")
def test_chunks_are_the_frames_of_a_video_that_ends_at_other_words():
    model, inputs = small("kimi_k25")
    batch = inputs([[3, 2], [1]], [4, 2], "right")
    assert shapes_of(model, batch) == [(3, 2, 4), (2, 2, 4), (1, 2, 4)]
    # A single chunk tells nothing of the length of a time: words make a video of its own if they are longer than any.
    far = inputs([[1, 1]], [4], "left")
    assert shapes_of(model, far) == [(2, 2, 4)]
    words = torch.full((1, 10), 30)
    split = int((far["input_ids"][0] == 119).nonzero()[0]) + 1  # behind the first chunk
    ids = torch.cat([far["input_ids"][:, :split], words, far["input_ids"][:, split:]], 1)
    assert shapes_of(model, far | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}) == [(1, 2, 4)] * 2


@pytest.mark.families("kimi_k25")
def test_chunks_of_two_sizes_are_two_videos():
    model, inputs = small("kimi_k25")
    batch = inputs([[4]], [4], "left")
    grids = batch["video_grid_thw"].clone()
    grids[2:, 1:] = grids[2:, 1:].flip(1)
    assert shapes_of(model, batch | {"video_grid_thw": grids}) == [(2, 2, 4), (2, 4, 2)]


@pytest.mark.families("kimi_k25")
def test_a_question_is_read_though_placeholders_have_no_embedding():
    model, inputs = small("kimi_k25")
    batch, adapter, seen = inputs([[2, 1]], [4], "left"), adapter_for(model), []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
        prompt = adapter.video_tokens(adapter.encode(batch), 0, frozenset({Need.QUESTION})).prompt
    hook.remove()
    assert torch.allclose(prompt.embeds, seen[0][0], atol=1e-6)


@pytest.mark.families("kimi_k25")
def test_an_image_stays_whole_beside_chunks():
    model, inputs = small("kimi_k25")
    batch = inputs([[2]], [4], "left")
    ids = batch["input_ids"]
    ids = torch.cat([ids[:, :-4], torch.tensor([[118, 117, *[IMAGE] * 8, 119]]), ids[:, -4:]], 1)
    batch |= {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(2)),
        "image_grid_thw": torch.tensor([[1, 4, 8]]),
    }
    assert whole(model, batch) < 1e-5
    assert int((adapter_for(model).prune(batch, METHOD).inputs["input_ids"] == IMAGE).sum()) == 8


@pytest.mark.families("kimi_k25")
def test_latent_attention_is_no_start_of_a_policy():
    with pytest.raises(NeedError, match="DeepseekV3Attention"):
        adapter_for(small("kimi_k25")[0]).layer_shape()
