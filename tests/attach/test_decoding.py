"""Methods that act while decoding: equal to a forward in which later layers do not see what a step leaves out."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.adapters.transformers_api import cache_kwargs, output_cache
from vidsieve.compressors.dycoke import DyCoke
from vidsieve.compressors.inside import DecodeView
from vidsieve.errors import BudgetError, StageError, UnsupportedCallError
from vidsieve.testing.equivalence import configuration
from vidsieve.testing.reference import reference_logits
from vidsieve.testing.tiny_models import FAMILIES

STEPS = 8
LAYER = 1


def dycoke(**fields):
    return DyCoke(**({"retention": 0.7, "layer": LAYER, "dropped": 0.6} | fields))


def reference(adapter, inputs, method, made, steps):
    """Return the logits (B, E, V) of made tokens (B, E) in which each of `steps` (places in made) reads what is chosen.

    Attention is the model's own, from an eager forward over everything; it is of a layer before any token is left out.
    """
    model, layers = adapter.model, list(adapter.decoder_layers)
    encoded = adapter.encode(inputs)
    chosen = adapter.select(encoded, method, torch.Generator().manual_seed(0))[0]
    prompt, seen = inputs["input_ids"].shape[1], []
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hook = layers[LAYER - 1].self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    reference_logits(adapter, inputs, chosen, made)
    hook.remove()
    model.set_attn_implementation(before)
    hidden = torch.zeros(len(made), 1, prompt + made.shape[1], prompt + made.shape[1])
    shares = []
    for span, selection in zip(encoded.videos, chosen, strict=True):
        columns, last = span.columns[selection.indices], None
        for step in steps:
            weights = seen[0][span.row, :, prompt + step, columns]
            view = DecodeView(LAYER, span.features.grid, selection.indices, weights)
            read = method.read(view, last)
            last = DecodeView(LAYER, span.features.grid, selection.indices, weights, read)
            if read is not None:
                gone = torch.ones(len(columns), dtype=torch.bool)
                gone[read] = False
                hidden[span.row, 0, prompt + step, columns[gone]] = torch.finfo(torch.float32).min
            shares.append(1.0 if read is None else len(read) / len(columns))
    lowest = torch.finfo(torch.float32).min

    def narrowed(module, args, kwargs):
        return args, kwargs | {"attention_mask": (kwargs["attention_mask"] + hidden).clamp(min=lowest)}

    with ExitStack() as stack:
        for layer in layers[LAYER:]:
            stack.callback(layer.register_forward_pre_hook(narrowed, with_kwargs=True).remove)
        logits = reference_logits(adapter, inputs, chosen, made)
    return logits[:, prompt - 1 :], sum(shares) / len(shares)


def generate(model, inputs, **options):
    settings = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **(settings | options))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2", "two videos", "official"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_reads_what_its_newest_token_attends_to(family, name, attention):
    model, variant = FAMILIES[family](), "official" if name == "official" else "ours"
    inputs = _long(family) if name == "official" else configuration(family, name)
    model.set_attn_implementation(attention)
    method = dycoke(variant=variant)
    with torch.no_grad():
        with vidsieve.attach(model, method) as session:
            out = generate(model, inputs)
        made = out.sequences[:, inputs["input_ids"].shape[1] :]
        wanted, share = reference(adapter_for(model), inputs, method, made[:, :-1], range(STEPS - 1))
    got = torch.stack(out.logits, 1)
    assert float((got - wanted).abs().max()) < 1e-4
    mean = sum(trace.decoded for trace in session.trace) / len(session.trace)
    assert mean == pytest.approx(share) and share < 1 and "read while decoding" in str(session.trace)


def _long(family):
    """Return a prompt with a video of five frames or more, as the release needs."""
    from vidsieve.testing.tiny_models import default_grid, inputs_for

    return inputs_for(family, [[default_grid(family, 6)]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_reads_everything_until_it_decodes(family):
    model, inputs = FAMILIES[family](), configuration(family, "ragged batch 2")
    method, prompt = dycoke(), inputs["input_ids"].shape[1]
    with torch.no_grad():
        with vidsieve.attach(model, method) as session:
            first = generate(model, inputs)
            words = torch.arange(40, 46).expand(2, -1)
            talk = torch.cat([first.sequences, words], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(talk[:, prompt:])], 1)
            again = generate(
                model, {"input_ids": talk, "attention_mask": mask, **cache_kwargs(model, output_cache(first))}
            )
            assert len(session.trace) == len(adapter_for(model).encode(inputs).videos)
        made = again.sequences[:, prompt:]
        later = range(STEPS + 6, 2 * STEPS + 6 - 1)
        wanted, _ = reference(adapter_for(model), inputs, method, made[:, :-1], [*range(STEPS - 1), *later])
    assert float((torch.stack(again.logits, 1) - wanted[:, -STEPS:]).abs().max()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_several_sequences_of_a_prompt_choose_each_for_themselves(family):
    model, inputs, method = FAMILIES[family](), configuration(family, "ragged batch 2"), dycoke()
    prompt = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    with torch.no_grad():
        with vidsieve.attach(model, method):
            out = generate(model, inputs, do_sample=True, num_return_sequences=2)
        got, made = torch.stack(out.logits, 1), out.sequences[:, prompt:]
        for i in range(2):
            wanted, _ = reference(adapter_for(model), inputs, method, made[i::2, :-1], range(STEPS - 1))
            assert float((got[i::2] - wanted).abs().max()) < 1e-4


def test_forward_prefills_as_a_method_before_the_llm_does_and_steps_by_hand_equal_generate():
    model, inputs = FAMILIES["qwen2_5_vl"](), configuration("qwen2_5_vl", "ragged batch 2")
    with torch.no_grad():
        with vidsieve.attach(model, dycoke(inner=False)):
            outer = model(**inputs).logits
        with vidsieve.attach(model, dycoke()):
            out = generate(model, inputs)
            step = model(**inputs, use_cache=True)
            assert torch.equal(step.logits, outer)
            cache, got = output_cache(step), [step.logits[:, -1]]
            twin = None
            for number in range(STEPS - 1):
                if number == 3:
                    twin = copy.deepcopy(cache)
                made = out.sequences[:, inputs["input_ids"].shape[1] + number, None]
                got.append(model(input_ids=made, **cache_kwargs(model, cache)).logits[:, -1])
            again = model(input_ids=out.sequences[:, -STEPS + 3, None], **cache_kwargs(model, twin)).logits[:, -1]
    assert torch.allclose(torch.stack(got, 1), torch.stack(out.logits, 1), atol=1e-5)
    assert torch.allclose(again, got[4], atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in adapter_for(model).decoder_layers)
    assert cache.get_seq_length(2) == cache.get_seq_length(0)  # nothing leaves the cache


def test_at_retention_1_steps_still_choose():
    model, inputs = FAMILIES["smolvlm"](), configuration("smolvlm", "batch 1")
    with vidsieve.attach(model, dycoke(retention=1.0)) as session:
        generate(model, inputs)
    (trace,) = session.trace
    assert trace.kept == trace.total and trace.decoded < 0.5
    with vidsieve.attach(model, dycoke(retention=1.0, inner=False)) as session:
        assert torch.equal(generate(model, inputs).sequences, generate(model, inputs).sequences) and not len(
            session.trace
        )


def test_what_cannot_be_is_refused():
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    with pytest.raises(StageError, match=r"use vidsieve\.attach"):
        vidsieve.prune(model, inputs, dycoke())
    assert vidsieve.prune(model, inputs, dycoke(inner=False))["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    with pytest.raises(BudgetError, match="not among the model's 3"):
        vidsieve.attach(model, dycoke(layer=3))
    with vidsieve.attach(model, dycoke()):
        with pytest.raises(UnsupportedCallError, match="switch its inner part off"):
            generate(model, inputs, num_beams=2)
        with pytest.raises(UnsupportedCallError, match="needs a DynamicCache"):
            generate(model, inputs, cache_implementation="static")
    with vidsieve.attach(model, dycoke(inner=False)):
        generate(model, inputs, num_beams=2)
    with vidsieve.attach(model, dycoke(retention=0.2)), pytest.raises(BudgetError, match=r"from 0\.3334 to 1"):
        generate(model, inputs)


def test_alike_attention_keeps_the_choice_and_other_attention_renews_it():
    """Over twelve tokens with 75 % dropped: 3 are read; the release reads all, its last token beside them always."""
    from vidsieve.types import TokenGrid

    grid, indices = TokenGrid(1, 3, 4), torch.arange(12)
    first = torch.linspace(0.1, 1.2, 12)[None]
    alike, other = first.flip(0) + 0.01, first.flip(1)
    for variant, chosen, same in (("ours", [9, 10, 11], [9, 10, 11]), ("official", [9, 10, 11], None)):
        method = dycoke(variant=variant, dropped=0.75)
        view = DecodeView(1, grid, indices, first)
        read = method.read(view, None)
        assert read.tolist() == chosen
        before = DecodeView(1, grid, indices, first, read)
        kept = method.read(DecodeView(1, grid, indices, alike), before)
        assert (kept if kept is None else kept.tolist()) == same
        renewed = method.read(DecodeView(1, grid, indices, other), before).tolist()
        assert renewed == ([0, 1, 2] if variant == "ours" else [0, 1, 11])


def test_ours_keeps_every_fourth_frame_and_what_differs_most():
    video = vidsieve.testing.make_video(vidsieve.types.TokenGrid(7, 3, 4), seed=3)
    kept = dycoke(retention=0.6, inner=False).compress(video).indices
    frames = video.embeds.double().reshape(7, 12, -1)
    per_frame = torch.bincount(kept // 12, minlength=7).tolist()
    assert per_frame[0] == per_frame[4] == 12 and sum(per_frame) == 50
    assert max(per_frame[1:4] + per_frame[5:]) - min(per_frame[1:4] + per_frame[5:]) <= 1
    for frame, earlier in ((1, 0), (2, 0), (3, 2), (5, 4), (6, 4)):
        cosine = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(frames[frame], frames[earlier], strict=True)]
        wanted = sorted(sorted(range(12), key=cosine.__getitem__)[: per_frame[frame]])
        assert (kept[kept // 12 == frame] % 12).tolist() == wanted
