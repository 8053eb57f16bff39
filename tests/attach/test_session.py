"""What the caller sees does not change; what cannot be right is an error; nothing stays behind."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.adapters.transformers_api import cache_kwargs, output_cache
from vidsieve.errors import (
    AttachError,
    NeedError,
    PolicyMismatchError,
    PromptError,
    SelectionError,
    UnknownNameError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from vidsieve.testing.equivalence import configuration
from vidsieve.testing.reference import reference_logits
from vidsieve.testing.tiny_models import FAMILIES, IMAGE, VIDEO, default_grid, inputs_for, placeholder
from vidsieve.types import Need, Selection, TokenGrid

FRAMES = ("internvl", "smolvlm")
"""Families whose frames are images to the model."""


def _layer_options(model):
    """InternVL's get_image_features has no defaults of its own."""
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    internvl = type(model).__name__.startswith("InternVL")
    return {name: getattr(model.config, name) for name in names} if internvl else {}


pytestmark = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def model(family):
    return FAMILIES[family]()


@pytest.fixture
def inputs(family):
    return configuration(family, "batch 1")


def random(retention=0.3):
    return vidsieve.load("random", retention=retention)


def generate(model, inputs, **options):
    return model.generate(**inputs, **({"max_new_tokens": 6, "do_sample": False} | options))


def snapshot(model):
    return {
        name: {k: v for k, v in vars(module).items() if not k.startswith("_is_hf")}
        for name, module in model.named_modules()
    }


def test_text_after_the_prompt_is_the_same_at_full_retention(model, inputs):
    plain = generate(model, inputs)
    with vidsieve.attach(model, random(1.0), layout="installed"):
        assert torch.equal(generate(model, inputs), plain)


def test_model_is_bit_identical_after_detach(model, inputs, family):
    generate(model, inputs)  # what the model itself leaves behind on first use
    before, weights = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    with vidsieve.attach(model, random()):
        generate(model, inputs)
        model(**inputs)
        assert "generate" in vars(model)
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].keys() == after[name].keys(), name
        for key, value in before[name].items():
            now = after[name][key]
            same = torch.equal(value, now) if isinstance(value, torch.Tensor) else value is now
            assert same or value == now, (name, key)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert torch.equal(generate(model, inputs), generate(FAMILIES[family](), inputs))


def test_detached_after_an_error_too(model, inputs):
    with pytest.raises(RuntimeError, match="inside"), vidsieve.attach(model, random()):
        raise RuntimeError("inside")
    assert not {"generate", "forward"} & vars(model).keys()


