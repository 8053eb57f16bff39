"""VideoLLaMA 3 drops tokens itself: methods choose among those it left, and what they cannot read is refused."""

from __future__ import annotations

import pytest
import torch

import vidsieve
from vidsieve import registry
from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import BudgetError, NeedError, PromptError, SelectionError, UnsupportedCallError
from vidsieve.testing.calls import CALLS, Case
from vidsieve.testing.equivalence import TOLERANCE
from vidsieve.testing.tiny_models import VIDEO
from vidsieve.types import TokenGrid
from workbench.families import tiny
from workbench.families.video_llama_3 import SIZE

KIND = tiny("video_llama_3")
SINGLE = {
    "random": {},
    "divprune": {},
    "fastv": {"layer": 1},
    "pyramiddrop": {"layers": (1, 2), "fractions": (0.5, 0.25)},
}
"""Methods that read single tokens, with settings for three layers."""
FREE = [name for name in registry.compressors if not registry.compressors.get(name).trained]


def whole():
    """Return inputs of a processor with ``use_token_compression=False``: four frames with every token."""
    inputs, mask = KIND.inputs([[4]], [5], "left"), torch.ones(4 * SIZE, dtype=torch.bool)
    ids, counts = inputs["input_ids"][0].unique_consecutive(return_counts=True)
    ids = ids.repeat_interleave(counts.where(ids != VIDEO, SIZE))[None]
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "video_compression_mask": mask}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("call", ["prefill logits", "8 greedy tokens"])
def test_methods_that_read_single_tokens_equal_the_reference(name, call):
    method = vidsieve.load(name, retention=0.6, **SINGLE[name])
    case = Case(adapter_for(KIND.model(0, 3)), KIND.inputs([[3, 2], [2]], [3, 9], "left"), method)
    difference, equal = CALLS[call](case)
    assert difference <= TOLERANCE and equal is not False


@pytest.mark.parametrize("name", sorted(set(FREE) - set(SINGLE)))
def test_other_methods_are_refused_and_never_read_a_wrong_frame(name):
    model, inputs = KIND.model(0, 3), KIND.inputs([[4]], [5], "left")
    # PruneVid's part inside the LLM reads single tokens; it spends a high budget alone.
    settings = {"inner": False} if name == "prunevid" else {}
    with torch.no_grad(), pytest.raises((UnsupportedCallError, NeedError, BudgetError)) as refused:
        with vidsieve.attach(model, vidsieve.load(name, retention=0.9, **settings)):
            model.generate(**inputs, max_new_tokens=2)
    if refused.type is UnsupportedCallError:
        assert "use_token_compression=False" in str(refused.value)


def test_methods_that_read_frames_work_where_the_processor_leaves_all():
    model, inputs = KIND.model(0, 3), whole()
    with torch.no_grad(), vidsieve.attach(model, vidsieve.load("evs", retention=0.5)) as session:
        model.generate(**inputs, max_new_tokens=2)
    (trace,) = session.trace
    assert trace.grid == TokenGrid(4, 2, 4) and trace.kept == 16


def test_the_trace_counts_what_the_model_left_and_names_places_of_the_whole_grid():
    model, inputs = KIND.model(0, 3), KIND.inputs([[4]], [5], "left")
    mask = inputs["video_compression_mask"]
    with torch.no_grad(), vidsieve.attach(model, vidsieve.load("random", retention=0.5)) as session:
        model(**inputs)
    (trace,) = session.trace
    assert trace.total == int(mask.sum()) < 32 and trace.kept == trace.total // 2
    assert mask[list(trace.indices)].all()
    assert list(trace.per_frame) == torch.bincount(torch.tensor(trace.indices) // SIZE, minlength=4).tolist()
    assert f"grid 4×2×4, {trace.total} of them left by the model" in str(session.trace)


def test_a_mask_that_does_not_fit_is_refused():
    adapter, inputs = adapter_for(KIND.model(0, 3)), KIND.inputs([[4]], [5], "left")
    with pytest.raises(PromptError, match="for videos of 32 tokens"):
        adapter.encode(inputs | {"video_compression_mask": inputs["video_compression_mask"][1:]})
    with pytest.raises(PromptError, match="video_compression_mask is missing"):
        adapter.encode({k: v for k, v in inputs.items() if k != "video_compression_mask"})
    with pytest.raises(SelectionError, match="left no token"):
        adapter.encode(inputs | {"video_compression_mask": torch.zeros(32, dtype=torch.bool)})


def test_a_limit_of_a_frame_is_refused():
    with pytest.raises(UnsupportedCallError, match="whole video, not of a frame"):
        adapter_for(KIND.model(0, 3)).limit_frames(None, 9)


def test_a_video_encoded_before_keeps_its_places():
    adapter, inputs = adapter_for(KIND.model(0, 3)), KIND.inputs([[4]], [5], "left")
    with torch.no_grad():
        first = adapter.encode(inputs).videos[0].features
        rest = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
        ready = adapter.ready_features(first)
        again = adapter.encode(rest | {"mm_encoder_outputs": ready}).videos[0].features
        found, wanted = adapter.model(**rest, mm_encoder_outputs=ready).logits, adapter.model(**inputs).logits
    assert torch.equal(first.embeds, again.embeds) and first.grid == again.grid
    assert torch.allclose(found, wanted, atol=TOLERANCE)
