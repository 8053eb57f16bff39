"""Pruned calls equal a full forward in which the dropped tokens are masked out at unchanged positions."""

from __future__ import annotations

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.testing.calls import CALLS, REFUSED, SLOW_CALLS, Case
from vidsieve.testing.equivalence import CONFIGURATIONS, TOLERANCE, cell, configuration, refusals
from vidsieve.testing.tiny_models import FAMILIES, VIDEO, default_grid, inputs_for
from vidsieve.types import Selection

COMPILED = ("llava_onevision", "qwen2_5_vl", "qwen3_vl")
"""One with counted positions, one with three, one with features for deeper layers; the benchmark compiles all."""


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in CONFIGURATIONS), ("two videos", "eager")])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_masked_reference(family, name, call, attention):
    result = cell(family, name, call, attention, vidsieve.load("random", retention=0.3))
    assert result.passed, result


@pytest.mark.parametrize(
    ("family", "call"),
    [(family, call) for family in FAMILIES for call in SLOW_CALLS if call == "device map" or family in COMPILED],
)
def test_changed_models_equal_it_too(family, call, monkeypatch):
    """The language model compiled, or the model's parts on two devices."""
    monkeypatch.setattr("vidsieve.testing.calls.BACKEND", "eager")  # benchmarks/equivalence.py compiles further
    result = cell(family, "ragged batch 2", call, "sdpa", vidsieve.load("random", retention=0.3))
    assert result.passed, result


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_right_is_an_error(family):
    found = refusals(family, vidsieve.load("random", retention=0.3))
    assert found.keys() == REFUSED.keys() and all(
        "leave" in text.lower() or "not supported" in text for text in found.values()
    )