def test_an_instance_attribute_from_elsewhere_comes_back(model, inputs):
    """accelerate wraps `forward` on the instance: that wrapper must be there again afterwards."""
    calls = []
    original = model.forward

    def wrapped(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = wrapped
    with vidsieve.attach(model, random()):
        model(**inputs)
    assert calls and vars(model)["forward"] is wrapped


def test_close_is_idempotent_and_frees_the_model(family):
    model = FAMILIES[family]()
    session = vidsieve.attach(model, random())
    session.close()
    session.close()
    gone = weakref.ref(model)
    del session, model
    gc.collect()
    assert gone() is None


def test_a_name_instead_of_a_method_is_refused(model):
    with pytest.raises(UnsupportedCallError, match=r"vidsieve\.load"):
        vidsieve.attach(model, "divprune")


def test_a_count_that_a_short_video_just_reaches_keeps_all_of_it(model, inputs, family):
    count = vidsieve.Tokens(default_grid(family).num_tokens)
    with torch.no_grad():
        plain = model(**inputs).logits
        with vidsieve.attach(model, vidsieve.load("random", retention=count), layout="installed") as session:
            attached = model(**inputs).logits
    assert all(video.kept == video.total for video in session.trace)
    assert float((plain - attached)[inputs["attention_mask"].bool()].abs().max()) < 1e-5


def test_attaching_twice_is_refused(model, inputs):
    with vidsieve.attach(model, random()):
        with pytest.raises(AttachError, match="random is attached to this model already"):
            vidsieve.attach(model, random())
        generate(model, inputs)
    with vidsieve.attach(model, random()):
        pass


def test_other_instances_are_not_touched(model, inputs, family):
    other = FAMILIES[family]()
    plain = generate(other, inputs)
    with vidsieve.attach(model, random()):
        assert torch.equal(generate(other, inputs), plain)


def test_text_only_prompts_pass_through(model, family):
    inputs = inputs_for(family, [[]], words=[12])
    plain, logits = generate(model, inputs), model(**inputs).logits
    with vidsieve.attach(model, random()) as session:
        assert torch.equal(generate(model, inputs), plain)
        assert torch.equal(model(**inputs).logits, logits)
    assert len(session.trace) == 0


def test_a_text_prompt_beside_a_video_prompt(model, family):
    inputs = inputs_for(family, [[default_grid(family)], []], words=[4, 20])
    real = inputs["attention_mask"][0].bool()
    alone = {k: v[:1, real] if v.shape[:2] == inputs["input_ids"].shape else v for k, v in inputs.items()}
    with vidsieve.attach(model, vidsieve.load("uniform", retention=0.3)) as session:
        both = generate(model, inputs)[:, inputs["input_ids"].shape[1] :]
        one = generate(model, alone)[:, alone["input_ids"].shape[1] :]
    assert torch.equal(both[:1], one)
    assert len(session.trace) == 2
    text = {k: v[1:] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    real = text["attention_mask"][0].bool()
    text = {k: v[:, real] for k, v in text.items()}
    assert torch.equal(both[1:], generate(model, text)[:, text["input_ids"].shape[1] :])


def test_trace_says_what_was_kept(model, inputs, family):
    grid = TokenGrid(3, 3, 3) if family == "llava_video" else default_grid(family)
    with vidsieve.attach(model, random(0.5)) as session:
        generate(model, inputs)
    (video,) = session.trace
    assert (video.kept, video.total, video.grid) == (grid.num_tokens // 2, grid.num_tokens, grid)
    assert sum(video.per_frame) == video.kept == len(video.indices) and video.select_ms > 0
    of_frames = torch.arange(grid.num_tokens).reshape(grid.frames, -1).tolist()
    assert video.per_frame == tuple(len(set(frame) & set(video.indices)) for frame in of_frames)
    assert f"kept {video.kept} of {video.total}" in str(session.trace) and "installed" in str(session.trace)
    before, after = session.trace.prompt_tokens
    shorter = before - after
    if family == "llava_video":  # 49 placeholders for 27 tokens and 9 newlines, of which those of empty rows go too
        rows = {index // 3 for index in video.indices}
        assert video.newlines == len(rows) and shorter == 49 - video.kept - len(rows)
    else:
        assert video.newlines == (family == "llava_onevision") and shorter == video.total - video.kept


def test_sampling_repeats_under_a_seed(model, inputs):
    outs = []
    for _ in range(2):
        with vidsieve.attach(model, random(), seed=3):
            torch.manual_seed(5)
            outs.append(generate(model, inputs, do_sample=True, temperature=1.5))
    assert torch.equal(*outs)
    with vidsieve.attach(model, random(), seed=4) as session:
        generate(model, inputs)
        other = session.trace.videos[0].indices
    with vidsieve.attach(model, random(), seed=3) as session:
        generate(model, inputs)
        assert session.trace.videos[0].indices != other


def test_several_return_sequences_and_beams_begin_with_the_callers_prompt(model, family):
    inputs = configuration(family, "ragged batch 2")
    prompt = inputs["input_ids"].repeat_interleave(2, 0)
    with vidsieve.attach(model, random()):
        for options in ({"do_sample": True}, {"num_beams": 3}):
            out = generate(model, inputs, num_return_sequences=2, **options)
            assert torch.equal(out[:, : prompt.shape[1]], prompt) and out.shape == (4, prompt.shape[1] + 6)


def test_total_lengths_count_the_callers_prompt(model, inputs):
    prompt = inputs["input_ids"].shape[1]
    with vidsieve.attach(model, random()):
        assert model.generate(**inputs, max_length=prompt + 3, do_sample=False).shape[1] == prompt + 3
        config = GenerationConfig(max_length=prompt + 4, do_sample=False, pad_token_id=0)
        assert model.generate(**inputs, generation_config=config).shape[1] == prompt + 4
        with pytest.raises(UnsupportedCallError, match="leaves no room"):
            model.generate(**inputs, max_length=prompt - 1)


def test_hooks_of_generate_see_the_callers_prompt(model, inputs):
    ids, seen = inputs["input_ids"], []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(("processor", input_ids.clone()))
            return scores

    def stop(input_ids, scores, **kwargs):
        seen.append(("criteria", input_ids.clone()))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def allowed(row, input_ids):
        seen.append(("prefix", input_ids[None].clone()))
        return list(range(128))

    class Streamer:
        def put(self, value):
            seen.append(("streamer", value.clone()))

        def end(self):
            seen.append(("end", ids))

    with vidsieve.attach(model, random()):
        generate(
            model,
            inputs,
            logits_processor=LogitsProcessorList([Watch()]),
            prefix_allowed_tokens_fn=allowed,
            stopping_criteria=StoppingCriteriaList([stop]),
            streamer=Streamer(),
            max_new_tokens=2,
        )
    for name in ("processor", "criteria", "prefix"):
        shown = [value for kind, value in seen if kind == name]
        assert shown and all(torch.equal(value[:, : ids.shape[1]], ids) for value in shown), name
    assert torch.equal(next(value for kind, value in seen if kind == "streamer"), ids)


def test_positional_input_ids_and_model_outputs(model, inputs):
    with vidsieve.attach(model, random()):
        named = generate(model, inputs)
        rest = {k: v for k, v in inputs.items() if k != "input_ids"}
        assert torch.equal(model.generate(inputs["input_ids"], **rest, max_new_tokens=6, do_sample=False), named)
        out = generate(model, inputs, return_dict_in_generate=True, output_scores=True)
        assert torch.equal(out.sequences, named) and len(out.scores) == 6


def test_forward_gathers_labels_and_maps_logits_back(model, inputs, family):
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == placeholder(family), -100)
    with vidsieve.attach(model, random()) as session:
        out = model(**inputs, labels=labels)
    kept = session.kept_positions
    assert out.logits.shape[:2] == kept.shape and kept.shape[1] < ids.shape[1]
    words = (ids[0] != placeholder(family)).nonzero().flatten()
    assert set(words.tolist()) <= set(kept[0].tolist())
    assert torch.isfinite(out.loss)


def test_logits_to_keep(model, inputs):
    with vidsieve.attach(model, random()):
        last = model(**inputs).logits[:, -2:]
        assert torch.allclose(model(**inputs, logits_to_keep=2).logits, last, atol=1e-5)
        with pytest.raises(UnsupportedCallError, match="reaches into the video"):
            model(**inputs, logits_to_keep=inputs["input_ids"].shape[1] - 3)
        with pytest.raises(UnsupportedCallError, match="kept_positions"):
            model(**inputs, logits_to_keep=torch.tensor([0, 1]))


def test_manual_decoding_through_forward_equals_generate(model, inputs):
    """A loop of plain forwards on the cache, with the caller's full-length mask, gives the same tokens."""
    with vidsieve.attach(model, random()), torch.no_grad():
        wanted = generate(model, inputs)
        out = model(**inputs, use_cache=True)
        made, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(6):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            made, mask = torch.cat([made, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            out = model(input_ids=token, attention_mask=mask, **cache_kwargs(model, output_cache(out)), use_cache=True)
    assert torch.equal(made, wanted)


def test_the_callers_own_cache_is_remembered(model, inputs):
    with vidsieve.attach(model, random()), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        first = generate(model, inputs, **cache_kwargs(model, cache))
        more = torch.cat([first, torch.tensor([[41, 42]])], 1)
        again = model.generate(input_ids=more, **cache_kwargs(model, cache), max_new_tokens=3, do_sample=False)
    assert torch.equal(again[:, : more.shape[1]], more)


def test_later_turns_that_cannot_be_right_are_refused(model, inputs, family):
    with vidsieve.attach(model, random()), torch.no_grad():
        out = generate(model, inputs, return_dict_in_generate=True)
        cache, full = output_cache(out), out.sequences
        more = torch.cat([full, full[:, :1]], 1)
        for extra, message in [
            ({"attention_mask": torch.ones(1, 3)}, "attention_mask must cover"),
            ({"attention_mask": torch.cat([torch.zeros(1, 1), torch.ones(1, more.shape[1] - 1)], 1)}, "hides other"),
            ({"position_ids": torch.arange(more.shape[1])[None]}, "takes input_ids alone"),
            ({"pixel_values": torch.randn(1, 3, 56, 56)}, "brings an image"),
        ][: 3 if family in FRAMES else 4]:
            with pytest.raises(UnsupportedCallError, match=message):
                model.generate(input_ids=more, **cache_kwargs(model, cache), max_new_tokens=2, **extra)
        other = full.clone()
        other[0, 1] = 55
        with pytest.raises(UnsupportedCallError, match="must begin with"):
            model.generate(input_ids=torch.cat([other, full[:, :1]], 1), **cache_kwargs(model, cache), max_new_tokens=2)
        with pytest.raises(UnsupportedCallError, match="brings another video"):
            new = torch.cat([full, torch.full((1, 2), placeholder(family))], 1)
            model.generate(input_ids=new, **cache_kwargs(model, cache), max_new_tokens=2)
        beams = generate(model, inputs, num_beams=2, return_dict_in_generate=True)
        with pytest.raises(UnsupportedCallError, match="beam search cannot be continued"):
            again = torch.cat([beams.sequences, full[:, :1]], 1)
            model.generate(input_ids=again, **cache_kwargs(model, output_cache(beams)), max_new_tokens=2)
        with pytest.raises(UnsupportedCallError, match="attention_mask must cover"):
            model(input_ids=full[:, :1], **cache_kwargs(model, cache), attention_mask=torch.ones(1, 3))


def test_a_cache_from_outside_the_session_is_refused(model, inputs):
    cache = output_cache(generate(model, inputs, return_dict_in_generate=True))
    more = torch.cat([inputs["input_ids"], torch.arange(40, 50)[None]], 1)
    with (
        vidsieve.attach(model, random()),
        pytest.raises(UnsupportedCallError, match="begin with an empty cache"),
    ):
        model.generate(input_ids=more, **cache_kwargs(model, cache), max_new_tokens=2)


def test_calls_that_could_be_wrong_are_refused(model, inputs):
    refused = [
        ({"use_cache": False}, "packed sequences"),
        ({"assistant_model": model}, "assisted decoding"),
        ({"guidance_scale": 2.0}, "classifier-free guidance"),
        ({"prompt_lookup_num_tokens": 2}, "prompt-lookup"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive"),
        ({"prefill_chunk_size": 8}, "chunked prefill"),
    ]
    with vidsieve.attach(model, random()):
        for options, message in refused:
            with pytest.raises(UnsupportedCallError, match=message):
                generate(model, inputs, **options)
        with pytest.raises(UnsupportedCallError, match="leave inputs_embeds out"):
            model(**inputs, inputs_embeds=torch.randn(*inputs["input_ids"].shape, 64))
        with pytest.raises(UnsupportedCallError, match="pass input_ids"):
            pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
            model(inputs_embeds=torch.randn(1, 9, 64), **pixels)


def test_prompt_and_video_must_agree(model, inputs, family):
    ids = inputs["input_ids"]
    words = (ids[0] != placeholder(family)).nonzero().flatten()
    bare = inputs | {"input_ids": ids[:, words], "attention_mask": torch.ones(1, len(words), dtype=torch.int64)}
    bare.pop("mm_token_type_ids", None)
    short = inputs | {"input_ids": ids[:, 6:], "attention_mask": inputs["attention_mask"][:, 6:]}
    if "mm_token_type_ids" in short:
        short["mm_token_type_ids"] = short["mm_token_type_ids"][:, 6:]
    with vidsieve.attach(model, random()):
        with pytest.raises(PromptError, match="no video placeholder"):
            generate(model, bare)
        with pytest.raises(PromptError, match="placeholders, its"):
            generate(model, short)
        with pytest.raises(PromptError, match="the call carries no video"):
            generate(model, {"input_ids": ids, "attention_mask": inputs["attention_mask"]})


def test_prune_is_the_same_by_hand(model, inputs):
    with vidsieve.attach(model, vidsieve.load("divprune", retention=0.3)):
        attached = generate(model, inputs)
    before = {k: v.clone() for k, v in inputs.items()}
    pruned = vidsieve.prune(model, inputs, vidsieve.load("divprune", retention=0.3))
    out = model.generate(**pruned, max_new_tokens=6, do_sample=False)
    assert torch.equal(out[:, pruned["input_ids"].shape[1] :], attached[:, inputs["input_ids"].shape[1] :])
    assert all(torch.equal(before[k], v) for k, v in inputs.items())
    with pytest.raises(TypeError, match="use_cache"):
        model.generate(**pruned, use_cache=False)


def test_ready_features_are_not_encoded_again(model, inputs):
    """Features from an earlier call can be handed over instead of pixels."""
    adapter = adapter_for(model)
    encode = model.model.get_image_features if adapter.modality == "image" else model.model.get_video_features
    with torch.no_grad():
        names = ("pixel_values_videos", "video_grid_thw", "pixel_values")
        ready = encode(*(inputs[k] for k in names if k in inputs), return_dict=True, **_layer_options(model))
    rest = {k: v for k, v in inputs.items() if k not in ("pixel_values_videos", "pixel_values")}
    method, ready = vidsieve.load("divprune", retention=0.3), {adapter.modality: copy.copy(ready)}
    if adapter.layout == "grid":
        with pytest.raises(UnsupportedCallError, match="pooled already"):
            adapter.prune(rest | {"mm_encoder_outputs": ready}, method)
        return
    again = adapter.prune(rest | {"mm_encoder_outputs": ready}, method)
    assert torch.equal(again.kept_positions, adapter.prune(inputs, method).kept_positions)


def test_question_aware_methods_need_a_template_and_keep_their_selection(model, inputs, family):
    method = vidsieve.registry.compressors.get("cacovid").untrained(64, retention=0.3)
    fitting = copy.copy(method.policy.config.__dict__) | {"family": family}
    object.__setattr__(method.policy, "config", type(method.policy.config)(**fitting))
    _give_rope_rows(method, family)
    with vidsieve.attach(model, method) as session, torch.no_grad():
        out = generate(model, inputs, return_dict_in_generate=True)
        more = torch.cat([out.sequences, torch.tensor([[41, 42]])], 1)
        model.generate(input_ids=more, **cache_kwargs(model, output_cache(out)), max_new_tokens=2, do_sample=False)
        assert "first question" in str(session.trace) and len(session.trace) == 1
    template = model.vidsieve_template
    del model.vidsieve_template
    with pytest.raises(NeedError, match=r"pass template=vidsieve\.Template\.of\(processor\)"):
        vidsieve.attach(model, method)
    with vidsieve.attach(model, method, template=template):
        generate(model, inputs)


def _give_rope_rows(method, family):
    if family.startswith("qwen"):
        for module in method.policy.modules():
            if hasattr(module, "shape"):
                module.shape = type(module.shape)(**{**module.shape.__dict__, "rope_sections": (6, 5, 5)})


def test_policies_for_other_models_are_refused(model, family):
    compressors = vidsieve.registry.compressors
    with pytest.raises(PolicyMismatchError, match="width 32, this model has 64"):
        vidsieve.attach(model, compressors.get("score").untrained(32))
    with pytest.raises(PolicyMismatchError, match=f"family none, this model is {family}"):
        vidsieve.attach(model, compressors.get("score").untrained(64))


def test_unknown_models_and_conventions(model):
    with pytest.raises(UnsupportedModelError, match="To add one"):
        vidsieve.attach(torch.nn.Linear(2, 2), random())
    with pytest.raises(UnknownNameError, match="installed"):
        vidsieve.attach(model, random(), positions="instaled")
    with pytest.raises(UnknownNameError, match="'grid'"):
        vidsieve.attach(model, random(), layout="grids")


def test_one_call_at_a_time(model, inputs):
    """A call from another thread while one runs is refused, not mixed up."""
    import threading

    caught = []

    class Slow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if not caught:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
            return scores

    def other():
        try:
            generate(model, inputs)
        except AttachError as error:
            caught.append(str(error))

    with vidsieve.attach(model, random()):
        generate(model, inputs, logits_processor=LogitsProcessorList([Slow()]))
    assert caught and "one call at a time" in caught[0]


def step(model, cache, token=41, rows=1, **options):
    """One plain forward on a cache."""
    return model(input_ids=torch.full((rows, 1), token), **cache_kwargs(model, cache), **options).logits[:, -1]


def test_the_record_travels_with_the_cache(model, inputs):
    """Copies, tuples and later sessions know what the cache stands for."""
    adapter = adapter_for(model)
    with torch.no_grad():
        with vidsieve.attach(model, random()):
            first = output_cache(model(**inputs, use_cache=True))
            as_tuple = model(**inputs, return_dict=False)[1]
        chosen, _ = adapter.select(adapter.encode(inputs), random(), torch.Generator().manual_seed(0))
        wanted = reference_logits(adapter, inputs, chosen, torch.tensor([[41]]))[:, -1]
        with vidsieve.attach(model, vidsieve.load("uniform", retention=0.5)):
            for cache in (copy.deepcopy(first), as_tuple, first):
                assert float((step(model, cache) - wanted).abs().max()) < 1e-4


def test_an_emptied_cache_forgets_its_prompt(model, inputs, family):
    text = inputs_for(family, [[]], words=[12])
    plain = generate(model, text)
    with vidsieve.attach(model, random()), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        generate(model, inputs, **cache_kwargs(model, cache))
        cache.crop(-cache.get_seq_length())
        assert torch.equal(generate(model, text, **cache_kwargs(model, cache)), plain)


def test_a_generation_that_breaks_off_leaves_a_cache_that_is_known(model, inputs):
    calls = []

    class Stop(LogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return scores

    with vidsieve.attach(model, random()), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs, **cache_kwargs(model, cache), logits_processor=LogitsProcessorList([Stop()]))
        wanted = step(model, output_cache(model(**inputs, use_cache=True)))
        cache.crop(cache._vidsieve_record.short_prompt - cache.get_seq_length())
        assert torch.allclose(step(model, cache), wanted, atol=1e-4)


def test_padding_is_inferred_as_transformers_does(model, family):
    inputs = configuration(family, "ragged batch 2")
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    with vidsieve.attach(model, random()):
        assert torch.equal(generate(model, bare), generate(model, inputs))


def test_generate_keeps_no_graph_of_the_vision_tower(model, inputs):
    saved = []
    with (
        vidsieve.attach(model, random()),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        generate(model, inputs)
    assert not saved


def test_reselecting_prefills_a_later_turn_anew(model, inputs, family):
    words = torch.tensor([[122, 124, 41, 42, 43, 123]])  # another user turn
    with vidsieve.attach(model, random(), reselect=True) as session:
        first = generate(model, inputs, return_dict_in_generate=True)
        length = output_cache(first).get_seq_length()
        more = torch.cat([first.sequences, words], 1)
        kinds = {"mm_token_type_ids": torch.zeros_like(more)} if "mm_token_type_ids" in inputs else {}
        if kinds:
            kinds["mm_token_type_ids"][:, : inputs["input_ids"].shape[1]] = inputs["mm_token_type_ids"]
        again = inputs | kinds | {"input_ids": more, "attention_mask": torch.ones_like(more)}
        second = generate(model, again, **cache_kwargs(model, output_cache(first)), return_dict_in_generate=True)
        assert len(session.trace) == 2 and output_cache(first).get_seq_length() == length
        with pytest.raises(UnsupportedCallError, match="with its video"):
            model.generate(input_ids=more, **cache_kwargs(model, output_cache(first)), max_new_tokens=2)
    with vidsieve.attach(model, random()):
        assert torch.equal(second.sequences, generate(model, again))


def test_later_turns_bring_words_only(model, inputs, family):
    with vidsieve.attach(model, random()):
        cache = output_cache(model(**inputs, use_cache=True))
        if family not in FRAMES:
            with pytest.raises(UnsupportedCallError, match="brings an image"):
                model(input_ids=torch.tensor([[40, model.config.image_token_id]]), **cache_kwargs(model, cache))
        with pytest.raises(UnsupportedCallError, match="brings another video"):
            model(input_ids=torch.tensor([[40, placeholder(family)]]), **cache_kwargs(model, cache))
        with pytest.raises(UnsupportedCallError, match="leave position_ids out"):
            step(model, cache, position_ids=torch.tensor([[99]]))


def test_an_image_without_its_arguments_is_refused(model, inputs, family):
    ids = inputs["input_ids"].clone()
    ids[0, -4] = model.config.image_token_id
    message = "image placeholders, its" if family in FRAMES else "hand over everything"
    with vidsieve.attach(model, random()), pytest.raises(PromptError, match=message):
        model(**(inputs | {"input_ids": ids}))


def test_a_video_and_an_image_in_one_prompt(model, family):
    """The image is kept whole, the video is pruned; prompt, beams and a second turn are the masked reference's."""
    grid = default_grid(family)
    inputs = inputs_for(family, [[grid], [grid]], words=[3, 8], image=True)
    length = inputs["input_ids"].shape[1]
    videos = [(0, grid.frames), (grid.frames + 1, grid.frames)] if family in FRAMES else None
    adapter = adapter_for(model)
    with torch.no_grad():
        encoded = adapter.encode(inputs, videos)
        count = 16 if family in FRAMES else int((inputs["input_ids"][0] == IMAGE).sum())
        assert [len(image.columns) for image in encoded.images] == [count, count]
        chosen = adapter.select(encoded, random(), torch.Generator().manual_seed(0))[0]
        wanted = reference_logits(adapter, inputs, chosen, videos=videos)
        words = {"suppress_tokens": [IMAGE, VIDEO]}  # a random model says anything
        with vidsieve.attach(model, random(), videos=videos) as session:
            got = model(**inputs).logits
            kept = session.kept_positions
            beams = generate(model, inputs, num_return_sequences=2, num_beams=2)
            first = generate(model, inputs, return_dict_in_generate=True, **words)
            more = torch.cat([first.sequences, torch.tensor([[41, 42]] * 2)], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, more.shape[1] - length, dtype=torch.int64)], 1)
            again = inputs | {"input_ids": more, "attention_mask": mask, **cache_kwargs(model, output_cache(first))}
            second = generate(model, again, **words)
        alone = vidsieve.prune(model, inputs, random(), generator=torch.Generator().manual_seed(0), videos=videos)
        by_hand = model.generate(**alone, max_new_tokens=6, do_sample=False, **words)
        reference = reference_logits(adapter, inputs, chosen, more[:, length:], videos=videos)[:, -1]
    rows = torch.arange(2)[:, None].expand_as(kept)
    assert float((got[kept >= 0] - wanted[rows[kept >= 0], kept[kept >= 0]]).abs().max()) < 1e-4
    assert beams.shape[0] == 4 and torch.equal(by_hand[:, -6:], first.sequences[:, -6:])
    reference[:, [IMAGE, VIDEO]] = -torch.inf
    assert torch.equal(second[:, more.shape[1]], reference.argmax(-1))


def test_what_a_method_reads_of_a_prompt_is_what_the_model_reads(model, family):
    """Words, the video and a still image beside it: the same features at the same places."""
    grid, read = default_grid(family), []
    inputs = inputs_for(family, [[grid], [grid]], words=[3, 8], image=True)
    videos = [(0, grid.frames), (grid.frames + 1, grid.frames)] if family in FRAMES else None
    adapter = adapter_for(model)
    hook = adapter.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((kwargs["inputs_embeds"], kwargs["attention_mask"])), with_kwargs=True
    )
    with torch.no_grad(), vidsieve.attach(model, random(1.0), videos=videos):
        encoded = adapter.encode(inputs, videos)
        model(**inputs)
    hook.remove()
    ((embeds, mask),) = read
    for number, video in enumerate(encoded.videos):
        prompt = adapter.video_tokens(encoded, number, frozenset({Need.QUESTION})).prompt
        assert torch.equal(prompt.embeds, embeds[number][mask[number].bool()])
        assert torch.equal(prompt.embeds[prompt.video_mask], video.features.embeds)


def test_moved_rows_of_a_cache_are_noticed(model, family):
    inputs = configuration(family, "ragged batch 2")
    with vidsieve.attach(model, random()), torch.no_grad():
        cache = output_cache(model(**inputs, use_cache=True))
        step(model, cache, rows=2)
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(UnsupportedCallError, match="rows of a pruned cache cannot be moved"):
            step(model, cache, rows=2)
        cache.reorder_cache(torch.tensor([1, 0]))
        step(model, cache, rows=2)
        cache.batch_repeat_interleave(2)
        with pytest.raises(UnsupportedCallError, match="cannot be moved, repeated"):
            step(model, cache, rows=4)


def test_beam_caches_are_refused_whatever_their_size(model, inputs):
    with vidsieve.attach(model, random()):
        out = generate(model, inputs, num_beams=3, num_return_sequences=3, return_dict_in_generate=True)
        more = torch.cat([out.sequences, torch.full((3, 1), 41)], 1)
        with pytest.raises(UnsupportedCallError, match="beam search cannot be continued"):
            model.generate(input_ids=more, **cache_kwargs(model, output_cache(out)), max_new_tokens=2)


def test_hooks_of_transformers_replace_built_in_ones_or_are_refused(model, inputs):
    from transformers import MaxLengthCriteria, RepetitionPenaltyLogitsProcessor

    none = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.0)])
    with vidsieve.attach(model, random()):
        plain = generate(model, inputs)
        assert torch.equal(generate(model, inputs, logits_processor=none, repetition_penalty=5.0), plain)
        with pytest.raises(UnsupportedCallError, match="pass max_new_tokens to generate instead"):
            generate(model, inputs, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(90)]))


