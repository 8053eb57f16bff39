"""LLMs some of whose layers slide: what is refused, where a method inside may cut, and what its result equals."""

from __future__ import annotations

import copy

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.errors import UnsupportedCallError
from vidsieve.loading import load_model
from vidsieve.testbed.model import chat_inputs
from vidsieve.testbed.world import make_cast, render
from vidsieve.testing import check_family
from vidsieve.testing.calls import CALLS, Case
from vidsieve.testing.equivalence import configuration
from vidsieve.testing.reference import reference_logits
from vidsieve.testing.tiny_models import FAMILIES, llava_onevision, smolvlm

S, F = "sliding_attention", "full_attention"
WINDOW = 24


def sliding(*kinds):
    """Return a tiny LLaVA-OneVision whose layers are of these kinds."""
    config = copy.deepcopy(llava_onevision().config)
    text = config.get_text_config()
    text.use_sliding_window, text.sliding_window, text.layer_types = True, WINDOW, list(kinds)
    torch.manual_seed(0)
    return type(llava_onevision())(config).eval()


def fastv(layer):
    return vidsieve.load("fastv", retention=0.8 if layer == 2 else 0.6, layer=layer)


@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
@pytest.mark.parametrize(("kinds", "layer"), [((S, F, F), 1), ((S, F, F), 2), ((F, S, F), 2), ((S, S, F), 2)])
def test_a_cut_behind_the_last_sliding_layer_equals_the_masked_reference(kinds, layer, name):
    model, inputs = sliding(*kinds), configuration("llava_onevision", name)
    assert inputs["input_ids"].shape[1] > 2 * WINDOW
    for call in ("prefill logits", "8 greedy tokens", "second turn"):
        difference, equal = CALLS[call](Case(adapter_for(model), inputs, fastv(layer)))
        assert difference < 1e-4 and equal is not False, call


@pytest.mark.parametrize(
    ("kinds", "layer", "said"),
    [
        (
            (F, S, F),
            1,
            "would drop tokens from layer 1 on, and this model has sliding_attention in layer 1: layers from 2",
        ),
        ((S, F, S), 1, "the last layer of this model has sliding_attention"),
        ((S, S, S), 2, "the last layer of this model has sliding_attention"),
    ],
)
def test_dropping_at_or_before_a_sliding_layer_is_refused_by_name(kinds, layer, said):
    with pytest.raises(UnsupportedCallError, match=f"fastv .*{said}"):
        vidsieve.attach(sliding(*kinds), fastv(layer))


def test_reading_a_sliding_layer_s_cache_is_refused_and_a_full_one_s_is_not():
    with pytest.raises(
        UnsupportedCallError,
        match=r"dycoke would read fewer .* from layer 1 on, .* has sliding_attention in layer 0: layers from 2 on",
    ):
        vidsieve.attach(sliding(S, F, F), vidsieve.load("dycoke", retention=0.4, layer=1))
    inputs = configuration("llava_onevision", "batch 1")
    model = sliding(S, F, F)
    with vidsieve.attach(model, vidsieve.load("dycoke", retention=0.4, layer=2)) as session:
        model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "read while decoding" in str(session.trace)


def test_a_window_without_layer_types_means_every_layer():
    config = copy.deepcopy(smolvlm().config)
    text = config.get_text_config()
    text.sliding_window = WINDOW
    assert getattr(text, "layer_types", None) is None
    torch.manual_seed(0)
    with pytest.raises(UnsupportedCallError, match="the last layer of this model has sliding_attention"):
        vidsieve.attach(type(smolvlm())(config).eval(), fastv(2))


def shipped(name):
    """Return the testbed's deep model and a prompt about a scene, or two of different lengths."""
    model, processor = load_model("testbed:deep")
    questions = ["what colour is the old mark ?", "which shape is crimson ?"][: 1 + name.startswith("ragged")]
    frames = render(make_cast("dense", 5, 0), 5, 0)
    inputs = chat_inputs(processor, frames, questions)
    pixels = inputs.pop("pixel_values_videos")
    return model, {**inputs, "pixel_values_videos": pixels.repeat(len(questions), 1, 1, 1, 1)}


@pytest.mark.parametrize("made", [lambda name: (sliding(S, F, S), configuration("llava_onevision", name)), shipped])
@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
def test_before_the_llm_the_result_is_the_stock_model_s_on_the_shortened_prompt(made, name):
    """Definition 2 of correctness: kept tokens at their own positions, in a model that nothing is attached to."""
    model, inputs = made(name)
    method, adapter = vidsieve.load("uniform", retention=0.5), adapter_for(model)
    with torch.no_grad(), vidsieve.attach(model, method) as session:
        logits, kept = model(**inputs).logits, session.kept_positions
        chosen = adapter.select(adapter.encode(inputs), method)[0]
    assert any("count the tokens that are kept" in note for note in session.trace.notes)
    with torch.no_grad():
        reference = reference_logits(adapter, inputs, chosen)
        features = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == model.config.video_token_id] = features.flatten(0, 1)
        counted = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        for row, columns in enumerate(kept):
            real = columns[columns >= 0]
            out = model.model.language_model(
                inputs_embeds=embeds[row, real][None],
                position_ids=counted[row, real][None],
                attention_mask=torch.ones(1, len(real), dtype=torch.int64),
                use_cache=False,
            )
            wanted = model.lm_head(out.last_hidden_state)[0]
            torch.testing.assert_close(logits[row, columns >= 0], wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(reference[row, real], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["deep", "shallow"])
def test_the_shipped_models_pass_the_check_for_families(name):
    """Trained models end their answers early, and one has sliding windows."""
    model, processor = load_model(f"testbed:{name}")
    inputs = chat_inputs(processor, render(make_cast("dense", 5, 0), 5, 0), ["what colour is the old mark ?"])
    cells = check_family(model, inputs, calls=("prefill logits", "8 greedy tokens", "2 beams", "2 sampled sequences"))
    assert all(cell.passed for cell in cells)


def test_families_of_full_attention_have_no_such_note():
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    with vidsieve.attach(model, vidsieve.load("uniform", retention=0.5)) as session:
        model.generate(**inputs, max_new_tokens=2)
    assert not session.trace.notes