@pytest.mark.parametrize("call", ["prefill logits", "8 greedy tokens", "forward with labels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_tokens_equal_the_reference_too(family, call):
    result = cell(family, "ragged batch 2", call, "sdpa", vidsieve.load("downsample", retention=0.3))
    assert result.passed, result


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_notices_wrong_positions(family, monkeypatch):
    """Without the original positions the table would fail: the comparison has teeth."""
    kind = type(adapter_for(FAMILIES[family]()))
    original = kind.build

    def compact(self, encoded, selections, rows=None):
        pruned = original(self, encoded, selections, rows)
        count = torch.arange(pruned.inputs["position_ids"].shape[-1])
        pruned.inputs["position_ids"] = count.expand_as(pruned.inputs["position_ids"])
        return pruned

    monkeypatch.setattr(kind, "build", compact)
    result = cell(family, "batch 1", "prefill logits", "sdpa", vidsieve.load("random", retention=0.3))
    assert result.difference > 0.01


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rebuilding_with_every_token_equals_the_installed_model(family, name):
    """Our positions, masks and features are the installed model's own."""
    model, inputs = FAMILIES[family](), configuration(family, name)
    adapter = adapter_for(model, layout="installed")
    with torch.no_grad():
        encoded = adapter.encode(inputs)
        everything = [
            [Selection(torch.arange(encoded.videos[i].features.grid.num_tokens)) for i in encoded.of_row(row)]
            for row in range(encoded.input_ids.shape[0])
        ]
        rebuilt = model(**adapter.build(encoded, everything).inputs).logits
        plain = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert float((rebuilt[real] - plain[real]).abs().max()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padded_batches_answer_as_left_padded_ones(family):
    model, grid = FAMILIES[family](), default_grid(family)
    outs = []
    for pad in ("left", "right"):
        inputs = inputs_for(family, [[grid], [grid]], words=[3, 9], pad=pad)
        with vidsieve.attach(model, vidsieve.load("divprune", retention=0.3)):
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        outs.append(out[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(*outs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_vision_tower(family):
    model, inputs = FAMILIES[family](), configuration(family, "batch 1")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 100, -100)
    with vidsieve.attach(model, vidsieve.load("uniform", retention=0.3)):
        model(**inputs, labels=labels).loss.backward()
    weight = next(p for n, p in model.named_parameters() if "patch_embed" in n and p.ndim > 1)
    assert float(weight.grad.abs().max()) > 1e-6


def test_different_frame_counts_in_one_batch():
    """Qwen takes videos of different lengths side by side (LLaVA-OneVision stacks them); each keeps its own share."""
    model = FAMILIES["qwen2_5_vl"]()
    inputs = inputs_for("qwen2_5_vl", [[default_grid("qwen2_5_vl", 2)], [default_grid("qwen2_5_vl", 5)]])
    case = Case(adapter_for(model), inputs, vidsieve.load("random", retention=0.5))
    assert CALLS["prefill logits"](case)[0] <= TOLERANCE


CONVENTIONS_OF = [
    (family, positions)
    for family in FAMILIES
    for positions in ("legacy", "compact")
    if not (positions == "compact" and family.startswith("qwen"))
]


@pytest.mark.parametrize("call", ["prefill logits", "8 greedy tokens", "second turn"])
@pytest.mark.parametrize(("family", "positions"), CONVENTIONS_OF)
def test_other_position_conventions_equal_their_own_reference(family, positions, call):
    result = cell(family, "ragged batch 2", call, "sdpa", vidsieve.load("random", retention=0.3), positions=positions)
    assert result.passed, result


def test_legacy_positions_go_on_behind_the_videos_last_moment():
    """3 words, a video of 3×2×4 tokens 2 ticks apart, words: time runs to 3 + 4, the grid only to 3 + 3."""
    model, grid = FAMILIES["qwen2_5_vl"](), default_grid("qwen2_5_vl")
    inputs = inputs_for("qwen2_5_vl", [[grid], [grid]], words=[3, 9])
    for row, pad in enumerate((6, 0)):
        found = {}
        for name in ("installed", "legacy"):
            positions = adapter_for(model, positions=name).encode(inputs).positions[1:, row, pad:]
            assert positions[0, 3 : 3 + 24].tolist() == [3] * 8 + [5] * 8 + [7] * 8
            assert positions[1, 3:11].tolist() == [3, 3, 3, 3, 4, 4, 4, 4]
            found[name] = positions[:, 27:]
        words = torch.arange(found["legacy"].shape[1]).expand(3, -1)
        assert torch.equal(found["installed"], 7 + words) and torch.equal(found["legacy"], 8 + words)


@pytest.mark.parametrize("family", ["llava_onevision", "internvl", "smolvlm"])
def test_compact_positions_are_what_the_model_counts_by_itself(family):
    model, inputs = FAMILIES[family](), configuration(family, "ragged batch 2")
    pruned = vidsieve.prune(model, inputs, vidsieve.load("uniform", retention=0.3), positions="compact")
    bare = {k: v for k, v in pruned.items() if k != "position_ids"}
    bare["mm_encoder_outputs"] = dict(pruned["mm_encoder_outputs"])
    with torch.no_grad():
        counted = (pruned["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert torch.equal(pruned["position_ids"], counted)
        new = model.generate(**pruned, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(**bare, max_new_tokens=4, do_sample=False), new)


def test_conventions_that_do_not_exist_are_refused():
    method = vidsieve.load("uniform", retention=0.3)
    with pytest.raises(vidsieve.VidsieveError, match="Did you mean 'legacy'"):
        vidsieve.attach(FAMILIES["smolvlm"](), method, positions="legcay")
    with pytest.raises(vidsieve.VidsieveError, match="in time and space"):
        vidsieve.attach(FAMILIES["qwen3_vl"](), method, positions="compact")
    with vidsieve.attach(FAMILIES["qwen2_5_vl"](), method, positions="legacy") as session:
        assert session.trace.positions == "legacy"


@pytest.mark.parametrize("name", CONFIGURATIONS[:3])
def test_the_grid_layout_is_llava_videos_own(name):
    """By hand: 2×2 patches of each frame averaged to 3×3 tokens, a newline after each row, words counted on behind."""
    model, inputs = FAMILIES["llava_video"](), configuration("llava_video", name)
    pixels, inner = inputs["pixel_values_videos"], model.model
    with torch.no_grad():
        hidden = inner.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-1]
        patches = inner.multi_modal_projector(hidden).unflatten(1, (7, 7))
        videos = []
        for video in patches.unflatten(0, pixels.shape[:2]):
            rows = []
            for frame in video:
                for y in range(3):
                    rows += [frame[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((0, 1)) for x in range(3)]
                    rows.append(inner.image_newline)
            videos.append(torch.stack(rows))
        with vidsieve.attach(model, vidsieve.load("uniform", retention=1.0)) as session:
            got = model(**inputs).logits
        taken = 0
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            words = ids[mask.bool()].tolist()
            parts = []
            while VIDEO in words:
                start = words.index(VIDEO)
                parts += [inner.language_model.embed_tokens(torch.tensor(words[:start])), videos[taken]]
                words, taken = words[start + 49 :], taken + 1
            parts.append(inner.language_model.embed_tokens(torch.tensor(words)))
            wanted = model(inputs_embeds=torch.cat(parts)[None]).logits[0]
            assert torch.allclose(got[row, session.kept_positions[row] >= 0], wanted, atol=1e-5)


def test_layouts_that_cannot_be_are_refused():
    inputs, method = configuration("llava_video", "batch 1"), vidsieve.load("uniform", retention=0.3)
    with pytest.raises(vidsieve.VidsieveError, match="is for LLaVA-Video; SmolVLMFor"):
        vidsieve.prune(FAMILIES["smolvlm"](), inputs, method, layout="grid")
    model = FAMILIES["llava_video"]()
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    with pytest.raises(vidsieve.VidsieveError, match="leave position_ids out"):
        vidsieve.prune(model, inputs | {"position_ids": positions}, method)
    model.config.vision_config.image_size = 64
    with pytest.raises(vidsieve.VidsieveError, match="odd number of patches a side, as LLaVA-Video's 27; this has 8"):
        vidsieve.prune(model, inputs, method)


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_images_that_are_frames(family):
    """All images of a prompt are a video, one alone is none, and `videos` says it where that is not so."""
    model, grid = FAMILIES[family](), default_grid(family, 2)
    method = vidsieve.load("uniform", retention=0.5)
    adapter, inputs = adapter_for(model), inputs_for(family, [[grid, grid], [grid]])
    assert [span.features.grid.frames for span in adapter.encode(inputs).videos] == [4, 2]
    named = adapter.encode(inputs, [(0, 2), (2, 2)])
    assert [(span.row, span.features.grid.frames) for span in named.videos] == [(0, 2), (0, 2)]
    assert [image.row for image in named.images] == [1]
    for wrong, message in [
        ([(0, 2), (1, 2)], "do not overlap"),
        ([(0, 9)], "among the 6 images"),
        ([(3, 2)], "into the next"),
        ([], "names no video"),
        ([(0, 0)], "pairs in order"),
    ]:
        with pytest.raises(vidsieve.VidsieveError, match=message):
            vidsieve.prune(model, inputs, method, videos=wrong)
    still = inputs_for(family, [[default_grid(family, 1)]])
    with torch.no_grad():
        plain = model(**still).logits
        with vidsieve.attach(model, method) as session:
            assert torch.equal(model(**still).logits, plain) and not len(session.trace)
    with pytest.raises(vidsieve.VidsieveError, match="frames are images; qwen3_vl"):
        vidsieve.prune(FAMILIES["qwen3_vl"](), configuration("qwen3_vl", "batch 1"), method, videos=[(0, 2)])


def test_a_family_of_ones_own_is_checked(monkeypatch):
    from vidsieve.adapters.families.smolvlm import SmolVLMAdapter
    from vidsieve.testing import check_family

    inputs = configuration("smolvlm", "ragged batch 2")
    assert [cell.call for cell in check_family(FAMILIES["smolvlm"](), inputs)] == list(CALLS)
    with monkeypatch.context() as broken:
        right = SmolVLMAdapter.encoder_outputs
        broken.setattr(SmolVLMAdapter, "encoder_outputs", lambda self, rows, *rest: right(self, rows[::-1], *rest))
        with pytest.raises(AssertionError, match="smolvlm: with every token kept, logits differ"):
            check_family(FAMILIES["smolvlm"](), inputs)
    # What is wrong alike in adapter and reference shows against the model itself.
    frames, build = SmolVLMAdapter.frame_features, SmolVLMAdapter.build
    for name, wrong in (
        ("frame_features", lambda self, inputs: 0 * frames(self, inputs)),
        ("positions", lambda self, ids, mask, inputs: torch.zeros_like(ids)[None]),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(SmolVLMAdapter, name, wrong)
            with pytest.raises(AssertionError, match="with every token kept, logits differ"):
                check_family(FAMILIES["smolvlm"](), inputs)

    def counted_anew(self, encoded, selections, rows=None):
        pruned = build(self, encoded, selections, rows)
        if pruned.kept_positions.shape[1] < encoded.input_ids.shape[1]:
            pruned.inputs["position_ids"] = (pruned.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return pruned

    # Right where nothing is dropped, wrong where something is.
    monkeypatch.setattr(SmolVLMAdapter, "build", counted_anew)
    with pytest.raises(AssertionError, match="smolvlm: prefill logits differs"):
        check_family(FAMILIES["smolvlm"](), inputs)