def test_what_is_left_of_a_closed_session_passes_calls_through(model, inputs):
    plain = generate(model, inputs)
    with vidsieve.attach(model, random()):
        kept, twin = model.generate, copy.copy(model)
        assert not torch.equal(kept(**inputs, max_new_tokens=6, do_sample=False), plain)
        inner = model.forward
        model.forward = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))  # by somebody, inside
    assert torch.equal(kept(**inputs, max_new_tokens=6, do_sample=False), plain)
    assert torch.equal(generate(twin, inputs), plain)
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_copying_an_attached_model_says_what_to_do(model):
    with vidsieve.attach(model, random()), pytest.raises(AttachError, match="close it before copying"):
        copy.deepcopy(model)


def test_sessions_do_not_hold_their_model(family):
    model = FAMILIES[family]()
    vidsieve.attach(model, random())  # forgotten, never closed
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    model = FAMILIES[family]()
    with vidsieve.attach(model, random()) as session:
        pass
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and str(session.trace) == "nothing pruned yet"


def test_masks_that_hide_the_video_are_refused(model, inputs, family):
    mask = inputs["attention_mask"].clone()
    mask[0, (inputs["input_ids"][0] == placeholder(family)).nonzero()[3]] = 0
    with vidsieve.attach(model, random()), pytest.raises(UnsupportedCallError, match="hides video tokens"):
        model(**(inputs | {"attention_mask": mask}))


