"""Methods before and inside the vision encoder: what is encoded, where it goes, and what budgets count."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch

import vidsieve
from vidsieve import registry
from vidsieve.adapters import adapter_for
from vidsieve.adapters.families.frames import FrameAdapter
from vidsieve.compressors.front import EncoderFront, FrameFront, Merged
from vidsieve.errors import SelectionError, StageError, UnsupportedCallError
from vidsieve.selection import kept_tokens
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from vidsieve.types import ENCODER_NEEDS, Selection, Stage, Tokens
from workbench.families import absent, tiny


class Pairs(FrameFront):
    """Every second frame takes the tokens of the one before."""

    name = "pairs"

    def sources(self, frames):
        return torch.arange(len(frames)) // 2 * 2


@dataclass(frozen=True)
class EverySecond(EncoderFront):
    """Drops every second frame after the first block."""

    name = "every_second"

    def step(self, view):
        kept = torch.arange(0, len(view.hidden), 2)
        return Merged(view.hidden[kept], kept) if view.block == 0 else None


def stands(front):
    """Return the names of the families that let methods act at a stage."""
    every = (registry.families.get(name) for name in registry.families)
    return [adapter.family for adapter in every if front in adapter.fronts and not absent(adapter.family)]


def made(family, batch):
    """Return a tiny model, and inputs of videos with so many frames."""
    if family in FAMILIES:
        return FAMILIES[family](), inputs_for(family, [[default_grid(family, n) for n in videos] for videos in batch])
    kind = tiny(family)
    return kind.model(0, kind.layers), kind.inputs(batch, [5] * len(batch), "left")


def close(one, other):
    scale = max(1.0, *other.abs().flatten().tolist(), 1.0)
    return torch.allclose(one.float(), other.float(), rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("family", stands(Stage.FRAME))
def test_a_family_s_frames_are_encoded_without_regard_to_each_other(family):
    """What the encoder makes of frames 0 and 2 alone is what it makes of them among all, token by token."""
    model, inputs = made(family, [[4, 4]])
    adapter = adapter_for(model)
    needs = ENCODER_NEEDS & adapter.provides
    with torch.no_grad():
        whole = adapter.encode(inputs, needs=needs)
        encoded = adapter.encode(inputs, None, needs, Pairs())
    assert len(encoded.videos) == len(whole.videos)
    for video, all_ in zip(encoded.videos, whole.videos, strict=True):
        assert torch.equal(video.columns, all_.columns) and torch.equal(video.surplus_columns, all_.surplus_columns)
        places = torch.arange(all_.features.grid.frames) // 2 * 2
        wanted, got = all_.features.at_frames(places), video.features
        assert got.grid == wanted.grid and got.surplus == wanted.surplus and got.encoded == len(places.unique())
        parts = [(got.embeds, wanted.embeds), (got.tail, wanted.tail), *zip(got.deep, wanted.deep, strict=True)]
        if needs:
            parts += [(got.encoder.attention, wanted.encoder.attention), (got.encoder.keys, wanted.encoder.keys)]
        assert all(close(one, other) for one, other in parts)
        assert not close(got.embeds, all_.features.embeds)
    assert torch.equal(encoded.positions, whole.positions) and torch.equal(encoded.attention_mask, whole.attention_mask)


@pytest.mark.parametrize("front", [Pairs(), EverySecond()])
def test_a_family_without_a_stage_refuses_it_by_name_and_says_why(front):
    every = {adapter.family: adapter for adapter in map(registry.families.get, registry.families)}
    missing = [name for name, adapter in every.items() if front.stage not in adapter.fronts and not absent(name)]
    for family in missing:
        model, inputs = made(family, [[2]])
        method = vidsieve.load("random", retention=0.5, ahead=front)
        refused = re.escape(f"the {family} adapter does not let it ({every[family].lacks[front.stage]})")
        with pytest.raises(UnsupportedCallError, match=f"{front.name} acts .* {refused}"):
            vidsieve.attach(model, method)
        with pytest.raises(UnsupportedCallError, match=refused), torch.no_grad():
            adapter_for(model).encode(inputs, front=front)
    assert {"molmo2", "video_llama_3", "minicpmv4_6"} - set(missing) <= {n for n in every if absent(n)}
    assert ("perception_lm" in missing) == (front.stage is Stage.ENCODER)


def test_ready_features_are_refused():
    model, inputs = made("qwen3_vl", [[3]])
    adapter = adapter_for(model)
    with torch.no_grad():
        ready = adapter.ready_features(adapter.encode(inputs).videos[0].features)
        with pytest.raises(UnsupportedCallError, match="send the video's pixels"):
            adapter.encode(inputs | {"mm_encoder_outputs": ready}, front=Pairs())


@dataclass(frozen=True)
class Returning(FrameFront):
    """Returns what it was made with."""

    name = "returning"
    made: tuple[float, ...]

    def sources(self, frames):
        return torch.tensor(self.made)


@pytest.mark.parametrize("made_", [(0, 1), (0.0, 1.0, 2.0), (0, 0, 1), (0, 1, 3), (-1, 1, 2)])
def test_frames_that_take_from_none_are_refused(made_):
    model, inputs = made("llava_onevision", [[3]])
    with torch.no_grad(), pytest.raises(SelectionError, match="returning"):
        adapter_for(model).encode(inputs, front=Returning(made_))


KINDS = ("llava_onevision", "llava_video", "qwen2_5_vl", "internvl")
"""A family for each way in which frames lie in an encoder and in the prompt."""
RUNS = [(family, "visionzip", 0.3) for family in stands(Stage.ENCODER)] + [
    (family, name, retention)
    for family in KINDS
    for name in ("random", "visionzip", "vidcom2")
    for retention in (0.3, 0.9, Tokens(20))
    if (name, retention) != ("visionzip", 0.3)
]


@pytest.mark.parametrize(("family", "name", "retention"), RUNS)
def test_merged_frames_leave_the_prompt_and_budgets_count_all_frames(family, name, retention):
    """A run equals one of the whole video of which the method keeps tokens of the frames that are left alone."""
    model, inputs = made(family, [[5], [5, 5]])
    adapter, method = adapter_for(model), vidsieve.load(name, retention=retention, ahead=EverySecond())
    videos = [(0, 5), (5, 5), (10, 5)] if isinstance(adapter, FrameAdapter) else None
    rows = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        for block in adapter.encoder_blocks(inputs)
    ]
    with torch.no_grad():
        encoded = adapter.encode(inputs, videos, method.needs, method.front)
        for hook in hooks:
            hook.remove()
        frame = rows[0] // 5  # packed encoders have a row for each patch
        assert rows == [5 * frame, *[3 * frame] * (len(hooks) - 1)] * 3
        plan = adapter.plan(encoded, method, torch.Generator().manual_seed(0))
        whole = adapter.encode(inputs, videos)
        chosen = []
        for span, all_, selection in zip(encoded.videos, whole.videos, plan.selections, strict=True):
            video, grid = span.features, all_.features.grid
            assert video.frames.tolist() == [0, 2, 4] and video.frames.dtype == torch.int64
            assert video.whole == grid and video.grid == replace(grid, frames=3)
            assert selection.num_kept == min(video.grid.num_tokens, kept_tokens(retention, grid.num_tokens))
            assert close(video.embeds, all_.features.at_frames(video.frames).embeds)
            size = grid.per_frame
            places = video.frames[selection.indices // size] * size + selection.indices % size
            chosen.append(Selection(places, selection.embeds))
        wanted = adapter.build(whole, whole.per_row(chosen)).inputs
        for name_ in ("input_ids", "position_ids", "attention_mask"):
            assert torch.equal(plan.inputs[name_], wanted[name_])
        assert torch.allclose(model(**plan.inputs).logits, model(**wanted).logits, atol=1e-5)
    for trace, selection in zip(plan.traces, chosen, strict=True):
        assert trace.indices == tuple(selection.indices.tolist()) and trace.total == grid.num_tokens
        assert trace.frames_left == 3 and trace.per_frame[1::2] == (0, 0) and trace.method == f"every_second+{name}"


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "qwen2_5_vl"])
def test_the_trace_of_a_session_says_what_left_the_encoder(family):
    model, inputs = made(family, [[5]])
    method = vidsieve.load("holitom", retention=0.3, layer=1, ahead=EverySecond())
    with torch.no_grad(), vidsieve.attach(model, method) as session:
        model.generate(**inputs, max_new_tokens=2)
    assert "; 3 of 5 frames left the encoder; positions" in str(session.trace)
    (trace,) = session.trace
    assert trace.grid.frames == 5 and trace.per_frame[1] == 0 and 0.27 < trace.held <= 0.3


def test_a_method_that_counts_inside_the_llm_alone_is_refused_after_merging():
    model, _ = made("llava_onevision", [[5]])
    with pytest.raises(StageError, match="no part before the LLM"):
        vidsieve.attach(model, vidsieve.load("fastv", retention=0.5, layer=1, ahead=EverySecond()))


@dataclass(frozen=True)
class Wrong(EncoderFront):
    """Returns frames that are not sorted, or not there."""

    name = "wrong"
    kept: tuple[int, ...]

    def step(self, view):
        return Merged(view.hidden[: len(self.kept)], torch.tensor(self.kept))


@pytest.mark.parametrize("kept", [(1, 0), (0, 0), (0, 3), (-1, 0)])
def test_wrong_frames_of_an_encoder_method_are_refused_and_hooks_go(kept):
    model, inputs = made("llava_onevision", [[3]])
    adapter = adapter_for(model)
    with torch.no_grad():
        before = adapter.encode(inputs).videos[0].features.embeds
        with pytest.raises(SelectionError, match="wrong must return"):
            adapter.encode(inputs, front=Wrong(kept))
        assert torch.equal(adapter.encode(inputs).videos[0].features.embeds, before)
