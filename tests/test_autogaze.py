"""AutoGaze: what is gazed at by which rule, files of the release's form, and tokens of a stock model."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors._gazing import GazeShape, Llama3Rope
from vidsieve.compressors.autogaze import AutoGaze, AutoGazePolicy, masks_of, stitched, tiles, tokens_of_masks
from vidsieve.errors import BudgetError, PolicyError, UnknownNameError, VideoError
from vidsieve.selection import kept_tokens
from vidsieve.testing import make_video
from vidsieve.testing.equivalence import CONFIGURATIONS, cell
from vidsieve.training.losses import gaze_loss
from vidsieve.types import TokenGrid

SHAPE = GazeShape((8, 16), 20, 16, 4, BlockShape(16, 4, 2, 4, 24, 1e-5, 5e5, qkv_bias=False), 2, 1, rope=Llama3Rope())
CONFIG = {
    "model_type": "autogaze",
    "scales": "16+8",
    "num_vision_tokens_each_frame": 20,
    "gaze_model_config": {
        "input_img_size": 16,
        "vision_model_config": {"hidden_dim": 16, "out_dim": 16, "depth": 1, "kernel_size": 4},
        "gaze_decoder_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        },
    },
}


def made(at_once=1, seed=0, variant="official"):
    policy = AutoGazePolicy(dataclasses.replace(SHAPE, at_once=at_once), variant)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in policy.named_parameters():
            value.copy_(torch.randn(value.shape, generator=draw) * (0.1 if "norm" in name else 0.4) + ("norm" in name))
    return policy.eval()


def clip(frames=4, side=16, seed=0):
    return torch.randn(frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("variant", "consistent"), [("ours", True), ("official", False)])
def test_each_patch_is_the_likeliest_in_training_but_not_as_released(variant, consistent):
    """Greedy patches against the pass over the whole video, which the release uses in training alone."""
    policy, video = made(variant=variant), clip(3)[None]
    network, frames = policy.gazing_model, (policy.gaze(video[0], 0.3, None).patches % 20)[None].split(6, 1)
    best = []
    for t, chosen in enumerate(frames):
        for j in range(6):
            others = [v for v in range(20) if v not in chosen[0, :j].tolist()]
            tried = torch.cat([chosen[:, :j].expand(len(others), -1), torch.tensor(others)[:, None]], 1)
            past = [tokens.expand(len(others), -1) for tokens in frames[:t]]
            with torch.no_grad():
                found, _ = network.likelihood(video[:, : t + 1].expand(len(others), -1, -1, -1, -1), [*past, tried])
            best.append(others[int(found[:, -1].argmax())] == int(chosen[0, j]))
    assert all(best) is consistent
    assert all(best[::6]), "the first patch of a frame is fed back nowhere but with the next frame"


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_when_a_frame_ends(at_once):
    policy, video = made(at_once), clip()
    whole = policy.gaze(video, ratio=0.37, requirement=None)
    assert whole.counts.tolist() == [7] * 4 and not bool(whole.padding.any())  # ⌊7.4⌋, whatever a step gives
    assert sum(int(mask.sum()) for mask in whole.masks) == 28, "no patch twice"
    # Every loss is low enough: the first patch stays for all that, the others of its step do not.
    low = policy.gaze(video, requirement=math.inf)
    after = 1 if at_once > 1 else 2
    assert low.counts.tolist() == [max(at_once, after)] * 4
    assert low.padding.tolist() == ([False] + [True] * (max(at_once, after) - 1)) * 4
    assert policy.gaze(video, 0.01, math.inf).counts.tolist() == [1] * 4


def test_later_patches_of_a_step_stay_where_their_own_loss_is_high():
    policy, video = made(3), clip()
    first = policy.gazing_model
    with torch.no_grad():
        first.gaze_decoder.task_loss_prediction_head.weight.zero_()
        features = first.features(video[None])
        state = first._decode(features[:, 0], torch.arange(16)[None], torch.ones(1, 16, dtype=torch.bool), [])[0, -1]
        first.gaze_decoder.task_loss_prediction_head.weight[1] = -state  # the second is predicted well below 0
    gaze = policy.gaze(video[:1], requirement=-1.0)
    assert gaze.padding.tolist() == [False, True, False]
    assert policy.gaze(video[:1], 0.25, requirement=-1e6).counts.tolist() == [5]


def test_a_frame_is_gazed_at_without_those_after_it():
    policy, video = made(2), clip(5)
    changed = torch.cat([video[:3], clip(2, seed=1)])
    one, other = (policy.gaze(v, 0.5, None) for v in (video, changed))
    for a, b in zip(one.masks, other.masks, strict=True):
        assert torch.equal(a[:3], b[:3])
    assert not all(torch.equal(a, b) for a, b in zip(one.masks, other.masks, strict=True))
    parts = [policy.gaze(part, 0.5, None) for part in video.split(2)]
    for a, *rest in zip(policy.gaze(video, 0.5, None, clip=2).masks, *(part.masks for part in parts), strict=True):
        assert torch.equal(a, torch.cat(rest))


def test_tiles_are_put_back_in_their_places():
    video = clip(2, 24)
    cut = tiles(video, 16)
    assert cut.shape == (4, 2, 3, 16, 16)
    back = stitched(cut[:, :, 0].flatten(2), 16, 24).reshape(2, 24, 24)
    assert torch.equal(back, video[:, 0])
    policy = made(2)
    gaze = policy.gaze(video, 0.4, None, scales=(12, 24), patch=4)
    assert [mask.shape for mask in gaze.masks] == [(2, 9), (2, 36)]
    corner = policy.gaze(video[..., :16, :16], 0.4, None)
    assert torch.equal(gaze.masks[1].reshape(2, 6, 6)[:, :4, :4].flatten(1), corner.masks[1])
    assert gaze.counts.tolist() == torch.cat(gaze.masks, 1).sum(1).tolist()
    assert all(a < b for a, b in pairwise(gaze.patches.tolist()))
    # One tile is the whole frame.
    same = policy.gaze(clip(2, 32), 0.4, None, scales=(16, 32), patch=8)
    for a, b in zip(same.masks, policy.gaze(clip(2, 32), 0.4, None).masks, strict=True):
        assert torch.equal(a, b)


def test_cells_of_gazed_patches():
    masks = [torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.bool)]
    masks[0][0, 3] = True  # a quarter of the frame
    masks[1][1, 0] = True
    cells = tokens_of_masks(masks, TokenGrid(2, 4, 4))
    assert cells[:16].nonzero().flatten().tolist() == [10, 11, 14, 15] and cells[10] == 0.25
    assert cells[16:].nonzero().flatten().tolist() == [0] and cells[16] == 1
    drawn = [torch.rand(6, side * side) < 0.4 for side in (2, 4, 7)]
    for grid in (TokenGrid(3, 5, 3), TokenGrid(6, 14, 14), TokenGrid(4, 1, 1)):
        found = tokens_of_masks(drawn, grid)
        assert found.shape == (grid.num_tokens,) and float(found.sum()) == pytest.approx(
            sum(int(mask.sum()) for mask in drawn), rel=1e-4
        )
    assert tokens_of_masks(masks, TokenGrid(2, 4, 4, places=(1, 10, 16))).tolist() == [0, 0.25, 1]


def test_on_a_stock_model():
    policy = made(2)
    masks = policy.gaze(clip(), 0.3, None).masks
    video = make_video(TokenGrid(4, 4, 4))
    chosen = AutoGaze(0.25, masks=masks).compress(video)
    assert chosen.num_kept == kept_tokens(0.25, 64) and torch.equal(chosen.scores, tokens_of_masks(masks, video.grid))
    assert float(chosen.scores[chosen.indices].min()) >= float(chosen.scores.sort(descending=True).values[15])
    result = cell("llava_onevision", next(iter(CONFIGURATIONS)), "prefill logits", "sdpa", AutoGaze(0.5, masks=masks))
    assert result.passed, result
    with pytest.raises(PolicyError, match="what was gazed at"):
        AutoGaze().compress(video)


def test_a_folder_of_the_release(tmp_path):
    policy = made()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(dict(policy.state_dict()), tmp_path / "model.safetensors")
    loaded = AutoGazePolicy.from_pretrained(tmp_path)
    assert loaded.shape == SHAPE and not loaded.training
    for a, b in zip(loaded.gaze(clip()).masks, policy.gaze(clip()).masks, strict=True):
        assert torch.equal(a, b)
    assert AutoGazePolicy.from_pretrained(tmp_path, variant="ours").variant == "ours"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": "8+15+16"}, "do not share 20 patches"),
        ({"scales": "0"}, "do not share 20 patches"),
        ({"scales": "8+x"}, "numbers with"),
        ({"gaze_model_config": {}}, "gaze_decoder_config"),
        ({"num_vision_tokens_each_frame": "20"}, "num_vision_tokens_each_frame"),
        ({"decoder": {"hidden_size": 32}}, "do not fit a decoder of 32"),
        (
            {"decoder": {"num_hidden_layers": 3}},
            "do not fit their config.json: gazing_model.gaze_decoder.model.layers.2",
        ),
        ({"decoder": {"rope_scaling": {"rope_type": "yarn"}}}, "'yarn'"),
        ({"decoder": {"rope_scaling": {"rope_type": "llama3", "factor": "x"}}}, "factor"),
        ({"vision": {"temporal_patch_size": 2}}, "temporal_patch_size"),
        ({"weights": math.nan}, "finite"),
    ],
    ids=str,
)
def test_a_folder_that_is_no_release(tmp_path, change, message):
    config, weights = json.loads(json.dumps(CONFIG)), dict(made().state_dict())
    model = config["gaze_model_config"]
    model["gaze_decoder_config"].update(change.pop("decoder", {}))
    model["vision_model_config"].update(change.pop("vision", {}))
    if "weights" in change:
        weights["gazing_model.connector.pos_embed"] = torch.full((16, 16), change.pop("weights"))
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(PolicyError, match=message):
        AutoGazePolicy.from_pretrained(tmp_path)


def test_wrong_arguments(tmp_path):
    policy = made()
    with pytest.raises(UnknownNameError):
        AutoGazePolicy(SHAPE, "paper")
    with pytest.raises(PolicyError):
        AutoGazePolicy.from_pretrained(tmp_path)
    for ratio in (0, 1.5):
        with pytest.raises(BudgetError):
            policy.gaze(clip(), ratio)
    with pytest.raises(BudgetError):
        policy.gaze(clip(), clip=0)
    for video in (clip()[:0], clip()[:, :2], clip()[0], clip().long()):
        with pytest.raises(VideoError):
            policy.gaze(video)
    for scales in ((24,), (24, 12), (8, 24), (2, 16)):
        with pytest.raises(VideoError):
            policy.gaze(clip(2, 16), scales=scales, patch=4)


def test_the_loss_asks_for_what_was_better_than_its_group():
    log_probs = torch.full((4, 3), -1.0, requires_grad=True)
    rewards = torch.tensor([[1.0], [5.0], [0.0], [5.0]])  # two videos, groups of two
    padding = torch.zeros(4, 3, dtype=torch.bool)
    gaze_loss(log_probs, padding, rewards, torch.tensor([2]), 2, 0.5).sum().backward()
    assert log_probs.grad.tolist() == [[-0.25, -0.5, 0], [0, 0, 0], [0.25, 0.5, 0], [0, 0, 0]]


def test_masks_leave_padding_out():
    small, large = masks_of([torch.tensor([[0, 20]]), torch.tensor([[19, 3]])], SHAPE)
    assert small.tolist() == [[[True, False, False, False], [False, False, False, True]]]
    assert large[0].nonzero().tolist() == [[1, 15]]