def test_pruned_inputs_are_not_pruned_again(model, inputs):
    method = vidsieve.load("uniform", retention=0.3)
    plain = model.generate(**vidsieve.prune(model, inputs, method), max_new_tokens=4, do_sample=False)
    again = vidsieve.prune(model, inputs, method)
    with vidsieve.attach(model, random()):
        assert torch.equal(model.generate(**again, max_new_tokens=4, do_sample=False), plain)


def test_a_method_that_misses_its_budget_is_caught(model, inputs, monkeypatch):
    kept = lambda self, video, budget, generator: Selection(torch.arange(budget + 2))  # noqa: E731
    monkeypatch.setattr("vidsieve.compressors.random.Random._select", kept)
    with vidsieve.attach(model, random()), pytest.raises(SelectionError, match="its budget is"):
        generate(model, inputs)


def test_a_method_that_drops_nothing_is_caught(model, inputs, monkeypatch):
    """Of methods whose number of tokens follows from what the video shows: all of them is no pruning."""
    kept = lambda self, video, budget, generator: Selection(torch.arange(video.num_tokens))  # noqa: E731
    monkeypatch.setattr("vidsieve.compressors.random.Random._select", kept)
    monkeypatch.setattr("vidsieve.compressors.random.Random.adaptive_budget", True)
    with vidsieve.attach(model, random()) as session:
        for call in (generate, lambda model, inputs: model(**inputs)):
            with pytest.raises(AttachError, match="dropped nothing from a prompt with a video"):
                call(model, inputs)
    assert len(session.trace) == 0


def test_the_prompt_is_passed_once(model, inputs):
    with vidsieve.attach(model, random()), pytest.raises(UnsupportedCallError, match="pass the prompt once"):
        model.generate(inputs["input_ids"], **inputs)


def test_decoding_modes_set_on_the_model_are_refused_too(model, inputs):
    model.generation_config.guidance_scale = 2.0
    with vidsieve.attach(model, random()), pytest.raises(UnsupportedCallError, match="guidance"):
        generate(model, inputs)


def test_static_caches(model, family):
    inputs = configuration(family, "ragged batch 2")
    with vidsieve.attach(model, random()):
        plain = generate(model, inputs)
        assert torch.equal(generate(model, inputs, cache_implementation="static", disable_compile=True), plain)


def test_a_third_turn(model, inputs):
    adapter, words = adapter_for(model), torch.tensor([[41, 42, 43]])
    with vidsieve.attach(model, random()), torch.no_grad():
        out = generate(model, inputs, return_dict_in_generate=True)
        talk = out.sequences
        for _ in range(2):
            talk = torch.cat([talk, words], 1)
            talk = model.generate(
                input_ids=talk, **cache_kwargs(model, output_cache(out)), max_new_tokens=4, do_sample=False
            )
    with torch.no_grad():
        chosen, _ = adapter.select(adapter.encode(inputs), random(), torch.Generator().manual_seed(0))
        made = talk[:, inputs["input_ids"].shape[1] :]
        for end in range(-4, 0):
            wanted = reference_logits(adapter, inputs, chosen, made[:, :end])[:, -1].argmax(-1)
            assert int(wanted) == int(made[0, end])


def test_calls_that_only_some_families_refuse(model, inputs, family):
    ids = inputs["input_ids"]
    with vidsieve.attach(model, random()):
        if family.startswith("qwen"):
            with pytest.raises(PromptError, match=r"position_ids must be \(3, B, L\) or \(4, B, L\)"):
                model(**inputs, position_ids=torch.arange(ids.shape[1])[None])
            with pytest.raises(PromptError, match="mm_token_type_ids is missing"):
                model(**{key: value for key, value in inputs.items() if key != "mm_token_type_ids"})


def test_one_still_image_beside_embeddings_alone_is_no_video(model, family):
    if family in FRAMES:
        inputs = inputs_for(family, [[default_grid(family, 1)]])
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        call = {key: value for key, value in inputs.items() if key != "input_ids"} | {"inputs_embeds": embeds}
        with torch.no_grad():
            wanted = model(**call).logits
            with vidsieve.attach(model, random()):
                assert torch.equal(model(**call).logits, wanted)


def test_outputs_cover_the_shortened_prompt(model, inputs):
    with torch.no_grad(), vidsieve.attach(model, random()) as session:
        out = model(**inputs, output_hidden_states=True, use_cache=True)
        length = int((session.kept_positions >= 0).sum())
        assert session.kept_positions.shape == (1, length) and length < inputs["input_ids"].shape[1]
    assert out.logits.shape[1] == out.hidden_states[-1].shape[1] == length
    assert output_cache(out).get_seq_length() == length


def test_a_configuration_without_a_cache_is_heeded(model, inputs):
    with torch.no_grad(), vidsieve.attach(model, random()):
        wanted = model(**inputs).logits
        for config in (model.config, model.config.get_text_config()):
            config.use_cache = False
        out = model(**inputs)
        assert output_cache(out) is None and torch.allclose(out.logits, wanted, atol=1e-5)
        model.config.use_cache = True  # one of the two: the model may make a cache, which then is known to the session
        cache = output_cache(model(**inputs))
        if cache is not None:
            assert torch.allclose(step(model, cache), step(model, output_cache(model(**inputs, use_cache=True))))
